"""Generating with a clock beside it: what the benches that need a model have in common."""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from pydoc_data.topics import topics
from typing import Any

import torch
from transformers import AutoModelForCausalLM
from transformers.generation.streamers import BaseStreamer
from transformers.utils import logging

from swarm.console.conversation import load_tokenizer

PROMPT_TOKENS = 33
NEW_TOKENS = 64

_TEXT = (
    "A shoal is a group of fish that stay together for social reasons. When they swim in the same direction, in a "
    "coordinated manner, they are schooling. Shoaling fish are safer because a predator finds it hard to single out "
    "one of many, and because many eyes see it sooner. They find food faster as well: when one of them has found some, "
    "the others see it eat, and come. Fish choose the shoal that they join. They prefer a large one to a small one, "
    "and one of their own kind and size, in which nobody stands out. A shoal has no leader. Each of its fish looks to "
    "those next to it, keeps a certain distance from them, and turns when they turn. What comes of such simple rules is"
)


@dataclass(frozen=True, slots=True)
class Generated:
    """What came of one `generate()`."""

    tokens: list[int]  # the new ones
    seconds: float  # of the whole call: opening the session and reading the prompt included
    decode_seconds: float  # from the first new token to the last, per token
    gaps: list[float]  # seconds from each new token to the next


class _Clock(BaseStreamer):
    """Notes when each token came, and tells how many new ones there are."""

    def __init__(self, told: Callable[[int], None]) -> None:
        self.times: list[float] = []
        self.told = told

    def put(self, value: torch.Tensor) -> None:
        self.times.append(time.perf_counter())
        self.told(len(self.times) - 1)  # the one before the first is the prompt's

    def end(self) -> None:
        pass


def prompt(folder: Path, tokens: int = PROMPT_TOKENS) -> torch.Tensor:
    """[1, tokens]: the beginning of a text, which goes on with Python's own help where it is not long enough."""
    tokenizer: Any = load_tokenizer(str(folder))
    ids: list[int] = tokenizer(_TEXT)["input_ids"]
    if len(ids) < tokens:
        ids += tokenizer(topics["assignment"])["input_ids"]
    assert len(ids) >= tokens
    return torch.tensor([ids[:tokens]])


def begun_elsewhere(ids: torch.Tensor) -> Iterator[torch.Tensor]:
    """The same tokens, each time from another one on: of what peers still hold of the last, nothing can be used."""
    for start in itertools.count():
        yield ids.roll(-start, dims=1)


def whole_model(folder: Path) -> Any:
    """The reference: the model in this process, in fp32 with one thread."""
    torch.set_num_threads(1)
    logging.disable_progress_bar()
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)


def endless(model: Any, new_tokens: int) -> dict[str, Any]:
    """What to ask `model.generate()` for so many tokens with, greedily, wherever the model would have ended.

    It is told of no end: to forbid the end takes transformers a millisecond a token, which nobody else has to spend.
    """
    model.generation_config.eos_token_id = None
    return {"do_sample": False, "max_new_tokens": new_tokens}


def generate(
    model: Any,
    ids: torch.Tensor,
    new_tokens: int = NEW_TOKENS,
    told: Callable[[int], None] = lambda count: None,
    cache: Any = None,
) -> Generated:
    """Exactly so many tokens after `ids`, greedily; `told` how many there are, each time one comes."""
    clock = _Clock(told)
    options = endless(model, new_tokens)
    started = time.perf_counter()
    output = model.generate(ids, attention_mask=torch.ones_like(ids), past_key_values=cache, streamer=clock, **options)
    seconds = time.perf_counter() - started
    gaps = [after - before for before, after in itertools.pairwise(clock.times[1:])]
    return Generated(output[0, ids.shape[1] :].tolist(), seconds, sum(gaps) / max(len(gaps), 1), gaps)
