"""Loading blocks and quantizing them on the way: one block at a time is in full precision, never the whole span."""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from contextlib import suppress
from typing import TYPE_CHECKING

import torch
from torch import nn

from swarm.cutting.skeleton import Skeleton
from swarm.errors import CannotCut
from swarm.files.checkpoint import Checkpoint
from swarm.quantization.experts import drop, install_experts, matrices, mixtures
from swarm.quantization.kernels import kernel_for
from swarm.quantization.layers import FixedLinear, Product, install, linears, matrix
from swarm.quantization.store import QuantStore
from swarm.quantization.weights import Kind, QuantizedWeight, joined, quantize
from swarm.types import Span

if TYPE_CHECKING:
    from transformers.modeling_utils import PreTrainedModel

_HEAD = "head"  # what it is called on disk


def load_quantized(
    skeleton: Skeleton,
    checkpoint: Checkpoint,
    span: Span,
    kind: Kind,
    device: torch.device,
    reader: Callable[[str], Callable[[], torch.Tensor]],
    skipped: Callable[[str], None],
) -> None:
    """Load what is left of `skeleton`, the linear layers and the experts of its blocks in `kind`; the rest as it is.

    Args:
        reader: for a tensor's name in the checkpoint, what reads it.
        skipped: told the names that need no reading, because they were quantized at an earlier start.

    Raises:
        CannotCut: blocks share weights, or hold no linear layer that could be quantized.
        ModelCorrupt: a weight is missing, has the wrong shape or is not finite.
    """
    if skeleton.top.all_tied_weights_keys:
        raise CannotCut(
            f"{skeleton.config.model_type}: its blocks share weights, which are not quantized; leave it out"
        )
    keys = skeleton.resolver()
    places = {name: keys(name) for name in skeleton.needed(checkpoint.names)}
    store = QuantStore(checkpoint.model_id, kind, skeleton.dtype)
    prefixes = [f"{skeleton.path}.{index}." for index in span]
    for index, prefix in zip(span, prefixes, strict=True):
        names = [name for name, found in places.items() if any(key.startswith(prefix) for key in found)]
        block = skeleton.blocks[index]
        layers, experts = linears(block), mixtures(block)
        kept = _kept(block, index, store)
        skeleton.load({name: reader(name) for name in _left(skeleton, names, skipped)}, device, prefix)
        weights = kept or _take(block, kind)
        for parameter in block.parameters():  # what stays as it is would keep the whole file mapped
            parameter.data = parameter.data.clone()
        checkpoint.unmap()
        if kept is None:
            store.write(index, weights)
        own = {path: weights[path] for path in layers}
        install(block, own, lambda family: kernel_for(joined(family), device), device)
        install_experts(block, experts, weights, lambda weight: kernel_for(weight, device), device)
        del layers, experts, kept, own, weights
        _return_memory()
    rest = [name for name, found in places.items() if not any(key.startswith(tuple(prefixes)) for key in found)]
    skeleton.load({name: reader(name) for name in rest}, device)


def quantize_head(model: PreTrainedModel, store: QuantStore, index: int, device: torch.device) -> None:
    """Put a quantized layer in the place of a model's head, if that is a plain one; the embedding stays as it is.

    It is kept on disk as if it were block `index`, the one after the last.
    """
    head = model.get_output_embeddings()  # type: ignore[no-untyped-call]
    if type(head) is not nn.Linear:
        return
    weights = store.read(index, {_HEAD: (head.weight.shape[0], head.weight.shape[1])})
    if weights is None:
        weights = {_HEAD: quantize(head.weight, store.kind)}
        store.write(index, weights)
    bias = head.bias if isinstance(head.bias, torch.Tensor) else None
    product = Product(kernel_for(weights[_HEAD], device), [head.weight.shape[0]], bias, device)
    layer = FixedLinear(product, 0, head.weight.shape[1])
    model.set_output_embeddings(layer)  # type: ignore[no-untyped-call]


def _kept(block: nn.Module, index: int, store: QuantStore) -> dict[str, QuantizedWeight] | None:
    """The block's weights from an earlier start, which are then not loaded again; None where they are not there."""
    layers = linears(block)
    shapes = {path: (matrix(layer).shape[0], matrix(layer).shape[1]) for path, layer in layers.items()}
    shapes |= {path: (weight.shape[0], weight.shape[1]) for path, weight in matrices(block)}
    if not shapes:
        raise CannotCut(f"block {index} has no linear layers: nothing of it can be quantized")
    if (weights := store.read(index, shapes)) is not None:
        for layer in layers.values():
            _drop(layer)
        drop(block)
    return weights


def _left(skeleton: Skeleton, names: list[str], skipped: Callable[[str], None]) -> list[str]:
    """Those of the checkpoint's `names` that are still to be loaded."""
    needed = skeleton.needed(names)
    for name in names:
        if name not in needed:
            skipped(name)
    return needed


def _take(block: nn.Module, kind: Kind) -> dict[str, QuantizedWeight]:
    """The block's weights in few bits; in full precision they are gone."""
    weights = {}
    for path, layer in linears(block).items():
        weights[path] = quantize(matrix(layer), kind)
        _drop(layer)
        _return_memory()
    weights |= {path: quantize(weight, kind) for path, weight in matrices(block)}
    drop(block)
    _return_memory()
    return weights


def _drop(layer: nn.Module) -> None:
    layer.register_parameter("weight", None)


def _return_memory() -> None:
    """Give back what was freed: glibc keeps what lies between the pieces that stay, here as much as several blocks."""
    with suppress(OSError, AttributeError):  # another C library
        ctypes.CDLL(None).malloc_trim(0)
