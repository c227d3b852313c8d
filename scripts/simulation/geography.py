"""A synthetic earth: where machines stand and how long bytes travel between them.

Machines stand around large cities, in proportion to rough weights. A round trip is the way along the great circle,
1.5 times as long for detours, at 200,000 km/s (light in fibre), times a factor of the pair of machines (log-normal,
sigma 0.1: routes are no straight lines, and break the triangle inequality), plus the last mile of both machines:
about 0.7 ms in a data centre (a quarter of them), 3 ms on fibre (45%) or 12 ms on cable and DSL, log-normal with
sigma 0.4. A measured round trip has 10% of noise and an exponential delay of 1 ms on top.
"""

from __future__ import annotations

import math
import random
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from swarm.routing import Indices, Vector

EARTH_RADIUS = 6371.0  # km
SECONDS_PER_KM = 2 * 1.5 / 200_000  # of a round trip
LAST_MILES = ((0.25, 0.0007), (0.45, 0.003), (0.30, 0.012))  # share, median seconds of a round trip
_DETOUR_SIGMA = 0.1
_DETOUR_AXES = 4
_SPREAD_DEGREES = 1.5  # around a city

CITIES = (  # latitude, longitude, weight
    (40.7, -74.0, 6), (37.6, -122.2, 6), (34.0, -118.2, 3), (41.9, -87.6, 3), (32.8, -96.8, 3), (47.6, -122.3, 2),
    (33.7, -84.4, 2), (39.0, -77.5, 4), (43.7, -79.4, 2), (45.5, -73.6, 1), (19.4, -99.1, 1), (-23.5, -46.6, 3),
    (-34.6, -58.4, 1), (51.5, 0.1, 5), (48.9, 2.3, 4), (52.4, 4.9, 4), (50.1, 8.7, 5), (52.5, 13.4, 3),
    (48.1, 11.6, 2), (47.4, 8.5, 2), (40.4, -3.7, 2), (45.5, 9.2, 2), (59.3, 18.1, 2), (60.2, 24.9, 1),
    (52.2, 21.0, 2), (50.5, 30.5, 1), (55.8, 37.6, 2), (41.0, 29.0, 1), (32.1, 34.8, 1), (25.2, 55.3, 1),
    (19.1, 72.9, 3), (13.0, 77.6, 3), (1.4, 103.8, 3), (22.3, 114.2, 2), (31.2, 121.5, 3), (39.9, 116.4, 3),
    (37.6, 127.0, 3), (35.7, 139.7, 4), (25.0, 121.6, 1), (-33.9, 151.2, 2), (-26.2, 28.0, 1), (6.5, 3.4, 1),
)  # fmt: skip


@dataclass(frozen=True, slots=True)
class Place:
    """Where a machine stands: `[cos, sin ...]` on the unit sphere, its last mile in seconds, its part of detours."""

    on_sphere: tuple[float, float, float]
    last_mile: float
    detour: tuple[float, ...]


def draw_place(chance: random.Random) -> Place:
    """A machine somewhere."""
    latitude, longitude, _ = chance.choices(CITIES, [city[2] for city in CITIES])[0]
    phi = math.radians(latitude + chance.gauss(0.0, _SPREAD_DEGREES))
    theta = math.radians(longitude + chance.gauss(0.0, _SPREAD_DEGREES))
    median = chance.choices([m for _, m in LAST_MILES], [share for share, _ in LAST_MILES])[0]
    return Place(
        (math.cos(phi) * math.cos(theta), math.cos(phi) * math.sin(theta), math.sin(phi)),
        median * chance.lognormvariate(0.0, 0.4),
        tuple(chance.gauss(0.0, 1.0) for _ in range(_DETOUR_AXES)),
    )


def round_trip(a: Place, b: Place) -> float:
    """The true one, in seconds."""
    cosine = sum(p * q for p, q in zip(a.on_sphere, b.on_sphere, strict=True))
    way = EARTH_RADIUS * math.acos(min(1.0, max(-1.0, cosine))) * SECONDS_PER_KM
    detour = sum(p * q for p, q in zip(a.detour, b.detour, strict=True)) / math.sqrt(_DETOUR_AXES)
    return way * math.exp(_DETOUR_SIGMA * detour) + a.last_mile + b.last_mile


def measured(a: Place, b: Place, chance: random.Random) -> float:
    """A round trip as somebody would measure it, in seconds."""
    return round_trip(a, b) * chance.lognormvariate(0.0, 0.1) + chance.expovariate(1000.0)


class TrueLatencies:
    """What nobody knows in reality: the true way between any two of `places`, and from and to a client's."""

    def __init__(self, places: list[Place], client: Place) -> None:
        self._all = _arrays(places)
        self._client = _arrays([client])

    def between(self, senders: Indices, receivers: Indices) -> Vector:
        """One way in seconds, [senders, receivers]."""
        return _one_way(tuple(a[senders] for a in self._all), tuple(a[receivers] for a in self._all))

    def first(self) -> Vector:
        """From the client, [places]."""
        return _one_way(self._client, self._all)[0]

    last = first


_Arrays = tuple[npt.NDArray[np.float64], ...]


def _arrays(places: list[Place]) -> _Arrays:
    return (
        np.array([place.on_sphere for place in places]),
        np.array([place.last_mile for place in places]),
        np.array([place.detour for place in places]),
    )


def _one_way(left: _Arrays, right: _Arrays) -> Vector:
    way = EARTH_RADIUS * np.arccos(np.clip(left[0] @ right[0].T, -1.0, 1.0)) * SECONDS_PER_KM
    factor = np.exp(_DETOUR_SIGMA * (left[2] @ right[2].T) / math.sqrt(_DETOUR_AXES))
    result: Vector = (way * factor + left[1][:, None] + right[1][None, :]) / 2
    return result
