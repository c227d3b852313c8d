"""Network coordinates: they find a geography out, and nobody's lies carry them away."""

from __future__ import annotations

import math
import random
import statistics
from collections.abc import Callable

import pytest
from hypothesis import given
from hypothesis import strategies as st

from swarm.coordinates import (
    BEST_ERROR,
    FARTHEST,
    LONGEST,
    MIN_HEIGHT,
    NOWHERE,
    WORST_ERROR,
    distance,
    fault,
    update,
)
from swarm.types import Coordinate

THERE = Coordinate((0.03, -0.02, 0.01), 0.004, 0.1)
PEERS = 60
ROUNDS = 200

axes = st.floats(-FARTHEST / 2, FARTHEST / 2)
coordinates = st.builds(
    Coordinate, st.tuples(axes, axes, axes), st.floats(MIN_HEIGHT, FARTHEST), st.floats(BEST_ERROR, WORST_ERROR)
)
anything = st.floats()
claims = st.builds(Coordinate, st.tuples(anything, anything, anything), anything, anything)


class Earth:
    """Points in space with a last mile each."""

    def __init__(self, seed: int) -> None:
        self.chance = random.Random(seed)
        self.points = [tuple(self.chance.gauss(0, 0.05) for _ in range(3)) for _ in range(PEERS)]
        self.heights = [self.chance.lognormvariate(-5.3, 0.7) for _ in range(PEERS)]

    def round_trip(self, a: int, b: int) -> float:
        return math.dist(self.points[a], self.points[b]) + self.heights[a] + self.heights[b]

    def settle(self, answer: Callable[[int, list[Coordinate]], Coordinate | None]) -> list[Coordinate]:
        """Let all measure each other at random, with 10% of noise. `answer` is the coordinate a peer tells instead."""
        places = [NOWHERE] * PEERS
        for _ in range(ROUNDS):
            for a in range(PEERS):
                b = self.chance.choice([other for other in range(PEERS) if other != a])
                rtt, lie = self.round_trip(a, b) * self.chance.lognormvariate(0, 0.1), answer(b, places)
                told = (places[b], rtt) if lie is None else (lie, self.chance.uniform(0.1, LONGEST))
                places[a] = update(places[a], *told, self.chance)
        return places

    def error(self, places: list[Coordinate], first: int = 0) -> float:
        """The median over all pairs, relative."""
        pairs = [(a, b) for a in range(first, PEERS) for b in range(a + 1, PEERS)]
        return statistics.median(
            abs(distance(places[a], places[b]) / self.round_trip(a, b) - 1) for a, b in pairs
        )  # fmt: skip


@pytest.mark.parametrize("seed", range(3))
def test_a_geography_with_last_miles_is_found_out(seed: int) -> None:
    earth = Earth(seed)
    places = earth.settle(lambda peer, places: None)
    assert earth.error(places) < 0.15
    assert statistics.mean(place.error for place in places) < 0.3  # and they know it


def test_one_liar_cannot_wreck_it() -> None:
    earth = Earth(3)

    def lie(peer: int, places: list[Coordinate]) -> Coordinate | None:
        return Coordinate((earth.chance.uniform(-20, 20), 20.0, 0.0), 0.0, 0.0) if peer == 0 else None

    places = earth.settle(lie)
    assert earth.error(places, first=1) < 0.2


def test_a_newcomer_finds_its_place_in_few_samples() -> None:
    earth = Earth(4)
    places = earth.settle(lambda peer, places: None)
    mine = NOWHERE
    for peer in earth.chance.sample(range(1, PEERS), 32):
        mine = update(mine, places[peer], earth.round_trip(0, peer), earth.chance)
    errors = [abs(distance(mine, places[b]) / earth.round_trip(0, b) - 1) for b in range(1, PEERS)]
    assert statistics.median(errors) < 0.25


@pytest.mark.parametrize(
    ("theirs", "rtt", "name"),
    [
        (THERE, math.nan, "no number"),
        (THERE, math.inf, "no number"),
        (THERE, 0.0, "before it began"),
        (THERE, -0.1, "before it began"),
        (THERE, LONGEST * 1.01, "more than 10 s"),
        (Coordinate((math.nan, 0, 0), 0, 0.1), 0.1, "coordinate that is no number"),
        (Coordinate((0, math.inf, 0), 0, 0.1), 0.1, "coordinate that is no number"),
        (Coordinate((0, 0, 2 * FARTHEST), 0, 0.1), 0.1, "end of the world"),
        (Coordinate((0, 0, 0), -0.1, 0.1), 0.1, "end of the world"),
        (Coordinate((0, 0, 0), 0, -0.1), 0.1, "end of the world"),
    ],
)
def test_what_cannot_be_is_ignored_by_name(theirs: Coordinate, rtt: float, name: str) -> None:
    assert name in (fault(theirs, rtt) or "")
    assert update(THERE, theirs, rtt) is THERE


def test_two_at_the_same_place_part() -> None:
    for chance in (None, random.Random(0)):
        mine = update(NOWHERE, NOWHERE, 0.1, chance)
        assert 0 < math.hypot(*mine.vector) <= 0.1
        assert mine.height == NOWHERE.height


@given(coordinates, coordinates, st.floats(1e-4, LONGEST))
def test_a_sample_moves_towards_what_was_measured(mine: Coordinate, theirs: Coordinate, rtt: float) -> None:
    before, after = distance(mine, theirs) - rtt, distance(update(mine, theirs, rtt), theirs) - rtt
    assert abs(after) <= abs(before) + 1e-6


@given(coordinates, claims, anything)
def test_whatever_comes_a_coordinate_stays_one_and_moves_little(
    mine: Coordinate, theirs: Coordinate, rtt: float
) -> None:
    after = update(mine, theirs, rtt)
    assert fault(after, 0.1) is None
    assert BEST_ERROR <= after.error <= WORST_ERROR
    assert after.height >= MIN_HEIGHT
    assert math.dist(mine.vector, after.vector) + abs(mine.height - after.height) <= 0.2 * mine.error + 1e-9


@given(coordinates, coordinates)
def test_distance_is_symmetric_and_finite(a: Coordinate, b: Coordinate) -> None:
    assert distance(a, b) == pytest.approx(distance(b, a))
    assert 0 < distance(a, b) < math.inf
