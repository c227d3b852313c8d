"""The largest of many scores, found by looking at few: always the one that the whole product has."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from inprocess import save_llama
from test_decoding import PROMPT, Drafting

from swarm.quantization import packed, screening
from swarm.quantization.kernels import FbgemmInt8
from swarm.quantization.packed import Packed, Transposed, pack_head
from swarm.quantization.screening import Screened, largest_alone, screens
from swarm.speculation.tuning import Speculate

pytestmark = pytest.mark.skipif(not FbgemmInt8.is_here(), reason="torch has no 8-bit products here")

DTYPES = [dtype for dtype in packed._dtypes() if dtype is torch.bfloat16 or dtype is torch.float32]


def head(weight: torch.Tensor) -> Screened:
    exact = Transposed(weight) if weight.dtype == torch.float32 else Packed(weight)
    return Screened(exact, weight, lambda numbers: weight[numbers])


@st.composite
def products(draw: st.DrawFn) -> tuple[torch.Tensor, torch.Tensor]:
    """A matrix and rows, as awkward as they come: rows that nearly tie, in sizes that differ a thousandfold."""
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**32 - 1)))
    columns = draw(st.integers(1, 96))
    weight = torch.randn(draw(st.integers(16, 400)), columns, generator=generator)
    if draw(st.booleans()):  # each is some of a few, and a little more
        few = weight[torch.randint(0, 4, (len(weight),), generator=generator)]
        weight = few + draw(st.sampled_from([0.0, 1e-6, 1e-3])) * weight
    weight = weight * torch.logspace(-draw(st.integers(0, 3)), 0, len(weight))[:, None]
    rows = torch.randn(draw(st.integers(1, 4)), columns, generator=generator) * draw(st.sampled_from([1e-3, 1.0, 1e4]))
    if draw(st.booleans()):  # one value dwarfs the others, as in the hidden states of many models
        rows[:, 0] *= 300
    dtype = draw(st.sampled_from(DTYPES))
    return weight.to(dtype), rows.to(dtype)


@given(products())
def test_the_largest_is_that_of_the_whole_product(given: tuple[torch.Tensor, torch.Tensor]) -> None:
    weight, rows = given
    screened = head(weight)
    with largest_alone():
        found = screened(rows).to(rows.dtype)
    truth = rows.double() @ weight.double().T
    chosen = truth.gather(1, found.argmax(1, keepdim=True))[:, 0]
    rounding = torch.finfo(rows.dtype).eps * truth.abs().amax(1)  # moves the whole product as much, and so does this:
    summing = weight.shape[1] * torch.finfo(torch.float32).eps * (rows.double().abs() @ weight.double().abs().T).amax(1)
    assert (chosen >= truth.amax(1) - rounding - summing).all()


@given(products())
def test_bounds_hold_for_every_score(given: tuple[torch.Tensor, torch.Tensor]) -> None:
    weight, rows = given
    screened = head(weight)
    scores, left = screened._rough.fine(rows)
    bounds = rows.float().norm(dim=1)[:, None] * screened._lost + left.norm(dim=1)[:, None] * screened._norms
    assert ((scores.double() - rows.double() @ weight.double().T).abs() <= bounds).all()


def clear_cut() -> tuple[torch.Tensor, torch.Tensor]:
    """[512, 64], and a row to which one of them is near."""
    weight = torch.randn(512, 64, generator=torch.Generator().manual_seed(3))
    return weight, weight[77:78] + 0.1


def counted(screened: Screened, monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """How many rows were multiplied in full, each time."""
    counts: list[int] = []
    take = screened._take

    def counting(numbers: torch.Tensor) -> torch.Tensor:
        counts.append(len(numbers))
        return take(numbers)

    monkeypatch.setattr(screened, "_take", counting)
    return counts


def test_few_rows_are_multiplied_in_full(monkeypatch: pytest.MonkeyPatch) -> None:
    weight, row = clear_cut()
    screened = head(weight)
    counts = counted(screened, monkeypatch)
    with largest_alone():
        scores = screened(row.repeat(3, 1))
    assert counts == [1, 1, 1]
    assert scores.argmax(1).tolist() == [77] * 3
    assert torch.allclose(scores[:, 77], (row @ weight.T)[:, 77])
    assert float((scores - row @ weight.T).abs().max()) < 0.5  # the others are what they about are


def test_whoever_wants_all_scores_gets_the_exact_ones(monkeypatch: pytest.MonkeyPatch) -> None:
    weight, row = clear_cut()
    screened = head(weight)
    counts = counted(screened, monkeypatch)
    assert torch.equal(screened(row), Transposed(weight)(row))
    with largest_alone():
        many = row.repeat(screening._FEW + 1, 1)
        assert torch.equal(screened(many), Transposed(weight)(many))
    assert torch.equal(screened(row), Transposed(weight)(row))
    assert not counts


@pytest.mark.parametrize("value", [float("nan"), float("inf"), 0.0])
def test_where_bounds_say_nothing_all_is_multiplied(value: float) -> None:
    weight, row = clear_cut()
    row = torch.full_like(row, value)
    with largest_alone():
        found = head(weight)(row)
    assert torch.equal(found.nan_to_num(nan=1.5), Transposed(weight)(row).nan_to_num(nan=1.5))


def test_a_matrix_that_is_small_or_holds_what_is_no_number_is_not_screened() -> None:
    assert not screens(torch.zeros(8, 8))
    large = torch.zeros(screening.SMALLEST // 64, 64)
    assert screens(large)
    large[5, 5] = float("nan")
    assert not screens(large)


# --- in a model ------------------------------------------------------------------------------------------------------


@pytest.fixture
def model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, tied: bool) -> Any:
    monkeypatch.setattr(packed, "SMALLEST", 0)
    monkeypatch.setattr(screening, "SMALLEST", 0)
    monkeypatch.setattr(screening, "_WORTH", 1)
    save_llama(tmp_path, num_hidden_layers=1, tie_word_embeddings=tied)
    model: Any = Drafting.from_pretrained(tmp_path)
    pack_head(model)
    return model


def answer(model: Any, **options: Any) -> Any:
    return model.generate(PROMPT, attention_mask=torch.ones_like(PROMPT), max_new_tokens=16, **options)


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("mode", ["off", "lookup"])
def test_greedy_answers_are_screened_and_the_same(
    model: Any, tied: bool, mode: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    kernel = model.lm_head.product.kernel
    assert isinstance(kernel, Screened)
    counts = counted(kernel, monkeypatch)
    model.how = Speculate(mode)  # type: ignore[arg-type]
    plain: Any = Drafting.from_pretrained(tmp_path)
    plain.how = Speculate("off")
    found, expected = answer(model, do_sample=False), answer(plain, do_sample=False)
    assert torch.equal(found, expected)
    assert len(counts) >= (16 if mode == "off" else 1)


@pytest.mark.parametrize("tied", [True])
@pytest.mark.parametrize(
    "options",
    [
        {"do_sample": True},
        {"repetition_penalty": 1.2},
        {"num_beams": 2},
        {"return_dict_in_generate": True, "output_scores": True},
        {"return_dict_in_generate": True, "output_logits": True},
    ],
    ids=lambda options: next(reversed(options)),
)
def test_what_looks_at_all_scores_is_not_screened(
    model: Any, tied: bool, options: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    counts = counted(model.lm_head.product.kernel, monkeypatch)
    model.how = Speculate("off")
    answer(model, **{"do_sample": False, **options})
    assert not counts
