"""The sessions of one stage: opened and kept alive by their clients, put out where others need the room, and ended."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Iterator

from peer.cache import Leases
from peer.engine import Engine
from peer.executor import Executor
from peer.kv.admission import Admission
from peer.scheduler import LOW, NORMAL
from peer.served import ServedSession, unheard
from peer.stage import SessionState, Stage
from swarm import wire
from swarm.errors import Draining, RemoteError, UnknownSession, WrongModel
from swarm.hops.rounding import choose
from swarm.rpc import Link, Reply, Rpc
from swarm.types import ModelId, SessionId, Span
from swarm.wire import Rounding

log = logging.getLogger(__name__)


class Sessions:
    """Who is here. What their steps come to is for `peer.server`.

    Attributes:
        draining: no new ones are taken.
    """

    def __init__(
        self,
        rpc: Rpc,
        stage: Stage,
        executor: Executor,
        engine: Engine,
        leases: Leases,
        model: ModelId,
        clock: Callable[[], float],
        rounding: Rounding,
    ) -> None:
        self.draining = False
        self._rpc = rpc
        self._rounding = rounding  # of what is passed on, where clients leave that to us
        self._stage = stage
        self._executor = executor
        self._engine = engine
        self._leases = leases
        self._admission = Admission(leases, self, clock)
        self._model = model
        self._clock = clock
        self._sessions: dict[SessionId, ServedSession] = {}
        self._empty = asyncio.Event()
        self._empty.set()
        rpc.answer(wire.OpenSession, self._open)
        rpc.answer(wire.KeepAlive, self._keep_alive)
        rpc.listen(wire.CloseSession, self._close)

    def __len__(self) -> int:
        return len(self._sessions)

    def __iter__(self) -> Iterator[ServedSession]:
        return iter(list(self._sessions.values()))

    def get(self, key: bytes) -> ServedSession | None:
        """The session, if it is here."""
        return self._sessions.get(SessionId(key))

    def of_client(self, link: Link, key: bytes) -> ServedSession:
        """The session, for its own client. Raises `UnknownSession`."""
        session = self.get(key)
        if session is None or session.client.peer != link.peer:
            raise UnknownSession("the peer holds no such session; its lease may have ended")
        return session

    def holds(self, session: ServedSession) -> bool:
        """Whether it is still here, and no other under its name."""
        return self._sessions.get(session.key) is session

    # --- opening and closing ---------------------------------------------------------------------------------------

    async def _open(self, link: Link, message: wire.OpenSession, body: memoryview) -> Reply:
        key = SessionId(message.session)
        session = self._sessions.get(key)
        if session is not None and session.client.peer != link.peer:
            raise UnknownSession("the session is another client's")
        if session is not None and message.epoch < session.opened:
            raise UnknownSession("the client has asked for something else since")
        if session is not None and not _is_same(session, message):
            self.end(key)  # the client has another part for us
            session = None
        if session is None:
            session = await self._admit(key, link, message)
        state = session.state
        length = max(message.max_length, state.length)  # what it holds stays, and stays leased
        await self._admission.lease(key, self._leases.room(message.batch, length), message.wait, first=True)
        if not self.holds(session):
            self._release_unless_held(key)
            raise UnknownSession("the session ended while it waited for room")
        session.heard_from(link)
        session.opened = message.epoch
        state.max_length = length
        session.priority = LOW if message.priority == "low" else NORMAL
        self._engine.prioritize(key, session.priority)
        try:
            await session.set_next(message.next)
        except (RemoteError, asyncio.CancelledError):
            if session.state.number == 0 and self.holds(session):
                self.end(key)
            raise
        if session.rounding is None:
            outlet = session.next or session.client
            session.rounding = await choose(self._rpc, outlet.link, message.rounding, self._rounding)
        return wire.SessionOpened(self._leases.duration, session.state.number, session.state.length, session.rounding)

    async def _admit(self, key: SessionId, link: Link, message: wire.OpenSession) -> ServedSession:
        if self.draining:
            raise Draining("the peer is leaving")
        if message.model != self._model:
            raise WrongModel(f"the peer hosts model {self._model[:12]}, not {message.model[:12]}")
        if message.end <= message.start or Span(message.start, message.end) not in self._stage.span:
            raise WrongModel(f"the peer hosts blocks {self._stage.span}, not {message.start}:{message.end}")
        await self._admission.lease(key, self._leases.room(message.batch, message.max_length), message.wait)
        span = Span(message.start, message.end)
        opened: list[SessionState] = []
        try:
            await self._executor.run(
                lambda: opened.append(self._stage.open(span, message.batch, message.max_length, link.peer))
            )
        except BaseException:  # nobody wants it any more; that it is opened cannot be taken back
            self._executor.submit(lambda: list(map(self._stage.close, opened)), _done)
            self._leases.release(key)
            self._admission.serve()
            raise
        [state] = opened
        self._empty.clear()
        session = self._sessions[key] = ServedSession(self._rpc, key, link, state)
        log.info("session opened session=%s client=%s span=%s", key.hex()[:8], link.peer[-6:], state.model.span)
        return session

    async def _keep_alive(self, link: Link, message: wire.KeepAlive, body: memoryview) -> Reply:
        session = self.of_client(link, message.session)
        session.heard_from(link)
        self._leases.renew(session.key, self._clock())
        waiting = self._engine.waiting(session.key) + session.outward
        return wire.Alive(session.state.number, session.came, waiting)

    def _close(self, link: Link, message: wire.CloseSession, body: memoryview) -> None:
        if (session := self.get(message.session)) is not None and session.client.peer == link.peer:
            self.end(session.key)

    def end(self, key: SessionId) -> None:
        """Forget it, and all that waits to be done for it."""
        if (session := self._sessions.pop(key, None)) is not None:
            session.close()
            self._engine.end(key)
            self._executor.submit(lambda: self._stage.close(session.state), _done)
        self._leases.release(key, self._clock())
        self._admission.serve()
        if not self._sessions:
            self._empty.set()

    def expire(self) -> None:
        """End those whose clients have not been heard of for too long."""
        for key in self._leases.expired(self._clock()):
            log.info("lease ended session=%s", key.hex()[:8])
            self.end(key)
        self._admission.serve()

    # --- out of the pool, and back ---------------------------------------------------------------------------------

    def is_busy(self, session: SessionId) -> bool:
        """Whether steps of it wait or run, or it is only being opened."""
        return session not in self._sessions or self._engine.waiting(session) > 0

    def put_out(self, session: SessionId) -> None:
        """Move what it holds to host memory."""
        state = self._sessions[session].state
        log.info("put out session=%s positions=%d", session.hex()[:8], state.length)
        self._executor.submit(lambda: self._stage.put_out(state), _done)

    def lose(self, session: SessionId) -> None:
        """It was idle for very long, and others need the room."""
        log.info("lease lost session=%s", session.hex()[:8])
        self.end(session)

    async def bring_back(self, session: ServedSession) -> bool:
        """Have what it holds come back to the pool, in its turn; whether it is still here then. Raises `NoRoom`."""
        state = session.state
        tokens = self._leases.room(state.batch, state.max_length)
        await self._admission.lease(session.key, tokens, self._leases.duration, first=True)
        if not self.holds(session):
            self._release_unless_held(session.key)
        return self.holds(session)

    def _release_unless_held(self, key: SessionId) -> None:
        """It ended while it waited for room; under its name there may be another."""
        if key not in self._sessions:
            self._leases.release(key)

    # --- leaving ---------------------------------------------------------------------------------------------------

    async def drain(self, timeout: float) -> bool:
        """Take no new ones, ask the clients of the others to move, wait until they have; whether they did."""
        self.draining = True
        for session in self:
            session.client.send(wire.Leaving(session.key), (), unheard)
        try:
            async with asyncio.timeout(timeout):
                await self._empty.wait()
        except TimeoutError:
            return False
        return True

    async def close(self) -> None:
        """End all, and let the stage go; who asks for one is told that the peer is leaving."""
        self.draining = True
        for session in self:
            self.end(session.key)
        await self._executor.run(lambda: None)  # whatever was to be done for them
        del self._stage, self._engine  # others may have come in their place


def _done(_: object, error: BaseException | None) -> None:
    if error is not None:
        log.error("a session's pages were not given back", exc_info=error)


def _is_same(session: ServedSession, terms: wire.OpenSession) -> bool:
    """Whether what cannot change of a session is as it was."""
    span = session.state.model.span
    return (terms.start, terms.end, terms.batch) == (span.start, span.end, session.state.batch)
