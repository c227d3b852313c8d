"""A route being used: steps are sent along it, its last hop is heard, and failures are met.

A step goes to the first hop and its answer comes from the last; the hops pass it on among themselves. Whichever hop
cannot do its part tells us, and says who is at fault; silence is met with a deadline that follows what was measured.
Then the one retry loop there is (`Session.step`) has the route repaired (`swarm.hops.liveroute`) and sends the step
again.
"""

from __future__ import annotations

import asyncio
import logging
import os
from dataclasses import dataclass

import torch

from swarm import tensors, wire
from swarm.errors import (
    BadTensor,
    BeyondCache,
    Busy,
    Closed,
    DeadlineExceeded,
    Malformed,
    NoRoom,
    NoRoute,
    Refused,
    RemoteError,
    SessionLost,
    Unreachable,
    UsageError,
    WeightsChanged,
    from_wire,
)
from swarm.hops.blame import Blame
from swarm.hops.finding import RouteFinder
from swarm.hops.history import History, Piece
from swarm.hops.liveroute import LiveRoute
from swarm.hops.standby import Standby
from swarm.routes.avoidance import Avoidance
from swarm.rpc import Link, Rpc
from swarm.types import ModelId, PeerId, Route, SessionId, Span
from swarm.wire import Priority, Rounding

log = logging.getLogger(__name__)

MAX_ATTEMPTS = 1000  # of one step: an end to what would otherwise go on for ever


@dataclass(slots=True)
class StepMeta:
    """What goes with the hidden states of a step. B rows, N positions."""

    position: int
    keep: int = 0  # trailing positions wanted, 0 for all
    rows: list[int] | None = None  # [B], which earlier rows the present ones continue
    position_ids: torch.Tensor | None = None  # [B, N] of int64
    mask: torch.Tensor | None = None  # [B, N], 1 for a token


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
        self.told: set[tuple[str, Rounding]] = set()  # which senders the user knows to round hidden states
        self._sessions: dict[SessionId, Session] = {}
        rpc.listen(wire.Output, self._output)
        rpc.listen(wire.StepFailed, self._failed)
        rpc.listen(wire.Leaving, self._leaving)

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
            session.told(link, message)

    def _leaving(self, link: Link, message: wire.Leaving, body: memoryview) -> None:
        if (session := self._sessions.get(SessionId(message.session))) is not None:
            self.rpc.spawn(session.leave(link.peer))

    async def close(self) -> None:
        """End all of them."""
        for session in list(self._sessions.values()):
            await session.close()


class Session:
    """One sequence batch being generated: a KV cache at every stage of its route. Used by one task at a time.

    Attributes:
        length: positions that every stage holds.
    """

    def __init__(
        self,
        owner: Sessions,
        model: ModelId,
        num_blocks: int,
        find: RouteFinder,
        batch: int,
        max_length: int,
        standby: int = 0,
        queue: float = 0.0,
    ) -> None:
        self.key = SessionId(os.urandom(16))
        self.length = 0
        self._owner = owner
        blocks = Span(0, num_blocks)
        self._blame = Blame(owner.avoidance)
        self._live = LiveRoute(owner.rpc, self._blame, self.key, model, blocks, find, batch, max_length, self._lost)
        self._history = History()
        self._standby = Standby(self._live, self._history, standby)
        self._waiting: _Waiting | None = None
        self._closed = False
        self._queue_seconds = queue  # to wait for room where all hops of some block are full
        self._stepping = asyncio.Lock()  # a hop is exchanged between two steps

    @property
    def route(self) -> Route | None:
        """The peers that hold the session, None before the first step."""
        return self._live.route

    @property
    def failovers(self) -> int:
        """How often places on the route were given to other peers."""
        return self._live.failovers

    def round(self, rounding: Rounding) -> None:
        """What may be done to hidden states on their way; to be said before the first step."""
        self._live.rounding, self._live.told = rounding, self._owner.told

    def prioritize(self, priority: Priority) -> None:
        """How urgent its steps are at the hops; to be said before the first step."""
        self._live.priority = priority

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
            UsageError: what is to be sent are no hidden states.
        """
        if self._closed:
            raise Closed("the session was closed")
        _check(hidden)
        async with self._stepping:
            output = await self._step(hidden, meta)
        self._standby.step_ended()
        return output

    async def _step(self, hidden: torch.Tensor, meta: StepMeta) -> torch.Tensor:
        number = self._history.number + 1
        piece = Piece(meta.position, hidden, meta.position_ids, meta.mask, meta.rows)
        self._history.record(number, piece)
        if piece.end > self._live.max_length:
            self._live.lease_for(max(piece.end, 2 * self._live.max_length))
        self._owner.add(self)
        self._blame.begin(begun=self.length > 0)
        self._live.queue = 0.0
        try:
            output = await self._run(number, piece, meta.keep)
        except BaseException:
            self._live.lose_track()
            raise
        self.length = piece.end
        return output

    async def _run(self, number: int, piece: Piece, keep: int) -> torch.Tensor:
        """The one retry loop: attempt, see who is at fault, repair, and attempt again."""
        last: RemoteError | None = None
        wanted = self._live.max_length
        for _ in range(MAX_ATTEMPTS):
            self._live.epoch += 1
            try:
                return await self._attempt(number, piece, keep)
            except NoRoute:
                if isinstance(last, NoRoom) and self._may_queue(wanted):
                    continue
                full = Refused if self.length == 0 else NoRoom | Busy
                if isinstance(last, full):
                    raise last from None  # why the last one said no tells more than that nobody else is left
                raise
            except WeightsChanged:  # whoever sends has to send something else
                raise
            except RemoteError as error:
                log.info("step failed session=%s error=%r peer=%s", self.key.hex()[:8], str(error), error.peer[-6:])
                if isinstance(error, NoRoom) and self._live.max_length > piece.end and not self._live.queue:
                    self._live.lease_for(piece.end)  # no more than this step needs
                else:
                    self._live.fault(error)
                last = error
        raise SessionLost(f"step {number} failed {MAX_ATTEMPTS} times, last with: {last}")

    def _may_queue(self, wanted: int) -> bool:
        """Nobody has room at once: whether to ask again and wait for it, once, if the user is ready to wait at all."""
        if self._live.queue or not self._queue_seconds:
            return False
        self._live.queue = self._queue_seconds
        self._live.lease_for(wanted)
        self._blame.begin(begun=self.length > 0)
        return True

    async def _attempt(self, number: int, piece: Piece, keep: int) -> torch.Tensor:
        """Repair the route where it needs that, send the step, and wait for its answer."""
        rows, count, _ = piece.hidden.shape
        loop = asyncio.get_running_loop()
        shape = (rows, min(keep, count) if keep else count)
        waiting = self._waiting = _Waiting(self._live.epoch, number, shape, loop.create_future())
        waiting.future.add_done_callback(lambda future: future.cancelled() or future.exception())  # perhaps not awaited
        try:
            await self._live.repair(number, piece.position, self._history)
            started = loop.time()
            await self._live.send(self._live.places[0], number, piece, keep)
            output = await self._answer(waiting, rows * count, rows * self._live.replayed)
        finally:
            self._waiting = None
            waiting.future.cancel()
        self._live.pace.took(loop.time() - started, rows * count)
        return output

    async def _answer(self, waiting: _Waiting, tokens: int, replayed: int) -> torch.Tensor:
        """Wait for the answer; at the deadline, ask the hops who still works on it.

        Who does is given time as long as nobody else could do it; then for much longer than a step should take.
        """
        loop, pace = asyncio.get_running_loop(), self._live.pace
        patience, limit, began = pace.patience(tokens), 0.0, loop.time()
        while True:
            try:
                async with asyncio.timeout(patience):
                    return await asyncio.shield(waiting.future)
            except TimeoutError:
                at_it = await self._live.probe(lambda: not waiting.future.done())
            limit = limit or pace.limit(tokens + replayed)
            if at_it and loop.time() - began > limit:
                if await self._live.can_relieve(at_it):
                    raise DeadlineExceeded(f"{at_it[-6:]} has worked on a step for too long", at_it)
                limit *= 2.0
            patience = pace.longer(patience)

    # --- what comes in ---------------------------------------------------------------------------------------------

    def _lost(self, link: Link) -> None:
        if not self._live.drop_spare(link.peer):
            self._fail(Unreachable(f"the connection to {link.peer} was lost: {link.error}"))

    def heard(self, link: Link, message: wire.Output, body: memoryview) -> None:
        """An answer came: check it, and hand it to the step that waits for it."""
        waiting = self._waiting
        if waiting is None or message.epoch < waiting.epoch:
            return  # an answer to an attempt that was given up, or one that came before
        if link.peer != self._live.places[-1].peer:
            return
        if (message.epoch, message.number) != (waiting.epoch, waiting.number):
            self._fail(Malformed("an answer to what was never asked", link.peer))
            return
        try:
            output = _checked(tensors.decode(body, [message.hidden])[0], waiting.shape)
        except BadTensor as error:
            self._fail(Malformed(str(error), link.peer))
            return
        if not waiting.future.done():
            waiting.future.set_result(output)

    def told(self, link: Link, message: wire.StepFailed) -> None:
        """A hop told us that it, or another, could not do its part."""
        if self._live.drop_spare(message.peer):
            return
        if self._waiting is not None and message.epoch == self._waiting.epoch and self._live.place_of(link.peer):
            error = from_wire(message.code, message.message, message.peer)
            error.teller = link.peer
            if self._live.place_of(message.peer) is None:  # it went to somebody who has no place any more
                error = BeyondCache(f"the step was sent astray: {error}", link.peer)
            self._fail(error)

    def _fail(self, error: RemoteError) -> None:
        if self._waiting is not None and not self._waiting.future.done():
            self._waiting.future.set_exception(error)

    async def leave(self, peer: PeerId) -> None:
        """A peer on the route is about to leave: bring another to where it is, and put it in its place."""
        await self._standby.replace(peer)
        async with self._stepping:
            if not self._closed and self._live.exchange(peer):
                self._live.epoch += 1
                try:
                    await self._live.repair(self._history.number + 1, self._history.length, self._history)
                except RemoteError as error:
                    self._live.fault(error)  # the next step sees to it
                except NoRoute as error:
                    log.info("not exchanged peer=%s error=%r", peer[-6:], str(error))  # nor can the next step be yet

    # --- the end ---------------------------------------------------------------------------------------------------

    async def close(self) -> None:
        """Give the leases back. A second call does nothing."""
        if self._closed:
            return
        self._closed = True
        self._owner.remove(self)
        self._fail(Unreachable("the session was closed"))
        self._standby.close()
        self._live.close()

    def __repr__(self) -> str:
        return f"<Session {self.key.hex()[:8]} at {self.length}/{self._live.max_length} route={self._live}>"


def _check(hidden: torch.Tensor) -> None:
    """Raise `UsageError` where every hop would refuse it: none of them is to be blamed for that."""
    if hidden.ndim != 3 or 0 in hidden.shape or not hidden.is_floating_point():
        raise UsageError(f"{hidden.dtype} of shape {list(hidden.shape)} are no hidden states [B, N, H]")
    if not tensors.all_finite(hidden):
        raise UsageError("hidden states that are not finite numbers")


def _checked(output: torch.Tensor, shape: tuple[int, int]) -> torch.Tensor:
    if output.ndim != 3 or tuple(output.shape[:2]) != shape or not output.is_floating_point():
        raise BadTensor(f"an answer of shape {list(output.shape)}, where {list(shape)} and hidden states belong")
    if not tensors.all_finite(output):
        raise BadTensor("an answer with values that are not finite numbers")
    return output
