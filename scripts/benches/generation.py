"""Generating with a clock beside it: what the benches that need a model have in common."""

from __future__ import annotations

import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM
from transformers.generation.streamers import BaseStreamer
from transformers.utils import logging

from swarm.conversation import load_tokenizer

PROMPT_TOKENS = 33
NEW_TOKENS = 64

_TEXT = (
    "A shoal is a group of fish that stay together for social reasons. When they swim in the same direction, in a "
    "coordinated manner, they are schooling. Shoaling fish are safer because"
)


@dataclass(frozen=True, slots=True)
class Generated:
    """What came of one `generate()`."""

    tokens: list[int]  # the new ones
    seconds: float  # of the whole call: opening the session and reading the prompt included
    decode_seconds: float  # from the first new token to the last, per token


class _Clock(BaseStreamer):
    """Notes when each token came."""

    def __init__(self) -> None:
        self.times: list[float] = []

    def put(self, value: torch.Tensor) -> None:
        self.times.append(time.perf_counter())

    def end(self) -> None:
        pass


def prompt(folder: Path) -> torch.Tensor:
    """[1, PROMPT_TOKENS]: the beginning of a text."""
    tokenizer: Any = load_tokenizer(str(folder))
    return torch.tensor([tokenizer(_TEXT)["input_ids"][:PROMPT_TOKENS]])


def whole_model(folder: Path) -> Any:
    """The reference: the model in this process, in fp32 with one thread."""
    torch.set_num_threads(1)
    logging.disable_progress_bar()
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)


def generate(model: Any, ids: torch.Tensor, new_tokens: int = NEW_TOKENS) -> Generated:
    """Exactly so many tokens after `ids`, greedily."""
    clock = _Clock()
    options = {"do_sample": False, "max_new_tokens": new_tokens, "min_new_tokens": new_tokens}
    started = time.perf_counter()
    output = model.generate(ids, attention_mask=torch.ones_like(ids), streamer=clock, **options)
    seconds = time.perf_counter() - started
    first, last = clock.times[1], clock.times[-1]  # the one before the first is the prompt's
    decode_seconds = (last - first) / max(new_tokens - 1, 1)
    return Generated(output[0, ids.shape[1] :].tolist(), seconds, decode_seconds)
