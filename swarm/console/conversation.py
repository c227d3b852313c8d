"""Text in, text out: a tokenizer beside a model, prompts checked, answers streamed, a history kept."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

import torch

from swarm.chain import context_of
from swarm.errors import UsageError
from swarm.files.hub import resolve, tokenizer_in
from swarm.speculation.tuning import Counts
from swarm.swarm_cache import SwarmCache
from swarm.types import Route

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


@dataclass(slots=True)
class Answer:
    """What came of one prompt."""

    text: str
    tokens: list[int]
    prompt_tokens: int
    seconds: float  # from sending the prompt to the last token
    first_seconds: float  # to the first token
    route: str
    counts: Counts  # what trips along the chain brought
    history: list[int] = field(default_factory=list)  # every token that the session holds, prompt included

    @property
    def tokens_per_second(self) -> float:
        """Of the decode, the first token left out."""
        return max(len(self.tokens) - 1, 0) / max(self.seconds - self.first_seconds, 1e-6)


def load_tokenizer(name: str) -> PreTrainedTokenizerBase:
    """The tokenizer of a model by its name. Raises as `hub.resolve` and `hub.tokenizer_in`."""
    return tokenizer_in(resolve(name))


class Conversation:
    """A model that talks. Turns share one session: what the peers have read once is not sent again."""

    def __init__(self, model: Any, tokenizer: PreTrainedTokenizerBase) -> None:
        self.model = model
        self.tokenizer = tokenizer
        self.context = context_of(model.config)
        self._cache: SwarmCache | None = None

    def encode(self, messages: list[dict[str, str]] | str, raw: bool = False) -> list[int]:
        """A prompt or a chat as tokens, through the chat template unless `raw` or there is none.

        Raises `UsageError` for an empty prompt, or one longer than the model's context.
        """
        turns = [{"role": "user", "content": messages}] if isinstance(messages, str) else messages
        if not turns[-1]["content"].strip():
            raise UsageError("the prompt is empty")
        ids: Any
        if raw or not self.tokenizer.chat_template:
            ids = self.tokenizer(turns[-1]["content"])["input_ids"]
        else:
            ids = self.tokenizer.apply_chat_template(turns, add_generation_prompt=True, return_dict=False)
        limit = self.context
        if limit and len(ids) >= limit:
            raise UsageError(f"the prompt has {len(ids)} tokens; the model's context is {limit} with the answer")
        return list(ids)

    @property
    def route(self) -> Route | None:
        """The peers that hold the talk at this moment, None while there is none."""
        return None if self._cache is None else self._cache.route

    def answer(self, prompt: list[int], on_text: Callable[[str], None] | None = None, **generation: Any) -> Answer:
        """Generate after `prompt`, telling `on_text` each piece as it comes. `generation` goes to `generate()`.

        Interrupted (Ctrl-C) it raises `KeyboardInterrupt`; the next answer then begins a new session.
        """
        from transformers import TextStreamer

        watch, beams = _Watch(), generation.get("num_beams", 1) > 1
        streamer = None if beams else _Streamer(TextStreamer, self.tokenizer, on_text or (lambda text: None), watch)
        if self.context and (room := self.context - len(prompt)) < generation.get("max_new_tokens", 0):
            generation["max_new_tokens"] = room
        if beams or self._cache is None:  # rows of a session cannot become more
            self.forget()
            self._cache = SwarmCache()
        cache = self._cache  # `generate()` takes it back to where it and the prompt part
        ids, before = torch.tensor([prompt]), replace(cache.tuner.counts)
        try:
            output = self.model.generate(
                ids,
                attention_mask=torch.ones_like(ids),
                past_key_values=cache,
                streamer=streamer,
                **generation,
            )[0].tolist()
        except BaseException:
            cache.close()
            self._cache = None
            raise
        counts = cache.tuner.counts.since(before)
        return self._finish(output, prompt, cache, watch, counts, on_text if streamer is None else None)

    def _finish(
        self,
        output: list[int],
        prompt: list[int],
        cache: SwarmCache,
        watch: _Watch,
        counts: Counts,
        on_text: Callable[[str], None] | None,
    ) -> Answer:
        tokens = output[len(prompt) :]
        text = str(self.tokenizer.decode(tokens, skip_special_tokens=True))
        if on_text is not None:
            on_text(text)
            self.forget()
        seconds = time.perf_counter() - watch.started
        return Answer(text, tokens, len(prompt), seconds, watch.first or seconds, str(cache.route), counts, output)

    def forget(self) -> None:
        """End the session; the next answer begins a new one."""
        if self._cache is not None:
            self._cache.close()
        self._cache = None


class _Watch:
    def __init__(self) -> None:
        self.started = time.perf_counter()
        self.first: float | None = None


def _Streamer(base: Any, tokenizer: Any, on_text: Callable[[str], None], watch: _Watch) -> Any:
    """transformers' own streamer, which knows where a word may be cut, telling us instead of printing."""

    class Streamer(base):  # type: ignore[misc]
        def put(self, value: torch.Tensor) -> None:
            if not self.next_tokens_are_prompt and watch.first is None:
                watch.first = time.perf_counter() - watch.started
            super().put(value)

        def on_finalized_text(self, text: str, stream_end: bool = False) -> None:
            if text:
                on_text(text)

    return Streamer(tokenizer, skip_prompt=True, skip_special_tokens=True)
