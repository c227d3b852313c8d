"""Weights in all their bits, but laid out as the processor multiplies by them fastest.

A product of few rows is the time in which the matrix is read. torch's own linear layer has the library below it
re-arrange the whole matrix before each product of several rows; here that is done once, and the matrix as it was is
given back. The sums are the same, in another order. Measured for the matrices of SmolLM2-135M, with one thread on an
EPYC with AVX-512, in microseconds of processor time for 1 and 8 rows:

| | `nn.Linear` | packed by oneDNN | transposed |
| --- | --- | --- | --- |
| float32, 3072 x 576 | 607, 955 | 564, 603 | 371, 771 |
| float32, 960 x 576 | 186, 281 | 171, 181 | 135, 234 |
| float32, 576 x 1536 | 216, 396 | 280, 300 | 294, 380 |
| bfloat16, 3072 x 576 | 434, 568 | 277, 313 | 444, 564 |
| bfloat16, 576 x 1536 | 184, 220 | 152, 161 | 222, 281 |
| float32, 49152 x 576 | 10200, 20900 | 8800, 9400 | 5400, 13600 |
| bfloat16, 49152 x 576 | 6700, 8700 | 4200, 4800 | 9800, 11800 |

So a float32 matrix with more outputs than inputs is kept transposed, and all others packed. With 128 rows either takes
0.85 of `nn.Linear`'s time there; on an Intel, whose `nn.Linear` is as fast as any for many rows, oneDNN takes twice as
long for what is transposed (25 ms against 11, 512 rows, 3072 x 576): so which multiplies that is measured.
"""

from __future__ import annotations

import functools
import timeit
from typing import TYPE_CHECKING

import torch
from torch import nn

from swarm.quantization.kernels import Kernel, Shared
from swarm.quantization.layers import FixedLinear, Product, install, linears, matrix
from swarm.quantization.screening import Screened, Take, screens

if TYPE_CHECKING:
    from transformers.modeling_utils import PreTrainedModel

SMALLEST = 1 << 16  # weights of a matrix: what is smaller stays near the processor, and the call takes most of the time


class Packed(Shared):
    """A matrix [N, K] in an order of oneDNN's own."""

    def __init__(self, weight: torch.Tensor) -> None:
        self.nbytes, self.dtype = weight.nbytes, weight.dtype
        self._packed = torch.ops.mkldnn._reorder_linear_weight(weight, None)

    def __call__(self, rows: torch.Tensor) -> torch.Tensor:
        return _product(rows, self._packed)


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
    kernel = _kernel([Plain(weight)])
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
    return Transposed(joined) if joined.dtype == torch.float32 and rows > columns else Packed(joined)


def _gains(weight: torch.Tensor) -> bool:
    return weight.numel() >= SMALLEST and weight.device.type == "cpu" and weight.dtype in _dtypes()


def _dtypes() -> list[torch.dtype]:
    """What oneDNN multiplies here."""
    if not torch.backends.mkldnn.is_available():  # type: ignore[no-untyped-call]
        return []
    bfloat16: bool = torch.ops.mkldnn._is_mkldnn_bf16_supported()
    return [torch.float32, torch.bfloat16] if bfloat16 else [torch.float32]
