"""Stages with quantized weights: loaded block by block, kept on disk, near the exact ones for every family."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from inprocess import save_random
from torch import nn
from transformers import (
    BloomConfig,
    Gemma3TextConfig,
    GPT2Config,
    GptOssConfig,
    LlamaConfig,
    MixtralConfig,
    OPTConfig,
    PhiConfig,
    Qwen2Config,
)

from swarm.errors import ModelCorrupt, UsageError
from swarm.files.checkpoint import Checkpoint
from swarm.model import StageModel, load_ends, load_stage
from swarm.quantization.layers import FixedLinear, Product, linears, weight_bytes
from swarm.quantization.weights import GROUP, KINDS, Kind
from swarm.types import Span

SMALL: dict[str, Any] = {
    "vocab_size": 64,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
}
GPT2_SIZES: dict[str, Any] = {"vocab_size": 64, "n_embd": 64, "n_layer": 3, "n_head": 4, "bos_token_id": 1}
CONFIGS = {
    "llama": LlamaConfig(**SMALL),
    "llama with biases": LlamaConfig(**SMALL, attention_bias=True, mlp_bias=True),
    "qwen2": Qwen2Config(**SMALL),
    "gemma3": Gemma3TextConfig(**SMALL, head_dim=16),
    "mixtral": MixtralConfig(**SMALL, num_local_experts=4),
    "gpt_oss": GptOssConfig(**SMALL, num_local_experts=4, num_experts_per_tok=2, head_dim=16),  # transposed, biases
    "gpt2": GPT2Config(**GPT2_SIZES, eos_token_id=2),
    "opt": OPTConfig(**{**SMALL, "ffn_dim": 96, "word_embed_proj_dim": 64}),
    "bloom": BloomConfig(vocab_size=64, hidden_size=64, n_layer=3, n_head=4),
    "phi": PhiConfig(**{**SMALL, "num_key_value_heads": 4}),
}
SPAN = Span(1, 3)


@pytest.fixture(autouse=True)
def own_cache_folder(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> Path:
    folder = tmp_path_factory.mktemp("cache")
    monkeypatch.setenv("XDG_CACHE_HOME", str(folder))
    torch.set_num_threads(1)
    return folder


@pytest.fixture
def llama(tmp_path: Path) -> Path:
    save_random(tmp_path / "llama", CONFIGS["llama"])
    return tmp_path / "llama"


def run(stage: StageModel, rows: int = 2, positions: int = 5) -> torch.Tensor:
    """Two steps of one session."""
    hidden = torch.randn(rows, positions + 1, 64, generator=torch.Generator().manual_seed(5))
    cache = stage.new_cache()
    first = stage.forward(hidden[:, :-1], position=0, cache=cache)
    return torch.cat([first, stage.forward(hidden[:, -1:], position=positions, cache=cache)], dim=1)


def off(found: torch.Tensor, expected: torch.Tensor) -> float:
    with torch.no_grad():
        return float((found - expected).norm() / expected.norm())


def cached(folder: Path) -> list[Path]:
    return sorted(folder.rglob("block-*.safetensors"))


# --- what is computed -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", CONFIGS)
@pytest.mark.parametrize(("kind", "bound"), [("int8", 0.03), ("int4", 0.25)])
def test_a_quantized_stage_is_near_the_exact_one(family: str, kind: Kind, bound: float, tmp_path: Path) -> None:
    save_random(tmp_path, CONFIGS[family])
    expected = run(load_stage(tmp_path, SPAN, dtype=torch.float32))
    first = run(load_stage(tmp_path, SPAN, dtype=torch.float32, quantize=kind))
    assert 0 < off(first, expected) < bound
    assert torch.equal(run(load_stage(tmp_path, SPAN, dtype=torch.float32, quantize=kind)), first)  # from the disk


def test_no_layer_of_a_block_is_left_in_full_precision(llama: Path) -> None:
    stage = load_stage(llama, SPAN, dtype=torch.float32, quantize="int8")
    assert not [module for module in stage.model.modules() if type(module) is nn.Linear]
    assert len([module for module in stage.model.modules() if isinstance(module, FixedLinear)]) == 2 * 7


def test_no_expert_is_left_in_full_precision(tmp_path: Path) -> None:
    save_random(tmp_path, CONFIGS["mixtral"])
    exact, int4 = (
        weight_bytes(load_stage(tmp_path, SPAN, dtype=torch.float32, quantize=q).model) for q in (None, "int4")
    )
    assert int4 == pytest.approx(0.16 * exact, rel=0.03)


def test_an_expert_gives_each_token_what_it_gives_it_alone(tmp_path: Path) -> None:
    save_random(tmp_path, CONFIGS["mixtral"])
    experts = load_stage(tmp_path, SPAN, dtype=torch.float32, quantize="int8").model.get_submodule(
        "layers.0.mlp.experts"
    )
    hidden, chosen, weights = (
        torch.randn(5, 64),
        torch.tensor([[0, 3], [3, 1], [2, 0], [0, 1], [4, 2]]),
        torch.rand(5, 2),
    )
    with torch.inference_mode():
        together = experts(hidden, chosen, weights)
        alone = [experts(hidden[i : i + 1], chosen[i : i + 1], weights[i : i + 1]) for i in range(5)]
    torch.testing.assert_close(together, torch.cat(alone), rtol=1e-5, atol=1e-6)


def test_the_memory_of_a_quantized_stage_is_told(llama: Path) -> None:
    exact, int8, int4 = (
        weight_bytes(load_stage(llama, SPAN, dtype=torch.float32, quantize=kind).model) for kind in (None, *KINDS)
    )
    assert int8 == pytest.approx(0.268 * exact, rel=0.02)
    assert int4 == pytest.approx(0.160 * exact, rel=0.02)


def test_layers_with_one_input_share_one_product(llama: Path) -> None:
    stage = load_stage(llama, SPAN, dtype=torch.float32, quantize="int8")
    products = [module for module in stage.model.modules() if isinstance(module, Product)]
    assert sorted(len(product.sizes) for product in products) == [1, 1, 1, 1, 2, 2, 3, 3]


def test_layers_that_share_a_product_are_right_for_different_inputs_too(llama: Path) -> None:
    exact = load_stage(llama, SPAN, dtype=torch.float32).model.get_submodule("layers.0.self_attn")
    attention = load_stage(llama, SPAN, dtype=torch.float32, quantize="int8").model.get_submodule("layers.0.self_attn")
    one, other = torch.randn(2, 3, 64), torch.randn(2, 3, 64)
    with torch.inference_mode():
        for name, hidden in (("q_proj", one), ("k_proj", other), ("k_proj", one), ("q_proj", one), ("v_proj", other)):
            found = attention.get_submodule(name)(hidden)
            assert off(found, exact.get_submodule(name)(hidden)) < 0.02
            assert found.is_contiguous()


def test_a_family_that_looks_at_its_weights_sees_them(llama: Path) -> None:
    exact = load_stage(llama, SPAN, dtype=torch.float32).model.get_submodule("layers.1.mlp.up_proj")
    layer = load_stage(llama, SPAN, dtype=torch.float32, quantize="int8").model.get_submodule("layers.1.mlp.up_proj")
    assert off(layer.weight, exact.weight) < 0.01
    assert (layer.in_features, layer.out_features, layer.bias) == (64, 96, None)


def test_routers_stay_exact(tmp_path: Path) -> None:
    block = nn.ModuleDict({"gate": nn.Linear(4, 4), "gate_proj": nn.Linear(4, 4), "experts": nn.Linear(4, 4)})
    assert set(linears(block)) == {"gate_proj", "experts"}


def test_a_part_of_a_stage_shares_its_weights(llama: Path) -> None:
    stage = load_stage(llama, SPAN, dtype=torch.float32, quantize="int8")
    part = stage.part(Span(2, 3))
    mine, theirs = (
        each.model.get_submodule(f"layers.{index}.mlp.up_proj").product.kernel
        for each, index in ((stage, 1), (part, 0))
    )
    assert mine is theirs
    alone = load_stage(llama, Span(2, 3), dtype=torch.float32, quantize="int8")
    assert torch.equal(run(part), run(alone))


def test_gradients_through_quantized_weights_are_refused(llama: Path) -> None:
    stage = load_stage(llama, SPAN, dtype=torch.float32, quantize="int8")
    with pytest.raises(UsageError, match="no gradients"):
        stage.run(torch.randn(1, 3, 64, requires_grad=True))


def test_a_stage_in_bfloat16_can_be_quantized(llama: Path) -> None:
    expected = run(load_stage(llama, SPAN, dtype=torch.float32))
    stage = load_stage(llama, SPAN, dtype=torch.bfloat16, quantize="int8")
    hidden = torch.randn(2, 6, 64, generator=torch.Generator().manual_seed(5)).bfloat16()
    found = stage.forward(hidden, position=0, cache=stage.new_cache())
    assert found.dtype == torch.bfloat16
    assert off(found.float(), expected) < 0.05


@pytest.mark.parametrize(("kind", "bound"), [("int8", 0.02), ("int4", 0.15)])
def test_a_quantized_head_is_near_the_exact_one(kind: Kind, bound: float, llama: Path, own_cache_folder: Path) -> None:
    exact = load_ends(llama, lambda states: states, dtype=torch.float32)
    tokens = torch.arange(10).unsqueeze(0)
    for _ in range(2):  # the second comes from the disk
        ends = load_ends(llama, lambda states: states, dtype=torch.float32, quantize=kind)
        assert isinstance(ends.lm_head, FixedLinear)
        with torch.inference_mode():
            assert 0 < off(ends(tokens, use_cache=False).logits, exact(tokens, use_cache=False).logits) < bound
    assert [file.name for file in cached(own_cache_folder)] == ["block-00003.safetensors"]


# --- what is read and kept --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
def test_the_second_start_reads_no_matrix(
    kind: Kind, llama: Path, own_cache_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    load_stage(llama, SPAN, dtype=torch.float32, quantize=kind)
    assert [file.name for file in cached(own_cache_folder)] == ["block-00001.safetensors", "block-00002.safetensors"]
    names: list[str] = []
    tensor = Checkpoint.tensor
    monkeypatch.setattr(Checkpoint, "tensor", lambda self, name: (names.append(name), tensor(self, name))[1])
    told: list[tuple[int, int]] = []
    load_stage(llama, SPAN, dtype=torch.float32, quantize=kind, progress=lambda *step: told.append(step))
    assert names
    assert all("layernorm" in name for name in names)
    assert told[-1][0] == told[-1][1]


@pytest.mark.parametrize("damage", [b"", b"nonsense", None])
def test_a_damaged_file_is_made_anew(damage: bytes | None, llama: Path, own_cache_folder: Path) -> None:
    expected = run(load_stage(llama, SPAN, dtype=torch.float32, quantize="int8"))
    file, _ = cached(own_cache_folder)
    whole = file.read_bytes()
    file.write_bytes(whole[:-100] if damage is None else damage)
    assert torch.equal(run(load_stage(llama, SPAN, dtype=torch.float32, quantize="int8")), expected)
    assert file.read_bytes() == whole


def test_weights_of_another_shape_are_not_taken(llama: Path, own_cache_folder: Path) -> None:
    expected = run(load_stage(llama, SPAN, dtype=torch.float32, quantize="int8"))
    load_stage(llama, SPAN, dtype=torch.float32, quantize="int4")
    file = next(file for file in cached(own_cache_folder) if "int8" in file.parent.name)
    file.write_bytes(next(file for file in cached(own_cache_folder) if "int4" in file.parent.name).read_bytes())
    assert torch.equal(run(load_stage(llama, SPAN, dtype=torch.float32, quantize="int8")), expected)


def test_another_model_has_other_files(tmp_path: Path) -> None:
    stages = []
    for seed in (0, 1):
        save_random(tmp_path / str(seed), CONFIGS["llama"], seed)
        stages.append(load_stage(tmp_path / str(seed), SPAN, dtype=torch.float32, quantize="int8"))
    assert off(run(stages[0]), run(stages[1])) > 0.5


def test_a_cache_that_cannot_be_written_costs_no_more_than_time(
    llama: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", "/proc/nowhere")
    run(load_stage(llama, SPAN, dtype=torch.float32, quantize="int8"))
    assert "cannot be kept" in caplog.text


def test_a_weight_that_is_no_number_is_found(tmp_path: Path) -> None:
    model = save_random(tmp_path, CONFIGS["llama"])
    with torch.no_grad():
        model.model.layers[1].mlp.up_proj.weight[0, 0] = torch.nan
    model.save_pretrained(tmp_path)
    with pytest.raises(ModelCorrupt, match="finite"):
        load_stage(tmp_path, SPAN, dtype=torch.float32, quantize="int8")


_PEAK = """
import ctypes, shutil, sys, torch
from pathlib import Path
from swarm.files.checkpoint import cache_folder
from swarm.model import load_stage
from swarm.types import Span
torch.set_num_threads(1)
folder, kind = Path(sys.argv[1]), sys.argv[2]
load_stage(folder, Span(1, 6), dtype=torch.float32, quantize=kind)  # what is needed once
shutil.rmtree(cache_folder() / "quantized")
ctypes.CDLL(None).malloc_trim(0)

def memory(what):
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(what))

Path("/proc/self/clear_refs").write_text("5")  # the peak begins anew
before = memory("VmRSS")
stage = load_stage(folder, Span(1, 6), dtype=torch.float32, quantize=kind)
print(memory("VmHWM") - before, memory("VmRSS") - before)
"""


@pytest.mark.slow
@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads what Linux tells of a process's memory")
@pytest.mark.parametrize("kind", KINDS)
def test_loading_takes_no_more_than_the_quantized_span_and_one_block(kind: Kind, tmp_path: Path) -> None:
    sizes = {**SMALL, "hidden_size": 768, "intermediate_size": 2048, "num_hidden_layers": 6, "num_key_value_heads": 4}
    model = save_random(tmp_path, LlamaConfig(**sizes))
    block = sum(weight.nbytes for weight in model.model.layers[0].parameters())  # as stored, in float32: 28 MB
    del model
    command = [sys.executable, "-c", _PEAK, str(tmp_path), kind]
    peak, after = map(int, subprocess.run(command, check=True, capture_output=True, text=True).stdout.split())
    quantized = 5 * block * (1.01 if kind == "int8" else 0.5 + 4 / GROUP) / 4  # bytes a weight, over 4 in float32
    assert after < quantized + 8e6
    assert peak < quantized + block + 16e6
