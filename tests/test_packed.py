"""Weights laid out anew: the same sums, in half of the time and none of the memory."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch
from inprocess import save_random
from test_quantized_stage import CONFIGS, SPAN, run
from torch import nn

from swarm.model import load_ends, load_stage
from swarm.quantization import packed
from swarm.quantization.layers import FixedLinear, Product, weight_bytes
from swarm.quantization.packed import Packed, Transposed
from swarm.types import Span

pytestmark = pytest.mark.skipif(not packed._dtypes(), reason="torch has no oneDNN here")


@pytest.fixture(autouse=True)
def small_ones_too(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(packed, "SMALLEST", 0)
    torch.set_num_threads(1)


@pytest.mark.parametrize("wide", [False, True])
@pytest.mark.parametrize("family", CONFIGS)
def test_a_packed_stage_computes_what_the_plain_one_does(
    family: str, wide: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(packed, "_has_wide_registers", lambda: wide)
    save_random(tmp_path, CONFIGS[family])
    expected = run(load_stage(tmp_path, SPAN, dtype=torch.float32, packed=False))
    found = run(stage := load_stage(tmp_path, SPAN, dtype=torch.float32))
    kernels = {type(module.kernel) for module in stage.model.modules() if isinstance(module, Product)}
    assert kernels == ({Packed} if wide else {Packed, Transposed})
    assert float((found - expected).abs().max() / expected.abs().max()) < 3e-6


@pytest.mark.parametrize("wide", [False, True])
@pytest.mark.parametrize("kernel", [Packed, Transposed])
@pytest.mark.parametrize("rows", [1, 2, 7, 40])
def test_a_product_is_the_plain_one_to_rounding(
    kernel: type, rows: int, wide: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(packed, "_has_wide_registers", lambda: wide)
    weight, inputs = torch.randn(48, 130), torch.randn(rows, 130)
    found, expected = kernel(weight)(inputs), inputs.double() @ weight.double().T
    assert float((found - expected).abs().max() / expected.abs().max()) < 1e-6


def test_bfloat16_is_summed_in_float32() -> None:
    if torch.bfloat16 not in packed._dtypes():
        pytest.skip("this processor does not multiply bfloat16")
    weight, inputs = torch.randn(48, 130).bfloat16(), torch.randn(3, 130).bfloat16()
    expected = (inputs.double() @ weight.double().T).float()
    assert torch.allclose(Packed(weight)(inputs).float(), expected, rtol=2**-8, atol=1e-5)


def test_the_weights_are_there_once_whatever_part_of_the_stage_is_used(tmp_path: Path) -> None:
    save_random(tmp_path, CONFIGS["llama"])
    plain = load_stage(tmp_path, SPAN, dtype=torch.float32, packed=False)
    stage = load_stage(tmp_path, SPAN, dtype=torch.float32)
    kernels = [
        {id(module.kernel) for module in each.model.modules() if isinstance(module, Product)}
        for each in (stage, stage.part(Span(2, 3)))
    ]
    assert len(kernels[1]) == 4
    assert kernels[1] < kernels[0]
    assert weight_bytes(stage.model) == weight_bytes(plain.model)
    assert not [module for module in stage.model.modules() if type(module) is nn.Linear]


def test_a_family_that_looks_at_its_weights_sees_the_very_same(tmp_path: Path) -> None:
    save_random(tmp_path, CONFIGS["llama"])
    for dtype in (torch.float32, torch.bfloat16):
        plain, stage = (load_stage(tmp_path, SPAN, dtype=dtype, packed=each) for each in (False, True))
        for name in ("layers.1.self_attn.k_proj", "layers.0.mlp.down_proj"):
            assert torch.equal(stage.model.get_submodule(name).weight, plain.model.get_submodule(name).weight)


@pytest.mark.parametrize("tied", [False, True])
def test_a_clients_head_is_laid_out_too_and_its_embedding_left_alone(
    tied: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(packed, "SMALLEST", 1)
    config = copy.deepcopy(CONFIGS["llama"])
    config.tie_word_embeddings = tied
    save_random(tmp_path, config)
    plain, ends = (
        load_ends(tmp_path, lambda hidden: hidden * 2, dtype=torch.float32, packed=each) for each in (False, True)
    )
    assert isinstance(ends.get_output_embeddings(), FixedLinear)
    ids = torch.arange(7)[None]
    with torch.inference_mode():
        found, expected = ends(input_ids=ids).logits, plain(input_ids=ids).logits
    assert torch.allclose(found, expected, rtol=1e-5, atol=1e-5)
    assert torch.equal(ends.get_input_embeddings().weight, plain.get_input_embeddings().weight)
