"""Attention of many short parts of a ragged batch in one call: padded to the longest, as a GPU likes it.

A loop over sessions costs a GPU a launch for each, in every block. Here the keys and values of all parts are gathered
with one index (made once for all blocks) into [parts, heads, longest, width], and a mask takes the padding out.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch.nn.functional import scaled_dot_product_attention

from swarm.batching.pool import Pool, Run

Inner = Callable[..., Any]
"""A family's own attention function."""


@dataclass(slots=True)
class Wanted:
    """One part: whose tokens in the batch, which slots it sees, and of these what each token sees."""

    tokens: Run
    runs: Sequence[Run]
    mask: torch.Tensor | None  # [count, N] of bool, None where all are seen


class Padded:
    """P parts, of at most N tokens and L slots each.

    Args:
        wanted: the parts, in the order of their tokens.
        device: where the attention runs.
    """

    def __init__(self, wanted: Sequence[Wanted], device: torch.device) -> None:
        slots = [[slot for run in each.runs for slot in range(*run)] for each in wanted]
        counts = [end - start for start, end in (each.tokens for each in wanted)]
        parts, longest, most = len(wanted), max(map(len, slots)), max(counts)
        self.shape = parts, most, longest
        asked = torch.zeros(parts, most, dtype=torch.int64)
        seen = torch.zeros(parts, longest, dtype=torch.int64)
        mask = torch.zeros(parts, 1, most, longest, dtype=torch.bool)
        mask[..., 0] = True  # what is only padding sees something, or there would be no number for it
        for index, (each, own, count) in enumerate(zip(wanted, slots, counts, strict=True)):
            asked[index, :count] = torch.arange(*each.tokens)
            seen[index, : len(own)] = torch.tensor(own)
            mask[index, 0, :count, : len(own)] = True if each.mask is None else each.mask
            mask[index, 0, :count, len(own) :] = False
        real = torch.arange(most)[None, :] < torch.tensor(counts)[:, None]
        self.tokens = asked[real].to(device)  # of the batch that this is for, in its order
        self._asked, self._seen, self._mask = asked.flatten().to(device), seen.flatten().to(device), mask.to(device)
        self._real = real.flatten().nonzero()[:, 0].to(device)
        self._added: torch.Tensor | None = None

    def attend(
        self,
        query: torch.Tensor,
        pool: Pool,
        layer: int,
        scaling: float | None,
        inner: Callable[[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor] | None,
    ) -> torch.Tensor:
        """What comes of the parts' tokens.

        Args:
            query: [1, heads, T, width], of the whole batch.
            pool, layer: where the keys and values are.
            scaling: of the scores.
            inner: the family's own function of (query, keys, values, added mask), None for torch's attention.

        Returns:
            [tokens, heads, width], for `self.tokens`.
        """
        parts, most, longest = self.shape
        heads, width = query.shape[1], query.shape[3]
        keys, values = pool.gather(layer, self._seen, query.dtype)
        keys, values = (kept.reshape(len(kept), parts, longest, -1).transpose(0, 1) for kept in (keys, values))
        asked = query[0].index_select(1, self._asked).reshape(heads, parts, most, width).transpose(0, 1)
        if inner is not None:
            output = inner(asked, keys, values, self._bias(query.dtype, 1))  # [P, N, heads, width]
        else:
            groups = heads // keys.shape[1]
            packed = asked.reshape(parts, keys.shape[1], groups * most, width)
            found = scaled_dot_product_attention(
                packed, keys, values, attn_mask=self._bias(query.dtype, groups), scale=scaling
            )
            output = found.reshape(parts, heads, most, values.shape[3]).transpose(1, 2)
        return output.flatten(0, 1).index_select(0, self._real)

    def _bias(self, dtype: torch.dtype, groups: int) -> torch.Tensor:
        """The mask as what is added to the scores, [P, 1, groups * N, L]: made once."""
        if self._added is None or self._added.shape[2] != groups * self.shape[1]:
            added = torch.zeros(self._mask.shape, dtype=dtype, device=self._mask.device)
            self._added = added.masked_fill_(~self._mask, torch.finfo(dtype).min).repeat(1, 1, groups, 1)
        return self._added
