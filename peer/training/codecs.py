"""Gradients as bytes and back, chunk by chunk: fp32, fp16 with a scale, 8 bits in blocks with error feedback.

A chunk is a flat fp32 tensor of at most `CHUNK` values. Each codec writes what it needs to read it before the values.
"""

from __future__ import annotations

import math
import struct
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch

from swarm import tensors
from swarm.errors import BadTensor
from swarm.links.bodies import body_of

CHUNK = 1 << 19  # values
BLOCK = 256  # values that share a scale in 8 bits
_SCALE = struct.Struct("<fxxxx")
_LARGEST_EXPONENT = 15  # fp16 values are scaled so that the largest is below 2 ** 15


class Codec(Protocol):
    """One way to write fp32 values."""

    def encode(self, values: torch.Tensor) -> memoryview:
        """The bytes of `values`, fp32 [n]: a view of them where that will do."""

    def decode(self, body: memoryview, out: torch.Tensor) -> torch.Tensor:
        """The values in `body`: in `out`, fp32 [n], or a view of `body` where that will do.

        Raises `BadTensor` where the bytes are not those of n values.
        """


class Float32:
    """As it is."""

    def encode(self, values: torch.Tensor) -> memoryview:
        return tensors.to_bytes(values)

    def decode(self, body: memoryview, out: torch.Tensor) -> torch.Tensor:
        return _read(body, torch.float32, len(out))


class Float16:
    """Half the bytes; a power of two brings each chunk into fp16's range, whatever the gradients' magnitude."""

    def encode(self, values: torch.Tensor) -> memoryview:
        scale = _scale(values)
        body = body_of(_SCALE.size + 2 * len(values))
        written = torch.frombuffer(body, dtype=torch.uint8)
        torch.mul(values, 1.0 / scale, out=written[_SCALE.size :].view(torch.float16))
        _SCALE.pack_into(body, 0, scale)
        return body

    def decode(self, body: memoryview, out: torch.Tensor) -> torch.Tensor:
        if len(body) < _SCALE.size:
            raise BadTensor("a chunk without its scale")
        (scale,) = _SCALE.unpack_from(body)
        if not 0.0 < scale < math.inf:
            raise BadTensor(f"a chunk with the scale {scale}")
        return out.copy_(_read(body[_SCALE.size :], torch.float16, len(out))).mul_(scale)


class Int8:
    """A quarter of the bytes: each block of `BLOCK` values by its largest (Dettmers et al. 2022, linear code)."""

    def encode(self, values: torch.Tensor) -> memoryview:
        blocks = torch.zeros(-(-len(values) // BLOCK), BLOCK)
        blocks.view(-1)[: len(values)] = values
        scales = blocks.abs().amax(dim=1, keepdim=True)
        codes = blocks.mul_(127.0 / scales.clamp(min=1e-37)).round_().to(torch.int8)
        written = torch.cat([scales.view(-1).view(torch.uint8), codes.view(-1)[: len(values)].view(torch.uint8)])
        return tensors.to_bytes(written)

    def decode(self, body: memoryview, out: torch.Tensor) -> torch.Tensor:
        blocks = -(-len(out) // BLOCK)
        scales = _read(body[: 4 * blocks], torch.float32, blocks)
        codes = _read(body[4 * blocks :], torch.int8, len(out))
        out.copy_(codes)
        whole = len(out) // BLOCK * BLOCK
        out[:whole].view(-1, BLOCK).mul_(scales[: whole // BLOCK, None] / 127.0)
        if whole < len(out):
            out[whole:].mul_(scales[-1] / 127.0)
        return out


CODECS: Mapping[str, Codec] = {"float32": Float32(), "float16": Float16(), "int8": Int8()}


@dataclass(frozen=True, slots=True)
class Chunk:
    """Values as bytes, by the codec of that name."""

    dtype: str
    count: int
    body: memoryview


Coded = Mapping[str, Sequence[Chunk]]
"""Vectors by their groups, each of chunks that lie one after another."""


def size_of(coded: Coded) -> int:
    """Bytes of all of it."""
    return sum(len(chunk.body) for chunks in coded.values() for chunk in chunks)


def as_it_is(values: torch.Tensor) -> list[Chunk]:
    """A copy of fp32 [n], as one chunk."""
    return [Chunk("float32", len(values), tensors.to_bytes(values.clone()))]


def vectors_of(coded: Coded) -> dict[str, torch.Tensor]:
    """The values: fp32 [n] of each group. Raises `BadTensor` where bytes are not those of as many values."""
    found = {}
    for group, chunks in coded.items():
        vector = found[group] = torch.empty(sum(chunk.count for chunk in chunks))
        start = 0
        for chunk in chunks:
            out = vector[start : start + chunk.count]
            values = CODECS[chunk.dtype].decode(chunk.body, out)
            if values.data_ptr() != out.data_ptr():
                out.copy_(values)
            start += chunk.count
    return found


def _scale(values: torch.Tensor) -> float:
    """The power of two to divide by; values that are not finite stay so."""
    low, high = torch.aminmax(values)
    largest = max(-low.item(), high.item())
    if not 0.0 < largest < math.inf:  # zero, infinite, or not a number, for which every comparison is false
        return 1.0
    return 2.0 ** max(math.frexp(largest)[1] - _LARGEST_EXPONENT, -126)


def _read(body: memoryview, dtype: torch.dtype, count: int) -> torch.Tensor:
    if len(body) != count * dtype.itemsize:
        raise BadTensor(f"{len(body)} bytes for {count} values of {dtype}")
    if body.readonly:  # torch knows no read-only tensors
        body = memoryview(bytearray(body))
    return torch.frombuffer(body, dtype=dtype) if count else torch.empty(0, dtype=dtype)
