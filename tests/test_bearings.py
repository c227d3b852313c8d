"""Where we are, from calls that are timed anyway."""

from __future__ import annotations

import random
from dataclasses import replace

import pytest
from dataplane import linked
from test_routing import offer

from swarm import wire
from swarm.coordinates import distance
from swarm.routes import bearings
from swarm.routes.bearings import Bearings
from swarm.routes.ping import TIMES, ping
from swarm.rpc import LIGHT, Link, Reply
from swarm.types import Coordinate, Offer, PeerId

HERE, FAR = Coordinate((0.0, 0.0, 0.0), 0.001, 0.1), Coordinate((0.1, 0.0, 0.0), 0.001, 0.1)


def at(number: int, place: Coordinate | None, start: int = 0, end: int = 6) -> Offer:
    return replace(offer(number, start, end), coordinate=place)


def some_bearings() -> Bearings:
    return Bearings(random.Random(0))


def test_nothing_is_known_before_anything_was_measured() -> None:
    assert some_bearings().coordinate is None
    assert some_bearings().view().client is None


def test_round_trips_to_a_few_peers_find_our_place() -> None:
    ours, chance = some_bearings(), random.Random(1)
    true = Coordinate((0.04, 0.03, 0.0), 0.002, 0.1)
    others = [
        at(n, Coordinate((chance.uniform(-0.1, 0.1), chance.uniform(-0.1, 0.1), 0.0), 0.001, 0.1)) for n in range(16)
    ]
    ours.read(others)
    for _ in range(8):
        for other in others:
            assert other.coordinate is not None
            ours.timed(other.peer, distance(true, other.coordinate))
    found = ours.coordinate
    assert found is not None
    errors = [abs(distance(found, o.coordinate) / distance(true, o.coordinate) - 1) for o in others if o.coordinate]
    assert sorted(errors)[8] < 0.1


def test_what_is_measured_is_the_shortest_of_late() -> None:
    ours, peer = some_bearings(), PeerId("a")
    for seconds in (0.05, 0.03, 0.08):
        ours.timed(peer, seconds)
    assert 0.03 < ours.view().measured[peer] < 0.04
    for _ in range(100):
        ours.timed(peer, 0.08)
    assert ours.view().measured[peer] == pytest.approx(0.08, rel=0.01)


@pytest.mark.parametrize("seconds", [0.0, -1.0, float("nan"), 1e9])
def test_a_round_trip_that_cannot_be_is_ignored(seconds: float) -> None:
    ours = some_bearings()
    ours.timed(PeerId("a"), seconds)
    assert ours.coordinate is None
    assert ours.view().measured == {}


def test_whom_to_call_first_and_whom_next() -> None:
    ours = some_bearings()
    near, far, later = at(1, HERE), at(2, FAR), at(3, HERE, 3, 6)
    assert sorted(o.peer for o in ours.anywhere([near, far, later])) == ["peer1", "peer2", "peer3"]
    assert [o.peer for o in ours.near([far, near, later], 0)] == ["peer1", "peer2"]
    ours.timed(near.peer, 0.002)
    assert [o.peer for o in ours.near([far, near, later], 0)] == ["peer2"]
    assert "peer1" not in [o.peer for o in ours.anywhere([near, far, later])]


def test_only_a_few_are_called_however_many_there_are() -> None:
    many = [at(n, HERE) for n in range(100)]
    assert len(some_bearings().anywhere(many)) == bearings.FIRST_PEERS
    assert len(some_bearings().near(many, 0)) == bearings.NEAR_PEERS


def test_what_is_remembered_is_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bearings, "MAX_PEERS", 3)
    ours = some_bearings()
    for number in range(5):
        ours.timed(PeerId(str(number)), 0.01)
    assert list(ours.view().measured) == ["2", "3", "4"]


# --- over the wire ----------------------------------------------------------------------------------------------------


async def test_every_light_call_tells_its_round_trip() -> None:
    async with linked() as (near, far, link):
        told: list[tuple[str, float]] = []
        near.timed = lambda peer, seconds: told.append((peer, seconds))
        await link.call(wire.Echo(), timeout=5)
        await link.call(wire.Echo(), [bytes(LIGHT + 1)], timeout=5)  # takes time of its own
        assert [peer for peer, _ in told] == [far.peer]
        assert 0 < told[0][1] < 5


@pytest.mark.parametrize(("answering", "told"), [(0.0625, [0.125]), (0.25, [])], ids=["prompt", "slow"])
async def test_the_time_that_an_answer_takes_is_not_the_ways(answering: float, told: list[float]) -> None:
    async with linked() as (near, far, link):
        here, there, heard = [0.0], [0.0], list[float]()
        near.clock, far.clock = lambda: here[0], lambda: there[0]
        near.timed = lambda _, seconds: heard.append(seconds)

        async def answer(link: Link, message: wire.KeepAlive, body: memoryview) -> Reply:
            here[0] += 0.125 + answering  # the way, and the work
            there[0] += answering
            return wire.Done()

        far.answer(wire.KeepAlive, answer)
        await link.call(wire.KeepAlive(bytes(16)), timeout=5)
        assert heard == told


async def test_ping_calls_each_and_does_not_mind_who_is_not_there() -> None:
    async with linked() as (near, far, _):
        told: list[str] = []
        near.timed = lambda peer, _: told.append(peer)
        living = replace(offer(0, 0, 6), peer=far.peer, addresses=(far.address,))
        dead = offer(1, 0, 6)
        await ping(near, [living, dead], 5.0)
        assert told == [far.peer] * TIMES
