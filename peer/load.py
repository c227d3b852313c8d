"""How busy a stage is of late, from how long its steps take. Pure: the clock is passed in.

A step that takes three times as long as it would alone has waited as long as two others take: the queue, in steps, is
what the time exceeds the time alone, as a multiple of it. So it counts what others really cost, be they run one after
another or together.
"""

from __future__ import annotations

import math

MEMORY_SECONDS = 10.0  # in which what was seen counts for 1/e of what it did
_NOISE = 0.25  # of a measurement: how far two of them differ anyway
_LEARNING = 0.05  # how fast the time of a step that is alone follows what is measured


class Load:
    """What is seen of steps of one token.

    Attributes:
        seconds_per_block: one of them alone, through one block.
    """

    def __init__(self, seconds_per_block: float) -> None:
        self.seconds_per_block = seconds_per_block
        self._queue = 0.0
        self._seen = 0.0

    def took(self, seconds: float, blocks: int, alone: bool, now: float) -> None:
        """A step through so many blocks took `seconds` from its arrival on; `alone` if no other was there meanwhile."""
        usual = self.seconds_per_block * blocks
        if alone:
            self.seconds_per_block += _LEARNING * (seconds / blocks - self.seconds_per_block)
        waited = 0.0 if alone or usual <= 0 else max(0.0, seconds / usual - 1.0)
        kept = self._kept(now)
        self._queue, self._seen = kept * self._queue + (1.0 - kept) * waited, now

    def measured(self, seconds_per_block: float) -> bool:
        """One alone was measured while nobody used the stage; whether that is news, and not the noise of measuring."""
        news = abs(seconds_per_block - self.seconds_per_block) > _NOISE * self.seconds_per_block
        if news:
            self.seconds_per_block = seconds_per_block
        return news

    def queue(self, now: float) -> float:
        """Steps that others waited for, on average of late; it fades where nothing comes."""
        return self._kept(now) * self._queue

    def _kept(self, now: float) -> float:
        return math.exp(-max(0.0, now - self._seen) / MEMORY_SECONDS)

    def __repr__(self) -> str:
        return f"<Load queue={self._queue:.2f} block={1000 * self.seconds_per_block:.2f}ms>"
