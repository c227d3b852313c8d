"""What the rounds need of a stage in training: its sums, its step, its state. Called from the compute thread only."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Protocol

import torch

from swarm.runs.layout import STAGE, TIED

__all__ = ["STAGE", "TIED", "Replica"]


class Replica(Protocol):
    """Parameters, optimizer and accumulated gradient of one stage."""

    round: int
    """The round whose gradient is being summed, -1 as long as nothing was restored or loaded."""

    @property
    def steps(self) -> int:
        """How many steps of the optimizer its state has had: skipped rounds have none."""

    def saved(self) -> Sequence[int]:
        """The rounds at whose beginning it can start now: those of its checkpoints, and 0 for the run's seed."""

    def restore(self, round_: int) -> None:
        """Start at the beginning of one of the `saved` rounds. Raises `ModelCorrupt`."""

    def sums(self) -> Mapping[str, torch.Tensor]:
        """By group (`STAGE`, `TIED`), the sum over samples of this round's gradient: flat, fp32, on the CPU.

        Views that the next step overwrites; they are not written to.
        """

    def void(self, round_: int) -> None:
        """Forget the sums of a round: this one, or the next where that is summed ahead. Of others, there are none."""

    def commit(self, mean: Mapping[str, torch.Tensor], factor: float) -> None:
        """One optimizer step with the mean gradient (like `sums`) times `factor`; then `round` + 1.

        Sums are zero then, or what was summed ahead.
        """

    def skip(self) -> None:
        """The round is over without a step: `round` + 1, and sums as after one."""

    def state(self) -> Iterable[tuple[str, torch.Tensor]]:
        """Parameters, optimizer state and whatever else the next step depends on, by name, in an order that is fixed.

        Views that the next step overwrites.
        """

    def load(self, round_: int, state: Mapping[str, torch.Tensor]) -> None:
        """Take over what another replica's `state()` was at the beginning of `round_`. Raises `BadTensor`."""
