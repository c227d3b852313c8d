"""Placement as a whole: it covers every block, uncovers none, and comes to rest."""

from __future__ import annotations

import random
from collections.abc import Collection
from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from peer.placement import Move, Policy, Stay, Survey, choose_span, decide, pauses, reconsider, survey
from swarm.directory.reading import Part
from swarm.directory.sampling import lot
from swarm.types import ModelId, Offer, PeerId, Span, State

BLOCKS = 12
EAGER = Policy(chance=1.0)
LATE = 1e9  # seconds: whatever the least stay is, it is over


def an_offer(name: str, start: int, end: int, speed: float = 10.0, state: State = State.ONLINE) -> Offer:
    return Offer(
        PeerId(name), ModelId("m"), "m", BLOCKS, Span(start, end), (), state, "float32", speed, 1, 1, 0, "", 0.0, 60.0
    )


@st.composite
def swarms(draw: st.DrawFn) -> list[Offer]:
    spans = st.tuples(st.integers(0, BLOCKS - 1), st.integers(1, BLOCKS)).map(lambda s: (s[0], min(sum(s), BLOCKS)))
    drawn = draw(st.lists(st.tuples(spans, st.floats(0.1, 100), st.sampled_from(State)), min_size=1, max_size=12))
    return [an_offer(f"p{i}", *span, speed, state) for i, (span, speed, state) in enumerate(drawn)]


def online_hosts(offers: list[Offer], leaving: Collection[PeerId] = ()) -> list[int]:
    online = [offer for offer in offers if offer.state is State.ONLINE and offer.peer not in leaving]
    return [sum(block in offer.span for offer in online) for block in range(BLOCKS)]


def decided(seen: Survey, mine: Offer, policy: Policy = EAGER, seed: int = 0, stayed: float = LATE) -> Move | Stay:
    return decide(seen, mine, since=0.0, now=stayed, chance=random.Random(seed), policy=policy)


@given(swarms(), st.integers(0, 99))
def test_however_many_move_at_once_no_block_is_uncovered(offers: list[Offer], seed: int) -> None:
    seen = survey(offers, BLOCKS)
    leaving = {o.peer for o in offers if isinstance(decided(seen, o, seed=seed), Move)}
    for before, after in zip(online_hosts(offers), online_hosts(offers, leaving), strict=True):
        assert after >= min(before, 1)


@given(swarms(), st.floats(0, 4000))
def test_the_least_stay_is_respected(offers: list[Offer], stayed: float) -> None:
    seen = survey(offers, BLOCKS)
    for mine in offers:
        decision = decided(seen, mine, stayed=stayed)
        if isinstance(decision, Move):
            assert stayed >= EAGER.urgent_stay
            assert stayed >= EAGER.min_stay or "nobody hosts" in decision.reason


@given(swarms(), st.integers(1, BLOCKS), st.integers(0, 99))
def test_a_newcomer_takes_uncovered_blocks_first(offers: list[Offer], count: int, seed: int) -> None:
    hosted = {block for o in offers if o.state is not State.DRAINING for block in o.span}

    def holes(span: Span) -> int:
        return sum(block not in hosted for block in span)

    for chance in (None, random.Random(seed)):
        span = choose_span(offers, BLOCKS, count, chance=chance)
        assert len(span) == count
        assert holes(span) == max(holes(Span(s, s + count)) for s in range(BLOCKS - count + 1))


@given(st.lists(st.integers(1, BLOCKS), min_size=30, max_size=30), st.integers(0, 999))
def test_newcomers_one_after_another_cover_the_model(counts: list[int], seed: int) -> None:
    chance, offers = random.Random(seed), []
    for number, count in enumerate(counts):
        span = choose_span(offers, BLOCKS, count, chance=chance)
        offers.append(an_offer(f"p{number}", span.start, span.end))
        if sum(counts[: number + 1]) >= 2 * BLOCKS:
            break
    assert min(online_hosts(offers)) > 0


def settle(offers: list[Offer], policy: Policy, looks: int, chance: random.Random) -> list[int]:
    """Let all decide at the same moment, again and again; the moves of each look."""
    moves = []
    for _ in range(looks):
        seen = survey(offers, BLOCKS)
        moving = {
            mine.peer: decision.span
            for mine in offers
            if isinstance(decision := decide(seen, mine, since=0.0, now=LATE, chance=chance, policy=policy), Move)
        }
        offers[:] = [replace(offer, span=moving.get(offer.peer, offer.span)) for offer in offers]
        moves.append(len(moving))
    return moves


@pytest.mark.parametrize("seed", range(10))
def test_two_that_decide_at_once_do_not_run_after_each_other(seed: int) -> None:
    names = sorted("abcdef", key=lambda name: lot(PeerId(name)))  # the first ones keep the blocks
    offers = [an_offer(name, start, start + 6, 1.0) for name, start in zip(names, (0, 0, 6, 6), strict=False)]
    offers += [an_offer(name, 0, 6, 10.0) for name in names[4:]]
    moves = settle(offers, Policy(), 60, random.Random(seed))
    assert 1 <= sum(moves) <= 5
    assert sum(moves[30:]) == 0
    assert {offer.span for offer in offers[4:]} == {Span(0, 6), Span(6, 12)}


@settings(deadline=None)
@given(swarms(), st.integers(0, 999))
def test_every_swarm_comes_to_rest(offers: list[Offer], seed: int) -> None:
    moves = settle(offers, Policy(), 150, random.Random(seed))
    assert sum(moves[-30:]) <= 2


@pytest.mark.parametrize("seed", range(5))
def test_a_hole_is_filled_by_whoever_can_be_spared(seed: int) -> None:
    offers = [an_offer(f"p{i}", 0, 6) for i in range(4)]
    settle(offers, Policy(), 40, random.Random(seed))
    assert min(online_hosts(offers)) >= 1


def test_the_only_host_stays_and_says_why() -> None:
    offers = [an_offer("a", 0, 6), an_offer("b", 6, 12, 0.1), an_offer("c", 6, 12, 0.1)]
    decision = decided(survey(offers, BLOCKS), offers[0])
    assert isinstance(decision, Stay)
    assert "nobody else hosts" in decision.reason


def test_a_small_gain_is_not_worth_a_move() -> None:
    offers = [an_offer(f"p{i}", 0, 6) for i in range(6)] + [an_offer(f"q{i}", 6, 12) for i in range(5)]
    seen = survey(offers, BLOCKS)
    assert all("worth no more than" in d.reason for o in offers if isinstance(d := decided(seen, o), Stay))
    assert not any(isinstance(decided(seen, o), Move) for o in offers)


def test_a_clear_gain_is_and_chance_decides_who_takes_it() -> None:
    offers = [an_offer(f"p{i}", 0, 6) for i in range(12)] + [an_offer(f"q{i}", 6, 12) for i in range(3)]
    seen = survey(offers, BLOCKS)
    eager = [o.peer for o in offers if isinstance(decided(seen, o), Move)]
    assert len(eager) == 10  # all but the two that keep the blocks
    chance = random.Random(0)
    decisions = [decide(seen, o, since=0.0, now=LATE, chance=chance) for o in offers]
    assert 0 < sum(isinstance(d, Move) for d in decisions) < 6


@pytest.mark.parametrize("state", [State.JOINING, State.DRAINING])
def test_who_does_not_serve_does_not_move(state: State) -> None:
    offers = [an_offer(f"p{i}", 0, 6) for i in range(5)]
    assert isinstance(decided(survey(offers, BLOCKS), replace(offers[0], state=state)), Stay)


def test_an_empty_swarm_is_filled_without_chinks() -> None:
    """Newcomers that draw their place still leave room for whole spans beside it."""
    starts = {choose_span([], BLOCKS, 4, chance=random.Random(seed)).start for seed in range(50)}
    assert starts == {0, 4, 8}


def test_who_was_told_to_stay_stays_and_lets_others_go() -> None:
    first, second = sorted("ab", key=lambda name: lot(PeerId(name)))
    offers = [an_offer(first, 0, 6), replace(an_offer(second, 0, 6), fixed=True)]
    seen = survey(offers, BLOCKS)
    assert isinstance(decided(seen, offers[0]), Move)  # though by lot it would be the keeper
    assert decided(seen, offers[1]) == Stay("it was told to")


def test_the_only_one_that_can_be_spared_does_not_leave_a_hole_to_chance() -> None:
    offers = [replace(an_offer("a", 0, 6), fixed=True), an_offer("b", 0, 6)]
    unwilling = Policy(chance=0.0)
    assert isinstance(decided(survey(offers, BLOCKS), offers[1], unwilling), Move)


def test_of_two_newcomers_with_the_same_blocks_one_gives_way() -> None:
    first, second = sorted("ab", key=lambda name: lot(PeerId(name)))
    offers = [an_offer(name, 0, 6, state=State.JOINING) for name in (second, first)]

    def parts(*known: Offer) -> list[Part]:
        return [Part(Span(0, BLOCKS), known, known)]

    assert reconsider(parts(*offers), offers[1]) is None
    assert reconsider(parts(*offers), offers[0]) == Span(6, 12)
    assert reconsider(parts(*offers, an_offer("c", 6, 12)), offers[0]) is None  # nowhere is it missed


def test_looks_are_spread() -> None:
    chance = random.Random(0)
    seconds = [pauses(Policy(look=600), chance) for _ in range(100)]
    assert 300 <= min(seconds) < 400
    assert 800 < max(seconds) <= 900
