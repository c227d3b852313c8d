"""Replicas that follow a session in the background, so that the death of a hop costs a few positions and no prefill.

The hop before (or the client, before the first) tells a spare late and in bulk what it passed on. It takes the place
when the hop fails, or when its peer is about to leave.
"""

from __future__ import annotations

import asyncio
import logging
import math
from collections.abc import Iterable

from swarm import wire
from swarm.errors import NoRoute, RemoteError
from swarm.history import History
from swarm.liveroute import REPLAY_POSITIONS, LiveRoute, Place, Shunned
from swarm.types import PeerId, Route

log = logging.getLogger(__name__)

FEED_SECONDS = 0.2  # between two times that a spare of the first hop is told what is new
RETRY_SECONDS = 5.0  # before a place without a spare gets another try
CATCH_UP_SECONDS = 30.0  # for a spare to run what it was told, before it takes a leaving peer's place


class Standby:
    """Keeps `count` spares for every place of a route."""

    def __init__(self, live: LiveRoute, history: History, count: int) -> None:
        self._live = live
        self._history = history
        self._count = count
        self._feeding: asyncio.TimerHandle | None = None
        self._tried = -math.inf
        self._preparing: asyncio.Task[None] | None = None

    def step_ended(self) -> None:
        """After a step: look after the spares, without delaying the next."""
        live, loop = self._live, asyncio.get_running_loop()
        if self._feeding is None and any(place.spares for place in live.places[:1]):
            self._feeding = loop.call_later(FEED_SECONDS, lambda: live.spawn(self._feed()))
        lacking = any(len(place.spares) < self._count for place in live.places)
        idle = self._preparing is None or self._preparing.done()
        if lacking and idle and loop.time() - self._tried >= RETRY_SECONDS:
            self._tried = loop.time()
            self._preparing = live.spawn(self._prepare_all())

    async def _prepare_all(self) -> None:
        for place in list(self._live.places):
            while len(place.spares) < self._count:
                try:
                    await self.prepare(place)
                except (NoRoute, RemoteError) as error:
                    log.info("no spare for=%s error=%r", place.hop, str(error))
                    break

    async def prepare(self, place: Place) -> None:
        """Let other peers follow what `place` is told. Raises `NoRoute`, or what they say."""
        live = self._live
        spare = [Place(hop) for hop in await self._find(place)]
        if place not in live.places:
            return
        index = live.places.index(place)
        after = live.places[index + 1].hop if index + 1 < len(live.places) else None
        following = [*(each.hop for each in spare[1:]), after]
        for each, hop in zip(spare, following, strict=True):
            await live.open(each, hop)
        first = spare[0].hop
        if index == 0:
            self._history.follow(first.peer)
        else:
            endpoint = wire.Endpoint(first.peer, [(a.host, a.port) for a in first.addresses])
            await live.call(live.places[index - 1], wire.Feed(live.key, endpoint, len(spare)))
        place.spares.append(spare)
        if index == 0:
            await self._feed()

    async def _find(self, place: Place) -> Route:
        taken = {peer for each in self._live.places for peer in _peers(each)}

        def shunned() -> Shunned:
            rather, ever = self._live.shunned()
            return Shunned(rather | taken, ever | taken)

        index = self._live.places.index(place)
        return await self._live.find(place.hop.span, shunned, -math.inf, self._live.neighbours(index, index + 1))

    async def _feed(self) -> None:
        """Tell the spares of the first hop what is new; those of the others are told by the hop before."""
        self._feeding = None
        for spare in self._live.places[0].spares if self._live.places else ():
            name = spare[0].hop.peer
            for piece in list(self._history.news(name, REPLAY_POSITIONS)):
                await self._live.send(spare[0], self._history.number, piece, None, 0, len(spare))

    async def replace(self, peer: PeerId) -> None:
        """Have a spare at the place of `peer` that has caught up, as far as one can be had."""
        place = next((place for place in self._live.places if place.hop.peer == peer), None)
        if place is None:
            return
        try:
            if not place.spares:
                await self.prepare(place)
            async with asyncio.timeout(CATCH_UP_SECONDS):
                await self._caught_up(place.spares[0])
        except (NoRoute, RemoteError, TimeoutError) as error:
            log.info("no spare for the leaving peer=%s error=%r", peer[-6:], str(error))

    async def _caught_up(self, spare: list[Place]) -> None:
        while True:
            answers = [await self._live.ask(each) for each in spare]
            if not any(answer.waiting for answer in answers):
                return
            await asyncio.sleep(0.02)  # nobody tells us when a spare is done

    def close(self) -> None:
        """Stop looking after spares; the places' own end gives them back."""
        if self._feeding is not None:
            self._feeding.cancel()
        if self._preparing is not None:
            self._preparing.cancel()


def _peers(place: Place) -> Iterable[PeerId]:
    return [place.hop.peer, *(each.hop.peer for spare in place.spares for each in spare)]
