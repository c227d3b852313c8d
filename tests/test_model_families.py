"""Every family: cut in stages and ends it computes what it computes whole, or it is refused with the reason.

The oracle is the uncut model of transformers; a peer's engine, which runs several sessions at once, is held to it too.
Models are tiny and random, with no weight left at zero or one, saved in several shards; sliding windows are shorter
than the prompt, and one row of the batch is padded on the left.
"""

from __future__ import annotations

import inspect
import itertools
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import CONFIG_MAPPING, AutoModelForCausalLM, Cache, DynamicCache, PreTrainedConfig, PreTrainedModel

from peer.stage import Stage, StepInput
from swarm.cutting.caches import LengthCache
from swarm.errors import CannotCut
from swarm.model import check_cut, load_ends, load_stage, num_blocks
from swarm.types import Span

PROMPT = 11  # positions, prefilled in two pieces
PIECES = (6, 5, 1, 1, 1, 1)
PADDING = 3
NEW_TOKENS = 6

COMMON: dict[str, Any] = {
    "vocab_size": 99,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "sliding_window": 4,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": None,
}
EXPERTS: dict[str, Any] = {
    "num_experts": 4,
    "num_local_experts": 4,
    "n_routed_experts": 4,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 16,
}
LATENT: dict[str, Any] = {
    "q_lora_rank": 16,
    "kv_lora_rank": 16,
    "qk_rope_head_dim": 8,
    "qk_nope_head_dim": 8,
    "v_head_dim": 8,
    "head_dim": 8,
    "n_group": 2,
    "topk_group": 1,
    "num_key_value_heads": 4,
}
SLIDING = ["sliding_attention", "full_attention"] * 2

RIGHT: dict[str, dict[str, Any]] = {
    "llama": {},
    "gpt2": {},
    "qwen2": {"use_sliding_window": True, "max_window_layers": 2},
    "qwen3": {"head_dim": 8},
    "qwen3_moe": {**EXPERTS, "head_dim": 8, "mlp_only_layers": [1]},
    "mistral": {},
    "mixtral": EXPERTS,
    "gemma": {"head_dim": 8},
    "gemma2": {"head_dim": 8, "query_pre_attn_scalar": 8},
    "gemma3_text": {"head_dim": 8, "query_pre_attn_scalar": 8, "layer_types": SLIDING},
    "phi": {"num_key_value_heads": 4},
    "phi3": {},
    "opt": {"ffn_dim": 48, "word_embed_proj_dim": 16},
    "bloom": {},
    "falcon": {"alibi": False},
    "gpt_neox": {},
    "gpt_neo": {"attention_types": [[["global", "local"], 2]], "window_size": 4},
    "gptj": {"rotary_dim": 4},
    "codegen": {"rotary_dim": 4},
    "stablelm": {},
    "olmo2": {},
    "olmoe": EXPERTS,
    "cohere": {},
    "granite": {"embedding_multiplier": 3.0, "residual_multiplier": 0.5},
    "starcoder2": {},
    "gpt_oss": {**EXPERTS, "head_dim": 8},
    "smollm3": {"no_rope_layers": [1, 0, 1, 0]},
    "mpt": {},
    "glm4": {"head_dim": 8},
    "exaone4": {"layer_types": SLIDING},
    "lfm2": {"layer_types": ["conv", "full_attention", "conv", "full_attention"]},
    "ernie4_5": {"head_dim": 8},
    "nemotron": {},
    "deepseek_v3": {**EXPERTS, **LATENT, "first_k_dense_replace": 2},
}

OTHERS: dict[str, dict[str, Any]] = {
    "apertus": {},
    "bamba": {"attn_layer_indices": [1, 3], "mamba_n_heads": 8, "mamba_d_head": 8, "mamba_d_state": 8},
    "biogpt": {},
    "ctrl": {},
    "diffllama": {},
    "deepseek_v2": {**EXPERTS, **LATENT, "first_k_dense_replace": 1, "topk_method": "group_limited_greedy"},
    "doge": {},
    "dots1": {**EXPERTS, "n_group": 2, "topk_group": 1, "n_shared_experts": 1, "first_k_dense_replace": 1},
    "falcon_h1": {"mamba_d_ssm": 32, "mamba_n_heads": 4, "mamba_d_head": 8, "mamba_d_state": 8, "head_dim": 8},
    "falcon_mamba": {"state_size": 8},
    "gemma3n_text": {
        "head_dim": 8,
        "num_kv_shared_layers": 2,
        "layer_types": SLIDING,
        "hidden_size_per_layer_input": 8,
    },
    "gpt_bigcode": {},
    "granitemoehybrid": {**EXPERTS, "layer_types": ["mamba", "attention"] * 2, "mamba_n_heads": 8, "mamba_d_head": 8},
    "hunyuan_v1_dense": {"head_dim": 8},
    "jamba": {**EXPERTS, "attn_layer_period": 2, "attn_layer_offset": 1, "mamba_d_state": 8},
    "lfm2_moe": {**EXPERTS, "layer_types": ["conv", "full_attention"] * 2, "num_dense_layers": 1},
    "mamba": {"state_size": 8},
    "mamba2": {"num_heads": 8, "head_dim": 8, "state_size": 8, "n_groups": 1},
    "minimax": {**EXPERTS, "head_dim": 8},
    "modernbert-decoder": {},
    "nemotron_h": {"mamba_num_heads": 8, "mamba_head_dim": 8, "ssm_state_size": 8, "n_groups": 1, "head_dim": 8},
    "ministral3": {"head_dim": 8},
    "moshi": {},
    "olmo3": {"layer_types": SLIDING},
    "phimoe": EXPERTS,
    "qwen3_next": {**EXPERTS, "head_dim": 8, "linear_num_value_heads": 4, "linear_num_key_heads": 2},
    "recurrent_gemma": {"head_dim": 8, "attention_window_size": 4},
    "rwkv": {"attention_hidden_size": 32},
    "xglm": {"d_model": 32, "num_layers": 4, "attention_heads": 4, "ffn_dim": 48},
    "zamba": {"num_hidden_layers": 6, "layers_block_type": ["linear_attention", "linear_attention", "hybrid"] * 2},
    "zamba2": {"layers_block_type": ["mamba", "hybrid"] * 2, "num_key_value_heads": 4, "mamba_d_state": 8},
}


# Each for a reason of its own: states that cannot be taken up again in the middle of a prompt, caches of their own,
# blocks that see more than the hidden states (the token ids, the embeddings, another block's keys).
REFUSED: dict[str, str] = {
    "ctrl": "cut in stages it computes something else",
    "falcon_mamba": "prefilled in pieces it fails",
    "gemma3n_text": "cut in stages it fails",
    "jamba": "prefilled in pieces it computes something else, even uncut",
    "mamba": "prefilled in pieces it fails",
    "minimax": "MiniMax uses cache of its own",
    "moshi": "prefilled in pieces it computes something else, even uncut",
    "recurrent_gemma": "prefilled in pieces it computes something else, even uncut",
    "rwkv": "prefilled in pieces it computes something else, even uncut",
    "zamba": "no small copy of it can be run",
    "zamba2": "cut in stages it fails",
}


class Chain:
    """Stages in one process: what a swarm is to the ends of a model."""

    def __init__(self, folder: Path, parts: int) -> None:
        self.ends = load_ends(folder, self, dtype=torch.float32)
        self.stages = [
            load_stage(folder, span, dtype=torch.float32) for span in split(num_blocks(self.ends.config), parts)
        ]
        self.caches = [stage.new_cache() for stage in self.stages]
        self.length = LengthCache()
        self.inputs: dict[str, Any] = {}
        self.ends.register_forward_pre_hook(self.note, with_kwargs=True)

    def note(self, module: PreTrainedModel, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        self.inputs = {name: kwargs.get(name) for name in ("attention_mask", "position_ids")}

    def __call__(self, hidden: torch.Tensor) -> torch.Tensor:
        start = self.length.length
        for stage, cache in zip(self.stages, self.caches, strict=True):
            hidden = stage.forward(hidden, position=start, cache=cache, **self.inputs)
        self.length.length += hidden.shape[1]
        return hidden


def split(blocks: int, parts: int) -> list[Span]:
    edges = [index * blocks // parts for index in range(parts + 1)]
    return [Span(start, end) for start, end in itertools.pairwise(edges)]


def tiny(family: str, special: dict[str, Any]) -> PreTrainedConfig:
    """The family's config, small, with only those of the common values that it knows."""
    config_class = CONFIG_MAPPING[family]
    known = config_class()
    wanted = {name: value for name, value in COMMON.items() if hasattr(known, name)}
    return config_class(**{**wanted, **special})


def save_tiny(family: str, special: dict[str, Any], folder: Path) -> PreTrainedConfig:
    config = tiny(family, special)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    dice = torch.Generator().manual_seed(7)
    with torch.no_grad():
        for weight in model.parameters():
            noise = torch.randn(weight.shape, generator=dice)
            weight.copy_(noise / weight.shape[-1] ** 0.5 if weight.ndim > 1 else weight + 0.2 * noise)
    model.save_pretrained(folder, max_shard_size="40KB")
    return config


def batch(length: int) -> dict[str, torch.Tensor]:
    tokens = torch.randint(2, 99, (2, length), generator=torch.Generator().manual_seed(3))
    mask = torch.ones(2, length, dtype=torch.long)
    mask[1, :PADDING] = 0
    return {"input_ids": tokens, "attention_mask": mask}


@torch.inference_mode()
def in_steps(model: PreTrainedModel, cache: Cache, pieces: tuple[int, ...]) -> torch.Tensor:
    """The logits of `model` for the batch, taken in `pieces`."""
    return logits_in_steps(model, cache, pieces, batch(sum(pieces)))


def logits_in_steps(
    model: PreTrainedModel, cache: Cache, pieces: tuple[int, ...], inputs: dict[str, torch.Tensor]
) -> torch.Tensor:
    positions = (inputs["attention_mask"].cumsum(-1) - 1).clamp(min=0)
    logits = []
    for end, count in zip(itertools.accumulate(pieces), pieces, strict=True):
        offered = {"position_ids": positions[:, end - count : end], **with_cache(model, cache)}
        offered = {name: value for name, value in offered.items() if name in parameters(model)}
        tokens, mask = inputs["input_ids"][:, end - count : end], inputs["attention_mask"][:, :end]
        logits.append(model(input_ids=tokens, attention_mask=mask, use_cache=True, **offered).logits)
    return torch.cat(logits, 1)


def parameters(model: PreTrainedModel) -> set[str]:
    return set(inspect.signature(type(model).forward).parameters)


def with_cache(model: PreTrainedModel, cache: Cache) -> dict[str, Cache]:
    return dict.fromkeys({"past_key_values", "cache_params"} & parameters(model), cache)


def compare(folder: Path, parts: int, oracle: tuple[int, ...]) -> None:
    """The chain, in steps, against the whole model that takes the same positions in the pieces of `oracle`."""
    whole = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    expected = in_steps(whole, DynamicCache(config=whole.config), oracle)
    chain = Chain(folder, parts)
    found = in_steps(chain.ends, chain.length, PIECES)
    real = batch(sum(PIECES))["attention_mask"].bool()
    assert float((found - expected)[real].abs().max()) <= 1e-5 * max(1.0, float(expected.abs().max()))

    options = {"max_new_tokens": NEW_TOKENS, "do_sample": False, "use_cache": True}
    chain = Chain(folder, parts)
    answer = chain.ends.generate(**batch(PROMPT), **options, **with_cache(chain.ends, chain.length))
    assert answer.tolist() == whole.generate(**batch(PROMPT), **options).tolist()


RHYTHMS = ((6, 1, 1, 3), (1, 7, 2, 1, 1, 1, 1, 1, 1), (4, 1, 1, 1, 1))
"""Positions per step of three sessions at once; in the end the second is alone."""

ALONE = {
    *("bloom", "falcon", "gpt_neo", "gptj", "codegen", "mpt", "xglm", "biogpt"),  # attention of their own
    *("diffllama", "doge"),  # they do more with the keys and values than to attend to them
    *("lfm2", "lfm2_moe", "bamba", "falcon_h1", "granitemoehybrid", "mamba2", "nemotron_h", "qwen3_next"),  # states
}
"""Families whose sessions run one by one; that they do is found out, not listed."""


@torch.inference_mode()
def compare_engine(family: str, folder: Path) -> None:
    """Sessions of different lengths, one of them of two rows with padding, that run at the same time in two stages."""
    whole = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    hidden = list[torch.Tensor]()
    ends = load_ends(folder, lambda states: hidden.append(states) or states, dtype=torch.float32)
    inputs = [batch(sum(rhythm)) for rhythm in RHYTHMS]
    inputs[:2] = [{name: value[:1] for name, value in each.items()} for each in inputs[:2]]
    logits(ends, inputs)
    engine = [Stage(load_stage(folder, span, dtype=torch.float32), 256) for span in split(num_blocks(whole.config), 2)]
    assert all(stage.batches == (family not in ALONE) for stage in engine)
    engine[1] = Stage(engine[1].model, 256, padded=True)  # as on a GPU
    for stage in engine:
        hidden = run_at_once(stage, hidden, inputs)
    assert all(stage.model.lean == stage.batches for stage in engine)
    outputs = iter(hidden)
    ends = load_ends(folder, lambda _: next(outputs), dtype=torch.float32)
    for found, each, rhythm in zip(logits(ends, inputs), inputs, RHYTHMS, strict=True):
        expected = logits_in_steps(whole, DynamicCache(config=whole.config), rhythm, each)
        real = each["attention_mask"].bool()
        assert float((found - expected)[real].abs().max()) <= 1e-5 * max(1.0, float(expected.abs().max()))


def run_at_once(stage: Stage, hidden: list[torch.Tensor], inputs: list[dict[str, torch.Tensor]]) -> list[torch.Tensor]:
    states = [stage.open(stage.span, len(each), each.shape[1]) for each in hidden]
    outputs: list[list[torch.Tensor]] = [[] for _ in hidden]
    for turn in range(max(map(len, RHYTHMS))):
        works = []
        for state, each, given, rhythm in zip(states, hidden, inputs, RHYTHMS, strict=True):
            if turn < len(rhythm):
                piece = slice(state.length, state.length + rhythm[turn])
                mask = given["attention_mask"]
                ids = (mask.cumsum(-1) - 1).clamp(min=0)[:, piece]
                step = StepInput(turn + 1, state.length, each[:, piece], None, ids, mask[:, piece])
                works.append((state, step))
        on = [index for index, rhythm in enumerate(RHYTHMS) if turn < len(rhythm)]
        for index, output in zip(on, stage.run_all(works), strict=True):
            assert isinstance(output, torch.Tensor), output
            outputs[index].append(output)
    for state in states:
        stage.close(state)
    assert stage.pages.used == 0
    return [torch.cat(pieces, 1) for pieces in outputs]


def logits(model: PreTrainedModel, inputs: list[dict[str, torch.Tensor]]) -> list[torch.Tensor]:
    found = []
    for each in inputs:
        ids = (each["attention_mask"].cumsum(-1) - 1).clamp(min=0)
        offered = {"position_ids": ids} if "position_ids" in parameters(model) else {}
        found.append(model(**each, use_cache=False, **offered).logits)
    return found


@pytest.fixture(autouse=True)
def own_cache_folder(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.getbasetemp() / "cache"))
    torch.set_num_threads(1)


@pytest.mark.parametrize("family", RIGHT)
def test_a_family_cut_is_the_family_whole(family: str, tmp_path: Path) -> None:
    save_tiny(family, RIGHT[family], tmp_path)
    for parts in (2, 3):
        compare(tmp_path, parts, oracle=(sum(PIECES),))
    compare_engine(family, tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("family", OTHERS)
def test_another_family_is_right_or_refused(family: str, tmp_path: Path) -> None:
    config = save_tiny(family, OTHERS[family], tmp_path)
    assert (refusal(config) is not None) == (family in REFUSED)
    if family in REFUSED:
        with pytest.raises(CannotCut, match=REFUSED[family]):
            load_stage(tmp_path, Span(0, 1), dtype=torch.float32)
    else:
        compare(tmp_path, 3, oracle=PIECES)
        compare_engine(family, tmp_path)


def refusal(config: PreTrainedConfig) -> str | None:
    try:
        check_cut(config)
    except CannotCut as error:
        return str(error)
    return None
