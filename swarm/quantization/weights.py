"""Weights in few bits: how a matrix is rounded, and what it is kept as, whatever multiplies by it later.

- int8: one scale per output row, symmetric. `weight[n, k] = values[n, k] * scales[n]`.
- int4: a scale and a zero point per `GROUP` columns of a row. Two values a byte, the even column in the high half:
  `weight[n, k] = (value - 8) * scale + zero`.

The range of an int4 group is not simply that of its values: a little less rounds the many better and clips the few.
Several ranges are tried, the best (least squares) is refined by fitting scale and zero to the values that it gave,
as llama.cpp's `make_qkx2_quants` does.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal, TypeAlias, get_args

import torch

from swarm.errors import ModelCorrupt

Kind: TypeAlias = Literal["int8", "int4"]
KINDS: tuple[Kind, ...] = get_args(Kind)

GROUP = 32  # columns that share a scale in int4
_RANGES = (1.0, 0.92, 0.84)  # of a group's values, that are tried
_MIDDLE, _LARGEST = 8, 15  # of 4 bits
_PIECE = 1 << 16  # weights that are rounded at once: bounds what is needed beside them


@dataclass(frozen=True, slots=True)
class QuantizedWeight:
    """A matrix [N, K] in few bits."""

    kind: Kind
    values: torch.Tensor  # int8 [N, K], or uint8 [N, K / 2]
    scales: torch.Tensor  # float32 [N], or bfloat16 [K / GROUP, N, 2]: scale and zero

    @property
    def shape(self) -> tuple[int, int]:
        """N, K."""
        rows, columns = self.values.shape
        return rows, columns if self.kind == "int8" else 2 * columns

    @property
    def nbytes(self) -> int:
        """What it takes."""
        return self.values.nbytes + self.scales.nbytes

    def dequantized(self) -> torch.Tensor:
        """[N, K] in float32."""
        if self.kind == "int8":
            return self.values.float() * self.scales[:, None]
        rows, columns = self.shape
        scale, zero = self.scales.float().permute(1, 0, 2).unbind(-1)
        values = unpack_nibbles(self.values).float().view(rows, -1, GROUP) - _MIDDLE
        return (values * scale[..., None] + zero[..., None]).view(rows, columns)


def fitting(kind: Kind, columns: int) -> Kind:
    """`kind`, or int8 where a row of so many columns cannot be cut into groups."""
    return "int8" if columns % GROUP else kind


def quantize(weight: torch.Tensor, kind: Kind) -> QuantizedWeight:
    """The matrix [N, K] in few bits, on its device.

    Raises:
        ModelCorrupt: it holds what is no finite number.
    """
    kind = fitting(kind, weight.shape[1])
    rounded = [_int8(piece) if kind == "int8" else _int4(piece) for piece in _pieces(weight)]
    values, scales = zip(*rounded, strict=True)
    return QuantizedWeight(kind, torch.cat(values), torch.cat(scales, dim=0 if kind == "int8" else 1))


def joined(weights: list[QuantizedWeight]) -> QuantizedWeight:
    """Matrices with the same K and kind, one below the other."""
    kind = weights[0].kind
    scales = torch.cat([weight.scales for weight in weights], dim=0 if kind == "int8" else 1)
    return QuantizedWeight(kind, torch.cat([weight.values for weight in weights]), scales)


def _pieces(weight: torch.Tensor) -> Iterator[torch.Tensor]:
    for piece in torch.split(weight.detach(), max(1, _PIECE // weight.shape[1])):
        if not torch.isfinite(piece).all():
            raise ModelCorrupt("weights that are not finite numbers cannot be quantized")
        yield piece.float()


def _int8(weight: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    scales = weight.abs().amax(dim=1) / 127
    divisor = scales.clamp_min(torch.finfo(torch.float32).tiny)
    return (weight / divisor[:, None]).round_().clamp_(-127, 127).to(torch.int8), scales


def _int4(weight: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    groups = weight.view(len(weight), -1, GROUP)
    low, high = torch.aminmax(groups, dim=-1, keepdim=True)
    best = _Rounded.to(groups, high - low, low)
    for share in _RANGES[1:]:
        best = best.better(_Rounded.to(groups, share * (high - low), share * low))
    best = best.better(best.refined(groups))
    scales = torch.cat([best.scale, best.zero], dim=-1).to(torch.bfloat16)
    return pack_nibbles(best.values.view(len(weight), -1)), scales.permute(1, 0, 2).contiguous()


@dataclass(slots=True)
class _Rounded:
    """Groups of 4-bit values, [N, groups, GROUP], and one way to read them."""

    values: torch.Tensor
    scale: torch.Tensor  # [N, groups, 1], like zero and loss
    zero: torch.Tensor
    loss: torch.Tensor

    @classmethod
    def to(cls, groups: torch.Tensor, width: torch.Tensor, low: torch.Tensor) -> _Rounded:
        """Rounded to sixteen steps from `low` to `low + width`."""
        scale = _as_kept(width / _LARGEST)
        return cls.with_scale(groups, scale, _as_kept(low + _MIDDLE * scale))

    @classmethod
    def with_scale(cls, groups: torch.Tensor, scale: torch.Tensor, zero: torch.Tensor) -> _Rounded:
        divisor = scale.where(scale != 0, torch.ones_like(scale))
        steps = ((groups - zero) / divisor).round_().clamp_(-_MIDDLE, _LARGEST - _MIDDLE)
        loss = (steps * scale + zero - groups).square_().sum(dim=-1, keepdim=True)
        return cls((steps + _MIDDLE).to(torch.uint8), scale, zero, loss)

    def refined(self, groups: torch.Tensor) -> _Rounded:
        """Rounded again, with the scale and the zero that fit these values best."""
        steps = self.values.float() - _MIDDLE
        mean_step, mean = steps.mean(dim=-1, keepdim=True), groups.mean(dim=-1, keepdim=True)
        steps -= mean_step
        spread = steps.square().sum(dim=-1, keepdim=True)
        scale = (steps * groups).sum(dim=-1, keepdim=True) / spread.clamp_min(1e-6)
        scale = _as_kept(torch.where(spread > 0, scale, self.scale))
        return self.with_scale(groups, scale, _as_kept(mean - scale * mean_step))

    def better(self, other: _Rounded) -> _Rounded:
        """Group by group, the one that loses less."""
        wins = other.loss < self.loss
        return _Rounded(
            torch.where(wins, other.values, self.values),
            torch.where(wins, other.scale, self.scale),
            torch.where(wins, other.zero, self.zero),
            torch.minimum(other.loss, self.loss),
        )


def _as_kept(scale: torch.Tensor) -> torch.Tensor:
    """What is left of a scale once it is kept: the values are rounded for that."""
    return scale.to(torch.bfloat16).float()


def pack_nibbles(values: torch.Tensor) -> torch.Tensor:
    """uint8 [N, K] below 16 to uint8 [N, K / 2]."""
    return values[:, ::2] << 4 | values[:, 1::2]


def unpack_nibbles(packed: torch.Tensor) -> torch.Tensor:
    """What `pack_nibbles` was given."""
    return torch.stack((packed >> 4, packed & 15), dim=-1).view(len(packed), -1)
