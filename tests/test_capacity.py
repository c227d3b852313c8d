"""What a machine can do, and how many blocks fit it; how busy it is of late; what of that is news."""

from __future__ import annotations

import itertools
import math
import weakref
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from inprocess import save_llama
from test_routing import offer

from peer import capacity
from peer.announcer import is_news
from peer.capacity import (
    Capacity,
    budget,
    cache_tokens,
    fitting_blocks,
    host_tokens,
    measure,
    rehearsals,
    rehearse,
    release_memory,
    thread_counts,
)
from peer.load import MEMORY_SECONDS, Load
from peer.stage import SessionState, Stage
from swarm.errors import UsageError
from swarm.model import load_stage
from swarm.types import Coordinate, Span

BLOCK = Capacity(0.002, 0.1, bytes_per_token=100, weights=1_000_000, blocks=1, activation=4000)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("llama")
    save_llama(folder)
    return folder


def stage_of(folder: Path, start: int, end: int) -> Stage:
    return Stage(load_stage(folder, Span(start, end), dtype=torch.float32))


def test_a_stage_is_measured(folder: Path) -> None:
    whole, one = measure(stage_of(folder, 1, 5)), measure(stage_of(folder, 2, 3))
    assert (whole.blocks, one.blocks) == (4, 1)
    assert whole.weights == pytest.approx(4 * one.weights)
    assert whole.bytes_per_token == 4 * one.bytes_per_token == 4 * 2 * 2 * 8 * 4  # K and V, heads, width, fp32
    assert one.activation == 32 * 4
    for each in (whole, one):
        assert each.seconds_per_block > 0
        assert each.prefill_seconds_per_block > 0


@pytest.mark.parametrize(
    ("seconds", "chosen"),
    [
        ({4: 0.5, 2: 1.0, 1: 2.0}, 4),
        ({4: 50.0, 2: 0.9, 1: 1.0}, 2),
        ({4: 1.05, 2: 1.0, 1: 1.02}, 4),
        ({4: 9.0, 2: 9.0, 1: 1.0}, 1),
    ],
)
def test_the_largest_number_of_threads_that_is_as_fast_as_any_is_computed_with(
    seconds: dict[int, float], chosen: int, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = torch.get_num_threads()
    timed = capacity._time

    def time(stage: Stage, state: SessionState, position: int, count: int) -> float:
        timed(stage, state, position, count)
        return seconds.get(torch.get_num_threads(), 1.0)

    monkeypatch.setattr(capacity, "_time", time)
    try:
        found = measure(stage_of(folder, 1, 3), thread_counts(4))
        assert torch.get_num_threads() == chosen
        assert found.seconds_per_block == seconds[chosen] / 2
    finally:
        torch.set_num_threads(before)


@given(st.integers(1, 1000))
def test_threads_are_tried_by_halves_down_to_one(most: int) -> None:
    counts = thread_counts(most)
    assert (counts[0], counts[-1]) == (most, 1)
    assert all(fewer == more // 2 for more, fewer in itertools.pairwise(counts))


def test_a_rehearsed_number_of_tokens_is_known_and_proven(folder: Path) -> None:
    stage = stage_of(folder, 1, 4)
    measure(stage)
    lean = stage.model._lean
    assert lean is not None
    assert lean.known
    assert 5 not in lean._open
    for tokens in rehearsals(6):
        rehearse(stage, tokens)
    assert {tokens: left for tokens, left in lean._open.items() if left} == {}
    assert lean._open.keys() == {1, 2, 3, 4, 5, 6}
    assert lean.known
    assert stage.pages._claims == {}


def test_bandwidth_is_a_part_of_the_speed() -> None:
    assert BLOCK.tokens_per_second(5) == pytest.approx(100)
    assert BLOCK.tokens_per_second(5, bandwidth=400_000) == pytest.approx(50)


def test_nothing_is_left_of_a_stage_that_was_let_go(folder: Path) -> None:
    stage = stage_of(folder, 0, 3)
    measure(stage)
    traces = [weakref.ref(stage.model.model), *map(weakref.ref, stage.model.model.parameters())]
    del stage
    release_memory()
    assert not [trace for trace in traces if trace() is not None]


# --- memory -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("tokens", "room", "count"),
    [
        (None, None, 8),  # nobody knows
        (None, 3 * (1_000_000 + 100 * capacity.DEFAULT_CACHE_TOKENS), 3),
        (10_000, 4_000_000, 2),
        (10_000, 3_999_999, 1),
        (10_000, 10**12, 8),
        (10_000, 1_200_000, 1),  # with a smaller cache than was wished for
    ],
)
def test_as_many_blocks_as_fit_with_their_cache(tokens: int | None, room: int | None, count: int) -> None:
    assert fitting_blocks(BLOCK, tokens, room, most=8) == count


def test_where_not_even_one_block_fits_that_is_said() -> None:
    with pytest.raises(UsageError, match="one block needs 1 MB of memory with its cache, 1 MB are free"):
        fitting_blocks(BLOCK, None, 1_000_000, most=8)


@given(st.integers(1, 10**6), st.integers(1, 10**9), st.integers(2_000_000, 10**12), st.integers(1, 100))
def test_what_fits_fits(tokens: int, weights: int, room: int, most: int) -> None:
    block = replace(BLOCK, weights=weights)
    try:
        count = fitting_blocks(block, tokens, room, most)
    except UsageError:
        assert room < weights + 100 * tokens
        return
    assert 1 <= count <= most
    assert count == 1 or count * (weights + 100 * tokens) <= room


def test_memory_is_capped_by_what_is_there_and_by_what_is_allowed(monkeypatch: pytest.MonkeyPatch) -> None:
    cpu = torch.device("cpu")
    monkeypatch.setattr(capacity, "available_memory", lambda _: 1000)
    assert [budget(cpu, cap) for cap in (None, 500, 5000)] == [800, 500, 800]
    monkeypatch.setattr(capacity, "available_memory", lambda _: None)
    assert [budget(cpu, cap) for cap in (None, 500)] == [None, 500]


def test_the_cache_promises_no_more_than_there_is() -> None:
    assert cache_tokens(None, 100, None) == cache_tokens(None, 100, 10**9) == capacity.DEFAULT_CACHE_TOKENS
    assert cache_tokens(None, 100, 50_000) == 500
    assert cache_tokens(400, 100, 50_000) == 400
    with pytest.raises(UsageError, match="at most 500 tokens fit"):
        cache_tokens(501, 100, 50_000)
    for wanted in (None, 400):
        with pytest.raises(UsageError, match="and 5 MB more: none is left for a cache"):
            cache_tokens(wanted, 100, -5_000_000)


# --- how busy ---------------------------------------------------------------------------------------------------------


def test_a_step_that_waits_for_two_others_counts_two() -> None:
    load = Load(0.01)
    for second in range(60):
        load.took(0.3, 10, alone=False, now=float(second))
    assert load.queue(60.0) == pytest.approx(2.0, rel=0.15)
    assert load.seconds_per_block == 0.01  # which says nothing of the stage itself


def test_who_is_alone_tells_how_fast_the_stage_is() -> None:
    load = Load(0.01)
    for second in range(200):
        load.took(0.2, 10, alone=True, now=float(second))
    assert load.queue(200.0) == 0.0
    assert load.seconds_per_block == pytest.approx(0.02, rel=0.01)


def test_measured_again_what_differs_by_noise_is_no_news() -> None:
    load = Load(0.01)
    assert not load.measured(0.012)
    assert load.seconds_per_block == 0.01
    assert load.measured(0.005)
    assert load.seconds_per_block == 0.005


@given(st.floats(0, 1000))
def test_a_queue_is_forgotten(later: float) -> None:
    load = Load(0.01)
    load.took(0.3, 10, alone=False, now=1e6)
    assert load.queue(1e6 + later) == pytest.approx(2.0 * math.exp(-later / MEMORY_SECONDS), rel=1e-6)


def test_what_is_news() -> None:
    told = offer(0, 0, 6, free=100)
    here = Coordinate((0.0, 0.0, 0.0), 0.001, 0.5)
    assert not is_news(told, replace(told, queue=0.4, cache_free=95))
    for news in ({"queue": 0.6}, {"cache_free": 80}, {"sessions": 1}, {"coordinate": here}):
        assert is_news(told, replace(told, **news))
    there = replace(told, coordinate=here)
    for vector, height, news in (((0.001, 0, 0), 0.002, False), ((0.01, 0, 0), 0.001, True), ((0, 0, 0), 0.02, True)):
        assert is_news(there, replace(there, coordinate=Coordinate(vector, height, 0.3))) is news
    busy = replace(told, queue=10.0)
    assert not is_news(busy, replace(busy, queue=12.0))


@pytest.mark.parametrize(("room", "expected"), [(None, 100), (10_000, 100), (1_500, 50), (1_000, 0), (500, 0)])
def test_idle_sessions_take_no_more_than_the_memory_beside_the_pool(room: int | None, expected: int) -> None:
    assert host_tokens(100, 10, room) == expected
