"""Offers in, a route out."""

from __future__ import annotations

import itertools
import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from swarm.errors import NoRoute
from swarm.routing import find_route, uncovered
from swarm.types import Address, ModelId, Offer, PeerId, Span, State

BLOCKS = 6


def offer(
    number: int,
    start: int,
    end: int,
    *,
    speed: float = 10.0,
    state: State = State.ONLINE,
    free: int = 100,
    sessions: int = 0,
) -> Offer:
    """What peer `number` says of itself."""
    return Offer(
        peer=PeerId(f"peer{number}"),
        model=ModelId("0" * 64),
        name="tiny",
        num_blocks=BLOCKS,
        span=Span(start, end),
        addresses=(Address("127.0.0.1", 4000 + number),),
        state=state,
        dtype="float32",
        tokens_per_second=speed,
        cache_tokens=100,
        cache_free=free,
        sessions=sessions,
        version="0.1.0",
        issued=0.0,
        expires=60.0,
    )


def _swarm(parts: list[tuple[int, int, float, State, int]]) -> list[Offer]:
    return [
        offer(number, start, min(start + length, BLOCKS), speed=speed, state=state, sessions=sessions)
        for number, (start, length, speed, state, sessions) in enumerate(parts)
    ]


swarms = st.lists(
    st.tuples(
        st.integers(0, BLOCKS - 1),
        st.integers(1, BLOCKS),
        st.floats(0, 1e4),
        st.sampled_from(State),
        st.integers(0, 5),
    ),
    max_size=8,
).map(_swarm)


def spans(offers: list[Offer], **options: object) -> list[tuple[str, str]]:
    return [(hop.peer, str(hop.span)) for hop in find_route(offers, BLOCKS, **options)]  # type: ignore[arg-type]


def test_one_peer_with_everything() -> None:
    assert spans([offer(0, 0, 6)]) == [("peer0", "0:6")]


def test_a_part_of_a_span_will_do() -> None:
    assert spans([offer(0, 0, 4), offer(1, 2, 6, speed=100)]) == [("peer0", "0:2"), ("peer1", "2:6")]


def test_fewer_hops_where_speeds_are_equal() -> None:
    assert spans([offer(0, 0, 3), offer(1, 3, 6), offer(2, 0, 6, speed=5)]) == [("peer2", "0:6")]


def test_the_faster_the_idler_and_the_emptier_is_taken() -> None:
    assert spans([offer(0, 0, 6), offer(1, 0, 6, speed=20)]) == [("peer1", "0:6")]
    assert spans([offer(0, 0, 6, sessions=3), offer(1, 0, 6)]) == [("peer1", "0:6")]
    assert spans([offer(0, 0, 6, free=0), offer(1, 0, 6)]) == [("peer1", "0:6")]


def test_a_full_peer_is_better_than_none() -> None:
    assert spans([offer(0, 0, 6, free=0)]) == [("peer0", "0:6")]


def test_who_is_to_be_avoided_is() -> None:
    offers = [offer(0, 0, 6, speed=100), offer(1, 0, 6)]
    assert spans(offers, avoid={PeerId("peer0")}) == [("peer1", "0:6")]


def test_no_route_names_the_blocks() -> None:
    with pytest.raises(NoRoute, match=r"blocks 0:1, 3:4 of 6") as caught:
        find_route([offer(0, 1, 3), offer(1, 4, 6), offer(2, 3, 4, state=State.JOINING)], BLOCKS)
    assert caught.value.missing == ((0, 1), (3, 4))


def test_chance_spreads_clients_over_equals() -> None:
    offers, chance = [offer(number, 0, 6) for number in range(3)], random.Random(0)
    assert {spans(offers, chance=chance)[0][0] for _ in range(50)} == {"peer0", "peer1", "peer2"}


@given(swarms)
def test_uncovered_is_exactly_what_no_online_peer_hosts(offers: list[Offer]) -> None:
    hosted = {block for each in offers if each.state is State.ONLINE for block in each.span}
    missing = uncovered(offers, BLOCKS)
    assert [block for span in missing for block in span] == sorted(set(range(BLOCKS)) - hosted)
    assert all(left.end < right.start for left, right in itertools.pairwise(missing))


@given(swarms, st.none() | st.integers(0, 99))
def test_a_route_covers_every_block_once_by_peers_that_host_them(offers: list[Offer], seed: int | None) -> None:
    chance = None if seed is None else random.Random(seed)
    missing = uncovered(offers, BLOCKS)
    if missing:
        with pytest.raises(NoRoute) as caught:
            find_route(offers, BLOCKS, chance=chance)
        assert caught.value.missing == tuple((span.start, span.end) for span in missing)
        return
    route = find_route(offers, BLOCKS, chance=chance)
    assert [block for hop in route for block in hop.span] == list(range(BLOCKS))
    by_peer = {each.peer: each for each in offers}
    for hop in route:
        assert by_peer[hop.peer].state is State.ONLINE
        assert hop.span in by_peer[hop.peer].span
        assert hop.addresses == by_peer[hop.peer].addresses
