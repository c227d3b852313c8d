"""Weights in all their bits, but laid out as the processor multiplies by them fastest.

A product of few rows is the time in which the matrix is read. torch's own linear layer has the library below it
re-arrange the whole matrix before each product of several rows; here that is done once, and the matrix as it was is
given back. The sums are the same, in another order. Measured for the matrices of SmolLM2-135M, with one thread on an
EPYC with AVX-512, in microseconds for 1, 4, 8 and 128 rows, the matrix not yet near the processor:

| | `nn.Linear` | packed by oneDNN | transposed |
| --- | --- | --- | --- |
| float32, 3072 x 576 | 592, 790, 933, 5041 | 429, 348, 471, 4182 | 314, 634, 754, 4903 |
| float32, 960 x 576 | 192, 235, 276, 1528 | 157, 125, 166, 1321 | 136, 182, 217, 1352 |
| float32, 576 x 1536 | 232, 330, 391, 2398 | 231, 183, 246, 2094 | 274, 287, 339, 2187 |
| bfloat16, 3072 x 576 | 409, 426, 501, 2410 | 162, 178, 238, 2177 | 391, 448, 492, 2463 |
| bfloat16, 576 x 1536 | 174, 172, 206, 1145 | 98, 99, 130, 1065 | 197, 216, 249, 1220 |
| float32, 49152 x 576 | 9517, 16239, 18411, 95483 | 6672, 5283, 7469, 66231 | 4943, 10572, 12792, 75648 |
| bfloat16, 49152 x 576 | 6330, 6988, 7950, 38496 | 3537, 2920, 3949, 34372 | 9482, 10245, 11234, 41735 |

oneDNN reads a float32 matrix faster for four rows than for one, so with AVX-512 there are four at least (393, 131 and
204 microseconds for one row), and all matrices of blocks are packed. Without, where a single row takes 1.3 times as
long packed as transposed, a float32 matrix with more outputs than inputs is kept transposed; and so is a head, of which
most products have one row. Several rows of what is transposed are multiplied by whoever is faster at it, which is
measured: oneDNN on the EPYC, on an Intel by far torch's own (11 ms against 25; 512 rows, 3072 x 576).
"""

from __future__ import annotations

import functools
import timeit
from typing import TYPE_CHECKING

import torch
from torch import nn
from torch.nn.functional import pad

from swarm.quantization.kernels import Kernel, Shared
from swarm.quantization.layers import FixedLinear, Product, install, linears, matrix
from swarm.quantization.screening import Screened, Take, screens

if TYPE_CHECKING:
    from transformers.modeling_utils import PreTrainedModel

_FEWEST = 4  # rows of a float32 product, with wide registers
SMALLEST = 1 << 16  # weights of a matrix: what is smaller stays near the processor, and the call takes most of the time


class Packed(Shared):
    """A matrix [N, K] in an order of oneDNN's own."""

    def __init__(self, weight: torch.Tensor) -> None:
        self.nbytes, self.dtype = weight.nbytes, weight.dtype
        self._packed = torch.ops.mkldnn._reorder_linear_weight(weight, None)
        self._least = _FEWEST if weight.dtype == torch.float32 and _has_wide_registers() else 1

    def __call__(self, rows: torch.Tensor) -> torch.Tensor:
        count = len(rows)
        if count >= self._least:
            return _product(rows, self._packed)
        filled = rows.expand(self._least, -1) if count == 1 else pad(rows, (0, 0, 0, self._least - count))
        return _product(filled, self._packed)[:count]


class Transposed(Shared):
    """A matrix [N, K] kept as [K, N]: a single row is the sum of its rows, which are read side by side."""

    def __init__(self, weight: torch.Tensor) -> None:
        self.nbytes, self.dtype = weight.nbytes, weight.dtype
        self._columns = weight.T.contiguous()
        self._always_own = _own_is_faster()

    def __call__(self, rows: torch.Tensor) -> torch.Tensor:
        if len(rows) == 1 or self._always_own:
            return torch.mm(rows, self._columns)
        return _product(rows, self._columns.T)

    def take(self, outputs: torch.Tensor) -> torch.Tensor:
        """Rows of the matrix, [len(outputs), K]."""
        return self._columns.index_select(1, outputs).T


def _has_wide_registers() -> bool:
    """Whether there is AVX-512."""
    return bool(torch.cpu.get_capabilities().get("avx512_f", False))


def _product(rows: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    product: torch.Tensor = torch.ops.mkldnn._linear_pointwise(rows, weight, None, "none", [], "")
    return product


@functools.cache
def _own_is_faster() -> bool:
    """Whether torch's own product (MKL's, mostly) of several rows with a transposed matrix is, measured once."""
    rows, columns = torch.ones(64, 512, dtype=torch.float32), torch.ones(512, 1536, dtype=torch.float32)
    own, onednn = (
        min(timeit.repeat(product, number=1, repeat=5))
        for product in (lambda: torch.mm(rows, columns), lambda: _product(rows, columns.T))
    )
    return own < onednn


class Plain:
    """A weight [N, K] as it is, with what `install` asks of one."""

    def __init__(self, weight: torch.Tensor) -> None:
        self.weight = weight
        self.shape = weight.shape
        self.kind = weight.dtype


def pack(block: nn.Module) -> None:
    """Lay out the weights of a block's linear layers anew, where that is faster: for blocks that serve on the CPU.

    What stays as it is becomes a copy, as it would keep the file mapped from which it came.
    """
    layers = {path: layer for path, layer in linears(block).items() if _gains(matrix(layer))}
    weights = {path: Plain(matrix(layer).detach()) for path, layer in layers.items()}
    install(block, weights, _kernel, torch.device("cpu"))
    for layer in layers.values():
        layer.register_parameter("weight", None)  # whoever still holds the layer does not hold its memory
    if layers:
        for parameter in block.parameters():
            parameter.data = parameter.data.clone()


def pack_head(model: PreTrainedModel) -> None:
    """Lay out a model's head anew, if that is a plain linear layer and faster so; the embedding stays as it is.

    Whoever wants the largest of its scores alone has them screened first (`swarm.quantization.screening`).
    """
    head = model.get_output_embeddings()  # type: ignore[no-untyped-call]
    if type(head) is not nn.Linear or not _gains(head.weight):
        return
    bias: torch.Tensor | None = head.bias
    weight = head.weight.detach()
    kernel: Kernel = Transposed(weight) if weight.dtype == torch.float32 else Packed(weight)
    if bias is None and (take := _rows_of(model, head, kernel)) is not None and screens(weight):
        kernel = Screened(kernel, weight, take)
    product = Product(kernel, [head.out_features], bias, torch.device("cpu"))
    model.set_output_embeddings(FixedLinear(product, 0, head.in_features))  # type: ignore[no-untyped-call]


def _rows_of(model: PreTrainedModel, head: nn.Linear, kernel: Kernel) -> Take | None:
    """What gives single rows of the head's matrix: the embedding, where that is the same, or the kernel."""
    embedding = model.get_input_embeddings()
    if embedding.weight is head.weight:
        return functools.partial(torch.index_select, embedding.weight.detach(), 0)
    return kernel.take if isinstance(kernel, Transposed) else None


def _kernel(family: list[Plain]) -> Kernel:
    joined = torch.cat([each.weight for each in family]) if len(family) > 1 else family[0].weight.contiguous()
    rows, columns = joined.shape
    transposed = joined.dtype == torch.float32 and rows > columns and not _has_wide_registers()
    return Transposed(joined) if transposed else Packed(joined)


def _gains(weight: torch.Tensor) -> bool:
    return weight.numel() >= SMALLEST and weight.device.type == "cpu" and weight.dtype in _dtypes()


def _dtypes() -> list[torch.dtype]:
    """What oneDNN multiplies here."""
    if not torch.backends.mkldnn.is_available():  # type: ignore[no-untyped-call]
        return []
    bfloat16: bool = torch.ops.mkldnn._is_mkldnn_bf16_supported()
    return [torch.float32, torch.bfloat16] if bfloat16 else [torch.float32]
