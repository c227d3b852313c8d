"""Several tokens in one trip along the chain: a draft goes with the last token, and the model says how far it is right.

The tokens are those that would have come one by one: each is chosen from the model's own scores, after the same
processors, and with the same random numbers, drawn once for each token that is kept. So a draft changes when tokens
come, and never which. transformers' own loop of assisted generation is exact in distribution alone, and looks for the
end of a text only after all that a trip has brought.
"""

from __future__ import annotations

import copy
import time
from collections.abc import Callable
from contextlib import nullcontext
from typing import TYPE_CHECKING, Any

import torch

from swarm.errors import UsageError
from swarm.quantization.screening import largest_alone
from swarm.speculation.drafting import Drafter, LookupDrafter, ModelDrafter
from swarm.speculation.tuning import LOOKUP, OFF, Speculate, Tuner
from swarm.swarm_cache import SwarmCache

if TYPE_CHECKING:
    from transformers.modeling_utils import PreTrainedModel


class SpeculatingMixin:
    """Puts our loop in the place of transformers' where there is something to draft with."""

    @property
    def speculate(self) -> Speculate:
        """Whether tokens are drafted, and with what."""
        raise NotImplementedError

    @property
    def draft_model(self) -> PreTrainedModel | None:
        """With what they are, where that is a model."""
        raise NotImplementedError

    @property
    def rewindable(self) -> bool:
        """Whether positions can be taken back."""
        raise NotImplementedError

    def _sample(
        self,
        input_ids: torch.Tensor,
        logits_processor: Any,
        stopping_criteria: Any,
        generation_config: Any,
        synced_gpus: bool = False,
        streamer: Any = None,
        **model_kwargs: Any,
    ) -> Any:
        """transformers' loop of greedy decoding and of sampling, or ours."""
        given = logits_processor, stopping_criteria, generation_config
        with largest_alone() if _is_greedy(logits_processor, generation_config) else nullcontext():
            tuner = self._tuner(input_ids, generation_config, model_kwargs)
            if tuner is None or not self.rewindable or self.speculate.mode == OFF:
                plain: Any = super()._sample  # type: ignore[misc]
                return plain(input_ids, *given, synced_gpus, streamer, **model_kwargs)
            drafter = self._drafter(tuner, input_ids, generation_config, model_kwargs)
            return generate(self, input_ids, drafter, tuner, *given, streamer, **model_kwargs)

    def _assisted_decoding(
        self,
        input_ids: torch.Tensor,
        logits_processor: Any,
        stopping_criteria: Any,
        generation_config: Any,
        synced_gpus: bool = False,
        streamer: Any = None,
        inputs_tensor: torch.Tensor | None = None,
        assistant_model: Any = None,
        assistant_tokenizer: Any = None,
        tokenizer: Any = None,
        **model_kwargs: Any,
    ) -> Any:
        """The same where the caller of `generate()` names an assistant, or wants the prompt looked up."""
        if not self.rewindable:
            raise UsageError(f"{type(self).__name__} folds the past into a state: no draft can be taken back")
        if (tuner := self._tuner(input_ids, generation_config, model_kwargs)) is None:
            raise UsageError("drafts are for one row of tokens with a cache, and for tokens and scores alone")
        assistants = assistant_model, tokenizer, assistant_tokenizer
        generator = self._generator(input_ids, inputs_tensor, generation_config, model_kwargs, *assistants)
        given = logits_processor, stopping_criteria, generation_config
        return generate(self, input_ids, ModelDrafter(generator), tuner, *given, streamer, **model_kwargs)

    @staticmethod
    def _tuner(input_ids: torch.Tensor, config: Any, model_kwargs: dict[str, Any]) -> Tuner | None:
        """What the session's cache has learned of its trips; None where our loop does not do what is asked for."""
        cache = model_kwargs.get("past_key_values")
        one_text = input_ids.shape[0] == 1 and model_kwargs.get("inputs_embeds") is None
        more = config.return_dict_in_generate and (config.output_hidden_states or config.output_attentions)
        plain = not more and config.prefill_chunk_size is None and not config.is_assistant
        suited = one_text and plain and model_kwargs.get("use_cache")
        return cache.tuner if suited and isinstance(cache, SwarmCache) else None

    def _drafter(self, tuner: Tuner, input_ids: torch.Tensor, config: Any, model_kwargs: dict[str, Any]) -> Drafter:
        if (draft_model := self.draft_model) is None:
            return LookupDrafter(tuner, least=int(self.speculate.mode == LOOKUP))
        return ModelDrafter(self._generator(input_ids, None, config, model_kwargs, draft_model), tuner)

    def _generator(
        self, input_ids: torch.Tensor, inputs: Any, config: Any, model_kwargs: dict[str, Any], *assistants: Any
    ) -> Any:
        """transformers' candidate generator for the assistant.

        It gets no processors: the assistant's own `generate()` makes them from the config, and would apply temperature
        and its like twice. And it gets the mask that our `generate()` leaves out where it is all ones, or it would
        take tokens that look like padding for that.
        """
        if model_kwargs.get("attention_mask") is None:
            model_kwargs = {**model_kwargs, "attention_mask": torch.ones_like(input_ids)}
        get: Any = self._get_candidate_generator  # type: ignore[attr-defined]
        return get(config, input_ids, inputs, None, model_kwargs, *assistants)


def _is_greedy(processors: Any, config: Any) -> bool:
    """Whether all that is made of a token's scores is that the largest is chosen."""
    wanted = config.return_dict_in_generate and (config.output_scores or config.output_logits)
    return not (config.do_sample or processors or wanted)


def generate(
    model: Any,
    input_ids: torch.Tensor,
    drafter: Drafter,
    tuner: Tuner,
    logits_processor: Any,
    stopping_criteria: Any,
    generation_config: Any,
    streamer: Any = None,
    **model_kwargs: Any,
) -> Any:
    """The decoding loop of `model.generate()`, for one row [1, N]; its arguments and its result are transformers' own.

    Every token is processed, chosen, streamed and checked for the end as if it had come alone.
    """
    answer = _Answer(input_ids, generation_config, logits_processor, stopping_criteria)
    cache = model_kwargs["past_key_values"]
    fresh: int | None = _fresh(input_ids, cache, generation_config, model_kwargs)
    first = True
    while not answer.ended:
        draft = drafter.draft(answer.ids, generation_config.max_length - answer.ids.shape[1] - 1)
        candidate = torch.cat([answer.ids, answer.ids.new_tensor([draft])], dim=1) if draft else answer.ids
        started = time.perf_counter()
        outputs = _verify(model, candidate, len(draft), fresh, first, model_kwargs)
        seconds = time.perf_counter() - started
        logits = outputs.logits[:, -len(draft) - 1 :].to(torch.float32, copy=True).to(answer.ids.device)
        tokens = answer.take(draft, logits)
        cache.crop(len(tokens) - 1 - len(draft))
        for token in tokens if streamer is not None else ():
            streamer.put(torch.tensor([token]))
        tuner.brought(len(draft), tokens, None if first else seconds)
        drafter.learn(len(draft), tokens, logits, answer.ids)
        model_kwargs = model._update_model_kwargs_for_generation(outputs, model_kwargs, num_new_tokens=len(tokens))
        fresh, first = 1, False
    if streamer is not None:
        streamer.end()
    return answer.result(cache)


def _fresh(input_ids: torch.Tensor, cache: Any, generation_config: Any, model_kwargs: dict[str, Any]) -> int | None:
    """How many of the tokens the cache does not hold yet, None for all: as `generate()` tells the two cases apart."""
    mask = model_kwargs.get("attention_mask")
    covered = mask.shape[1] if mask is not None else getattr(generation_config, "_mask_length", -1)
    return input_ids.shape[1] - cache.get_seq_length() if covered == input_ids.shape[1] else None


def _verify(
    model: Any, candidate: torch.Tensor, drafted: int, fresh: int | None, first: bool, model_kwargs: dict[str, Any]
) -> Any:
    """One forward over what is fresh and the draft after it."""
    from transformers.generation import candidate_generator as extending

    given = copy.copy(model_kwargs)
    given = extending._prepare_attention_mask(given, candidate.shape[1], False)
    given = extending._prepare_token_type_ids(given, candidate.shape[1])
    if drafted and (ids := given.get("position_ids")) is not None:
        given = extending._prepare_position_ids(given, ids.shape[-1] + drafted, False)
    inputs = model.prepare_inputs_for_generation(
        candidate,
        next_sequence_length=None if fresh is None else fresh + drafted,
        is_first_iteration=first,
        **given,
    )
    if "logits_to_keep" in inputs:
        inputs["logits_to_keep"] = drafted + 1
    return model(**inputs, return_dict=True)


class _Answer:
    """What has been generated, and how the next token is chosen."""

    def __init__(self, ids: torch.Tensor, config: Any, processor: Callable[..., torch.Tensor], criteria: Any) -> None:
        self.ids = ids
        self.ended = False
        self._config = config
        self._processor = processor
        self._criteria = criteria
        wanted = config.return_dict_in_generate
        self._scores: tuple[torch.Tensor, ...] | None = () if wanted and config.output_scores else None
        self._logits: tuple[torch.Tensor, ...] | None = () if wanted and config.output_logits else None

    def take(self, draft: list[int], logits: torch.Tensor) -> list[int]:
        """Go on with the tokens that `logits` [1, len(draft) + 1, V] yield, as far as the draft is what they are."""
        tokens: list[int] = []
        for place in range(len(draft) + 1):
            token = self._next(logits[:, place])
            tokens.append(token)
            if self.ended or place == len(draft) or token != draft[place]:
                break
        return tokens

    def _next(self, logits: torch.Tensor) -> int:
        if self._logits is not None:
            self._logits += (logits.clone(),)
        scores = self._processor(self.ids, logits.clone())
        if self._scores is not None:
            self._scores += (scores,)
        if self._config.do_sample:
            token = torch.multinomial(torch.nn.functional.softmax(scores, dim=-1), num_samples=1)
        else:
            token = scores.argmax(dim=-1, keepdim=True)
        self.ids = torch.cat([self.ids, token], dim=1)
        self.ended = bool(self._criteria(self.ids, self._scores).all())
        return int(token)

    def result(self, cache: Any) -> Any:
        if not self._config.return_dict_in_generate:
            return self.ids
        from transformers.generation.utils import GenerateDecoderOnlyOutput

        parts: dict[str, Any] = {"sequences": self.ids, "scores": self._scores, "logits": self._logits}
        return GenerateDecoderOnlyOutput(**parts, past_key_values=cache)
