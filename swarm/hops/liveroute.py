"""One session's route and what keeps it alive: who serves which blocks, how far each is, who takes a dead one's place.

When a hop fails, other hosts of its blocks take its place (one peer, or several that together cover them), the
session is opened there, and the nearest hop before it that remembers replays what it passed on. The client itself is
before the first hop, and always remembers.
"""

from __future__ import annotations

import asyncio
import logging
import math
from collections.abc import Callable, Collection, Coroutine, Sequence
from typing import Any

from swarm import wire
from swarm.errors import Forgotten, NoRoute, RemoteError
from swarm.hops.blame import Blame
from swarm.hops.finding import Neighbours, RouteFinder, Shunned
from swarm.hops.history import History, Mark, Piece
from swarm.hops.pace import Pace
from swarm.hops.place import Place, step_header
from swarm.hops.probing import probe
from swarm.hops.rounding import choose
from swarm.rpc import Link, Rpc
from swarm.types import Hop, ModelId, PeerId, Route, SessionId, Span
from swarm.wire import Priority, Rounding

log = logging.getLogger(__name__)

OPEN_SECONDS = 10.0  # for a hop to grant a lease, before the first step
FAILOVER_SECONDS = 4.0  # the same, in the middle of an answer
REOPEN_SECONDS = 1.0  # for a hop to say how far it is, where nothing else is asked of it
REPLAY_SECONDS = 2.0  # for a hop to begin a replay, beside what it may have to run before
REPLAY_POSITIONS = 256  # of a replayed step, at most


class LiveRoute:
    """The places of one session.

    Attributes:
        max_length: positions to lease at every hop.
        failovers: how often places were given to other peers.
        epoch: grows with every attempt; what is left over from an earlier one is dropped by everybody.
        replayed: positions that some hop has to run again before the step under way.
        queue: seconds to wait for room at a hop that is full; 0 to be refused at once, and ask another.
        rounding: what may be done to hidden states on their way.
        priority: of its steps at the hops.
        sending: what is done to those that we send; None before the first.
        told: which senders the user knows to round what they send.
    """

    def __init__(
        self,
        rpc: Rpc,
        blame: Blame,
        key: SessionId,
        model: ModelId,
        blocks: Span,
        find: RouteFinder,
        batch: int,
        max_length: int,
        lost: Callable[[Link], None],
    ) -> None:
        self.max_length = max_length
        self.failovers = 0
        self.epoch = 0
        self.replayed = 0
        self.queue = 0.0
        self.rounding: Rounding = "float32"
        self.priority: Priority = "normal"
        self.sending: Rounding | None = None
        self.told: set[tuple[str, Rounding]] = set()
        self.places: list[Place] = []
        self.pace = Pace()
        self.blame = blame
        self._rpc = rpc
        self.key = key
        self._model = model
        self._blocks = blocks
        self._find = find
        self._batch = batch
        self._lost = lost
        self._lease = 0.0
        self._alive: asyncio.Task[None] | None = None

    @property
    def route(self) -> Route | None:
        """The peers that hold the session, None before the first step."""
        return Route(tuple(place.hop for place in self.places)) if self.places else None

    def place_of(self, peer: str) -> Place | None:
        """Where on the route a peer is; None for spares and strangers."""
        return next((place for place in self.places if place.peer == peer), None)

    # --- who failed ------------------------------------------------------------------------------------------------

    def fault(self, error: RemoteError) -> None:
        """See who is at fault: another takes the place or, where it may do better than it did, it is asked again."""
        now = asyncio.get_running_loop().time()
        place = self.place_of(error.peer)
        lives = place is not None and place.lives
        if place is not None and self.blame.doubts(error, lives):
            place.open = False
        elif (peer := self.blame.judge(error, lives, now)) and (place := self.place_of(peer)) is not None:
            place.failed = True

    def lose_track(self) -> None:
        """A step was given up in the middle: how far the hops are has to be asked."""
        for place in self.places:
            place.open = False

    def lease_for(self, length: int) -> None:
        """Ask for so many positions when the session is opened the next time, which is now."""
        self.max_length = length
        self.lose_track()

    def shunned(self) -> Shunned:
        """Whom to do without at this moment."""
        return Shunned(*self.blame.shunned(asyncio.get_running_loop().time()))

    # --- repair ----------------------------------------------------------------------------------------------------

    async def repair(self, number: int, position: int, history: History) -> None:
        """Have an open session at a living peer for every block, each ready for step `number` at `position`.

        `history` is what was sent to the first hop. Raises `NoRoute`, or a `RemoteError` to be blamed.
        """
        self.replayed = 0
        if self.places and all(place.sound for place in self.places):
            return
        await self._replace_failed()
        await self._open_all()
        await self._replay(number, position, history)
        if self._alive is None:
            self._alive = asyncio.get_running_loop().create_task(self._keep_alive())

    async def _replace_failed(self) -> None:
        """Other hosts for the blocks of the failed places, each run of them together; else a new route altogether.

        A peer that is on the route already may host the missing blocks too, but holds one part of a session only.
        """
        if self.places and await self._replaced():
            return
        route = await self._find(self._blocks, self.shunned, self.blame.trouble, Neighbours())
        if not self.places or not await self._replaced():
            self._adopt(route)

    async def _replaced(self) -> bool:
        """Whether the rest of the route could stay as it is."""
        try:
            for start, end in reversed(runs([place.failed for place in self.places])):
                await self._replace(start, end)
        except NoRoute:
            return False
        return True

    async def _replace(self, start: int, end: int) -> None:
        failed, others = self.places[start:end], [*self.places[:start], *self.places[end:]]
        span = Span(failed[0].hop.span.start, failed[-1].hop.span.end)
        taken = {place.peer for place in others}
        if (spares := _spares_of(failed, taken)) is None:
            following = {each.peer for place in others for each in place.followers()}
            route = await self.find_others(span, taken, self.neighbours(start, end), following)
            spares = [Place(hop) for hop in route]
        self._put(start, end, spares)

    async def find_others(
        self, span: Span, taken: set[PeerId], neighbours: Neighbours, rather_not: Collection[PeerId] = ()
    ) -> Route:
        """Hosts of `span` that are none of `taken`, without waiting for any. Raises `NoRoute`."""

        def shunned() -> Shunned:
            rather, now, ever = (each | taken for each in self.shunned())
            return Shunned(rather | set(rather_not), now, ever)

        return await self._find(span, shunned, -math.inf, neighbours)

    def neighbours(self, start: int, end: int) -> Neighbours:
        """Who comes before the places from `start` to `end`, and who after."""
        after = self.places[end].peer if end < len(self.places) else None
        return Neighbours(self.places[start - 1].peer if start else None, after)

    def _put(self, start: int, end: int, places: list[Place]) -> None:
        """Give these places to others. A peer has one part in a session: who was a spare elsewhere is none any more."""
        log.info("failover session=%s to=%s", self.key.hex()[:8], [str(place) for place in places])
        before = self.places[start:end]
        self.places[start:end] = places
        self.failovers += 1
        for place in self.places[start + len(places) :][:1]:  # whoever fed its spares is gone
            self.dismiss_spares(place)
        for place in before:
            place.spares = [spare for spare in place.spares if spare[0] not in places]
            self.dismiss(place)
        for peer in [place.peer for place in places]:
            self.drop_spare(peer)

    def drop_spare(self, peer: str) -> bool:
        """If `peer` is a spare, or a part of one, it is none any more."""
        for place in self.places:
            for spare in place.spares:
                if any(each.peer == peer for each in spare):
                    place.spares.remove(spare)
                    for each in spare:
                        self.dismiss(each)
                    return True
        return False

    def _adopt(self, route: Route) -> None:
        """Go over to another route; who has the same part of it as before keeps what it holds."""
        same = {(place.peer, place.hop.span): place for place in self.places if not place.failed}
        before, self.places = self.places, [same.get((hop.peer, hop.span)) or Place(hop) for hop in route]
        if before:
            log.info("another route session=%s to=%s", self.key.hex()[:8], self)
            self.failovers += 1
        for place in before:
            if place in self.places:
                self.dismiss_spares(place)
            else:
                self.dismiss(place)

    def dismiss_spares(self, place: Place) -> None:
        """Nobody follows it any more."""
        for each in place.followers():
            self.dismiss(each)
        place.spares = []

    def dismiss(self, place: Place) -> None:
        """Its peer has nothing more to do with the session; if it has another part in it, it is told that again."""
        self.dismiss_spares(place)
        if (other := self.place_of(place.peer)) is not None and other is not place:
            other.open = False
            return
        if place.link is not None:
            place.link.unwatch(self._lost)
        self._rpc.tell(place.peer, wire.CloseSession(self.key))

    async def _open_all(self) -> None:
        """Open the session at every place, or tell it the new terms: who comes next, how long it may get."""
        following: list[Hop | None] = [*(place.hop for place in self.places[1:]), None]
        opening = [
            asyncio.ensure_future(self.open(place, after)) for place, after in zip(self.places, following, strict=True)
        ]
        try:
            await asyncio.wait(opening)
        finally:
            for task in opening:
                task.cancel()
        failures = [error for task in opening if isinstance(error := task.exception(), RemoteError)]
        for failure in failures[1:]:
            self.fault(failure)
        if failures:
            raise failures[0]
        for task in opening:
            task.result()

    async def open(self, place: Place, after: Hop | None, priority: Priority | None = None) -> None:
        """Open the session at `place` on the terms of the moment. Raises what its peer says.

        `priority` is another than the session's own, for a place that is not on the route.
        """
        endpoint = wire.Endpoint(after.peer, [(a.host, a.port) for a in after.addresses]) if after else None
        span = place.hop.span
        terms = wire.OpenSession(
            self.key,
            self._model,
            span.start,
            span.end,
            self._batch,
            self.max_length,
            endpoint,
            self.epoch,
            self.queue,
            self.rounding,
            priority or self.priority,
        )
        seconds = OPEN_SECONDS if self.blame.trouble is None else FAILOVER_SECONDS
        if place.lives and place.after == after:
            seconds = place.soon(REOPEN_SECONDS)
        seconds += self.queue
        lease = await place.open_session(self._rpc, terms, after, self._lost, seconds)
        self._lease = min(lease, self._lease or lease)
        assert place.link is not None
        if self.sending is None and place is self.places[0]:
            self.sending = await choose(self._rpc, place.link, self.rounding)
            self._tell_of("ourselves", self.sending)
        self._tell_of(place.peer[-6:], place.rounding)

    def _tell_of(self, sender: str, rounding: Rounding) -> None:
        """Where hidden states are rounded, and nobody has asked for that, the user is told: once of each sender."""
        if self.rounding == "auto" and rounding != "float32" and (sender, rounding) not in self.told:
            self.told.add((sender, rounding))
            log.warning("hidden states are rounded on their way from=%s to=%s", sender, rounding)

    async def _replay(self, number: int, position: int, history: History) -> None:
        """Bring every place that is behind to `position`, from the nearest one before it that remembers."""
        behind = [position > 0 and (p.mark.number < number - 1 or p.mark.length < position) for p in self.places]
        for start, end in runs(behind):
            for source in range(start - 1, -2, -1):
                try:
                    await self._replay_from(source, end, position, history)
                    break
                except Forgotten:
                    log.info("replay one hop earlier session=%s hop=%d", self.key.hex()[:8], source)

    async def _replay_from(self, source: int, end: int, position: int, history: History) -> None:
        """Replay to the places after `source`, up to `end`. -1 is ourselves: we have everything."""
        through = self.places[source + 1 : end]
        marks = {place.mark for place in through}
        mark = marks.pop() if len(marks) == 1 else Mark()  # who is not just there takes it only from the start
        self.replayed = max(self.replayed, position)
        if source >= 0:
            message = wire.Replay(self.key, self.epoch, *mark, position, len(through))
            await self.places[source].call(message, self.pace.patience(position) + REPLAY_SECONDS)
            return
        number = history.number
        for piece in list(history.update(mark, position, REPLAY_POSITIONS)):
            await self.send(through[0], number, piece, replay=len(through))

    async def send(self, first: Place, number: int, piece: Piece, keep: int = 0, replay: int = 0) -> None:
        """Send a step to the peer at a place. Raises `Unreachable` or `DeadlineExceeded`."""
        block, rounding = first.hop.span.start, self.sending or "float32"
        header = step_header(self.key, self.epoch, number, block, piece, rounding, keep, replay)
        await first.send(header, piece, self.pace.patience(piece.hidden.shape[0] * piece.hidden.shape[1]))

    # --- living and ending -----------------------------------------------------------------------------------------

    async def probe(self, waiting: Callable[[], bool]) -> str:
        """Which peer works on the step, as long as somebody is `waiting` for it. Raises as `swarm.hops.probing`."""
        return await probe(self.places, self.key, self.epoch, waiting)

    async def can_relieve(self, peer: str) -> bool:
        """Whether others, who have not failed of late, could take the place of a peer that is very slow."""
        if (place := self.place_of(peer)) is None:
            return False
        index = self.places.index(place)
        taken = {place.peer for place in self.places} | self.shunned().rather
        try:
            await self.find_others(place.hop.span, taken, self.neighbours(index, index + 1))
        except NoRoute:
            return False
        return True

    async def _keep_alive(self) -> None:
        """Say that we are still here, well before the lease ends. Who denies it is found out by the next step."""
        while True:
            await asyncio.sleep(self._lease / 3)
            all_places = [each for place in self.places for each in (place, *place.followers())]
            calls = [place.ask(self.key, self._lease / 3) for place in all_places]
            for outcome in await asyncio.gather(*calls, return_exceptions=True):
                if isinstance(outcome, Exception):
                    log.info("not kept alive session=%s error=%r", self.key.hex()[:8], str(outcome))

    def spawn(self, work: Coroutine[Any, Any, None]) -> asyncio.Task[None]:
        """Run `work` beside the steps."""
        return self._rpc.spawn(work)

    def exchange(self, peer: PeerId) -> bool:
        """Let a spare take the place of `peer` at the next repair, and do not blame it; False where there is none."""
        place = self.place_of(peer)
        if place is None or not place.spares:
            return False
        place.failed = True
        return True

    def close(self) -> None:
        """Give the leases back."""
        if self._alive is not None:
            self._alive.cancel()
        for place in self.places:
            self.dismiss(place)

    def __str__(self) -> str:
        return " -> ".join(map(str, self.places))


def runs(marks: Sequence[bool]) -> list[tuple[int, int]]:
    """The half-open ranges of what is marked."""
    padded = [False, *marks, False]
    edges = [index for index in range(len(marks) + 1) if padded[index] != padded[index + 1]]
    return list(zip(edges[::2], edges[1::2], strict=True))


def _spares_of(failed: Sequence[Place], taken: set[PeerId]) -> list[Place] | None:
    """Places that can take over from all of `failed` at once, None where one of them has no living spare."""
    found: list[Place] = []
    for place in failed:
        living = [spare for spare in place.spares if all(each.lives and each.peer not in taken for each in spare)]
        if not living:
            return None
        found += living[0]
    return found
