"""Shoal: the protocol, and everything that a client needs."""
