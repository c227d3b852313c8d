"""Layers whose weights are fixed, quantized or only laid out anew, in the places of a model's own."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Protocol, TypeVar

import torch
from torch import nn

from swarm.batching.tape import opaque
from swarm.errors import UsageError
from swarm.quantization.kernels import Kernel

_SIBLINGS = (("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj"), ("w1", "w3"))
"""Layers that are given the same input in most families: one product does for all of them."""

_ROUTERS = frozenset({"gate", "router"})
"""Tiny layers that choose among experts: a wrong choice costs more than their bytes."""


class Matrix(Protocol):
    """A layer's weight [N, K], in whatever form."""

    @property
    def shape(self) -> Sequence[int]:
        """N, K."""

    @property
    def kind(self) -> object:
        """What matrices must have in common to be joined."""


W = TypeVar("W", bound=Matrix)


class Product(nn.Module):
    """Some layers' weights in one matrix, one below the other; what they give for one input is computed once.

    Attributes:
        kernel: multiplies by the matrix.
        sizes: how many rows of the matrix each has.
        bias: of all of them, None where they have none.
    """

    def __init__(self, kernel: Kernel, sizes: list[int], bias: torch.Tensor | None, device: torch.device) -> None:
        super().__init__()
        self.kernel = kernel
        self.sizes = sizes
        self.device = device
        self.bias = None if bias is None else nn.Parameter(bias, requires_grad=False)
        self._input: torch.Tensor | None = None
        self._waiting: dict[int, torch.Tensor] = {}

    def forward(self, inputs: torch.Tensor, index: int) -> torch.Tensor:
        """What layer `index` gives for `inputs`, [..., K] to [..., N]."""
        if len(self.sizes) == 1:
            return self.all(inputs)
        if inputs is not self._input or index not in self._waiting:
            self._input = inputs
            self._waiting = dict(enumerate(torch.split(self.all(inputs), self.sizes, dim=-1)))
        output = self._waiting.pop(index)
        if not self._waiting:
            self._input = None
        return output.contiguous()

    @opaque
    def all(self, inputs: torch.Tensor) -> torch.Tensor:
        """What all of them give, side by side. Raises `UsageError` where gradients are wanted."""
        if inputs.requires_grad and torch.is_grad_enabled():
            raise UsageError("the weights of a stage that serves have no gradients")
        output = self.kernel(inputs.reshape(-1, inputs.shape[-1])).to(inputs.dtype)
        if self.bias is not None:
            output = output + self.bias
        return output.view(*inputs.shape[:-1], -1)


class FixedLinear(nn.Module):
    """In the place of an `nn.Linear`: one of the layers of a `Product`."""

    def __init__(self, product: Product, index: int, in_features: int) -> None:
        super().__init__()
        self.product = product
        self.index = index
        self.in_features = in_features
        self.out_features = product.sizes[index]

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        """[..., in_features] to [..., out_features]"""
        output: torch.Tensor = self.product(inputs, self.index)
        return output

    @property
    def weight(self) -> torch.Tensor:
        """[out_features, in_features], as it multiplies: slow, for the families that look at their weights."""
        identity = torch.eye(self.in_features, dtype=self.product.kernel.dtype, device=self.product.device)
        columns = self.product.kernel(identity)
        return torch.split(columns, self.product.sizes, dim=-1)[self.index].T.contiguous()

    @property
    def bias(self) -> torch.Tensor | None:
        """[out_features]"""
        return None if self.product.bias is None else torch.split(self.product.bias, self.product.sizes)[self.index]

    def extra_repr(self) -> str:
        return f"{self.in_features}, {self.out_features}, {type(self.product.kernel).__name__}"


def weight_bytes(model: nn.Module) -> int:
    """What the weights of a model take, fixed or not."""
    products = (module for module in model.modules() if isinstance(module, Product))
    return sum(weight.nbytes for weight in model.parameters()) + sum(product.kernel.nbytes for product in products)


def linears(block: nn.Module) -> dict[str, nn.Module]:
    """The layers of a block that can be quantized, by their paths in it: `nn.Linear`, and what GPT-2 has for it."""
    from transformers.pytorch_utils import Conv1D

    return {
        path: module
        for path, module in block.named_modules()
        if type(module) in (nn.Linear, Conv1D) and path.rpartition(".")[2] not in _ROUTERS
    }


def matrix(layer: nn.Module) -> torch.Tensor:
    """The layer's weight as [out, in]."""
    weight = layer.weight
    assert isinstance(weight, torch.Tensor)
    return weight if isinstance(layer, nn.Linear) else weight.T.contiguous()


def install(
    block: nn.Module, weights: Mapping[str, W], kernel: Callable[[list[W]], Kernel], device: torch.device
) -> None:
    """Put fixed layers in the places of those of `weights`, by path; their biases stay.

    Args:
        kernel: multiplies by matrices of one kind, one below the other.
    """
    for paths in _families(block, weights):
        biases = [bias for path in paths if (bias := _bias(block, path)) is not None]
        sizes = [weights[path].shape[0] for path in paths]
        matrix = kernel([weights[path] for path in paths])
        product = Product(matrix, sizes, torch.cat(biases) if biases else None, device)
        for index, path in enumerate(paths):
            parent, _, name = path.rpartition(".")
            layer = FixedLinear(product, index, weights[path].shape[1])
            block.get_submodule(parent).register_module(name, layer)


def _families(block: nn.Module, weights: Mapping[str, Matrix]) -> Iterator[list[str]]:
    """The paths of `weights`: siblings that can share a product together, the others alone."""
    done: set[str] = set()
    for path in weights:
        parent, _, name = path.rpartition(".")
        names = next((names for names in _SIBLINGS if name in names), (name,))
        paths = [f"{parent}.{each}" if parent else each for each in names]
        kinds = {_look(block, weights, each) for each in paths}
        family = paths if len(kinds) == 1 and None not in kinds else [path]
        if path not in done:
            yield family
        done.update(family)


def _look(block: nn.Module, weights: Mapping[str, Matrix], path: str) -> tuple[object, ...] | None:
    """What siblings must have in common; None where there is no such layer."""
    if (weight := weights.get(path)) is None:
        return None
    return weight.kind, weight.shape[1], _bias(block, path) is None


def _bias(block: nn.Module, path: str) -> torch.Tensor | None:
    bias = block.get_submodule(path).bias
    return bias if isinstance(bias, torch.Tensor) else None
