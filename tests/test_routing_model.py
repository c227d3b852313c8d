"""Routing as a whole: against every route there is, with latencies, load, chance, and bounded knowledge."""

from __future__ import annotations

import itertools
import random
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import replace

import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from swarm.coordinates import distance
from swarm.errors import NoRoute
from swarm.routes.costs import seconds_per_block, turn_seconds
from swarm.routes.explanation import explain
from swarm.routing import View, find_route, uncovered
from swarm.types import Coordinate, Hop, ModelId, Offer, PeerId, Route, Span, State

BLOCKS = 6
HERE = Coordinate((0.0, 0.0, 0.0), 0.001, 0.1)
FAR = Coordinate((0.2, 0.0, 0.0), 0.001, 0.1)


def an_offer(name: str, start: int = 0, end: int = BLOCKS, **values: object) -> Offer:
    offer = Offer(
        peer=PeerId(name),
        model=ModelId("m"),
        name="m",
        num_blocks=max(end, BLOCKS),
        span=Span(start, end),
        addresses=(),
        state=State.ONLINE,
        dtype="float32",
        tokens_per_second=10.0,
        cache_tokens=1000,
        cache_free=1000,
        sessions=0,
        version="",
        issued=0.0,
        expires=60.0,
        coordinate=HERE,
        seconds_per_block=0.01,
    )
    return replace(offer, **values)  # type: ignore[arg-type]


axes = st.floats(-0.1, 0.1)
places = st.builds(Coordinate, st.tuples(axes, axes, axes), st.floats(0.0001, 0.02), st.just(0.1))


@st.composite
def swarms(draw: st.DrawFn, whole: bool = False) -> list[Offer]:
    """Up to five peers; where it is `whole`, every block has one."""
    spans, cuts = [], [0, *sorted(draw(st.sets(st.integers(1, BLOCKS - 1), max_size=2))), BLOCKS]
    if whole:
        spans = [(draw(st.integers(0, a)), draw(st.integers(b, BLOCKS))) for a, b in itertools.pairwise(cuts)]
    for _ in range(draw(st.integers(int(not whole), 5 - len(spans)))):
        start = draw(st.integers(0, BLOCKS - 1))
        spans.append((start, draw(st.integers(start + 1, BLOCKS))))
    offers = []
    for number, (start, end) in enumerate(draw(st.permutations(spans))):
        offers.append(
            an_offer(
                f"p{number}",
                start,
                end,
                coordinate=draw(places),
                seconds_per_block=draw(st.floats(0.0005, 0.05)),
                queue=draw(st.floats(0, 2)),
            )
        )
    return offers


def every_route(offers: Sequence[Offer], start: int, end: int, again: bool) -> Iterator[tuple[Hop, ...]]:
    if start == end:
        yield ()
    for offer in offers:
        others = [other for other in offers if again or other is not offer]
        for stop in range(start + 1, min(offer.span.end, end) + 1) if start in offer.span else ():
            for rest in every_route(others, stop, end, again):
                if not rest or rest[0].peer != offer.peer:
                    yield (Hop(offer.peer, (), Span(start, stop)), *rest)


def seconds(hops: Sequence[Hop], offers: Sequence[Offer], source: Coordinate = HERE, sink: Coordinate = HERE) -> float:
    """A token's time, counted the plain way."""
    known = {offer.peer: offer for offer in offers}
    stops = [source, *(known[hop.peer].coordinate or HERE for hop in hops), sink]
    ways = sum(distance(a, b) / 2 for a, b in itertools.pairwise(stops))
    return ways + sum(
        turn_seconds(known[hop.peer], 1) + seconds_per_block(known[hop.peer]) * len(hop.span) for hop in hops
    )


@given(swarms(whole=True))
def test_no_route_at_all_is_faster(offers: list[Offer]) -> None:
    route = find_route(offers, BLOCKS, view=View(HERE))
    found = seconds(route.hops, offers)
    assert len({hop.peer for hop in route}) == len(route)
    fastest = min(seconds(hops, offers) for hops in every_route(offers, 0, BLOCKS, again=False))
    assert found >= fastest - 1e-9
    # Where a peer would have to serve twice to be faster, it need not be the fastest of those that can be used.
    if fastest <= min(seconds(hops, offers) for hops in every_route(offers, 0, BLOCKS, again=True)) + 1e-9:
        assert found == pytest.approx(fastest)


@given(swarms(), st.integers(0, BLOCKS - 1), st.integers(1, BLOCKS))
def test_a_part_is_put_between_two_peers_at_least_cost(offers: list[Offer], start: int, length: int) -> None:
    span = Span(start, min(start + length, BLOCKS))
    assume(not uncovered(offers, span))
    before, after = an_offer("before", coordinate=FAR), an_offer("after", coordinate=HERE)
    route = find_route(offers, span, view=View(None, before=before, after=after))
    assert (route.hops[0].span.start, route.hops[-1].span.end) == (span.start, span.end)
    every = list(every_route(offers, span.start, span.end, again=True))
    fastest = min(seconds(hops, offers, FAR, HERE) for hops in every)
    if any(seconds(h, offers, FAR, HERE) <= fastest + 1e-9 and len({x.peer for x in h}) == len(h) for h in every):
        assert seconds(route.hops, offers, FAR, HERE) == pytest.approx(fastest)


@given(swarms(), st.integers(0, 9))
def test_chance_and_avoidance_leave_a_route_a_route(offers: list[Offer], seed: int) -> None:
    offers = [replace(offers[0], peer=PeerId("gone"), state=State.DRAINING), *offers]
    avoid = {offers[-1].peer}
    usable = [offer for offer in offers if offer.state is State.ONLINE and offer.peer not in avoid]
    if missing := uncovered(usable, BLOCKS):
        with pytest.raises(NoRoute) as caught:
            find_route(offers, BLOCKS, avoid=avoid, chance=random.Random(seed))
        assert caught.value.missing == tuple((span.start, span.end) for span in missing)
        return
    route = find_route(offers, BLOCKS, avoid=avoid, chance=random.Random(seed), view=View(HERE))
    assert [block for hop in route for block in hop.span] == list(range(BLOCKS))
    spans = {offer.peer: offer.span for offer in usable}
    assert all(hop.span in spans[hop.peer] for hop in route)


def peers_of(route: Route) -> list[str]:
    return [str(hop.peer) for hop in route]


@pytest.mark.parametrize("state", [State.JOINING, State.DRAINING])
def test_who_is_not_online_serves_nobody(state: State) -> None:
    offers = [an_offer("slow", seconds_per_block=1.0), an_offer("fast", state=state)]
    assert peers_of(find_route(offers, BLOCKS)) == ["slow"]


def test_the_nearer_one_is_chosen_and_a_measurement_counts_more() -> None:
    offers = [an_offer("near", coordinate=HERE), an_offer("far", coordinate=FAR)]
    assert peers_of(find_route(offers, BLOCKS, view=View(HERE))) == ["near"]
    measured = {PeerId("far"): 0.001, PeerId("near"): 0.3}
    assert peers_of(find_route(offers, BLOCKS, view=View(HERE, measured))) == ["far"]


def test_few_hops_are_taken_where_that_is_faster_and_not_elsewhere() -> None:
    halves = [an_offer("a", 0, 3, seconds_per_block=0.009), an_offer("b", 3, 6, seconds_per_block=0.009)]
    offers = [an_offer("whole"), *halves]
    assert peers_of(find_route(offers, BLOCKS, view=View(HERE))) == ["a", "b"]
    far = [replace(half, coordinate=FAR) for half in halves]
    assert peers_of(find_route([an_offer("whole"), *far], BLOCKS, view=View(HERE))) == ["whole"]


def test_a_queue_and_a_full_cache_are_avoided_but_not_for_ever() -> None:
    idle, busy = an_offer("idle", seconds_per_block=0.015), an_offer("busy", queue=3.0)
    assert peers_of(find_route([idle, busy], BLOCKS)) == ["idle"]
    full = an_offer("full", cache_free=99)
    assert peers_of(find_route([idle, full], BLOCKS, tokens_needed=99)) == ["full"]
    assert peers_of(find_route([idle, full], BLOCKS, tokens_needed=100)) == ["idle"]
    assert peers_of(find_route([full], BLOCKS, tokens_needed=100)) == ["full"]


def test_who_has_no_coordinate_is_as_far_as_the_usual_one() -> None:
    offers = [an_offer("near"), an_offer("far", coordinate=FAR), an_offer("unknown", coordinate=None)]
    best = [peers_of(find_route(offers[i:], BLOCKS, view=View(HERE)))[0] for i in range(2)]
    assert best == ["near", "unknown"]
    nobody_knows = [replace(offer, coordinate=None) for offer in offers]
    assert len(find_route(nobody_knows, BLOCKS)) == 1


def test_clients_spread_over_what_is_about_as_good() -> None:
    offers = [an_offer(f"p{i}", seconds_per_block=0.01 + 0.0001 * i) for i in range(4)]
    offers.append(an_offer("slow", seconds_per_block=0.02))
    chosen = Counter(peers_of(find_route(offers, BLOCKS, chance=random.Random(seed)))[0] for seed in range(400))
    assert min(chosen[f"p{i}"] for i in range(4)) > 40
    assert chosen["slow"] == 0


def test_a_peer_that_would_serve_twice_serves_what_is_between() -> None:
    offers = [an_offer("all"), an_offer("middle", 2, 4, seconds_per_block=0.001)]
    assert peers_of(find_route(offers, BLOCKS)) == ["all"]


def test_hundreds_of_offers_are_no_matter() -> None:
    chance, offers = random.Random(0), []
    for number in range(400):
        start = 4 * number if number < 25 else chance.randrange(92)
        place = Coordinate((chance.gauss(0, 0.05), chance.gauss(0, 0.05), chance.gauss(0, 0.05)), 0.005, 0.1)
        pace = 0.002 * chance.lognormvariate(0, 0.5)
        end = min(start + chance.choice([8, 16]), 100)
        offers.append(an_offer(f"p{number}", start, end, coordinate=place, seconds_per_block=pace))
    route = find_route(offers, 100, view=View(HERE))
    random_routes = [find_route(chance.sample(offers[25:], 200) + offers[:25], 100, view=View(HERE)) for _ in range(5)]
    assert all(seconds(route.hops, offers) <= seconds(other.hops, offers) + 1e-9 for other in random_routes)


# --- why -------------------------------------------------------------------------------------------------------------


def test_an_explanation_adds_up_and_names_the_next_best() -> None:
    offers = [
        an_offer("a", 0, 3),
        an_offer("far", 0, 3, coordinate=FAR),
        an_offer("b", 3, 6),
        an_offer("slow", 3, 6, seconds_per_block=0.04),
    ]
    route = find_route(offers, BLOCKS, view=View(HERE))
    why = explain(route, offers, view=View(HERE))
    assert why.seconds == pytest.approx(seconds(route.hops, offers))
    assert [choice.hop for choice in why.choices] == list(route)
    assert [peers_of(Route(choice.instead)) for choice in why.choices] == [["far"], ["slow"]]
    assert [choice.extra for choice in why.choices] == pytest.approx([0.2, 0.09])
    assert ["farther away" in why.choices[0].reason, "slower" in why.choices[1].reason] == [True, True]


def test_an_explanation_says_where_there_is_nobody_else_and_who_is_busy() -> None:
    offers = [an_offer("only", 0, 3), an_offer("b", 3, 6), an_offer("busy", 3, 6, queue=2.0)]
    why = explain(find_route(offers, BLOCKS), offers)
    assert "nobody else hosts all of 0:3" in why.choices[0].reason
    assert why.choices[0].extra == float("inf")
    assert "busier" in why.choices[1].reason
