"""Weights in few bits: how far they are off, and what every product with them has in common."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from swarm.errors import ModelCorrupt
from swarm.quantization.kernels import CpuInt4, FbgemmInt8, Kernel, Plain, TiledInt4, WeightOnlyInt8, kernel_for
from swarm.quantization.weights import (
    GROUP,
    KINDS,
    Kind,
    QuantizedWeight,
    joined,
    pack_nibbles,
    quantize,
    unpack_nibbles,
)

CPU = torch.device("cpu")
CUDA = torch.device("cuda")


def matrix(rows: int, columns: int, seed: int = 0, size: float = 1.0) -> torch.Tensor:
    return size * torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed))


def off(found: torch.Tensor, expected: torch.Tensor) -> float:
    """How far, as a part of what was expected."""
    return float((found.float() - expected.float()).norm() / expected.float().norm())


# --- rounding ---------------------------------------------------------------------------------------------------------

seeds, sizes = st.integers(0, 1000), st.floats(1e-15, 1e15)  # whose squares are float32 numbers


@given(seed=seeds, rows=st.integers(1, 5), columns=st.integers(1, 100), size=sizes)
def test_int8_is_off_by_half_a_step_of_its_row_at_most(seed: int, rows: int, columns: int, size: float) -> None:
    weight = matrix(rows, columns, seed, size)
    step = weight.abs().amax(dim=1, keepdim=True) / 127
    assert ((quantize(weight, "int8").dequantized() - weight).abs() <= 0.5001 * step).all()


@settings(max_examples=30)
@given(seed=seeds, rows=st.integers(1, 5), groups=st.integers(1, 3), size=sizes)
def test_int4_loses_no_more_than_sixteen_even_steps_would(seed: int, rows: int, groups: int, size: float) -> None:
    weight = matrix(rows, groups * GROUP, seed, size)
    wide = weight.view(rows, groups, GROUP)
    low, high = torch.aminmax(wide, dim=-1, keepdim=True)
    even = ((wide - low) / (high - low) * 15).round() / 15 * (high - low) + low
    loss = (quantize(weight, "int4").dequantized().view_as(wide) - wide).double().square().sum(-1)
    assert (loss <= 1.1 * (even - wide).double().square().sum(-1)).all()


def test_sixteen_values_with_a_short_scale_are_kept_as_they_are() -> None:
    steps = torch.randint(0, 16, (8, 2 * GROUP), generator=torch.Generator().manual_seed(0)).float()
    steps[:, ::GROUP], steps[:, 1::GROUP] = 0, 15
    weight = 0.25 * (steps - 8) + 0.5
    assert torch.equal(quantize(weight, "int4").dequantized(), weight)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("value", [0.0, 0.5, -3.0])
def test_a_constant_matrix_is_kept_as_it_is(kind: Kind, value: float) -> None:
    weight = torch.full((16, 2 * GROUP), value)
    assert torch.allclose(quantize(weight, kind).dequantized(), weight)


@pytest.mark.parametrize("kind", KINDS)
def test_many_rows_are_rounded_as_one_alone(kind: Kind, monkeypatch: pytest.MonkeyPatch) -> None:
    weight = matrix(50, 2 * GROUP)
    whole = quantize(weight, kind)
    monkeypatch.setattr("swarm.quantization.weights._PIECE", 3 * 2 * GROUP)
    in_pieces = quantize(weight, kind)
    assert torch.equal(whole.dequantized(), in_pieces.dequantized())
    halves = joined([quantize(weight[:20], kind), quantize(weight[20:], kind)])
    assert torch.equal(whole.dequantized(), halves.dequantized())


def test_int4_falls_back_to_int8_where_rows_cannot_be_cut_into_groups() -> None:
    assert quantize(matrix(4, GROUP + 1), "int4").kind == "int8"


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_what_is_no_finite_number_is_refused(kind: Kind, value: float) -> None:
    weight = matrix(4, GROUP)
    weight[2, 3] = value
    with pytest.raises(ModelCorrupt, match="finite"):
        quantize(weight, kind)


def test_quantized_weights_take_few_bytes() -> None:
    weight = matrix(64, 256)
    assert quantize(weight, "int8").nbytes == 64 * 256 + 64 * 4
    assert quantize(weight, "int4").nbytes == 64 * 256 // 2 + 64 * 256 // GROUP * 4
    assert quantize(weight, "int8").shape == quantize(weight, "int4").shape == (64, 256)


@given(st.lists(st.lists(st.integers(0, 15), min_size=6, max_size=6), min_size=1, max_size=5))
def test_nibbles_are_what_they_were(values: list[list[int]]) -> None:
    given_values = torch.tensor(values, dtype=torch.uint8)
    assert torch.equal(unpack_nibbles(pack_nibbles(given_values)), given_values)


# --- products ---------------------------------------------------------------------------------------------------------


def kernels(weight: torch.Tensor) -> list[tuple[Kernel, QuantizedWeight, float]]:
    """Every product that this machine has, what its weight is, and how far off it may be."""
    int8, int4 = quantize(weight, "int8"), quantize(weight, "int4")
    found: list[tuple[Kernel, QuantizedWeight, float]] = [
        (Plain(int8, CPU), int8, 1e-5),
        (Plain(int4, CPU), int4, 1e-5),
        (CpuInt4(int4), int4, 0.005),
    ]
    if torch.backends.quantized.engine in ("x86", "fbgemm"):
        found.append((FbgemmInt8(int8), int8, 0.02))
    return found


@pytest.mark.parametrize("count", [1, 2, 5, 33])
def test_a_product_is_that_of_the_weight_in_full(count: int) -> None:
    rows = matrix(count, 128, seed=1)
    for kernel, weight, bound in kernels(matrix(48, 128)):
        assert off(kernel(rows), rows @ weight.dequantized().T) < bound, kernel


def test_a_row_is_its_own_affair_whatever_is_beside_it() -> None:
    rows = matrix(20, 128, seed=1) * torch.logspace(-4, 4, 20)[:, None]
    rows[:, 7] *= 50
    for kernel, weight, bound in kernels(matrix(48, 128)):
        together = kernel(rows)
        for index in range(len(rows)):
            alone = kernel(rows[index : index + 1])[0]
            assert off(together[index], alone) < 1e-4, kernel
            assert off(alone, weight.dequantized() @ rows[index]) < 2 * bound, kernel


def test_rows_of_zeros_give_zeros() -> None:
    rows = matrix(3, 128)
    rows[1] = 0
    for kernel, _, _ in kernels(matrix(48, 128)):
        assert not kernel(rows)[1].any(), kernel
        assert not kernel(rows[1:2]).any(), kernel


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("rows", [16, 20, 528, 1040])
def test_the_kernel_that_is_chosen_for_a_cpu_takes_any_shape(kind: Kind, rows: int) -> None:
    weight = quantize(matrix(rows, GROUP), kind)
    inputs = matrix(3, GROUP, seed=1)
    assert off(kernel_for(weight, CPU)(inputs), inputs @ weight.dequantized().T) < 0.02


def test_tiles_are_taken_where_the_shape_allows() -> None:
    assert TiledInt4.takes(quantize(matrix(16, 256), "int4"))
    assert not TiledInt4.takes(quantize(matrix(16, 96), "int4"))
    assert not TiledInt4.takes(quantize(matrix(12, 256), "int4"))
    assert not TiledInt4.takes(quantize(matrix(16, 256), "int8"))


def test_the_product_of_8_bit_weights_alone_scales_its_columns() -> None:
    weight = quantize(matrix(48, 128), "int8")  # the operation is CUDA's and the CPU's, so its use can be tried here
    rows = matrix(3, 128, seed=1)
    assert off(WeightOnlyInt8(weight, CPU)(rows), rows @ weight.dequantized().T) < 1e-5


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("count", [1, 3, 40])
def test_the_kernels_of_cuda_are_right(kind: Kind, count: int) -> None:
    weight = quantize(matrix(64, 256), kind)
    rows = matrix(count, 256, seed=1)
    found = kernel_for(weight, CUDA)(rows.to(CUDA)).cpu()
    assert off(found, rows @ weight.dequantized().T) < 0.02
