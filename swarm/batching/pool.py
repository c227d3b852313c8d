"""Keys and values of many sessions side by side: every block has one tensor for either, cut into numbered slots.

A slot holds one position of one row. Which slots are whose is decided elsewhere; the more of a row's slots follow one
another, the more of what is read here is a view.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

Run = tuple[int, int]
"""Slots that follow one another: the first, and the one after the last."""

Kept = tuple[torch.Tensor, torch.Tensor]
"""Keys and values of some slots of one block, [heads, N, width] each."""


class Pool:
    """Room for `slots` positions in every block. What memory it takes grows with the slots that were ever written.

    Args:
        slots: how many.
        device: where the tensors are.
        dtype: of what is kept; None for that of the first keys that come.
    """

    def __init__(self, slots: int, device: str | torch.device = "cpu", dtype: torch.dtype | None = None) -> None:
        self.slots = slots
        self.device = torch.device(device)
        self._dtype = dtype
        self._layers: dict[int, tuple[torch.Tensor, torch.Tensor]] = {}

    def bytes_per_slot(self) -> int:
        """What one position takes in all the blocks that were written to so far."""
        return sum(kept.nbytes for layer in self._layers.values() for kept in layer) // max(self.slots, 1)

    def write(self, layer: int, where: slice | torch.Tensor, keys: torch.Tensor, values: torch.Tensor) -> None:
        """Keep T positions of a block.

        Args:
            layer: which block.
            where: their slots, as a slice or as [T] of int64.
            keys: [1, heads, T, width]
            values: the same, with a width of its own.
        """
        kept = self._layers.get(layer) or self._make(layer, keys, values)
        for store, new in zip(kept, (keys, values), strict=True):
            if isinstance(where, slice):
                store[:, where] = new[0]
            else:
                store.index_copy_(1, where, new[0].to(store.dtype))

    def read(self, layer: int, runs: Sequence[Run], dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
        """Keys and values [1, heads, N, width] of the slots in `runs`: views where that is a single run."""
        keys, values = self._layers[layer]
        return _taken(keys, runs, dtype), _taken(values, runs, dtype)

    def stores(self, layer: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Keys and values [1, heads, slots, width] of all slots of a block, as they are kept."""
        keys, values = self._layers[layer]
        return keys.unsqueeze(0), values.unsqueeze(0)

    def gather(self, layer: int, slots: torch.Tensor, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
        """Keys and values [heads, N, width] of these slots, [N] of int64: copied."""
        keys, values = self._layers[layer]
        return keys.index_select(1, slots).to(dtype), values.index_select(1, slots).to(dtype)

    def copy(self, pairs: Sequence[tuple[Run, int]]) -> None:
        """Let what is in each run of slots also be in those from the given slot on."""
        for kept in (kept for layer in self._layers.values() for kept in layer):
            for (start, end), target in pairs:
                kept[:, target : target + end - start] = kept[:, start:end]

    def take_out(self, runs: Sequence[Run]) -> list[Kept]:
        """What the slots in `runs` hold in every block, copied to host memory."""
        return [
            (
                torch.cat([keys[:, start:end] for start, end in runs], 1).to("cpu"),
                torch.cat([values[:, start:end] for start, end in runs], 1).to("cpu"),
            )
            for _, (keys, values) in sorted(self._layers.items())
        ]

    def put_back(self, kept: Sequence[Kept], runs: Sequence[Run]) -> None:
        """Undo `take_out`, into these slots."""
        for (_, stores), held in zip(sorted(self._layers.items()), kept, strict=True):
            for store, tensor in zip(stores, held, strict=True):
                offset = 0
                for start, end in runs:
                    store[:, start:end] = tensor[:, offset : offset + end - start].to(store.device)
                    offset += end - start

    def _make(self, layer: int, keys: torch.Tensor, values: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """The system gives memory to a page of it only when that is first written to."""
        keys_, values_ = (
            torch.empty(new.shape[1], self.slots, new.shape[3], dtype=self._dtype or new.dtype, device=self.device)
            for new in (keys, values)
        )
        self._layers[layer] = keys_, values_
        return keys_, values_

    def __repr__(self) -> str:
        return f"<Pool slots={self.slots} blocks={len(self._layers)} bytes_per_slot={self.bytes_per_slot()}>"


def _taken(kept: torch.Tensor, runs: Sequence[Run], dtype: torch.dtype) -> torch.Tensor:
    if len(runs) == 1:
        start, end = runs[0]
        found = kept.narrow(1, start, end - start)
    else:
        found = torch.cat([kept.narrow(1, start, end - start) for start, end in runs], 1)
    return found.to(dtype).unsqueeze(0)
