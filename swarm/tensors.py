"""Tensors to bytes and back, without a copy where the memory allows it.

Hidden states may be rounded on their way: to bfloat16, which is off by 1/256 of each value at most, or to 8 bits in
blocks of 64 values with a scale each, which is off by 1/250 of the block's largest at most. A position is rounded by
itself, so what is sent again, with others or alone, is the same again.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch.nn import functional

from swarm.errors import BadTensor
from swarm.wire import BLOCK_VALUES, BLOCKWISE, ITEM_SIZES, Rounding, TensorSpec, padded, split_body

_DTYPES: dict[str, torch.dtype] = {name: getattr(torch, name) for name in ITEM_SIZES}
_NAMES = {dtype: name for name, dtype in _DTYPES.items()}
_PADDING = bytes(8)
_LARGEST_SCALE = float(2**121 + 2**114)  # a bfloat16, and 127 of it a float32


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


def spec_of(tensor: torch.Tensor, rounding: Rounding = "float32") -> TensorSpec:
    """What tells the other side how to read this tensor, if it is sent rounded so."""
    name = dtype_name(tensor.dtype)
    if rounding == "int8" and tensor.is_floating_point():
        name = BLOCKWISE
    elif rounding == "bfloat16" and tensor.dtype == torch.float32:
        name = rounding
    return TensorSpec(name, list(tensor.shape))


def all_finite(tensor: torch.Tensor) -> bool:
    """Whether all values are finite numbers.

    A value that is not finite makes the sum so, whatever is added to it; looking at each is for sums that overflowed.
    """
    return math.isfinite(tensor.sum().item()) or bool(torch.isfinite(tensor).all())


def to_bytes(tensor: torch.Tensor) -> memoryview:
    """The tensor's bytes: a view of its own memory where it is contiguous and on the CPU."""
    flat = tensor.detach().cpu().contiguous().reshape(-1)
    return flat.view(torch.uint8).numpy().data if flat.numel() else memoryview(b"")


def encode(tensors: Sequence[torch.Tensor], specs: Sequence[TensorSpec] | None = None) -> list[memoryview | bytes]:
    """The body of a message that carries `tensors`, in pieces that need no joining; rounded where `specs` say so."""
    pieces: list[memoryview | bytes] = []
    for index, tensor in enumerate(tensors):
        view = to_bytes(tensor if specs is None else _as_sent(tensor, specs[index].dtype))
        pieces.append(view)
        if gap := padded(len(view)) - len(view):
            pieces.append(_PADDING[:gap])
    return pieces


def _as_sent(tensor: torch.Tensor, dtype: str) -> torch.Tensor:
    return _blockwise(tensor) if dtype == BLOCKWISE else tensor.to(_DTYPES[dtype])


def _blockwise(tensor: torch.Tensor) -> torch.Tensor:
    """[..., H] as bytes: all scales, bfloat16 [..., H / 64], and then all values, int8 [..., H]."""
    if not tensor.numel():
        return torch.empty(0, dtype=torch.uint8)
    size = tensor.shape[-1]
    rows = tensor.detach().float().reshape(-1, size)
    blocks = functional.pad(rows, (0, -size % BLOCK_VALUES)).view(len(rows), -1, BLOCK_VALUES)
    # What is not finite stays so, for the other side to refuse; what would be after rounding its scale up, does not.
    scales = (
        (blocks.abs().amax(dim=-1) / 127).clamp_max(_LARGEST_SCALE).where(torch.isfinite(blocks).all(-1), torch.nan)
    )
    kept = scales.to(torch.bfloat16)
    kept = torch.where(kept.abs() < torch.finfo(torch.float32).tiny, 0, kept)  # too small for eight bits of a scale
    divisor = kept.float().where(kept != 0, torch.inf)
    values = (blocks / divisor[..., None]).nan_to_num(0.0).round_().clamp_(-127, 127).to(torch.int8)
    plain = values.view(len(rows), -1)[:, :size].contiguous()
    return torch.cat([kept.contiguous().view(-1).view(torch.uint8), plain.view(-1).view(torch.uint8)])


def _from_blockwise(view: memoryview, shape: list[int]) -> torch.Tensor:
    size = shape[-1]
    count = -(-size // BLOCK_VALUES)
    raw = torch.frombuffer(bytearray(view), dtype=torch.uint8)
    rows = len(raw) // (size + 2 * count)
    scales = raw[: rows * count * 2].view(torch.bfloat16).float().view(rows, count, 1)
    values = functional.pad(
        raw[rows * count * 2 :].view(torch.int8).view(rows, size).float(), (0, -size % BLOCK_VALUES)
    )
    blocks = values.view(rows, count, BLOCK_VALUES) * scales
    return blocks.view(rows, -1)[:, :size].reshape(shape)


def decode(body: memoryview, specs: Sequence[TensorSpec]) -> list[torch.Tensor]:
    """The tensors of a body, as views of its memory. Raises `BadTensor` where it does not fit `specs`."""
    return [_tensor(view, spec) for view, spec in zip(split_body(body, specs), specs, strict=True)]


def _tensor(view: memoryview, spec: TensorSpec) -> torch.Tensor:
    if not len(view):
        return torch.empty(spec.shape, dtype=_DTYPES.get(spec.dtype, torch.float32))
    if spec.dtype == BLOCKWISE:
        return _from_blockwise(view, spec.shape)
    if view.readonly:  # torch knows no read-only tensors
        view = memoryview(bytearray(view))
    if spec.dtype == "bool":  # to torch, a byte that is neither 0 nor 1 is no bool, and what it does with it undefined
        return torch.frombuffer(view, dtype=torch.uint8).ne(0).view(spec.shape)
    return torch.frombuffer(view, dtype=_DTYPES[spec.dtype]).view(spec.shape)
