"""Products with quantized weights: the fastest way that each device has, and a plain one that all have.

Every kernel takes any number of rows, and what it makes of one does not depend on the others: sessions that are run
together get what each would get alone.
"""

from __future__ import annotations

import functools
import warnings
from typing import Any, Protocol

import torch
from torch.nn import functional

from swarm.quantization.weights import GROUP, QuantizedWeight, unpack_nibbles

_TINY = 1e-30  # a row of zeros is divided by this


class Kernel(Protocol):
    """Multiplies rows [R, K] by a fixed matrix: returns [R, N]."""

    nbytes: int
    dtype: torch.dtype  # of rows that it takes, if there is only one

    def __call__(self, rows: torch.Tensor) -> torch.Tensor: ...


class Shared:
    """What never changes: copies of a stage's modules have it in common."""

    nbytes = 0
    dtype = torch.float32

    def __deepcopy__(self, memo: dict[int, Any]) -> Any:
        return self


def kernel_for(weight: QuantizedWeight, device: torch.device) -> Kernel:
    """The fastest product with `weight` on `device`."""
    if device.type == "cpu":
        if weight.kind == "int8":
            return FbgemmInt8(weight) if FbgemmInt8.is_here() else Plain(weight, device)
        return CpuInt4(weight) if weight.shape[0] % 16 == 0 else Plain(weight, device)
    if device.type == "cuda" and weight.kind == "int8":
        return WeightOnlyInt8(weight, device)
    if device.type == "cuda" and TiledInt4.takes(weight) and torch.cuda.get_device_capability(device) >= (8, 0):
        return TiledInt4(weight, device)
    return Plain(weight, device)


class FbgemmInt8(Shared):
    """On x86: 8-bit integers on both sides, each row of the input with the scale and the zero point of its own range.

    A single row is FBGEMM's own dynamic product. That has one scale for all rows of a call, of which one with a large
    value would take the others' precision: several rows are quantized here, in the same way. Without VNNI, sums of two
    products are kept in 16 bits, which 8 bits on both sides overflow: so the input gets 7 there.
    """

    _LIFT = 4096.0  # what inputs are multiplied by: FBGEMM takes no scale below 6.1e-5, and small inputs want one

    @staticmethod
    @functools.cache
    def is_here() -> bool:
        """Whether torch has it on this machine."""
        return torch.backends.quantized.engine in ("x86", "fbgemm") and torch.cpu.get_capabilities().get("avx2", False)

    def __init__(self, weight: QuantizedWeight) -> None:
        scales = weight.scales.double() / self._LIFT
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # the type is to go from a later torch, with nothing as fast yet to follow
            values = torch._make_per_channel_quantized_tensor(
                weight.values, scales.clamp_min(_TINY), torch.zeros_like(scales).long(), 0
            )
        self._packed = torch.ops.quantized.linear_prepack(values, None)
        self._sums = self._product(torch.ones(1, weight.shape[1]))  # of the weights of each output
        self._reduced = not torch.cpu._is_vnni_supported()
        self._steps = 127 if self._reduced else 255
        self.nbytes = weight.nbytes

    def __call__(self, rows: torch.Tensor) -> torch.Tensor:
        rows = rows.float() * self._LIFT
        if len(rows) == 1:
            product: torch.Tensor = torch.ops.quantized.linear_dynamic(rows, self._packed, self._reduced)
            return product
        values, scale, zero = self._rounded(rows)
        return self._product(values).sub_(zero * self._sums).mul_(scale)

    def fine(self, rows: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """The product with rows in 16 bits: what 8 bits leave of each goes along as a row of its own.

        Also returns what the two leave, [R, K].
        """
        left = rows.float() * self._LIFT
        parts = []
        for _ in range(2):
            values, scale, zero = self._rounded(left)
            left = left - (values - zero) * scale
            parts.append((values, scale, zero))
        values, scale, zero = (torch.cat(each) for each in zip(*parts, strict=True))
        products = self._product(values).sub_(zero * self._sums).mul_(scale)
        return products[: len(rows)] + products[len(rows) :], left / self._LIFT

    def _rounded(self, rows: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Rows as whole numbers that fit into 8 bits; their scales and zero points, [R, 1]."""
        low = rows.amin(dim=-1, keepdim=True).clamp_max_(0).double()  # in double precision, as FBGEMM has it
        high = rows.amax(dim=-1, keepdim=True).clamp_min_(0).double()
        scale = ((high - low) / self._steps).clamp_min_(_TINY).float()
        zero = (-low / scale).round_().float()
        return (rows * (1 / scale)).round_().add_(zero).clamp_(0, self._steps), scale, zero

    def _product(self, values: torch.Tensor) -> torch.Tensor:
        """Of rows of whole numbers that fit into 8 bits."""
        product: torch.Tensor = torch.ops.quantized.linear_with_input_q_dq_qweight_dq_output_fp32(
            values, 1.0, 0, self._packed
        )
        return product


class CpuInt4(Shared):
    """On CPUs: 4-bit weights, unpacked in registers; rows in bfloat16, sums in float32."""

    _ROWS = 512  # of the weight that are packed at once; the packing's own blocks of at most 64 fit into it

    def __init__(self, weight: QuantizedWeight) -> None:
        pack = torch.ops.aten._convert_weight_to_int4pack_for_cpu  # takes 32 bits a value: a piece at a time
        pieces = torch.split(weight.values, self._ROWS)
        self._packed = torch.cat([pack(unpack_nibbles(piece).to(torch.int32), 1) for piece in pieces])
        self._scales = weight.scales.clone()
        self.nbytes = weight.nbytes

    def __call__(self, rows: torch.Tensor) -> torch.Tensor:
        rows = rows.to(torch.bfloat16)
        product: torch.Tensor = torch.ops.aten._weight_int4pack_mm_for_cpu(rows, self._packed, GROUP, self._scales)
        return product


class WeightOnlyInt8(Shared):
    """On CUDA: 8-bit weights, widened in registers."""

    def __init__(self, weight: QuantizedWeight, device: torch.device) -> None:
        self._values = weight.values.to(device)
        self._scales = weight.scales.to(device)
        self.nbytes = weight.nbytes

    def __call__(self, rows: torch.Tensor) -> torch.Tensor:
        product: torch.Tensor = torch.ops.aten._weight_int8pack_mm(rows, self._values, self._scales.to(rows.dtype))
        return product


class TiledInt4(Shared):
    """On CUDA from Ampere on: 4-bit weights in the tiles of the tensor cores; rows in bfloat16."""

    _TILES = 8  # along K, 16 columns each, that a thread block takes at once

    def __init__(self, weight: QuantizedWeight, device: torch.device) -> None:
        self._packed = torch.ops.aten._convert_weight_to_int4pack(weight.values.to(device), self._TILES)
        self._scales = weight.scales.to(device)
        self.nbytes = weight.nbytes

    @classmethod
    def takes(cls, weight: QuantizedWeight) -> bool:
        """Whether the matrix can be cut into such tiles."""
        rows, columns = weight.shape
        return weight.kind == "int4" and rows % 8 == 0 and columns % (16 * cls._TILES) == 0

    def __call__(self, rows: torch.Tensor) -> torch.Tensor:
        rows = rows.to(torch.bfloat16)
        product: torch.Tensor = torch.ops.aten._weight_int4pack_mm(rows, self._packed, GROUP, self._scales)
        return product


class Plain(Shared):
    """Anywhere: the weight is widened for each product. Saves memory and no time."""

    def __init__(self, weight: QuantizedWeight, device: torch.device) -> None:
        self._weight = QuantizedWeight(weight.kind, weight.values.to(device), weight.scales.to(device))
        self.nbytes = weight.nbytes

    def __call__(self, rows: torch.Tensor) -> torch.Tensor:
        return functional.linear(rows, self._weight.dequantized().to(rows.dtype))
