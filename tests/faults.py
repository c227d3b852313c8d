"""What schedules of faults have in common: which faults there are, and which a seed chooses."""

from __future__ import annotations

import random

FAULTS = ("kill", "kill_a_trainer", "stall", "slow", "partition", "drop", "duplicate", "corrupt", "late_join")


def chosen(seed: int, dice: random.Random, two: bool) -> list[str]:
    """The fault whose turn it is and, for `two`, one at random that comes with it."""
    first = FAULTS[seed % len(FAULTS)]
    return [first, dice.choice(FAULTS)] if two else [first]
