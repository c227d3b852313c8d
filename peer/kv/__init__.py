"""Whose slots of the KV pool are whose, and who gets some next."""
