"""A thousand random fault schedules: each ends in the undisturbed tokens, or in the error that is due.

A failing seed is told of and can be run alone: `python tests/schedules.py SEED --log`.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from inprocess import TINY, save_llama
from schedules import Schedule, failures

from swarm.model import load_stage
from swarm.types import Span

FAST = range(16)
BATCHES = [range(start, start + 123) for start in range(16, 1000, 123)]


@pytest.fixture(autouse=True)
def _one_thread() -> None:
    torch.set_num_threads(1)


def test_random_faults() -> None:
    assert failures(FAST) == []


@pytest.mark.slow
@pytest.mark.timeout(300)
@pytest.mark.parametrize("seeds", BATCHES, ids=str)
def test_many_more_random_faults(seeds: range) -> None:
    assert failures(seeds) == []


@pytest.mark.parametrize("seed", [3, 38, 225])
def test_the_same_seed_takes_the_same_course(seed: int) -> None:
    courses = [Schedule(seed) for _ in range(2)]
    first, second = ([(o.tokens, o.ended, o.steps) for o in course.run()] for course in courses)
    assert first == second
    assert courses[0].swarm.trace == courses[1].swarm.trace


class LlamaEnds:
    """The embeddings and the head of a whole model."""

    def __init__(self, model: Any) -> None:
        self._model = model
        self.vocabulary = TINY["vocab_size"]

    @torch.no_grad()
    def embedded(self, ids: torch.Tensor) -> torch.Tensor:
        hidden: torch.Tensor = self._model.model.embed_tokens(ids)
        return hidden

    @torch.no_grad()
    def scores(self, hidden: torch.Tensor) -> torch.Tensor:
        return torch.log_softmax(self._model.lm_head(self._model.model.norm(hidden)), dim=-1)


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """A tiny Llama that stages can be loaded from, each span once."""
    folder: Path = tmp_path_factory.mktemp("llama")
    whole = save_llama(folder, max_position_embeddings=512)
    loaded: dict[Span, Any] = {}

    def load(span: Span) -> Any:
        if span not in loaded:
            loaded[span] = load_stage(folder, span, dtype=torch.float32)
        return loaded[span]

    return {"whole": TINY["num_hidden_layers"], "load": load, "ends": LlamaEnds(whole)}


@pytest.mark.parametrize("seed", [1000, *(pytest.param(s, marks=pytest.mark.slow) for s in range(1001, 1040))])
def test_random_faults_of_a_real_model(llama: dict[str, Any], seed: int) -> None:
    Schedule(seed, **llama).run()
