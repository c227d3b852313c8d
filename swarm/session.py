"""A route being used: open it, send steps along it, hear from its last hop, and put other peers in dead ones' places.

A step goes to the first hop and its answer comes from the last; the hops pass it on among themselves. Whichever hop
cannot do its part tells us, and says who is at fault; silence is met with a deadline that follows what was measured.
Then the one retry loop there is (`Session.step`) repairs the route: it finds other hosts for the failed hops' blocks,
opens the session there, has the nearest living hop upstream replay what it passed on, and sends the step again.
"""

from __future__ import annotations

import asyncio
import logging
import math
import os
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch

from swarm import tensors, wire
from swarm.avoidance import Avoidance
from swarm.errors import (
    BadTensor,
    Closed,
    DeadlineExceeded,
    Forgotten,
    Malformed,
    NoRoom,
    NoRoute,
    Refused,
    RemoteError,
    SessionLost,
    Unreachable,
    from_wire,
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
MAX_ATTEMPTS = 64  # of one step: an end to what would otherwise go on for ever


class Shunned(NamedTuple):
    """Whom a route has to do without."""

    rather: set[PeerId]  # if that is possible
    ever: set[PeerId]  # in any case


RouteFinder = Callable[[Span, Callable[[], Shunned], "float | None"], Awaitable[Route]]
"""Finds hops for a span, waiting as long as the user wants: since then, on the loop's clock, where a hop has failed,
from now on where the session only begins. Raises `NoRoute`."""


@dataclass(slots=True)
class StepMeta:
    """What goes with the hidden states of a step. B rows, N positions."""

    position: int
    keep: int = 0  # trailing positions wanted, 0 for all
    rows: list[int] | None = None  # [B], which earlier rows the present ones continue
    position_ids: torch.Tensor | None = None  # [B, N] of int64
    mask: torch.Tensor | None = None  # [B, N], 1 for a token


@dataclass(slots=True)
class Place:
    """One hop of the session's route and how far it is."""

    hop: Hop
    link: Link | None = None
    open: bool = False  # on the terms of the moment: who comes next, how long it may get
    failed: bool = False  # another peer has to take its place
    number: int = 0  # of the last step it ran, as it said when the session was opened there

    def __str__(self) -> str:
        return f"{self.hop}{'!' if self.failed else ''}"


@dataclass(slots=True)
class _Waiting:
    epoch: int
    number: int
    shape: tuple[int, int]  # rows, kept positions
    future: asyncio.Future[torch.Tensor]


class Sessions:
    """All sessions of one client: hands what comes in to the session it is for, and remembers who failed."""

    def __init__(self, rpc: Rpc) -> None:
        self.rpc = rpc
        self.avoidance = Avoidance()
        self._sessions: dict[SessionId, Session] = {}
        rpc.listen(wire.Output, self._output)
        rpc.listen(wire.StepFailed, self._failed)

    def add(self, session: Session) -> None:
        """From now on it is told what comes for it."""
        self._sessions[session.key] = session

    def remove(self, session: Session) -> None:
        """It is over."""
        self._sessions.pop(session.key, None)

    def _output(self, link: Link, message: wire.Output, body: memoryview) -> None:
        if (session := self._sessions.get(SessionId(message.session))) is not None:
            session.heard(link, message, body)

    def _failed(self, link: Link, message: wire.StepFailed, body: memoryview) -> None:
        if (session := self._sessions.get(SessionId(message.session))) is not None:
            session.told(message)

    async def close(self) -> None:
        """End all of them."""
        for session in list(self._sessions.values()):
            await session.close()


class Session:
    """One sequence batch being generated: a KV cache at every stage of its route. Used by one task at a time.

    Attributes:
        length: positions that every stage holds.
        failovers: how often a hop was replaced.
    """

    def __init__(
        self, owner: Sessions, model: ModelId, num_blocks: int, find_route: RouteFinder, batch: int, max_length: int
    ) -> None:
        self.key = SessionId(os.urandom(16))
        self.batch = batch
        self.max_length = max_length
        self.length = 0
        self.failovers = 0
        self._owner = owner
        self._model = model
        self._blocks = Span(0, num_blocks)
        self._find_route = find_route
        self._places: list[Place] = []
        self._history = History()
        self._pace = Pace()
        self._epoch = 0
        self._waiting: _Waiting | None = None
        self._lease = 0.0
        self._alive: asyncio.Task[None] | None = None
        self._closed = False
        self._needed = 0  # positions, for the step under way
        self._refused: set[PeerId] = set()  # who said no to the step under way
        self._trouble: float | None = None  # since when the step under way meets failures, on the loop's clock

    @property
    def route(self) -> Route | None:
        """The peers that hold the session, None before the first step."""
        return Route(tuple(place.hop for place in self._places)) if self._places else None

    # --- a step ----------------------------------------------------------------------------------------------------

    async def step(self, hidden: torch.Tensor, meta: StepMeta) -> torch.Tensor:
        """Make `hidden` [B, N, H] the session's content from `meta.position` on, and run it through the chain.

        Hops that fail meanwhile are replaced, as long as every block has a living host.

        Returns:
            [B, kept, H]: the last block's hidden states for the last `meta.keep` positions, or for all N.

        Raises:
            NoRoute: some block has no host, and none came in time.
            NoRoom: nobody has room for the session.
            SessionLost: it failed again and again.
            RemoteError: what we sent was refused by the first hop.
        """
        if self._closed:
            raise Closed("the session was closed")
        number = self._history.number + 1
        self._history.record(number, meta.position, hidden, meta.rows, meta.position_ids, meta.mask)
        self._needed = meta.position + hidden.shape[1]
        if self._needed > self.max_length:
            self._lease_for(max(self._needed, 2 * self.max_length))
        self._owner.add(self)
        try:
            output = await self._run(number, hidden, meta)
        except BaseException:
            for place in self._places:
                place.number = _UNKNOWN
            raise
        finally:
            self._refused.clear()
            self._trouble = None
        self.length = meta.position + hidden.shape[1]
        return output

    async def _run(self, number: int, hidden: torch.Tensor, meta: StepMeta) -> torch.Tensor:
        """The one retry loop: attempt, see who is at fault, repair, and attempt again."""
        last: RemoteError | None = None
        for _ in range(MAX_ATTEMPTS):
            self._epoch += 1
            try:
                await self._repair(number, meta.position)
                return await self._attempt(number, hidden, meta)
            except NoRoute:
                if isinstance(last, Refused):
                    raise last from None  # why the last one said no tells more than that nobody else is left
                raise
            except RemoteError as error:
                log.info("step failed session=%s error=%r peer=%s", self.key.hex()[:8], str(error), error.peer[-6:])
                if self.length:
                    self._trouble = self._trouble or asyncio.get_running_loop().time()
                self._blame(error)
                last = error
        raise SessionLost(f"step {number} failed {MAX_ATTEMPTS} times, last with: {last}")

    async def _attempt(self, number: int, hidden: torch.Tensor, meta: StepMeta) -> torch.Tensor:
        rows, count, _ = hidden.shape
        kept = min(meta.keep, count) if meta.keep else count
        loop = asyncio.get_running_loop()
        waiting = self._waiting = _Waiting(self._epoch, number, (rows, kept), loop.create_future())
        started = loop.time()
        try:
            piece = Piece(meta.position, hidden, meta.position_ids, meta.mask)
            await self._send(number, piece, meta.rows, meta.keep)
            output = await self._answer(waiting, rows * count)
        finally:
            self._waiting = None
        self._pace.took(loop.time() - started, rows * count)
        return output

    async def _answer(self, waiting: _Waiting, tokens: int) -> torch.Tensor:
        """Wait for the answer; at the deadline, ask the hops who still works on it."""
        patience = self._pace.patience(tokens)
        while True:
            done, _ = await asyncio.wait({waiting.future}, timeout=patience)
            if done:
                return waiting.future.result()
            await self._probe(waiting)
            patience = self._pace.longer(patience)

    async def _probe(self, waiting: _Waiting) -> None:
        """Raise for the first hop that does not answer, or where nobody works on the step any more."""
        answers = await asyncio.gather(*map(self._ask, self._places), return_exceptions=True)
        if waiting.future.done():
            return
        silent = [place for place, answer in zip(self._places, answers, strict=True) if isinstance(answer, Exception)]
        for place in silent:
            place.failed = True
        if silent:
            raise DeadlineExceeded(f"no answer from {silent[0].hop}", silent[0].hop.peer)
        if not any(isinstance(a, wire.Alive) and a.epoch == waiting.epoch and a.waiting for a in answers):
            raise DeadlineExceeded("the step was lost on its way")

    async def _ask(self, place: Place) -> wire.Alive:
        if place.link is None:
            raise Unreachable("not connected", place.hop.peer)
        answer, _ = await place.link.call(wire.KeepAlive(self.key), timeout=PROBE_TIMEOUT)
        if not isinstance(answer, wire.Alive):
            raise Malformed("an answer to KeepAlive that is none", place.hop.peer)
        return answer

    async def _send(self, number: int, piece: Piece, rows: list[int] | None, keep: int, replay: int = 0) -> None:
        """To the first hop."""
        first = self._places[0]
        extras = [extra for extra in (piece.position_ids, piece.mask) if extra is not None]
        message = wire.Step(
            self.key,
            self._epoch,
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
            async with asyncio.timeout(self._pace.patience(piece.hidden.shape[0] * piece.hidden.shape[1])):
                await first.link.notify(message, body)
        except TimeoutError:
            raise DeadlineExceeded(f"{first.hop} takes nothing", first.hop.peer) from None

    # --- who failed ------------------------------------------------------------------------------------------------

    def _blame(self, error: RemoteError) -> None:
        """Mark the place whose peer is at fault; raise where nobody else could do better."""
        if isinstance(error, BadTensor) and self._places and error.peer == self._places[0].hop.peer:
            raise error  # the first hop refuses what we sent; so would any other
        if isinstance(error, NoRoom) and self.max_length > self._needed:
            self._lease_for(self._needed)  # ask for no more than this step needs
            return
        for place in self._places:
            if place.hop.peer == error.peer:
                place.failed = True
        if not error.peer:
            return
        if isinstance(error, Refused):
            self._refused.add(PeerId(error.peer))
        else:
            self._owner.avoidance.failed(PeerId(error.peer), asyncio.get_running_loop().time())

    def _shunned(self) -> Shunned:
        now = asyncio.get_running_loop().time()
        avoidance = self._owner.avoidance
        ever = self._refused | avoidance.resting(now)
        return Shunned(avoidance.avoided(now) | ever, ever)

    def _lost(self, link: Link) -> None:
        if any(place.link is link for place in self._places):
            self._fail(Unreachable(f"the connection to {link.peer} was lost: {link.error}"))

    # --- repair ----------------------------------------------------------------------------------------------------

    def _lease_for(self, length: int) -> None:
        """Ask for so many positions when the session is opened the next time, which is now."""
        self.max_length = length
        for place in self._places:
            place.open = False

    async def _repair(self, number: int, position: int) -> None:
        """Have an open session at a living peer for every block, each at `position`."""
        if self._places and all(map(_is_sound, self._places)):
            return
        await self._replace_failed()
        await self._open_all()
        await self._replay(number, position)
        if self._alive is None:
            self._alive = asyncio.get_running_loop().create_task(self._keep_alive())

    async def _replace_failed(self) -> None:
        """Other hosts for the blocks of the failed places, each run of them together."""
        if not self._places:
            self._places = await self._find(self._blocks)
            return
        runs = _runs([place.failed for place in self._places])
        for start, end in reversed(runs):
            span = Span(self._places[start].hop.span.start, self._places[end - 1].hop.span.end)
            found = await self._find(span)
            log.info("failover session=%s blocks=%s to=%s", self.key.hex()[:8], span, [str(place) for place in found])
            for place in self._places[start:end]:
                self._dismiss(place)
            self._places[start:end] = found
            self.failovers += 1

    async def _find(self, span: Span) -> list[Place]:
        return [Place(hop) for hop in await self._find_route(span, self._shunned, self._trouble)]

    def _dismiss(self, place: Place) -> None:
        if place.link is not None:
            place.link.on_lost.discard(self._lost)
        self._owner.rpc.tell(place.hop.peer, wire.CloseSession(self.key))

    async def _open_all(self) -> None:
        """Open the session at every place, or tell it the new terms: who comes next, how long it may get."""
        following: list[Hop | None] = [*(place.hop for place in self._places[1:]), None]
        opening = [
            asyncio.ensure_future(self._open(place, after))
            for place, after in zip(self._places, following, strict=True)
        ]
        try:
            await asyncio.wait(opening)
        finally:
            for task in opening:
                task.cancel()
        failures = [error for task in opening if isinstance(error := task.exception(), RemoteError)]
        for failure in failures[1:]:
            self._blame(failure)
        if failures:
            raise failures[0]
        for task in opening:
            task.result()

    async def _open(self, place: Place, after: Hop | None) -> None:
        link = await self._owner.rpc.connect(place.hop.peer, place.hop.addresses)
        endpoint = wire.Endpoint(after.peer, [(a.host, a.port) for a in after.addresses]) if after else None
        span = place.hop.span
        message = wire.OpenSession(self.key, self._model, span.start, span.end, self.batch, self.max_length, endpoint)
        opened, _ = await link.call(message, timeout=OPEN_TIMEOUT)
        if not isinstance(opened, wire.SessionOpened) or not 0 < opened.lease < math.inf:
            raise Malformed("an answer to OpenSession that is none", link.peer)
        self._lease = min(opened.lease, self._lease or opened.lease)
        place.link = link
        place.open = True
        place.number = min(opened.number, place.number) if place.number == _UNKNOWN else opened.number
        link.on_lost.add(self._lost)

    async def _replay(self, number: int, position: int) -> None:
        """Bring every place that is behind to `position`, from the nearest one before it that remembers."""
        behind = [position > 0 and place.number < number - 1 for place in self._places]
        for start, end in _runs(behind):
            for source in range(start - 1, -2, -1):
                try:
                    await self._replay_from(source, end, position)
                    break
                except Forgotten:
                    log.info("replay one hop earlier session=%s hop=%d", self.key.hex()[:8], source)
        for place in self._places:
            place.number = max(place.number, number - 1)

    async def _replay_from(self, source: int, end: int, position: int) -> None:
        """Replay to the places after `source`, up to `end`. -1 is ourselves: we have everything."""
        hops = end - source - 1
        if source >= 0:
            link = self._places[source].link
            assert link is not None
            message = wire.Replay(self.key, self._epoch, 0, position, hops)
            await link.call(message, timeout=self._pace.patience(position) + OPEN_TIMEOUT)
            return
        for piece in self._history.pieces(0, position, REPLAY_POSITIONS):
            await self._send(self._history.number, piece, None, 0, hops)

    # --- what comes in ---------------------------------------------------------------------------------------------

    def heard(self, link: Link, message: wire.Output, body: memoryview) -> None:
        """An answer came: check it, and hand it to the step that waits for it."""
        waiting = self._waiting
        if waiting is None or (message.epoch, message.number) != (waiting.epoch, waiting.number):
            return  # an answer to an attempt that was given up
        if link.peer != self._places[-1].hop.peer:
            return
        try:
            output = _checked(tensors.decode(body, [message.hidden])[0], waiting.shape)
        except RemoteError as error:
            error.peer = link.peer
            self._fail(error)
            return
        if not waiting.future.done():
            waiting.future.set_result(output)

    def told(self, message: wire.StepFailed) -> None:
        """A hop told us that it, or the one after it, could not do its part."""
        if self._waiting is not None and message.epoch == self._waiting.epoch:
            self._fail(from_wire(message.code, message.message, message.peer))

    def _fail(self, error: RemoteError) -> None:
        if self._waiting is not None and not self._waiting.future.done():
            self._waiting.future.set_exception(error)

    # --- living and ending -----------------------------------------------------------------------------------------

    async def _keep_alive(self) -> None:
        """Say that we are still here, well before the lease ends. Who denies it is found out by the next step."""
        while True:
            await asyncio.sleep(self._lease / 3)
            links = [place.link for place in self._places if place.link is not None]
            calls = [link.call(wire.KeepAlive(self.key), timeout=self._lease / 3) for link in links]
            for outcome in await asyncio.gather(*calls, return_exceptions=True):
                if isinstance(outcome, Exception):
                    log.info("not kept alive session=%s error=%r", self.key.hex()[:8], str(outcome))

    async def close(self) -> None:
        """Give the leases back. A second call does nothing."""
        if self._closed:
            return
        self._closed = True
        self._owner.remove(self)
        self._fail(Unreachable("the session was closed"))
        if self._alive is not None:
            self._alive.cancel()
        for place in self._places:
            self._dismiss(place)

    def __repr__(self) -> str:
        places = " -> ".join(map(str, self._places))
        return f"<Session {self.key.hex()[:8]} at {self.length}/{self.max_length} route={places}>"


def _is_sound(place: Place) -> bool:
    lives = place.link is not None and place.link.error is None
    return lives and place.open and not place.failed and place.number != _UNKNOWN


def _runs(marks: Sequence[bool]) -> list[tuple[int, int]]:
    """The half-open ranges of what is marked."""
    padded = [False, *marks, False]
    edges = [index for index in range(len(marks) + 1) if padded[index] != padded[index + 1]]
    return list(zip(edges[::2], edges[1::2], strict=True))


def _checked(output: torch.Tensor, shape: tuple[int, int]) -> torch.Tensor:
    if output.ndim != 3 or tuple(output.shape[:2]) != shape or not output.is_floating_point():
        raise BadTensor(f"an answer of shape {list(output.shape)}, where {list(shape)} and hidden states belong")
    if not torch.isfinite(output).all():
        raise BadTensor("an answer with values that are not finite numbers")
    return output
