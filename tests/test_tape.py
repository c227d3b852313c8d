"""A tape gives what the recorded function would have given; what cannot be recorded is refused."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch.nn import functional

from swarm.batching.tape import Recorder, Tape, Unrecorded, opaque

WEIGHT = torch.arange(16.0).reshape(4, 4) / 7
TABLE = torch.arange(16.0).reshape(4, 4)


def made_of(function: Callable[..., Any], *inputs: Any) -> Tape:
    with Recorder(inputs, [WEIGHT, TABLE]) as recorder:
        output = function(*inputs)
    return recorder.tape(output)


def normed(x: torch.Tensor) -> torch.Tensor:
    wide = x.to(torch.float32)  # the very same tensor, where it is float32
    return WEIGHT[0] * (wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + 1e-6)).to(x.dtype)


def rotated(x: torch.Tensor) -> torch.Tensor:
    half = x.shape[-1] // 2
    return torch.cat((-x[..., half:], x[..., :half]), dim=-1)


def in_place(x: torch.Tensor) -> torch.Tensor:
    x = x.clone()
    y = x.mul_(2)
    x[0, 1] = 5.0
    x += y
    return x


def in_parts(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor | None]:
    first, second = torch.split(x, [1, 3], dim=-1)
    values, places = second.max(-1)
    return first + values.unsqueeze(-1) + places.unsqueeze(-1), None


def shaped(x: torch.Tensor) -> torch.Tensor:
    hidden_shape = (*x.shape[:-1], -1, 2)
    return functional.linear(x, WEIGHT.to(x.dtype)).view(hidden_shape).transpose(0, 1).reshape(*x.shape)


def looked_up(x: torch.Tensor) -> torch.Tensor:
    return TABLE[x.argmax(-1)] + torch.arange(4) + torch.tensor(0.5) - (1 - x).T.sum(0, keepdim=True).T


@pytest.mark.parametrize("function", [normed, rotated, in_place, in_parts, shaped, looked_up], ids=lambda f: f.__name__)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_tape_gives_the_same_bits(function: Callable[..., Any], dtype: torch.dtype) -> None:
    tape = made_of(function, torch.ones(2, 4, dtype=dtype))
    for seed in range(3):
        given = torch.randn(2, 4, dtype=dtype, generator=torch.Generator().manual_seed(seed))
        expected, found = function(given.clone()), tape(given.clone())
        expected, found = (each[0] if isinstance(each, tuple) else each for each in (expected, found))
        assert torch.equal(expected, found)


def test_what_is_opaque_is_called_as_it_is_with_whatever_it_is_given_then() -> None:
    class Book:
        def __init__(self) -> None:
            self.read: list[float] = []

    @opaque
    def keep(book: Book, x: torch.Tensor, scale: float = 1.0) -> tuple[torch.Tensor, None]:
        book.read.append(float(x.sum()))  # looks into the tensor, which is its own affair
        return x * scale, None

    first, second = Book(), Book()
    tape = made_of(lambda book, x: keep(book, x + 1, scale=3.0)[0] - 1, first, torch.zeros(2))
    assert torch.equal(tape(second, torch.ones(2)), torch.full((2,), 5.0))
    assert (first.read, second.read) == ([2.0], [4.0])


@pytest.mark.parametrize(
    "looks",
    [
        lambda x: x if x.any() else -x,
        lambda x: x * x.sum().item(),
        lambda x: x * len(x.nonzero().tolist()),
        lambda x: x * float(x[0]),
        lambda x: x[x > 0],
        lambda x: torch.masked_select(x, x > 0),
    ],
)
def test_what_looks_into_a_tensor_is_refused(looks: Callable[[torch.Tensor], torch.Tensor]) -> None:
    with pytest.raises(Unrecorded, match="looks into a tensor"):
        made_of(looks, torch.ones(3))


def test_a_tensor_that_nobody_named_is_refused() -> None:
    stray = torch.ones(3)
    with pytest.raises(Unrecorded, match="comes from elsewhere"):
        made_of(lambda x: x + stray, torch.ones(3))


def test_what_is_recorded_is_let_go_with_the_recorder() -> None:
    """A tape holds the constants that it needs, and nothing that was made while it was recorded."""
    tape = made_of(lambda x: (x @ WEIGHT).relu(), torch.ones(2, 4))
    held = [cell.cell_contents for cell in tape.__closure__ or ()]  # type: ignore[attr-defined]
    assert [each for each in held if isinstance(each, torch.Tensor)] == [WEIGHT]
