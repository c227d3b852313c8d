"""A model of whole numbers in the place of a Transformer: what each position puts out depends on all before it.

It stands behind the same interface as `swarm.model.StageModel`, takes microseconds, and is exact however its steps are
cut, so one wrong, missing or doubled position anywhere in a chain of stages changes every token after it.
"""

from __future__ import annotations

from typing import Any

import torch

from swarm.types import Span

HIDDEN = 4
VOCABULARY = 24
_PRIME = 4093  # whole numbers below it are exact in fp32


class ArithmeticCache:
    """The sums of what each block has seen, up to and including each position."""

    is_stateful = False

    def __init__(self, blocks: int) -> None:
        self.length = 0
        self.sums: list[torch.Tensor | None] = [None] * blocks  # [B, L, H] each

    def crop(self, count: int) -> None:
        """Forget the last `-count` positions."""
        self.sums = [None if each is None else each[:, :count] for each in self.sums]

    def reorder_cache(self, rows: torch.Tensor) -> None:
        self.sums = [None if each is None else each[rows] for each in self.sums]

    def nbytes(self) -> int:
        return sum(0 if each is None else each.nbytes for each in self.sums)


class ArithmeticModel:
    """The blocks of a span."""

    device = torch.device("cpu")
    dtype = torch.float32
    hidden_size = HIDDEN
    unbatched = "whole numbers are not attended to"

    def __init__(self, span: Span) -> None:
        self.span = span

    def part(self, span: Span) -> ArithmeticModel:
        return ArithmeticModel(span)

    def new_cache(self) -> ArithmeticCache:
        return ArithmeticCache(len(self.span))

    def forward(
        self,
        hidden: torch.Tensor,
        *,
        position: int,
        cache: ArithmeticCache,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """[B, N, H] to [B, N, H]."""
        count = hidden.shape[1]
        ids = torch.arange(position, position + count) if position_ids is None else position_ids
        places = (ids % 97 + 3).reshape(-1, count, 1)  # [1 or B, N, 1]
        seen = torch.ones(1, count, 1, dtype=torch.int64)
        if attention_mask is not None:
            seen = attention_mask[:, -count:].to(torch.int64).unsqueeze(2)
        values = hidden.to(torch.int64)
        for index, block in enumerate(self.span):
            values = self._block(block, values, places, seen, index, cache)
        cache.length = position + count
        return values.to(self.dtype)

    def _block(
        self,
        block: int,
        values: torch.Tensor,
        places: torch.Tensor,
        seen: torch.Tensor,
        index: int,
        cache: ArithmeticCache,
    ) -> torch.Tensor:
        sums = torch.cumsum(values * places * seen % _PRIME, dim=1)
        before = cache.sums[index]
        if before is not None and before.shape[1]:
            sums = sums + before[:, -1:]
        sums = sums % _PRIME
        cache.sums[index] = sums if before is None else torch.cat([before, sums], dim=1)
        return (values * (block + 2) + sums.roll(1, dims=2) * (3 * block + 5) + places) % _PRIME


_TABLE = (torch.arange(VOCABULARY * HIDDEN).reshape(VOCABULARY, HIDDEN) * 2654435761 % 4001).to(torch.float32)
_HEAD = torch.arange(HIDDEN * VOCABULARY).reshape(HIDDEN, VOCABULARY) * 40503 % 3989


class ArithmeticEnds:
    """The embeddings and the head."""

    vocabulary = VOCABULARY

    def embedded(self, ids: torch.Tensor) -> torch.Tensor:
        """[B, N] token ids as the hidden states that go into the first block, [B, N, H]."""
        return _TABLE[ids]

    def scores(self, hidden: torch.Tensor) -> torch.Tensor:
        """[B, N, H] as the logarithms of probabilities of the next token, [B, N, V]."""
        values: Any = hidden.to(torch.int64) @ _HEAD % _PRIME
        return torch.log_softmax(values.to(torch.float64) / _PRIME * 6.0, dim=-1)


ARITHMETIC = ArithmeticEnds()
