"""Weights in few bits, rounded, stored and loaded; and in all their bits, laid out for the processor."""
