"""Spares that follow a session in the background, so that the death of a hop costs a few positions and no prefill.

The hop before (or the client, before the first) tells a spare late and in bulk what it passed on. It takes the place
when the hop fails, or when its peer is about to leave.
"""

from __future__ import annotations

import asyncio
import logging
import math

from swarm import wire
from swarm.errors import NoRoute, RemoteError
from swarm.hops.history import History, Mark
from swarm.hops.liveroute import REPLAY_POSITIONS, LiveRoute
from swarm.hops.place import Place
from swarm.hops.probing import PROBE_SECONDS
from swarm.types import Hop, PeerId

log = logging.getLogger(__name__)

FEED_SECONDS = 0.2  # between two times that a spare of the first hop is told what is new
FEED_TIMEOUT = 4.0  # for a hop to reach a spare
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
                    await self._prepare(place)
                except (NoRoute, RemoteError) as error:
                    log.info("no spare for=%s error=%r", place.hop, str(error))
                    break

    async def _prepare(self, place: Place) -> None:
        """Let other peers follow what `place` is told, whoever can be had. Raises `NoRoute`, or what the hops say."""
        failed: set[PeerId] = set()
        while True:
            try:
                return await self._prepare_without(failed, place)
            except RemoteError as error:
                log.info("not a spare peer=%s error=%r", error.peer[-6:], str(error))
                if not error.peer or error.peer in failed:
                    raise
                failed.add(PeerId(error.peer))

    async def _prepare_without(self, failed: set[PeerId], place: Place) -> None:
        live = self._live
        before, after = self._around(place)
        taken = {each.peer for one in live.places for each in (one, *one.followers())} | failed
        index = live.places.index(place)
        route = await live.find_others(place.hop.span, taken, live.neighbours(index, index + 1))
        spare = [Place(hop) for hop in route]
        try:
            following = [*(each.hop for each in spare[1:]), after]
            for each, hop in zip(spare, following, strict=True):
                await live.open(each, hop, "low")  # nobody waits for a spare, until it takes a place
            if before is not None:
                first = spare[0].hop
                endpoint = wire.Endpoint(first.peer, [(a.host, a.port) for a in first.addresses])
                await before.call(wire.Feed(live.key, endpoint, len(spare)), FEED_TIMEOUT)
            taken = {each.peer for one in live.places for each in (one, *one.followers())}
            if self._around(place) != (before, after) or not taken.isdisjoint(each.peer for each in spare):
                raise NoRoute("the route has changed")  # while we were at it
        except BaseException:
            for each in spare:
                live.dismiss(each)
            raise
        place.spares.append(spare)
        if before is None:
            await self._feed()

    def _around(self, place: Place) -> tuple[Place | None, Hop | None]:
        """Who feeds the place, None where that is ourselves, and whom it feeds. Raises `NoRoute` if it has gone."""
        places = self._live.places
        if place not in places or place.failed:
            raise NoRoute("the place was given to another")
        index = places.index(place)
        after = places[index + 1].hop if index + 1 < len(places) else None
        return (places[index - 1] if index else None), after

    async def _feed(self) -> None:
        """Tell the spares of the first hop what is new; those of the others are told by the hop before."""
        self._feeding = None
        for spare in list(self._live.places[0].spares) if self._live.places else []:
            first, history = spare[0], self._history
            number = history.number
            pieces = list(history.update(first.told, history.length, REPLAY_POSITIONS))
            first.told = history.mark
            try:
                for piece in pieces:
                    await self._live.send(first, number, piece, replay=len(spare))
            except RemoteError:
                self._live.drop_spare(first.peer)

    async def replace(self, peer: PeerId) -> None:
        """Have a spare at the place of `peer` that has caught up, as far as one can be had."""
        if (place := self._live.place_of(peer)) is None:
            return
        try:
            if not place.spares:
                await self._prepare(place)
            async with asyncio.timeout(CATCH_UP_SECONDS):
                await self._caught_up(place, self._history.mark)
        except (NoRoute, RemoteError, TimeoutError) as error:
            log.info("no spare for the leaving peer=%s error=%r", peer[-6:], str(error))

    async def _caught_up(self, place: Place, mark: Mark) -> None:
        """Wait until the first spare has run all that there was at `mark`; nobody tells us when."""
        while place.spares:
            answers = [await each.ask(self._live.key, PROBE_SECONDS) for each in place.spares[0]]
            if all(answer.number >= mark.number and not answer.waiting for answer in answers):
                return
            await asyncio.sleep(0.02)

    def close(self) -> None:
        """Stop looking after spares; the places' own end gives them back."""
        if self._feeding is not None:
            self._feeding.cancel()
        if self._preparing is not None:
            self._preparing.cancel()
