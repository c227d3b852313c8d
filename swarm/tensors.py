"""Tensors to bytes and back, without a copy where the memory allows it."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from swarm.errors import BadTensor
from swarm.wire import ITEM_SIZES, TensorSpec, padded, split_body

_DTYPES: dict[str, torch.dtype] = {name: getattr(torch, name) for name in ITEM_SIZES}
_NAMES = {dtype: name for name, dtype in _DTYPES.items()}
_PADDING = bytes(8)


def dtype_name(dtype: torch.dtype) -> str:
    """`torch.float32` as "float32". Raises `BadTensor` for a dtype that does not travel."""
    if dtype not in _NAMES:
        raise BadTensor(f"tensors of {dtype} do not travel")
    return _NAMES[dtype]


def dtype_of(name: str) -> torch.dtype:
    """ "float32" as `torch.float32`. Raises `BadTensor` for a dtype that does not travel."""
    if name not in _DTYPES:
        raise BadTensor(f"tensors of dtype {name!r} do not travel")
    return _DTYPES[name]


def spec_of(tensor: torch.Tensor) -> TensorSpec:
    """What tells the other side how to read this tensor."""
    return TensorSpec(dtype_name(tensor.dtype), list(tensor.shape))


def to_bytes(tensor: torch.Tensor) -> memoryview:
    """The tensor's bytes: a view of its own memory where it is contiguous and on the CPU."""
    flat = tensor.detach().cpu().contiguous().reshape(-1)
    return flat.view(torch.uint8).numpy().data if flat.numel() else memoryview(b"")


def encode(tensors: Sequence[torch.Tensor]) -> list[memoryview | bytes]:
    """The body of a message that carries `tensors`, in pieces that need no joining."""
    pieces: list[memoryview | bytes] = []
    for tensor in tensors:
        view = to_bytes(tensor)
        pieces.append(view)
        if gap := padded(len(view)) - len(view):
            pieces.append(_PADDING[:gap])
    return pieces


def decode(body: memoryview, specs: Sequence[TensorSpec]) -> list[torch.Tensor]:
    """The tensors of a body, as views of its memory. Raises `BadTensor` where it does not fit `specs`."""
    return [_tensor(view, spec) for view, spec in zip(split_body(body, specs), specs, strict=True)]


def _tensor(view: memoryview, spec: TensorSpec) -> torch.Tensor:
    if not len(view):
        return torch.empty(spec.shape, dtype=_DTYPES[spec.dtype])
    if view.readonly:  # torch knows no read-only tensors
        view = memoryview(bytearray(view))
    if spec.dtype == "bool":  # to torch, a byte that is neither 0 nor 1 is no bool, and what it does with it undefined
        return torch.frombuffer(view, dtype=torch.uint8).ne(0).view(spec.shape)
    return torch.frombuffer(view, dtype=_DTYPES[spec.dtype]).view(spec.shape)
