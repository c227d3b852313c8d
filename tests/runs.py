"""Small runs for the tests of training: files, models and batches."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from transformers import (
    AutoModelForCausalLM,
    Gemma3TextConfig,
    GPT2Config,
    LlamaConfig,
    MixtralConfig,
    PreTrainedConfig,
    Qwen3Config,
    get_scheduler,
)

from swarm.runs.origin import byte_tokenizer, config_of, stage_of
from swarm.runs.run import Run, parse

torch.set_num_threads(1)  # on matrices as small as these, several only wait for each other

_SIZES: dict[str, Any] = {
    "vocab_size": 96,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 64,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}

FAMILIES: dict[str, PreTrainedConfig] = {
    "llama": LlamaConfig(**_SIZES),
    "gpt2": GPT2Config(
        vocab_size=96, n_embd=32, n_head=4, n_layer=4, n_positions=64, bos_token_id=1, eos_token_id=2, pad_token_id=0
    ),
    "qwen3": Qwen3Config(**_SIZES, tie_word_embeddings=True),
    "gemma3_text": Gemma3TextConfig(**_SIZES, sliding_window=6),
    "mixtral": MixtralConfig(**_SIZES, num_local_experts=4, num_experts_per_tok=2),
}

FILE = """
name = "test"
seed = 5
rounds = {rounds}
stages = {stages}

[model]
architecture = "llama"

[model.config]
hidden_size = 32
intermediate_size = 48
num_hidden_layers = 4
num_attention_heads = 4
num_key_value_heads = 2
max_position_embeddings = 64
tie_word_embeddings = {tied}

[batch]
sequence_length = {length}
micro = {micro}
target = {target}

[optimizer]
learning_rate = 0.01
weight_decay = 0.1
clip_norm = 1.0

[schedule]
name = "cosine"
warmup_rounds = 3

[averaging]
dtype = "float32"
"""


def run_text(
    stages: tuple[str, ...] = ("0:4",),
    *,
    rounds: int = 10,
    length: int = 16,
    micro: int = 2,
    target: int = 7,
    tied: bool = False,
    more: str = "",
) -> str:
    """A run's file: a tiny Llama that learns the embedded default, byte by byte."""
    text = FILE.format(
        stages=str(list(stages)).replace("'", '"'),
        rounds=rounds,
        length=length,
        micro=micro,
        target=target,
        tied=str(tied).lower(),
    )
    return text + more


def small_run(stages: tuple[str, ...] = ("0:4",), **options: Any) -> Run:
    """The run of `run_text`."""
    return parse(run_text(stages, **options))


def save_run(folder: Path, stages: tuple[str, ...] = ("0:4",), **options: Any) -> Path:
    """The file of `run_text` in `folder`."""
    file = folder / "run.toml"
    file.write_text(run_text(stages, **options))
    return file


def tokens(rows: int, count: int, vocabulary: int = 96, seed: int = 0) -> torch.Tensor:
    """Some tokens, [rows, count]."""
    return torch.randint(3, vocabulary, (rows, count), generator=torch.Generator().manual_seed(seed))


def reference_curve(run: Run, rounds: int, samples: Callable[[int], torch.Tensor]) -> list[float]:
    """One process with transformers and torch alone: all `samples` of a round at once, [target, N].

    Where the run's rounds overlap, gradients are taken with the weights of the round before.
    """
    config = config_of(run, byte_tokenizer())
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    model.train(False)
    weights = dict(model.named_parameters())
    with torch.no_grad():
        for index in range(len(run.stages)):
            stage = stage_of(run, config, index)
            for name, value in stage.parameters().items():
                weights[stage.tied.get(name, name)].copy_(value)
    table = run.optimizer
    decaying = [weight for weight in model.parameters() if weight.ndim > 1]
    others = [weight for weight in model.parameters() if weight.ndim < 2]
    groups = [{"params": decaying, "weight_decay": table.weight_decay}, {"params": others, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=table.learning_rate, betas=table.betas, eps=table.epsilon)
    schedule: Any = get_scheduler(run.schedule.name, optimizer, run.schedule.warmup_rounds, run.rounds)
    losses, earlier = [], [weight.detach().clone() for weight in model.parameters()]
    for round in range(rounds):
        ids, latest = samples(round), [weight.detach().clone() for weight in model.parameters()]
        if run.averaging.overlap:
            _set(model, earlier)
        loss = model(input_ids=ids, labels=ids).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), table.clip_norm)
        _set(model, latest)
        earlier = latest
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses


def _set(model: torch.nn.Module, values: list[torch.Tensor]) -> None:
    with torch.no_grad():
        for weight, value in zip(model.parameters(), values, strict=True):
            weight.copy_(value)
