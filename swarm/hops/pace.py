"""How long a session's steps take, and how long to wait for one before asking. Pure."""

from __future__ import annotations

import statistics
from collections import deque

FLOOR = 0.5  # seconds of patience, at least
CEILING = 30.0  # and at most, for one token
FIRST = 2.0  # before anything was measured
_MULTIPLE = 8.0  # of the recent time of a step
_RECENT = 16  # steps
_FIRST_PER_TOKEN = 0.02  # seconds, before anything was measured
_LIMIT = 10.0  # times the patience with a step that a hop may work on it where others could


class Pace:
    """Measured step times of one session."""

    def __init__(self) -> None:
        self._single: deque[float] = deque(maxlen=_RECENT)  # seconds of steps of few tokens
        self._per_token = _FIRST_PER_TOKEN  # seconds, of long steps

    def took(self, seconds: float, tokens: int) -> None:
        """A step of so many tokens (rows x positions) was answered."""
        self._single.append(seconds if tokens <= 16 else min(seconds, CEILING))
        if tokens > 1:
            self._per_token = seconds / tokens

    def patience(self, tokens: int) -> float:
        """Seconds to wait for a step before its hops are asked: longer for many tokens."""
        if not self._single:
            return FIRST + self._per_token * tokens
        usual = min(max(FLOOR, _MULTIPLE * statistics.median(self._single)), CEILING)
        return usual + 2.0 * self._per_token * (tokens - 1)

    def limit(self, tokens: int) -> float:
        """Seconds after which even a hop that says that it works on the step has failed, if there are others."""
        return _LIMIT * self.patience(tokens)

    def longer(self, patience: float) -> float:
        """How long to wait once more where the hops say that they work on it."""
        return min(2.0 * patience, max(CEILING, patience))
