"""What the swarm is told of this peer: at once where it matters, else with the next renewal."""

from __future__ import annotations

import time
from dataclasses import replace
from typing import Any

from swarm.coordinates import distance
from swarm.discovery import Discovery
from swarm.types import Coordinate, Offer

PAUSE_SECONDS = 5.0  # between two publications because something has changed

_QUEUE_NEWS = 0.5  # steps
_CACHE_NEWS = 0.1  # of all tokens
_WAY_NEWS = 0.005  # seconds of round trip
_SHARE_NEWS = 0.25  # of what it was


class Announcer:
    """Keeps one peer's offer true.

    Attributes:
        offer: what it says now, or with the next renewal.
    """

    def __init__(self, discovery: Discovery, offer: Offer) -> None:
        self.offer = offer
        self._discovery = discovery
        self._told = offer
        self._when = 0.0

    async def tell(self, **changes: Any) -> None:
        """Publish the offer with these `changes`, now. Raises `DeadlineExceeded`; it is told again at the renewal."""
        self.offer = self._told = replace(self.offer, **changes)
        self._when = time.monotonic()
        await self._discovery.publish(self.offer)

    async def keep(self, **facts: Any) -> None:
        """The offer says these `facts` from now on: at once where they are news, but not too often."""
        self.offer = replace(self.offer, **facts)
        if is_news(self._told, self.offer) and time.monotonic() - self._when >= PAUSE_SECONDS:
            await self.tell()
        else:
            self._discovery.amend(self.offer)


def is_news(told: Offer, now: Offer) -> bool:
    """Whether clients would choose otherwise if they knew."""
    return (
        told.sessions != now.sessions
        or abs(told.queue - now.queue) > _QUEUE_NEWS + _SHARE_NEWS * told.queue
        or abs(told.cache_free - now.cache_free) > _CACHE_NEWS * max(told.cache_tokens, 1)
        or abs(told.seconds_per_block - now.seconds_per_block) > _SHARE_NEWS * told.seconds_per_block
        or _has_moved(told.coordinate, now.coordinate)
    )


def _has_moved(told: Coordinate | None, now: Coordinate | None) -> bool:
    if told is None or now is None:
        return told is not now
    moved = distance(told, now) - told.height - now.height + abs(told.height - now.height)
    return moved > _WAY_NEWS
