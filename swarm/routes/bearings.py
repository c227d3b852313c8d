"""Where we are, as far as latency goes, and how far it is to those we called: kept from calls that are timed anyway."""

from __future__ import annotations

import random
from collections.abc import Iterable, Sequence
from typing import TypeVar

from swarm.coordinates import NOWHERE, distance, fault, update
from swarm.routing import View
from swarm.types import Coordinate, Offer, PeerId

FIRST_PEERS = 16  # anywhere, that a newcomer calls to find its place
NEAR_PEERS = 8  # near it, that it calls because the way to them matters most
MAX_PEERS = 4096  # that are remembered

_KNOWN = 0.9  # relative error of a coordinate that says more than nothing
_DRIFT = 0.1  # share of the way that a longer round trip moves what is remembered; a shorter one replaces it

_Value = TypeVar("_Value")


class Bearings:
    """One peer's or client's coordinate and the round trips that it measured itself."""

    def __init__(self, chance: random.Random | None = None) -> None:
        self._coordinate = NOWHERE
        self._places: dict[PeerId, Coordinate] = {}  # as they say in their offers
        self._measured: dict[PeerId, float] = {}  # seconds, the oldest first
        self._chance = chance or random.Random()

    @property
    def coordinate(self) -> Coordinate | None:
        """Where we are, None while we know nothing of it."""
        return self._coordinate if self._coordinate.error < _KNOWN else None

    def read(self, offers: Iterable[Offer]) -> None:
        """Remember where others say they are."""
        for offer in offers:
            if offer.coordinate is not None:
                _remember(self._places, offer.peer, offer.coordinate)

    def timed(self, peer: PeerId, seconds: float) -> None:
        """A round trip to `peer` took so long. One that cannot be is ignored."""
        place = self._places.get(peer, NOWHERE)
        if fault(place, seconds) is not None:
            return
        before = self._measured.get(peer, seconds)
        _remember(self._measured, peer, min(seconds, before + _DRIFT * (seconds - before)))
        self._coordinate = update(self._coordinate, place, seconds, self._chance)

    def view(self, before: Offer | None = None, after: Offer | None = None) -> View:
        """What a route is looked for from here, or from `before` to `after`."""
        return View(self.coordinate, self._measured, before, after)

    def anywhere(self, offers: Sequence[Offer]) -> list[Offer]:
        """Whom to call to find our place: a few of `offers` by lot, that were never called."""
        unknown = [offer for offer in offers if offer.peer not in self._measured]
        return self._chance.sample(unknown, min(FIRST_PEERS, len(unknown)))

    def near(self, offers: Iterable[Offer], block: int) -> list[Offer]:
        """Whom to call since the way there matters: the nearest hosts of `block`, that were never called."""
        mine, hosts = self._coordinate, [offer for offer in offers if block in offer.span]
        hosts.sort(key=lambda offer: self._measured.get(offer.peer) or distance(mine, offer.coordinate or NOWHERE))
        return [offer for offer in hosts[:NEAR_PEERS] if offer.peer not in self._measured]

    def __repr__(self) -> str:
        return f"<Bearings {self._coordinate} measured={len(self._measured)}>"


def _remember(memory: dict[PeerId, _Value], peer: PeerId, value: _Value) -> None:
    """Keep the newest."""
    memory.pop(peer, None)
    memory[peer] = value
    if len(memory) > MAX_PEERS:
        del memory[next(iter(memory))]
