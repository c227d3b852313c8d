"""Mixtures of experts whose family holds one matrix of all experts in one tensor: a fixed product for each expert.

transformers' families say how theirs are laid out (its `use_experts_implementation`): [experts, out, in] or transposed,
with biases or without, how the gate is applied. What they do with a product stays their own.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import nn

from swarm.batching.tape import opaque
from swarm.quantization.kernels import Kernel
from swarm.quantization.layers import Product, W

_INTO = ("gate_up_proj", "up_proj")  # the name of the matrices that lead into an expert: with a gate, and without
_OUT = "down_proj"


def mixtures(block: nn.Module) -> dict[str, nn.Module]:
    """The mixtures of a block whose experts can be quantized, by their paths in it."""
    return {path: module for path, module in block.named_modules() if _is_mixture(module)}


def _is_mixture(module: nn.Module) -> bool:
    described = all(hasattr(module, name) for name in ("has_gate", "has_bias", "is_transposed", "_apply_gate"))
    return described and all(module._parameters.get(name) is not None for name in _names(module))


def _names(mixture: Any) -> tuple[str, str]:
    """Of the parameter that leads into its experts, and of the one that leads out."""
    return _INTO[0 if mixture.has_gate else 1], _OUT


def matrices(block: nn.Module) -> Iterator[tuple[str, torch.Tensor]]:
    """Every expert's matrices [out, in], each with a path of its own: where they lie, no copies."""
    for path, mixture in mixtures(block).items():
        for name in _names(mixture):
            stack = mixture.get_parameter(name)
            for number, matrix in enumerate(stack.mT if mixture.is_transposed else stack):
                yield _path(path, name, number), matrix


def _path(path: str, name: str, number: int) -> str:
    return f"{path}.{name}.{number}" if path else f"{name}.{number}"


def left_whole(model: nn.Module) -> int:
    """Bytes of matrices that lie one upon another and are not quantized: experts of families that say nothing."""
    modules = [module for module in model.modules() if not isinstance(module, nn.Conv1d)]
    weights = (weight for module in modules for weight in module.parameters(recurse=False))
    return sum(weight.nbytes for weight in weights if weight.ndim == 3)


def drop(block: nn.Module) -> None:
    """Take the experts' matrices out of a block; all else of its mixtures stays."""
    for mixture in mixtures(block).values():
        for name in _names(mixture):
            mixture.register_parameter(name, None)


class FixedExperts(nn.Module):
    """In the place of a family's mixture.

    Args:
        family: what was there, without its matrices.
        into, out: the products of each expert.
    """

    def __init__(self, family: nn.Module, into: list[Product], out: list[Product]) -> None:
        super().__init__()
        self.family = family
        self.into = nn.ModuleList(into)
        self.out = nn.ModuleList(out)

    @opaque
    def forward(self, hidden: torch.Tensor, chosen: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
        """The sum of what the chosen experts make of each token.

        Args:
            hidden: [T, H]
            chosen: [T, k], experts by number; what is beyond the last is nobody.
            weights: [T, k], of the experts.

        Returns:
            [T, H]
        """
        output = torch.zeros_like(hidden)
        for expert in sorted(set(chosen.flatten().tolist())):
            if expert < len(self.into):
                tokens, ways = torch.where(chosen == expert)
                made = self._ask(expert, hidden[tokens]) * weights[tokens, ways, None]
                output.index_add_(0, tokens, made.to(output.dtype))
        return output

    def _ask(self, expert: int, rows: torch.Tensor) -> torch.Tensor:
        family: Any = self.family
        inner = self.into[expert](rows, 0)
        inner = family._apply_gate(inner) if family.has_gate else family.act_fn(inner)
        made: torch.Tensor = self.out[expert](inner, 0)
        return family.post_expert_norm(made) if family.has_post_expert_norm else made


def install_experts(
    block: nn.Module,
    found: Mapping[str, nn.Module],
    weights: Mapping[str, W],
    kernel: Callable[[W], Kernel],
    device: torch.device,
) -> None:
    """Put fixed experts in the places of the mixtures that were `found` in a block; their biases stay.

    Args:
        weights: by the paths that `matrices` gave them.
        kernel: multiplies by one of them.
    """
    for path, mixture in found.items():
        into, out = (list(_products(path, name, mixture, weights, kernel, device)) for name in _names(mixture))
        parent, _, name = path.rpartition(".")
        block.get_submodule(parent).register_module(name, FixedExperts(mixture, into, out))


def _products(
    path: str,
    name: str,
    mixture: Any,
    weights: Mapping[str, W],
    kernel: Callable[[W], Kernel],
    device: torch.device,
) -> Iterator[Product]:
    biases = getattr(mixture, f"{name}_bias") if mixture.has_bias else None
    for number in range(mixture.num_experts):
        weight = weights[_path(path, name, number)]
        bias = None if biases is None else biases[number].detach().clone()
        yield Product(kernel(weight), [weight.shape[0]], bias, device)
