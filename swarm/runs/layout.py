"""Where the weights of a stage lie in one flat vector: the order that all replicas of the stage share.

Gradients, weights and both moments of the optimizer are each one vector, so that averaging, stepping, hashing and
streaming need not know what a weight is. Weights that the other end of the chain holds too lie at the end, in an order
that both ends find by themselves.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch

STAGE = "stage"  # the group of all that only the replicas of one stage hold
TIED = "tied"  # the group of a weight that the first and the last stage share


@dataclass(frozen=True, slots=True)
class Entry:
    """One weight: what the whole model calls it, its shape, and where it lies."""

    name: str
    shape: tuple[int, ...]
    group: str
    start: int

    @property
    def place(self) -> slice:
        return slice(self.start, self.start + math.prod(self.shape))

    @property
    def decays(self) -> bool:
        """Whether weight decay acts on it: on matrices, not on biases and norms."""
        return len(self.shape) > 1


class Layout:
    """The weights of one stage, in their order.

    Attributes:
        size: how many numbers they are.
    """

    def __init__(self, shapes: Mapping[str, Sequence[int]], tied: Mapping[str, str]) -> None:
        """`shapes` of the weights by name; `tied` as `TrainableStage.tied`."""
        entries, start = [], 0
        for name in sorted(shapes, key=lambda name: (name in tied, len(shapes[name]) < 2, tied.get(name, name))):
            entry = Entry(name, tuple(shapes[name]), TIED if name in tied else STAGE, start)
            entries.append(entry)
            start = entry.place.stop
        self.entries = tuple(entries)
        self.size = start

    @property
    def groups(self) -> dict[str, slice]:
        """Where each group lies."""
        return {group: slice(run[0].start, run[-1].place.stop) for group, _, run in self._runs(by_decay=False)}

    @property
    def decaying(self) -> list[tuple[slice, bool]]:
        """The longest ranges whose weights all decay or all do not."""
        return [(slice(run[0].start, run[-1].place.stop), decays) for _, decays, run in self._runs(by_decay=True)]

    def views(self, flat: torch.Tensor) -> dict[str, torch.Tensor]:
        """Each weight's part of a vector [size], in its own shape."""
        return {entry.name: flat[entry.place].view(entry.shape) for entry in self.entries}

    def _runs(self, by_decay: bool) -> Iterator[tuple[str, bool, list[Entry]]]:
        run: list[Entry] = []
        for entry in self.entries:
            same = run and run[0].group == entry.group and (run[0].decays == entry.decays or not by_decay)
            if run and not same:
                yield run[0].group, run[0].decays, run
                run = []
            run.append(entry)
        if run:
            yield run[0].group, run[0].decays, run

    def __repr__(self) -> str:
        return f"<Layout weights={len(self.entries)} size={self.size}>"
