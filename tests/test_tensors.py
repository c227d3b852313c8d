"""Tensors to bytes and back."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st

from swarm import tensors, wire
from swarm.errors import BadTensor
from swarm.wire import ITEM_SIZES, Rounding, TensorSpec

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


# --- rounded on their way ---------------------------------------------------------------------------------------------

rounded_sizes = st.sampled_from([1, 5, 63, 64, 65, 130])
magnitudes = st.floats(1e-30, 1e37)


def sent(tensor: torch.Tensor, rounding: Rounding) -> torch.Tensor:
    spec = tensors.spec_of(tensor, rounding)
    body = memoryview(bytearray(b"".join(tensors.encode([tensor], [spec]))))
    [found] = tensors.decode(body, [spec])
    assert found.shape == tensor.shape
    return found.float()


def states(seed: int, rows: int, positions: int, size: int, magnitude: float) -> torch.Tensor:
    """Hidden states with large and small values, from block to block and within one."""
    dice = torch.Generator().manual_seed(seed)
    spread = torch.exp(2 * torch.randn(rows, positions, size, generator=dice)).clamp_max(30)
    return magnitude / 1000 * spread * torch.randn(rows, positions, size, generator=dice)


@given(st.integers(0, 999), st.integers(1, 2), st.integers(1, 3), rounded_sizes, magnitudes)
def test_bfloat16_is_off_by_a_256th_at_most(seed: int, rows: int, positions: int, size: int, magnitude: float) -> None:
    hidden = states(seed, rows, positions, size, magnitude)
    assert ((sent(hidden, "bfloat16") - hidden).abs() <= hidden.abs() / 256 + 1e-38).all()


@given(st.integers(0, 999), st.integers(1, 2), st.integers(1, 3), rounded_sizes, magnitudes)
def test_8_bits_are_off_by_a_250th_of_their_block_at_most(
    seed: int, rows: int, positions: int, size: int, magnitude: float
) -> None:
    hidden = states(seed, rows, positions, size, magnitude)
    found = sent(hidden, "int8")
    for start in range(0, size, 64):
        block, got = hidden[..., start : start + 64], found[..., start : start + 64]
        assert ((got - block).abs() <= block.abs().amax(-1, keepdim=True) / 250 + 2e-36).all()


@given(st.integers(0, 999), rounded_sizes, st.sampled_from(["float32", "bfloat16", "int8"]))
def test_what_is_sent_again_is_the_same_however_it_is_cut(seed: int, size: int, rounding: Rounding) -> None:
    hidden = states(seed, 2, 6, size, 10.0)
    together = sent(hidden, rounding)
    alone = [sent(hidden[:, index : index + 1], rounding) for index in range(6)]
    assert torch.equal(torch.cat(alone, dim=1), together)
    assert torch.equal(sent(hidden[1:], rounding), together[1:])
    assert torch.equal(sent(together, rounding), together)  # nor does a second time lose more


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("rounding", ["bfloat16", "int8"])
def test_what_is_no_finite_number_stays_so_to_be_refused(value: float, rounding: Rounding) -> None:
    hidden = torch.ones(1, 1, 130)
    hidden[0, 0, 70] = value
    assert not torch.isfinite(sent(hidden, rounding)).all()
    assert torch.isfinite(sent(hidden, rounding)[..., :64]).all()


@pytest.mark.parametrize("value", [0.0, 1e-40, 3.4e38, -3.4e38])
def test_8_bits_hold_the_smallest_and_the_largest(value: float) -> None:
    found = sent(torch.full((1, 1, 64), value), "int8")
    assert torch.allclose(found, torch.full_like(found, value), rtol=0.01, atol=1e-35)


def test_rounded_hidden_states_are_smaller_and_others_stay_as_they_are() -> None:
    hidden = torch.ones(1, 4, 128)
    sizes = [tensors.spec_of(hidden, rounding).nbytes() for rounding in ("float32", "bfloat16", "int8")]
    assert sizes == [2048, 1024, 512 + 4 * 2 * 2]
    assert tensors.spec_of(hidden.half(), "bfloat16").dtype == "float16"
    assert tensors.spec_of(torch.ones(1, dtype=torch.int64), "int8").dtype == "int64"


def test_a_single_value_is_no_block() -> None:
    with pytest.raises(BadTensor, match="single value"):
        wire.TensorSpec(wire.BLOCKWISE, []).nbytes()


def test_a_block_of_nothing_is_nothing() -> None:
    assert sent(torch.ones(1, 0, 64), "int8").shape == (1, 0, 64)


@given(
    st.lists(st.floats(width=32, allow_nan=True, allow_infinity=True), min_size=1, max_size=40),
    st.sampled_from([torch.float32, torch.bfloat16, torch.float16]),
)
@example([3e38, 3e38], torch.float32)  # finite, and their sum is not
@example([float("inf"), float("-inf")], torch.float32)
def test_all_finite_is_what_torch_says_of_each_value(values: list[float], dtype: torch.dtype) -> None:
    given_values = torch.tensor(values).to(dtype)
    assert tensors.all_finite(given_values) == bool(torch.isfinite(given_values).all())
