"""Attention of single tokens, each to its own past, with nothing between torch and the keys and values where they are.

What a token sees may lie in several places: after a beginning that it shares with others, or a beam's. To gather that
for every token would copy all of it, so each place is attended to where it is, and the results are put together by how
much weight each place had: Dao et al. 2023, "FlashDecoding".
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch.nn.functional import scaled_dot_product_attention

from swarm.batching.pool import Run

WORTH = 256  # positions: where runs are shorter on average, gathering them is faster


def attend(
    query: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    seen: Sequence[Sequence[Run]],
    scaling: float | None,
) -> torch.Tensor:
    """What comes of T tokens.

    Args:
        query: [1, heads, T, width]
        keys, values: [1, key heads, slots, width], of everybody.
        seen: the slots that each token sees.
        scaling: of the scores.

    Returns:
        [1, T, heads, width]
    """
    _, heads, tokens, width = query.shape
    groups = heads // keys.shape[1]
    # Query heads that share a key head are put one below another, as if they were positions: nothing is copied.
    asked = query.transpose(1, 2).reshape(tokens, keys.shape[1], groups, width).chunk(tokens)
    found = [_one(each, keys, values, runs, scaling) for each, runs in zip(asked, seen, strict=True)]
    return (found[0] if tokens == 1 else torch.cat(found)).view(1, tokens, heads, values.shape[3])


def _one(
    query: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, runs: Sequence[Run], scaling: float | None
) -> torch.Tensor:
    """[1, key heads, groups, width] for a query of that shape."""
    pieces = [(_part(keys, run, query.dtype), _part(values, run, query.dtype)) for run in runs]
    if len(pieces) > 1 and (keys.shape[3] != values.shape[3] or sum(b - a for a, b in runs) < WORTH * len(runs)):
        pieces = [(torch.cat([each for each, _ in pieces], 2), torch.cat([each for _, each in pieces], 2))]
    if len(pieces) == 1:
        return scaled_dot_product_attention(query, *pieces[0], scale=scaling)
    flash = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
    outputs, weights = zip(*(flash(query, *piece, scale=scaling) for piece in pieces), strict=True)
    shares = torch.stack(weights).softmax(0).unsqueeze(-1)  # from the logarithms of the sums of exponents
    output: torch.Tensor = (torch.stack(outputs) * shares).sum(0).to(query.dtype)
    return output


def _part(kept: torch.Tensor, run: Run, dtype: torch.dtype) -> torch.Tensor:
    part = kept.narrow(2, run[0], run[1] - run[0])
    return part if part.dtype == dtype else part.to(dtype)
