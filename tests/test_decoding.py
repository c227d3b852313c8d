"""Drafts change when tokens come and never which: our decoding loop against transformers', on a model right here."""

from __future__ import annotations

import itertools
from collections import Counter
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from inprocess import save_llama
from scipy.stats import chisquare
from transformers import (
    DynamicCache,
    GenerationConfig,
    LlamaForCausalLM,
    StoppingCriteria,
    StoppingCriteriaList,
    set_seed,
)

from swarm.errors import UsageError
from swarm.speculation.decoding import SpeculatingMixin, _Answer, generate
from swarm.speculation.drafting import LookupDrafter
from swarm.speculation.tuning import Speculate, Tuner
from swarm.swarm_cache import SwarmCache

PROMPT = torch.tensor([[5, 17, 23, 5, 17, 23, 5]])
SAMPLED: dict[str, Any] = {"do_sample": True, "temperature": 0.8, "top_k": 40, "top_p": 0.9}


class TunedCache(SwarmCache):
    """A cache as the swarm's, for blocks that are here: keys and values and all."""

    def __init__(self, config: Any) -> None:
        super().__init__()
        DynamicCache.__init__(self, config=config)

    update = DynamicCache.update
    crop = DynamicCache.crop
    reorder_cache = DynamicCache.reorder_cache
    get_seq_length = DynamicCache.get_seq_length
    get_mask_sizes = DynamicCache.get_mask_sizes


class Drafting(SpeculatingMixin, LlamaForCausalLM):
    """A whole model that drafts."""

    how = Speculate("lookup")
    helper: tuple[Any, ...] = ()  # in a tuple, or it would become a part of the model
    rewindable = True

    @property
    def speculate(self) -> Speculate:
        return self.how

    @property
    def draft_model(self) -> Any:
        return self.helper[0] if self.helper else None

    def _prepare_cache_for_generation(self, config: Any, kwargs: dict[str, Any], *_: Any) -> None:
        kwargs.setdefault("past_key_values", TunedCache(self.config))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("llama")


@pytest.fixture(scope="module")
def whole(folder: Path) -> Any:
    return save_llama(folder, num_hidden_layers=1)


@pytest.fixture
def model(folder: Path, whole: Any) -> Any:
    return Drafting.from_pretrained(folder)


@pytest.fixture(scope="module")
def helper(tmp_path_factory: pytest.TempPathFactory, whole: Any) -> Any:
    """A draft model that is right now and then: the model itself, shaken."""
    other = save_llama(tmp_path_factory.mktemp("helper"), num_hidden_layers=1)
    with torch.no_grad():
        for parameter in other.parameters():
            parameter += 0.02 * torch.randn_like(parameter)
    return other


def answer(model: Any, seed: int = 7, **options: Any) -> Any:
    set_seed(seed)
    defaults = {"max_new_tokens": 24, "do_sample": False, "attention_mask": torch.ones_like(PROMPT)}
    return model.generate(PROMPT, **{**defaults, **options})


OPTIONS = [
    {},
    SAMPLED,
    {**SAMPLED, "repetition_penalty": 1.3},
    {"no_repeat_ngram_size": 3},
    {"min_new_tokens": 24, "eos_token_id": list(range(2, 60))},
    {"eos_token_id": list(range(2, 30)), **SAMPLED},
    {"max_new_tokens": 1},
    {"max_new_tokens": 2},
]


@pytest.mark.parametrize("options", OPTIONS, ids=lambda options: "-".join(options) or "greedy")
@pytest.mark.parametrize("how", ["auto", "lookup", "draft:helper"])
def test_the_tokens_are_those_without_drafts(
    whole: Any, model: Any, helper: Any, how: str, options: dict[str, Any]
) -> None:
    """Sampled ones too, from the same seed, and afterwards the generator stands where it would have stood."""
    model.how, model.helper = Speculate.parse(how), (helper,) if how.startswith("draft") else ()
    expected, after = answer(whole, **options), torch.rand(1)
    assert answer(model, **options).tolist() == expected.tolist()
    assert torch.equal(torch.rand(1), after)


def counted(model: Any, **options: Any) -> Any:
    cache = TunedCache(model.config)
    answer(model, past_key_values=cache, **options)
    return cache.tuner.counts


def test_a_text_that_goes_in_circles_comes_in_few_trips(model: Any) -> None:
    """Sampling among the one likeliest token is greedy, and greedy tiny models go in circles."""
    for options in ({"max_new_tokens": 120}, {"max_new_tokens": 120, "do_sample": True, "top_k": 1}):
        counts = counted(model, **options)
        assert counts.tokens > 1.3 * counts.trips  # how long drafts are follows the clock; one is sent in any case


def test_a_draft_model_that_samples_with_the_same_numbers_is_mostly_right(model: Any, helper: Any, whole: Any) -> None:
    """At a temperature at which two independent draws would hardly ever be the same token."""
    model.how = Speculate("draft", "helper")
    options = {"do_sample": True, "temperature": 2.0, "top_k": 0, "max_new_tokens": 60}
    model.helper = (whole,)
    assert (counts := counted(model, **options)).accepted == counts.drafted > 20
    model.helper = (helper,)
    assert (counts := counted(model, **options)).accepted > 0.3 * counts.drafted


@pytest.mark.parametrize("assistant", ["model", "lookup"])
def test_an_assistant_of_the_callers_changes_no_token(whole: Any, model: Any, helper: Any, assistant: str) -> None:
    model.how = Speculate("off")
    given = {"assistant_model": helper} if assistant == "model" else {"prompt_lookup_num_tokens": 5}
    for options in ({}, SAMPLED):
        assert answer(model, **given, **options).tolist() == answer(whole, **options).tolist()


def test_scores_and_logits_are_those_without_drafts(whole: Any, model: Any) -> None:
    options = {**SAMPLED, "return_dict_in_generate": True, "output_scores": True, "output_logits": True}
    expected, found = answer(whole, **options), answer(model, **options)
    for kind in ("scores", "logits"):
        assert torch.allclose(torch.stack(found[kind]), torch.stack(expected[kind]), atol=1e-4)
    assert found.past_key_values.get_seq_length() == found.sequences.shape[1] - 1


class Stop(StoppingCriteria):
    """Ends a text after the first token that can be divided by seven, wherever in a trip that is."""

    def __call__(self, input_ids: torch.Tensor, scores: Any, **_: Any) -> torch.Tensor:
        return input_ids[:, -1] % 7 == 0


def test_nothing_comes_after_the_end_whoever_says_where_that_is(whole: Any, model: Any) -> None:
    for seed in range(5):
        options = {**SAMPLED, "seed": seed, "stopping_criteria": StoppingCriteriaList([Stop()])}
        assert answer(model, **options).tolist() == answer(whole, **options).tolist()


def test_a_streamer_hears_token_by_token(model: Any) -> None:
    heard: list[torch.Tensor] = []
    streamer = SimpleNamespace(put=heard.append, end=lambda: heard.append(torch.tensor([-1])))
    output = answer(model, streamer=streamer)
    assert torch.equal(heard[0], PROMPT)
    assert [value.tolist() for value in heard[1:]] == [
        [token] for token in [*output[0, PROMPT.shape[1] :].tolist(), -1]
    ]


def test_an_answer_goes_on_where_the_cache_ended(whole: Any, model: Any) -> None:
    texts = []
    for each, cache in ((whole, DynamicCache(config=whole.config)), (model, TunedCache(model.config))):
        ids = PROMPT
        for turn in ([11, 12, 13], [5, 17]):
            options = {"attention_mask": torch.ones_like(ids), "max_new_tokens": 20, "do_sample": False}
            ids = each.generate(ids, past_key_values=cache, **options)
            ids = torch.cat([ids, torch.tensor([turn])], dim=1)
        texts.append(ids.tolist())
    assert texts[0] == texts[1]


def test_rows_and_beams_and_hidden_states_are_transformers_own(whole: Any, model: Any) -> None:
    for options in ({"num_beams": 2}, {"num_return_sequences": 2, "do_sample": True}):
        assert answer(model, **options).tolist() == answer(whole, **options).tolist()
    assert answer(model, return_dict_in_generate=True, output_hidden_states=True).hidden_states
    with pytest.raises(UsageError, match="one row"):
        answer(model, use_cache=False, prompt_lookup_num_tokens=3)


def test_what_cannot_go_back_is_not_drafted_for(whole: Any, model: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Drafting, "rewindable", False)
    assert counted(model).trips == 0
    with pytest.raises(UsageError, match="no draft can be taken back"):
        answer(model, prompt_lookup_num_tokens=3)


# --- the distribution -------------------------------------------------------------------------------------------------

TOKENS, RUNS = 6, 3000


class Chances:
    """A model whose next token depends on the last one alone, by a table of chances that is known."""

    def __init__(self) -> None:
        self.logits = torch.randn(TOKENS, TOKENS, generator=torch.Generator().manual_seed(1))

    def prepare_inputs_for_generation(self, ids: torch.Tensor, next_sequence_length: Any, **_: Any) -> dict[str, Any]:
        return {"ids": ids}

    def __call__(self, ids: torch.Tensor, return_dict: bool) -> Any:
        return SimpleNamespace(logits=self.logits[ids])

    def _update_model_kwargs_for_generation(self, outputs: Any, kwargs: Any, num_new_tokens: int) -> Any:
        return kwargs


class Stubborn(LookupDrafter):
    """Always drafts the same, likely or not."""

    def draft(self, input_ids: torch.Tensor, most: int) -> list[int]:
        return [3, 3, 0][:most]

    def learn(self, *_: Any) -> None:
        pass


def chance_of_what_is_found(drafter: Any) -> float:
    """How probable it is that tokens are as far off as the three after the prompt are, by a chi-squared test."""
    model, tuner = Chances(), Tuner()
    cache = SimpleNamespace(get_seq_length=lambda: 0, crop=lambda length: None)
    config = GenerationConfig(do_sample=True, max_length=7)
    set_seed(0)
    found: Counter[tuple[int, ...]] = Counter()
    for _ in range(RUNS):
        ids = generate(
            model,
            torch.tensor([[3, 0, 3, 0]]),
            drafter(tuner, 1),
            tuner,
            lambda ids, scores: scores,
            lambda ids, scores: torch.tensor([ids.shape[1] >= 7]),
            config,
            past_key_values=cache,
        )
        found[tuple(ids[0, 4:].tolist())] += 1
    assert tuner.counts.accepted > RUNS / 20
    chance = model.logits.double().softmax(-1)
    all_three = list(itertools.product(range(TOKENS), repeat=3))
    expected = {(a, b, c): RUNS * float(chance[0, a] * chance[a, b] * chance[b, c]) for a, b, c in all_three}
    common = [each for each in all_three if expected[each] >= 5]
    rest = RUNS - sum(found[each] for each in common), RUNS - sum(expected[each] for each in common)
    observed = [*(found[each] for each in common), rest[0]]
    return float(chisquare(observed, [*(expected[each] for each in common), rest[1]]).pvalue)


@pytest.mark.parametrize("drafter", [LookupDrafter, Stubborn])
def test_sampled_tokens_come_as_often_as_they_should(drafter: Any) -> None:
    assert chance_of_what_is_found(drafter) > 1e-3


def test_tokens_that_come_too_often_would_be_found_out(monkeypatch: pytest.MonkeyPatch) -> None:
    """A loop that takes every tenth draft for granted."""
    honest, calls = _Answer._next, itertools.count(1)

    def lenient(self: _Answer, logits: torch.Tensor) -> int:
        if next(calls) % 10:
            return honest(self, logits)
        return honest(self, torch.nn.functional.one_hot(torch.tensor([3]), TOKENS) * 100.0)

    monkeypatch.setattr(_Answer, "_next", lenient)
    assert chance_of_what_is_found(Stubborn) < 1e-3
