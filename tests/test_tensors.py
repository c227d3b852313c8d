"""Tensors to bytes and back."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from swarm import tensors
from swarm.errors import BadTensor
from swarm.wire import ITEM_SIZES, TensorSpec

DTYPES = [tensors.dtype_of(name) for name in ITEM_SIZES]
SHAPES = st.lists(st.integers(0, 5), max_size=4)


def tensor(dtype: torch.dtype, shape: list[int]) -> torch.Tensor:
    """Its values differ from each other."""
    values = torch.arange(math.prod(shape)).reshape(shape)
    return (values % 2).to(dtype) if dtype is torch.bool else values.to(dtype)


def body(values: list[torch.Tensor]) -> memoryview:
    """As it arrives: in one piece, writable."""
    return memoryview(bytearray(b"".join(tensors.encode(values))))


@given(st.lists(st.builds(tensor, st.sampled_from(DTYPES), SHAPES), max_size=4))
def test_tensors_come_back_as_they_went(values: list[torch.Tensor]) -> None:
    back = tensors.decode(body(values), [tensors.spec_of(value) for value in values])
    for value, other in zip(values, back, strict=True):
        assert other.dtype == value.dtype
        assert other.shape == value.shape
        assert torch.equal(other, value)


def test_values_that_are_no_numbers_come_back_too() -> None:
    value = torch.tensor([math.nan, math.inf, -math.inf, -0.0], dtype=torch.bfloat16)
    back = tensors.decode(body([value]), [tensors.spec_of(value)])[0]
    assert torch.equal(back.view(torch.int16), value.view(torch.int16))


def test_nothing_is_copied_where_memory_is_contiguous() -> None:
    value = torch.zeros(4, 4)
    view = tensors.to_bytes(value)
    value[0, 0] = 1.0
    assert torch.frombuffer(bytearray(view), dtype=torch.float32)[0] == 1.0
    data = body([value])
    back = tensors.decode(data, [tensors.spec_of(value)])[0]
    back[3, 3] = 2.0
    assert tensors.decode(data, [tensors.spec_of(value)])[0][3, 3] == 2.0


@pytest.mark.parametrize(
    "value",
    [
        torch.arange(24).reshape(4, 6).T,
        torch.arange(24).reshape(4, 6)[:, 1:3],
        torch.arange(3).expand(2, 3),
        torch.ones(3, requires_grad=True),
        torch.tensor(7),
    ],
    ids=["transposed", "a slice", "expanded", "with a gradient", "a scalar"],
)
def test_any_memory_layout_travels(value: torch.Tensor) -> None:
    assert torch.equal(tensors.decode(body([value]), [tensors.spec_of(value)])[0], value)


def test_bytes_that_cannot_be_written_are_read_all_the_same() -> None:
    value = torch.tensor([1.5, 2.5])
    back = tensors.decode(memoryview(bytes(tensors.to_bytes(value))), [tensors.spec_of(value)])[0]
    assert torch.equal(back, value)


def test_a_byte_is_a_bool_whatever_it_holds() -> None:
    data = memoryview(bytearray([0, 1, 2, 255, 128, 0, 0, 0]))
    value = tensors.decode(data, [TensorSpec("bool", [8])])[0]
    assert value.tolist() == [False, True, True, True, True, False, False, False]
    assert (~value).tolist() == [True, False, False, False, False, True, True, True]
    assert int(value.sum()) == 4


@pytest.mark.parametrize("dtype", [torch.complex64, torch.float64, torch.int8])
def test_a_dtype_that_does_not_travel_is_refused(dtype: torch.dtype) -> None:
    with pytest.raises(BadTensor, match="do not travel"):
        tensors.spec_of(torch.zeros(1, dtype=dtype))
    with pytest.raises(BadTensor, match="do not travel"):
        tensors.dtype_of(str(dtype).removeprefix("torch."))


@given(SHAPES, st.sampled_from(list(ITEM_SIZES)), st.integers(0, 200))
def test_a_body_of_another_length_is_refused(shape: list[int], dtype: str, length: int) -> None:
    spec = TensorSpec(dtype, shape)
    needed = -(-spec.nbytes() // 8) * 8
    if length == needed:
        assert tensors.decode(memoryview(bytearray(length)), [spec])[0].shape == torch.Size(shape)
    else:
        with pytest.raises(BadTensor, match="announced"):
            tensors.decode(memoryview(bytearray(length)), [spec])
