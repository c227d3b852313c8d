"""One session's route and what keeps it alive: who serves which blocks, how far each is, who takes a dead one's place.

When a hop fails, other hosts of its blocks take its place (one peer, or several that together cover them), the
session is opened there, and the nearest hop before it that remembers replays what it passed on. The client itself is
before the first hop, and always remembers.
"""

from __future__ import annotations

import asyncio
import logging
import math
from collections.abc import Awaitable, Callable, Coroutine, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple, Protocol

from swarm import tensors, wire
from swarm.avoidance import Avoidance
from swarm.errors import (
    DeadlineExceeded,
    Forgotten,
    Malformed,
    NoRoute,
    Refused,
    RemoteError,
    Unreachable,
)
from swarm.history import History, Piece
from swarm.pace import Pace
from swarm.rpc import Link, Rpc
from swarm.types import Hop, ModelId, PeerId, Route, SessionId, Span

log = logging.getLogger(__name__)

OPEN_TIMEOUT = 10.0  # seconds for a hop to grant a lease
PROBE_TIMEOUT = 0.5  # seconds for a hop to say that it lives
REPLAY_POSITIONS = 256  # of a replayed step, at most
_UNKNOWN = -1  # how far a hop is after a step was given up in the middle


class Shunned(NamedTuple):
    """Whom a route has to do without."""

    rather: set[PeerId]  # if that is possible
    ever: set[PeerId]  # in any case


class Neighbours(NamedTuple):
    """Who feeds a part of a route, and whom it feeds; None is the client."""

    before: PeerId | None = None
    after: PeerId | None = None


class RouteFinder(Protocol):
    """Finds hops for a span."""

    def __call__(
        self,
        span: Span,
        shunned: Callable[[], Shunned],
        since: float | None,
        neighbours: Neighbours,
    ) -> Awaitable[Route]:
        """The best route of the moment between `neighbours`; waits for missing blocks as long as the user wants.

        `since` is when the trouble began, on the loop's clock: None where the session only begins, and -inf not to
        wait at all. Raises `NoRoute`.
        """


@dataclass(slots=True)
class Place:
    """One hop of the route and how far it is."""

    hop: Hop
    link: Link | None = None
    open: bool = False  # on the terms of the moment: who comes next, how long it may get
    failed: bool = False  # another peer has to take its place
    number: int = 0  # of the last step it ran, as it said when the session was opened there
    length: int = 0  # positions it holds, as it said then
    spares: list[list[Place]] = field(default_factory=list)  # who follows, ready to take the place: one or several

    @property
    def sound(self) -> bool:
        """Whether it can take the next step."""
        lives = self.link is not None and self.link.error is None
        return lives and self.open and not self.failed and self.number != _UNKNOWN

    def __str__(self) -> str:
        return f"{self.hop}{'!' if self.failed else ''}"


class LiveRoute:
    """The places of one session.

    Attributes:
        max_length: positions to lease at every hop.
        failovers: how often places were given to other peers.
        epoch: grows with every attempt; what is left over from an earlier one is dropped by everybody.
    """

    def __init__(
        self,
        rpc: Rpc,
        avoidance: Avoidance,
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
        self.places: list[Place] = []
        self.pace = Pace()
        self._rpc = rpc
        self._avoidance = avoidance
        self.key = key
        self._model = model
        self._blocks = blocks
        self.find = find
        self._batch = batch
        self._lost = lost
        self._refused: set[PeerId] = set()  # who said no to the step under way
        self._trouble: float | None = None  # since when the step under way meets failures, on the loop's clock
        self._lease = 0.0
        self._alive: asyncio.Task[None] | None = None

    @property
    def route(self) -> Route | None:
        """The peers that hold the session, None before the first step."""
        return Route(tuple(place.hop for place in self.places)) if self.places else None

    # --- who failed ------------------------------------------------------------------------------------------------

    def begin(self) -> None:
        """A new step: what was wrong with the one before is forgiven, but not forgotten."""
        self._refused.clear()
        self._trouble = None

    def blame(self, error: RemoteError, begun: bool) -> None:
        """Mark the place whose peer is at fault. `begun` is whether the session has run a step before."""
        if begun:
            self._trouble = self._trouble or asyncio.get_running_loop().time()
        for place in self.places:
            if place.hop.peer == error.peer:
                place.failed = True
        if not error.peer:
            return
        if isinstance(error, Refused):
            self._refused.add(PeerId(error.peer))
        else:
            self._avoidance.failed(PeerId(error.peer), asyncio.get_running_loop().time())

    def lose_track(self) -> None:
        """A step was given up in the middle: how far the hops are is not known any more."""
        for place in self.places:
            place.number = _UNKNOWN

    def lease_for(self, length: int) -> None:
        """Ask for so many positions when the session is opened the next time, which is now."""
        self.max_length = length
        for place in self.places:
            place.open = False

    def shunned(self) -> Shunned:
        """Whom to do without at this moment."""
        now = asyncio.get_running_loop().time()
        ever = self._refused | self._avoidance.resting(now)
        return Shunned(self._avoidance.avoided(now) | ever, ever)

    # --- repair ----------------------------------------------------------------------------------------------------

    async def repair(self, number: int, position: int, history: History) -> None:
        """Have an open session at a living peer for every block, each ready for step `number` at `position`.

        `history` is what was sent to the first hop. Raises `NoRoute`, or a `RemoteError` to be blamed.
        """
        if self.places and all(place.sound for place in self.places):
            return
        await self._replace_failed()
        await self._open_all()
        await self._replay(number, position, history)
        if self._alive is None:
            self._alive = asyncio.get_running_loop().create_task(self._keep_alive())

    async def _replace_failed(self) -> None:
        """Other hosts for the blocks of the failed places, each run of them together; else a new route altogether."""
        try:
            for start, end in reversed(runs([place.failed for place in self.places])):
                await self._replace(start, end)
        except NoRoute:
            # Perhaps a peer that is on the route already hosts the blocks too: one peer holds one part of a session.
            for place in self.places:
                self._dismiss(place)
            self.places = []
        if not self.places:
            # Where somebody has refused, the swarm is there but full: waiting for another host is not what was asked.
            since = -math.inf if self._refused else self._trouble
            route = await self.find(self._blocks, self.shunned, since, Neighbours())
            self.places = [Place(hop) for hop in route]

    async def _replace(self, start: int, end: int) -> None:
        failed = self.places[start:end]
        span = Span(failed[0].hop.span.start, failed[-1].hop.span.end)
        others = {place.hop.peer for place in (*self.places[:start], *self.places[end:])}

        def shunned() -> Shunned:
            rather, ever = self.shunned()
            return Shunned(rather | others, ever | others)

        if (spares := _spares_of(failed)) is not None:
            self._put(start, end, spares)
            return
        route = await self.find(span, shunned, -math.inf, self.neighbours(start, end))
        self._put(start, end, [Place(hop) for hop in route])

    def neighbours(self, start: int, end: int) -> Neighbours:
        """Who comes before the places from `start` to `end`, and who after."""
        after = self.places[end].hop.peer if end < len(self.places) else None
        return Neighbours(self.places[start - 1].hop.peer if start else None, after)

    def _put(self, start: int, end: int, places: list[Place]) -> None:
        log.info("failover session=%s to=%s", self.key.hex()[:8], [str(place) for place in places])
        after = self.places[end : end + 1]
        for place in after:  # whoever fed its spares is gone
            self._dismiss_spares(place)
        for place in self.places[start:end]:
            place.spares = [spare for spare in place.spares if spare[0] not in places]
            self._dismiss(place)
        self.places[start:end] = places
        self.failovers += 1

    def _dismiss_spares(self, place: Place) -> None:
        for each in (each for spare in place.spares for each in spare):
            self._dismiss(each)
        place.spares = []

    def _dismiss(self, place: Place) -> None:
        self._dismiss_spares(place)
        if place.link is not None:
            place.link.on_lost.discard(self._lost)
        self._rpc.tell(place.hop.peer, wire.CloseSession(self.key))

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
            self.blame(failure, False)
        if failures:
            raise failures[0]
        for task in opening:
            task.result()

    async def open(self, place: Place, after: Hop | None) -> None:
        """Open the session at `place` on the terms of the moment. Raises what its peer says."""
        link = await self._rpc.connect(place.hop.peer, place.hop.addresses)
        endpoint = wire.Endpoint(after.peer, [(a.host, a.port) for a in after.addresses]) if after else None
        span = place.hop.span
        message = wire.OpenSession(self.key, self._model, span.start, span.end, self._batch, self.max_length, endpoint)
        opened, _ = await link.call(message, timeout=OPEN_TIMEOUT)
        if not isinstance(opened, wire.SessionOpened) or not 0 < opened.lease < math.inf:
            raise Malformed("an answer to OpenSession that is none", link.peer)
        self._lease = min(opened.lease, self._lease or opened.lease)
        place.link = link
        place.open = True
        place.length = opened.length
        place.number = min(opened.number, place.number) if place.number == _UNKNOWN else opened.number
        link.on_lost.add(self._lost)

    async def _replay(self, number: int, position: int, history: History) -> None:
        """Bring every place that is behind to `position`, from the nearest one before it that remembers."""
        behind = [position > 0 and (p.number < number - 1 or p.length < position) for p in self.places]
        for start, end in runs(behind):
            for source in range(start - 1, -2, -1):
                try:
                    await self._replay_from(source, end, position, history)
                    break
                except Forgotten:
                    log.info("replay one hop earlier session=%s hop=%d", self.key.hex()[:8], source)
        for place in self.places:
            place.number, place.length = max(place.number, number - 1), max(place.length, position)

    async def _replay_from(self, source: int, end: int, position: int, history: History) -> None:
        """Replay to the places after `source`, up to `end`. -1 is ourselves: we have everything."""
        hops = end - source - 1
        held = 0 if self.places[source + 1].number == _UNKNOWN else self.places[source + 1].length
        if source >= 0:
            message = wire.Replay(self.key, self.epoch, held, position, hops)
            await self.call(self.places[source], message, self.pace.patience(position) + OPEN_TIMEOUT)
            return
        for piece in history.pieces(min(held, history.given(self.places[0].hop.peer)), position, REPLAY_POSITIONS):
            await self.send(self.places[0], history.number, piece, None, 0, hops)

    async def call(self, place: Place, message: wire.Message, timeout: float = OPEN_TIMEOUT) -> object:
        """Ask the peer at a place. Raises what it says, or `Unreachable`."""
        if place.link is None:
            raise Unreachable("not connected", place.hop.peer)
        answer, _ = await place.link.call(message, timeout=timeout)
        return answer

    async def send(
        self, first: Place, number: int, piece: Piece, rows: list[int] | None, keep: int, replay: int = 0
    ) -> None:
        """Send a step to the peer at a place. Raises `Unreachable` or `DeadlineExceeded`."""
        extras = [extra for extra in (piece.position_ids, piece.mask) if extra is not None]
        message = wire.Step(
            self.key,
            self.epoch,
            number,
            piece.position,
            keep,
            tensors.spec_of(piece.hidden),
            rows,
            tensors.spec_of(piece.position_ids) if piece.position_ids is not None else None,
            tensors.spec_of(piece.mask) if piece.mask is not None else None,
            replay,
        )
        if first.link is None or first.link.error is not None:
            raise Unreachable("the connection was lost")
        body = tensors.encode([piece.hidden, *extras])
        if first.link.try_notify(message, body):
            return
        try:
            async with asyncio.timeout(self.pace.patience(piece.hidden.shape[0] * piece.hidden.shape[1])):
                await first.link.notify(message, body)
        except TimeoutError:
            raise DeadlineExceeded(f"{first.hop} takes nothing", first.hop.peer) from None

    # --- living and ending -----------------------------------------------------------------------------------------

    async def probe(self, waiting: Callable[[], bool]) -> None:
        """Ask all hops who works on the step, as long as somebody is `waiting` for it.

        Raises `DeadlineExceeded` for the first hop that does not answer, or where nobody works on it any more.
        """
        answers = await asyncio.gather(*map(self.ask, self.places), return_exceptions=True)
        if not waiting():
            return
        silent = [place for place, answer in zip(self.places, answers, strict=True) if isinstance(answer, Exception)]
        for place in silent:
            place.failed = True
        if silent:
            raise DeadlineExceeded(f"no answer from {silent[0].hop}", silent[0].hop.peer)
        if not any(isinstance(a, wire.Alive) and a.epoch == self.epoch and a.waiting for a in answers):
            raise DeadlineExceeded("the step was lost on its way")

    async def ask(self, place: Place) -> wire.Alive:
        """How far the peer at a place is. Raises what it says, or `DeadlineExceeded` where it says nothing."""
        answer = await self.call(place, wire.KeepAlive(self.key), PROBE_TIMEOUT)
        if not isinstance(answer, wire.Alive):
            raise Malformed("an answer to KeepAlive that is none", place.hop.peer)
        return answer

    async def _keep_alive(self) -> None:
        """Say that we are still here, well before the lease ends. Who denies it is found out by the next step."""
        while True:
            await asyncio.sleep(self._lease / 3)
            following = [each for place in self.places for spare in place.spares for each in spare]
            links = [place.link for place in (*self.places, *following) if place.link is not None]
            calls = [link.call(wire.KeepAlive(self.key), timeout=self._lease / 3) for link in links]
            for outcome in await asyncio.gather(*calls, return_exceptions=True):
                if isinstance(outcome, Exception):
                    log.info("not kept alive session=%s error=%r", self.key.hex()[:8], str(outcome))

    def spawn(self, work: Coroutine[Any, Any, None]) -> asyncio.Task[None]:
        """Run `work` beside the steps."""
        return self._rpc.spawn(work)

    def exchange(self, peer: PeerId) -> bool:
        """Let a spare take the place of `peer` at the next repair, and do not blame it; False where there is none."""
        places = [place for place in self.places if place.hop.peer == peer and place.spares]
        for place in places:
            place.failed = True
        return bool(places)

    def close(self) -> None:
        """Give the leases back."""
        if self._alive is not None:
            self._alive.cancel()
        for place in self.places:
            self._dismiss(place)

    def __str__(self) -> str:
        return " -> ".join(map(str, self.places))


def runs(marks: Sequence[bool]) -> list[tuple[int, int]]:
    """The half-open ranges of what is marked."""
    padded = [False, *marks, False]
    edges = [index for index in range(len(marks) + 1) if padded[index] != padded[index + 1]]
    return list(zip(edges[::2], edges[1::2], strict=True))


def _spares_of(failed: Sequence[Place]) -> list[Place] | None:
    """Places that can take over from all of `failed` at once, None where one of them has no living spare."""
    found: list[Place] = []
    for place in failed:
        living = [spare for spare in place.spares if all(each.link and each.link.error is None for each in spare)]
        if not living:
            return None
        found += living[0]
    return found
