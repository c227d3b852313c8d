"""Thousands of simulated peers, placed, routed to and located by the code that real ones run."""
