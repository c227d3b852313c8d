"""How well a model predicts a text: the exponential of the mean negative log-likelihood of its tokens.

The text is cut into windows that do not overlap, and every token but the first of each is predicted from those before
it in its window. So figures compare for the same text, tokens, window and tokenizer, and for nothing else.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch.nn import functional

from swarm.errors import UsageError

WINDOW = 512  # tokens
TOKENS = 8192
_AT_ONCE = 128  # positions whose probabilities are worked out at once: each takes as many numbers as there are words

Progress = Callable[[int, int], None]
"""Called with (tokens read so far, tokens in all)."""


@dataclass(frozen=True, slots=True)
class Perplexity:
    """What was measured."""

    perplexity: float
    predicted: int  # tokens
    windows: int
    seconds: float
    route: str  # of the last window

    @property
    def tokens_per_second(self) -> float:
        """Read, not generated."""
        return (self.predicted + self.windows) / max(self.seconds, 1e-6)


def default_text() -> str:
    """English prose that is on every machine: the help texts that come with CPython."""
    from pydoc_data.topics import topics

    return "\n".join(topics[name] for name in sorted(topics))


def read_text(file: Path) -> str:
    """What is in `file`. Raises `UsageError`."""
    try:
        return file.read_text("utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise UsageError(f"{file} cannot be read as text: {error}") from None


def windows_of(tokens: list[int], window: int, most: int) -> list[list[int]]:
    """The first `most` tokens (0: all) in pieces of `window`; a last one of a single token is left out.

    Raises:
        UsageError: there is nothing to predict.
    """
    if window < 2:
        raise UsageError("a window needs two tokens: one to see and one to predict")
    tokens = tokens[:most] if most else tokens
    pieces = [tokens[start : start + window] for start in range(0, len(tokens), window)]
    if not (pieces := [piece for piece in pieces if len(piece) > 1]):
        raise UsageError("the text has fewer than two tokens: there is nothing to predict")
    return pieces


def measure(model: Any, windows: list[list[int]], progress: Progress | None = None) -> Perplexity:
    """The perplexity of `model` (a `SwarmModelForCausalLM`, or any of Hugging Face) on `windows` of tokens.

    Raises:
        NoRoute, SessionLost: as any forward through the swarm.
    """
    started, total = time.perf_counter(), sum(map(len, windows))
    loss, done, route = 0.0, 0, ""
    for window in windows:
        ids = torch.tensor([window], device=model.device)
        with torch.inference_mode():
            output = model(ids, use_cache=True)
            loss += _loss(output.logits[0, :-1], ids[0, 1:])
        route = str(getattr(output.past_key_values, "route", None) or "")
        if (close := getattr(output.past_key_values, "close", None)) is not None:
            close()
        done += len(window)
        if progress is not None:
            progress(done, total)
    predicted = total - len(windows)
    return Perplexity(math.exp(loss / predicted), predicted, len(windows), time.perf_counter() - started, route)


def _loss(logits: torch.Tensor, targets: torch.Tensor) -> float:
    """The sum of the negative log-likelihoods of `targets` [N] under `logits` [N, V]."""
    pieces = zip(torch.split(logits, _AT_ONCE), torch.split(targets, _AT_ONCE), strict=True)
    return sum(float(functional.cross_entropy(each.float(), target, reduction="sum")) for each, target in pieces)
