"""Weights in few bits: rounded, multiplied by, put in a model's place, stored and loaded."""
