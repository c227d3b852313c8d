"""The largest of a head's scores, for a third of what all of them cost.

For each token a client multiplies by its head [V, K], by far the largest matrix that it holds, and a product with one
row takes as long as the matrix takes to be read. Greedy decoding asks only which score is the largest. So they are
computed from a copy in 8 bits first, each with a bound of how wrong it is: what rounding took of a row of the matrix
moves its score by no more than the two norms multiplied (Cauchy and Schwarz). Only rows that may be the largest by
these bounds are multiplied in full. Of SmolLM2's 49152 that was 8.5 in the mean, and 141 at most, over 800 tokens of
English; it took 2.4 ms instead of 5.5. Cf. Teflioudi et al. 2015, "LEMP", where bounds spare most of the rows, too.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import TypeAlias

import torch

from swarm.quantization.kernels import FbgemmInt8, Kernel, Shared
from swarm.quantization.weights import quantize

Take: TypeAlias = Callable[[torch.Tensor], torch.Tensor]
"""Rows [n, K] of the matrix, by their numbers [n]."""

SMALLEST = 1 << 22  # weights of a matrix: what is smaller is read as fast as the bounds are computed
_FEW = 8  # rows of a product, at most: of more, each costs little
_WORTH = 8  # so many times fewer rows than the matrix has may be multiplied in full
_PIECE = 1024  # rows of the matrix that are looked at together, while they are near the processor

_largest_alone: ContextVar[bool] = ContextVar("largest_alone", default=False)


@contextmanager
def largest_alone() -> Iterator[None]:
    """Whoever computes scores in here looks for the largest, and takes the others for what they about are."""
    token = _largest_alone.set(True)
    try:
        yield
    finally:
        _largest_alone.reset(token)


def screens(weight: torch.Tensor) -> bool:
    """Whether it is worth while for such a matrix, on this machine; not for one that holds what is no number."""
    return weight.numel() >= SMALLEST and FbgemmInt8.is_here() and bool(weight.sum().isfinite())


class Screened(Shared):
    """A matrix [V, K] whose largest products can be had for less.

    Args:
        exact: multiplies by it.
        weight: itself, which is not kept.
        take: gives some of its rows.
    """

    def __init__(self, exact: Kernel, weight: torch.Tensor, take: Take) -> None:
        self._exact = exact
        self._take = take
        self._rounding = torch.finfo(weight.dtype).eps
        rounded = quantize(weight, "int8")
        self._rough = FbgemmInt8(rounded)
        self._lost, self._norms = _bounds(weight, rounded.values, rounded.scales)
        self.nbytes, self.dtype = exact.nbytes + rounded.nbytes, exact.dtype

    def __call__(self, rows: torch.Tensor) -> torch.Tensor:
        if not _largest_alone.get() or len(rows) > _FEW:
            return self._exact(rows)
        scores, left = self._rough.fine(rows)
        if not all(map(self._settle, rows, scores, left)):
            return self._exact(rows)
        return scores

    def _settle(self, row: torch.Tensor, scores: torch.Tensor, left: torch.Tensor) -> bool:
        """Put what is exact in the places of those of the `scores` [V] that may be the largest; whether they are few.

        Those that stay are smaller than the largest even when both are rounded to the matrix's type. Where something
        is not a number, no comparison holds, and none are found.
        """
        bounds = self._lost * row.float().norm() + self._norms * left.norm()
        least = (scores - bounds).max()
        least -= 2 * self._rounding * least.abs()
        possible = (scores + bounds >= least).nonzero()[:, 0]
        if not 0 < len(possible) <= len(scores) // _WORTH:
            return False
        scores[possible] = (self._take(possible).double() @ row.double()).float()
        return True


def _bounds(weight: torch.Tensor, values: torch.Tensor, scales: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Of each row [V]: how far a score may be off, for an input of norm 1, and the norm.

    The former has room for sums in single precision, whose error grows with their length at worst (Higham 2002, section
    3.1): of the whole product, and a few times of this one's, where numbers are twice as large and taken apart again.
    """
    lost, norms = [], []
    for piece, value, scale in zip(*(torch.split(each, _PIECE) for each in (weight, values, scales)), strict=True):
        piece = piece.float()
        norms.append(piece.norm(dim=1))
        lost.append((value * scale[:, None]).sub_(piece).norm(dim=1))
    every, sums = torch.cat(norms), 8 * (weight.shape[1] + 4) * torch.finfo(torch.float32).eps
    return torch.cat(lost) + sums * every, every
