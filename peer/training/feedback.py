"""Error feedback: what a lossy code left out of one round is added to the next (Karimireddy et al. 2019)."""

from __future__ import annotations

import torch

from swarm.types import PeerId


class Feedback:
    """What was left out of one vector. Two more fp32 vectors of memory, where the code is lossy enough to need it."""

    def __init__(self, length: int) -> None:
        self._kept = torch.zeros(length)
        self._pending = torch.zeros(length)
        self._parts: dict[PeerId, range] = {}

    def begin(self, parts: dict[PeerId, range]) -> None:
        """An attempt begins. Once parts change hands, what was left out of a mean and of a sum cannot be told apart."""
        self._pending.zero_()
        if parts != self._parts:
            self._kept.zero_()
            self._parts = parts

    def added(self, start: int, values: torch.Tensor) -> torch.Tensor:
        """`values` and what was left out of them the last time."""
        return values + self._kept[start : start + len(values)]

    def left_out(self, start: int, remainder: torch.Tensor) -> None:
        """What the code left out this time; it counts once the round is committed."""
        self._pending[start : start + len(remainder)] = remainder

    def commit(self) -> None:
        """The attempt was committed."""
        self._kept, self._pending = self._pending, self._kept
