"""A thousand random fault schedules: each ends in the undisturbed tokens, or in the error that is due.

A failing seed is told of and can be run alone: `python tests/schedules.py SEED --log`.
"""

from __future__ import annotations

import pytest
import torch
from schedules import Schedule, failures

FAST = range(24)
BATCHES = [range(start, start + 122) for start in range(24, 1000, 122)]


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
