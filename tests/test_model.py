"""Loading and running a part of a model: what is read, what is refused, what can be undone."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import (
    CTRLConfig,
    FalconH1Config,
    Gemma3Config,
    GPT2Config,
    GraniteConfig,
    Lfm2Config,
    LlamaConfig,
    MixtralConfig,
    PreTrainedConfig,
)
from transformers.models.auto.modeling_auto import AutoModelForCausalLM

from swarm.cutting import skeleton, verdict
from swarm.cutting.caches import SessionCache
from swarm.cutting.shrink import shrink
from swarm.cutting.splice import Splice
from swarm.errors import CannotCut, ModelCorrupt, UsageError
from swarm.files.checkpoint import Checkpoint
from swarm.model import check_cut, load_ends, load_stage, num_blocks, reorder, rollback
from swarm.types import Span

SMALL: dict[str, Any] = {
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
}


@pytest.fixture(autouse=True)
def own_cache_folder(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> Path:
    folder = tmp_path_factory.mktemp("cache")
    monkeypatch.setenv("XDG_CACHE_HOME", str(folder))
    torch.set_num_threads(1)
    return folder


@pytest.fixture
def llama(tmp_path: Path) -> Path:
    return save(LlamaConfig(**SMALL), tmp_path / "llama")


def save(config: PreTrainedConfig, folder: Path, dtype: torch.dtype = torch.float32) -> Path:
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(config, dtype=dtype).save_pretrained(folder, max_shard_size="20KB")
    return folder


@pytest.fixture
def taken(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The names of the tensors that are read, in order."""
    names: list[str] = []
    tensor = Checkpoint.tensor

    def note(self: Checkpoint, name: str) -> torch.Tensor:
        names.append(name)
        return tensor(self, name)

    monkeypatch.setattr(Checkpoint, "tensor", note)
    return names


def hidden(rows: int, positions: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.randn(rows, positions, 32, generator=torch.Generator().manual_seed(5)).to(dtype)


# --- what is read -----------------------------------------------------------------------------------------------------


def test_a_stage_reads_the_tensors_of_its_span_and_no_others(llama: Path, taken: list[str]) -> None:
    load_stage(llama, Span(1, 3), dtype=torch.float32)
    expected = [name for name in Checkpoint(llama).names if name.startswith(("model.layers.1.", "model.layers.2."))]
    assert sorted(taken) == sorted(expected)


def test_a_stage_reads_the_experts_of_its_span_and_no_others(tmp_path: Path, taken: list[str]) -> None:
    folder = save(MixtralConfig(**SMALL, num_local_experts=4), tmp_path)
    load_stage(folder, Span(3, 4), dtype=torch.float32)
    assert taken
    assert all(name.startswith("model.layers.3.") for name in taken)
    assert sum("experts" in name for name in taken) == 4 * 3  # as on the hub: three matrices for each expert


def test_the_ends_read_no_block(llama: Path, taken: list[str]) -> None:
    load_ends(llama, lambda states: states, dtype=torch.float32)
    assert sorted(taken) == ["lm_head.weight", "model.embed_tokens.weight", "model.norm.weight"]


def test_a_checkpoint_of_the_base_model_loads_too(tmp_path: Path, taken: list[str]) -> None:
    model = AutoModelForCausalLM.from_config(GPT2Config(n_embd=32, n_head=4, n_layer=3, vocab_size=64))
    model.base_model.save_pretrained(tmp_path)  # names without "transformer.", and no head: it is tied
    stage = load_stage(tmp_path, Span(2, 3), dtype=torch.float32)
    assert {name.partition(".attn")[0].partition(".mlp")[0].partition(".ln")[0] for name in taken} == {"h.2"}
    assert torch.equal(stage.model.get_submodule("h.0.ln_1").weight, model.base_model.h[2].ln_1.weight)
    ends = load_ends(tmp_path, lambda states: states, dtype=torch.float32)
    assert ends.lm_head.weight is ends.transformer.wte.weight


def test_weights_in_the_wanted_dtype_are_mapped_and_not_copied(llama: Path) -> None:
    stage = load_stage(llama, Span(0, 1), dtype=torch.float32)
    weight = stage.model.get_submodule("layers.0.mlp.up_proj").weight
    assert weight.is_contiguous()
    mapped = Path("/proc/self/maps").read_text().splitlines()
    ranges = [tuple(int(end, 16) for end in line.split()[0].split("-")) for line in mapped if "safetensors" in line]
    assert any(start <= weight.data_ptr() < end for start, end in ranges)


def test_progress_goes_up_to_the_bytes_of_the_span(llama: Path) -> None:
    seen: list[tuple[int, int]] = []
    load_stage(llama, Span(0, 2), dtype=torch.float32, progress=lambda done, total: seen.append((done, total)))
    names = Checkpoint(llama).names
    total = sum(info.nbytes for name, info in names.items() if name.startswith(("model.layers.0.", "model.layers.1.")))
    assert [done for done, _ in seen] == sorted({done for done, _ in seen})
    assert seen[-1] == (total, total)


# --- precision --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_that_of_the_whole_model(llama: Path, dtype: torch.dtype) -> None:
    whole = AutoModelForCausalLM.from_pretrained(llama, dtype=dtype)
    stage = load_stage(llama, Span(0, 4), dtype=dtype)
    rotary = stage.model.rotary_emb.inv_freq
    assert rotary.dtype == whole.model.rotary_emb.inv_freq.dtype == torch.float32
    assert torch.equal(rotary, whole.model.rotary_emb.inv_freq)
    states = hidden(1, 5, dtype)
    found = stage.forward(states, position=0, cache=stage.new_cache())
    with torch.inference_mode():
        expected = whole.model(inputs_embeds=states).last_hidden_state
    assert found.dtype == dtype
    assert torch.equal(whole.model.norm(found), expected)


def test_attention_is_what_transformers_would_choose(llama: Path) -> None:
    whole = AutoModelForCausalLM.from_pretrained(llama)
    chosen = whole.config._attn_implementation
    assert load_stage(llama, Span(0, 1), dtype=torch.float32).config._attn_implementation == chosen
    assert load_ends(llama, lambda states: states, dtype=torch.float32).config._attn_implementation == chosen


def test_buffers_that_a_whole_model_computes_are_computed_for_a_part(tmp_path: Path) -> None:
    mamba = {"mamba_d_ssm": 32, "mamba_n_heads": 4, "mamba_d_head": 8, "mamba_d_state": 8, "head_dim": 8}
    folder = save(FalconH1Config(**SMALL, **mamba, ssm_multipliers=[2.0, 3.0, 4.0, 5.0, 6.0]), tmp_path)
    stage = load_stage(folder, Span(1, 3), dtype=torch.float32)
    whole = AutoModelForCausalLM.from_pretrained(folder)
    assert torch.equal(stage.model.layers[1].mamba.mup_vector, whole.model.layers[2].mamba.mup_vector)


# --- what is refused --------------------------------------------------------------------------------------------------


def test_blocks_out_of_range_are_refused_with_the_range(llama: Path) -> None:
    with pytest.raises(UsageError, match="0:4"):
        load_stage(llama, Span(3, 5), dtype=torch.float32)


def test_a_damaged_shard_is_refused_with_its_name(llama: Path) -> None:
    shard = Checkpoint(llama).names["model.layers.2.mlp.up_proj.weight"].file
    shard.write_bytes(shard.read_bytes()[:-10])
    with pytest.raises(ModelCorrupt, match=shard.name):
        load_stage(llama, Span(2, 3), dtype=torch.float32)


def test_a_weight_that_is_missing_is_named(llama: Path) -> None:
    index = llama / "model.safetensors.index.json"
    content = json.loads(index.read_text())
    del content["weight_map"]["model.layers.2.mlp.up_proj.weight"]
    index.write_text(json.dumps(content))
    load_stage(llama, Span(0, 2), dtype=torch.float32)
    with pytest.raises(ModelCorrupt, match=r"model\.layers\.2\.mlp\.up_proj\.weight"):
        load_stage(llama, Span(2, 3), dtype=torch.float32)


def test_a_weight_of_another_shape_is_named(llama: Path) -> None:
    path = llama / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "intermediate_size": 40}))
    with pytest.raises(ModelCorrupt, match=r"mlp.* has shape .*48"):
        load_stage(llama, Span(0, 1), dtype=torch.float32)


def test_a_family_that_cannot_be_cut_is_refused_with_the_reason() -> None:
    with pytest.raises(CannotCut, match=r"ctrl: cut in stages it computes something else \(off by"):
        check_cut(CTRLConfig(n_embd=32, n_head=4, n_layer=4, dff=48, vocab_size=64))


def test_a_model_of_more_than_text_is_refused() -> None:
    with pytest.raises(CannotCut, match="more than text"):
        check_cut(Gemma3Config())


def test_what_a_trial_would_not_show_is_refused() -> None:
    with pytest.raises(CannotCut, match="stored quantized"):
        check_cut(LlamaConfig(**SMALL, quantization_config={"quant_method": "fp8"}))
    rope = {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 10000.0}
    with pytest.raises(CannotCut, match="longest session"):
        check_cut(LlamaConfig(**SMALL, rope_parameters=rope))


def test_a_config_without_a_causal_model_is_refused() -> None:
    with pytest.raises(CannotCut, match="no causal language model"):
        check_cut(PreTrainedConfig(num_hidden_layers=2, vocab_size=9, hidden_size=8))


# --- the verdict ------------------------------------------------------------------------------------------------------


def test_a_good_verdict_is_kept(own_cache_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    check_cut(LlamaConfig(**SMALL))
    assert len(list((own_cache_folder / "shoal" / "cuts").glob("*.json"))) == 1
    monkeypatch.setattr(verdict, "_try_cut", lambda config: pytest.fail("tried again"))
    check_cut(LlamaConfig(**SMALL))
    with pytest.raises(pytest.fail.Exception, match="tried again"):
        check_cut(LlamaConfig(**{**SMALL, "attention_bias": True}))


def test_a_bad_verdict_is_not_kept(own_cache_folder: Path) -> None:
    for _ in range(2):
        with pytest.raises(CannotCut):
            check_cut(CTRLConfig(n_embd=32, n_head=4, n_layer=4, dff=48, vocab_size=64))
    assert not list(own_cache_folder.rglob("*.json"))


def test_a_damaged_verdict_is_found_out_again(own_cache_folder: Path) -> None:
    check_cut(LlamaConfig(**SMALL))
    (kept,) = (own_cache_folder / "shoal" / "cuts").glob("*.json")
    text = kept.read_text()
    kept.write_text("[1,")
    check_cut(LlamaConfig(**SMALL))
    assert kept.read_text() == text


def test_a_cut_that_forgets_the_true_input_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Splice, "enter_at", lambda self, block: None)
    check_cut(LlamaConfig(**SMALL))  # nothing happens to its embeddings before the first block
    with pytest.raises(CannotCut, match="computes something else"):
        check_cut(GraniteConfig(**SMALL, embedding_multiplier=12.0))


def test_a_cut_that_forgets_to_number_the_blocks_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(skeleton, "_BLOCK_INDEX", ())
    with pytest.raises(CannotCut, match="cut in stages it fails with IndexError"):
        check_cut(LlamaConfig(**SMALL))


def test_trying_the_cut_leaves_the_callers_dice_alone() -> None:
    torch.manual_seed(3)
    expected = torch.rand(1)
    torch.manual_seed(3)
    check_cut(LlamaConfig(**SMALL))
    assert torch.equal(torch.rand(1), expected)


def test_a_small_copy_is_small_and_has_every_kind_of_block() -> None:
    config = LlamaConfig(hidden_size=8192, num_hidden_layers=80, num_attention_heads=64, num_key_value_heads=8)
    small = shrink(config)
    assert num_blocks(small) == 3
    assert small.hidden_size <= 256
    kinds = ["conv", "conv", "conv", "conv", "full_attention", *["conv"] * 7]
    small = shrink(Lfm2Config(num_hidden_layers=12, layer_types=kinds))
    assert small.layer_types == kinds[:5]


# --- running ----------------------------------------------------------------------------------------------------------


def test_repr_shows_the_span(llama: Path) -> None:
    stage = load_stage(llama, Span(1, 3), dtype=torch.bfloat16)
    assert repr(stage) == "<StageModel 1:3 llama bfloat16>"
    assert (stage.num_blocks, stage.hidden_size, stage.supports_rollback) == (2, 32, True)


def test_after_a_rollback_it_is_as_if_nothing_had_come_after(llama: Path) -> None:
    stage = load_stage(llama, Span(1, 3), dtype=torch.float32)
    states, cache, fresh = hidden(1, 9), stage.new_cache(), stage.new_cache()
    stage.forward(states, position=0, cache=cache)
    rollback(cache, 4)
    assert cache.length == cache.get_seq_length() == 4
    stage.forward(states[:, :4], position=0, cache=fresh)
    again = [stage.forward(states[:, 7:8], position=4, cache=each) for each in (cache, fresh)]
    assert torch.allclose(*again, atol=1e-6)
    with pytest.raises(CannotCut, match="cannot go on to 6"):
        rollback(cache, 6)


def test_a_recurrent_state_is_not_rolled_back(tmp_path: Path) -> None:
    folder = save(Lfm2Config(**SMALL, layer_types=["conv", "full_attention"] * 2), tmp_path)
    recurrent, attentive = (load_stage(folder, Span(at, at + 1), dtype=torch.float32) for at in (0, 1))
    assert (recurrent.supports_rollback, attentive.supports_rollback) == (False, True)
    cache = recurrent.new_cache()
    recurrent.forward(hidden(1, 4), position=0, cache=cache)
    rollback(cache, 4)
    with pytest.raises(CannotCut, match="recurrent state"):
        rollback(cache, 3)


def test_reorder_moves_the_rows_of_every_block(llama: Path) -> None:
    stage = load_stage(llama, Span(0, 2), dtype=torch.float32)
    states, caches = hidden(3, 5), [stage.new_cache(), stage.new_cache()]
    rows = torch.tensor([2, 2, 0])
    stage.forward(states, position=0, cache=caches[0])
    reorder(caches[0], rows)
    stage.forward(states[rows], position=0, cache=caches[1])
    found = [stage.forward(hidden(3, 1), position=5, cache=cache) for cache in caches]
    assert torch.allclose(*found, atol=1e-6)


def test_without_a_cache_gradients_flow_to_the_input_and_the_weights(llama: Path) -> None:
    stage = load_stage(llama, Span(1, 3), dtype=torch.float32)
    states = hidden(2, 5).requires_grad_()
    stage.run(states).square().sum().backward()
    assert states.grad is not None
    assert all(weight.grad is not None for weight in stage.model.layers.parameters())


def test_a_sessions_cache_says_how_long_it_is(llama: Path) -> None:
    stage = load_stage(llama, Span(1, 3), dtype=torch.float32)
    cache = stage.new_cache()
    stage.forward(hidden(1, 4), position=0, cache=cache)
    assert isinstance(cache, SessionCache)
    assert repr(cache) == "<SessionCache layers=2 length=4>"


# --- the ends ---------------------------------------------------------------------------------------------------------


def test_the_ends_are_of_the_familys_class_with_the_mixin_first(llama: Path) -> None:
    class Greeting:
        def greet(self) -> str:
            return "hello"

    (llama / "generation_config.json").write_text(
        json.dumps({"max_new_tokens": 3, "temperature": 0.5, "do_sample": True})
    )
    ends = load_ends(llama, lambda states: states, dtype=torch.float32, mixin=Greeting)
    whole = AutoModelForCausalLM.from_pretrained(llama)
    assert isinstance(ends, type(whole))
    assert type(ends).__name__ == "LlamaForCausalLM"
    assert type(ends).__mro__[1] is Greeting
    assert ends.config.num_hidden_layers == 4
    assert ends.generation_config.temperature == 0.5
    assert ends.name_or_path == str(llama)
