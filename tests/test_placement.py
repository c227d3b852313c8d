"""Which blocks a newcomer takes."""

from __future__ import annotations

import random

import pytest
from hypothesis import given
from hypothesis import strategies as st
from test_routing import BLOCKS, offer, swarms

from peer.placement import choose_span
from swarm.routing import uncovered
from swarm.types import Offer, Span, State

counts = st.integers(1, BLOCKS)


def test_the_first_takes_the_first_blocks() -> None:
    assert choose_span([], 8, 3) == Span(0, 3)


def test_a_gap_is_filled_before_anything_else() -> None:
    assert choose_span([offer(0, 0, 3, speed=0.1), offer(1, 5, 8)], 8, 2) == Span(3, 5)


def test_where_all_is_covered_the_weakest_is_strengthened() -> None:
    assert choose_span([offer(0, 0, 4, speed=10), offer(1, 4, 8, speed=5)], 8, 4) == Span(4, 8)
    assert choose_span([offer(0, 0, 4, speed=5), offer(1, 4, 8, speed=10)], 8, 4) == Span(0, 4)


def test_of_equally_good_spans_a_newcomer_takes_one_that_another_can_then_leave() -> None:
    offers = [offer(0, 0, 4, speed=10.1), offer(1, 4, 8, speed=10)]
    chosen = {choose_span(offers, 8, 4, chance=random.Random(seed)) for seed in range(50)}
    assert chosen == {Span(0, 4), Span(4, 8)}


def test_who_leaves_does_not_count_and_who_joins_does() -> None:
    leaving, joining = offer(0, 0, 4, state=State.DRAINING), offer(1, 4, 8, speed=0, state=State.JOINING)
    assert choose_span([leaving, joining], 8, 4) == Span(0, 4)


@pytest.mark.parametrize("count", [0, -1, 9])
def test_a_number_of_blocks_that_cannot_be(count: int) -> None:
    with pytest.raises(ValueError, match="blocks"):
        choose_span([], 8, count)


@given(swarms, counts)
def test_it_hosts_as_much_as_was_asked_and_covers_as_much_as_anybody_could(offers: list[Offer], count: int) -> None:
    span = choose_span(offers, BLOCKS, count)
    assert len(span) == count
    assert span.end <= BLOCKS
    staying = [each for each in offers if each.state is not State.DRAINING]

    def still_missing(at: Span) -> int:
        hosted = {block for each in staying for block in each.span} | set(at)
        return BLOCKS - len(hosted)

    assert still_missing(span) == min(still_missing(Span(start, start + count)) for start in range(BLOCKS - count + 1))


@given(st.integers(1, 6), st.integers(1, 12))
def test_newcomers_one_after_another_cover_the_model(count: int, blocks: int) -> None:
    """As few of them as there can be, if the model divides by what each takes; never more than twice as many."""
    count = min(count, blocks)
    offers: list[Offer] = []
    while uncovered(offers, blocks):
        span = choose_span(offers, blocks, count)
        offers.append(offer(len(offers), span.start, span.end))
        assert len(offers) <= 2 * -(-blocks // count)
    if blocks % count == 0:
        assert len(offers) == blocks // count
