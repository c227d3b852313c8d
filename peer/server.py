"""Message in, the right room called, reply out: what a peer does with sessions and their steps."""

from __future__ import annotations

import asyncio
import logging
import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import replace

import torch

from peer.cache import Leases
from peer.executor import Executor
from peer.stage import SessionState, Stage, StepInput
from swarm import tensors, wire
from swarm.errors import (
    Busy,
    Draining,
    Forgotten,
    Internal,
    ProtocolError,
    RemoteError,
    ShoalError,
    UnknownSession,
    WrongModel,
    to_wire,
)
from swarm.frames import Buffer
from swarm.history import History
from swarm.rpc import Link, Reply, Rpc
from swarm.types import Address, ModelId, PeerId, SessionId, Span
from swarm.wire import Message

log = logging.getLogger(__name__)

MAX_WAITING_STEPS = 256  # steps of one session that may wait for the compute thread
REPLAY_POSITIONS = 256  # of a replayed step, at most: other sessions' steps go between
BACKUP_BYTES = 256 * 1024 * 1024  # of what was passed on, of all sessions together


class ServedSession:
    """A session as its peer sees it: the client's link, the next hop's, and what waits to be sent to either."""

    def __init__(self, key: SessionId, client: Link, state: SessionState) -> None:
        self.key = key
        self.client = client
        self.state = state
        self.next: wire.Endpoint | None = None
        self.next_link: Link | None = None
        self.history: History | None = History()  # what was passed on; None where that was too much to keep
        self.epoch = 0
        self.waiting = 0  # steps given to the compute thread and not yet done
        self.outbox: deque[tuple[Message, Sequence[Buffer]]] = deque()  # while the way is not free

    def __repr__(self) -> str:
        return f"<ServedSession {self.key.hex()[:8]} {self.state.model.span} at {self.state.length}>"


class Server:
    """Serves one stage to many sessions."""

    def __init__(
        self,
        rpc: Rpc,
        stage: Stage,
        executor: Executor,
        leases: Leases,
        model: ModelId,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._rpc = rpc
        self._stage = stage
        self._executor = executor
        self._leases = leases
        self._model = model
        self._clock = clock
        self._sessions: dict[SessionId, ServedSession] = {}
        self.draining = False
        self._backup = 0  # bytes of all sessions' histories
        self.tokens = 0  # positions that were run so far, of all rows
        rpc.answer(wire.OpenSession, self._open)
        rpc.answer(wire.KeepAlive, self._keep_alive)
        rpc.answer(wire.Replay, self._replay)
        rpc.listen(wire.CloseSession, self._close)
        rpc.listen(wire.Step, self._step)
        rpc.listen(wire.StepFailed, self._failed_downstream)

    @property
    def sessions(self) -> int:
        """How many sessions hold a lease."""
        return len(self._sessions)

    # --- opening and closing ---------------------------------------------------------------------------------------

    async def _open(self, link: Link, message: wire.OpenSession, body: memoryview) -> Reply:
        key = SessionId(message.session)
        session = self._sessions.get(key)
        if session is None:
            session = await self._admit(key, link, message)
        elif session.client.peer != link.peer:
            raise UnknownSession("the session is another client's")
        self._leases.grant(key, message.batch * message.max_length, self._clock())
        session.client = link  # a client that lost its connection comes back on another
        session.state.max_length = message.max_length
        try:
            session.next, session.next_link = message.next, await self._dial(message.next)
        except (RemoteError, asyncio.CancelledError):
            if session.state.number == 0:
                self._forget(key)
            raise
        return wire.SessionOpened(self._leases.duration, session.state.number, session.state.length)

    async def _admit(self, key: SessionId, link: Link, message: wire.OpenSession) -> ServedSession:
        if self.draining:
            raise Draining("the peer is leaving")
        if message.model != self._model:
            raise WrongModel(f"the peer hosts model {self._model[:12]}, not {message.model[:12]}")
        if message.end <= message.start or Span(message.start, message.end) not in self._stage.span:
            raise WrongModel(f"the peer hosts blocks {self._stage.span}, not {message.start}:{message.end}")
        self._leases.grant(key, message.batch * message.max_length, self._clock())
        span = Span(message.start, message.end)
        try:
            state = await self._executor.run(lambda: self._stage.open(span, message.batch, message.max_length))
        except BaseException:
            self._leases.release(key)
            raise
        session = self._sessions[key] = ServedSession(key, link, state)
        log.info("session opened session=%s client=%s span=%s", key.hex()[:8], link.peer[-6:], state.model.span)
        return session

    async def _dial(self, endpoint: wire.Endpoint | None) -> Link | None:
        if endpoint is None:
            return None
        return await self._rpc.connect(PeerId(endpoint.peer), [Address(*pair) for pair in endpoint.addresses])

    async def _keep_alive(self, link: Link, message: wire.KeepAlive, body: memoryview) -> Reply:
        session = self._of_client(link, message.session)
        session.client = link
        self._leases.renew(session.key, self._clock())
        return wire.Alive(session.state.number, session.epoch, session.waiting)

    def _close(self, link: Link, message: wire.CloseSession, body: memoryview) -> None:
        if (session := self._sessions.get(SessionId(message.session))) and session.client.peer == link.peer:
            self._forget(session.key)

    def _of_client(self, link: Link, key: bytes) -> ServedSession:
        session = self._sessions.get(SessionId(key))
        if session is None or session.client.peer != link.peer:
            raise UnknownSession("the peer holds no such session; its lease may have ended")
        return session

    def _forget(self, key: SessionId) -> None:
        if (session := self._sessions.pop(key, None)) is not None:
            self._drop_history(session)
        self._leases.release(key)

    def expire(self) -> None:
        """End the sessions whose clients have not been heard of for too long; call it now and then."""
        for key in self._leases.expired(self._clock()):
            log.info("lease ended session=%s", key.hex()[:8])
            self._forget(key)

    # --- steps: in, run, out ---------------------------------------------------------------------------------------

    def _step(self, link: Link, message: wire.Step, body: memoryview) -> None:
        session = self._sessions.get(SessionId(message.session))
        if session is None:
            self._refuse(link, message, UnknownSession("the peer holds no such session; its lease may have ended"))
            return
        if message.epoch < session.epoch:
            return  # left over from before a retry
        session.epoch = message.epoch
        try:
            if session.waiting >= MAX_WAITING_STEPS:
                raise Busy(f"more than {MAX_WAITING_STEPS} steps of one session wait")
            step = _step_input(message, body)
        except RemoteError as error:
            self._refuse(session.client, message, _blamed(error, link, session))
            return
        self._leases.renew(session.key, self._clock())
        session.waiting += 1
        self._executor.submit(
            lambda: self._stage.run(session.state, step),
            lambda output, error: self._ran(session, link, message, step, output, error),
        )

    def _ran(
        self,
        session: ServedSession,
        link: Link,
        message: wire.Step,
        step: StepInput,
        output: torch.Tensor | None,
        error: BaseException | None,
    ) -> None:
        session.waiting -= 1
        if output is None:
            self._refuse(session.client, message, _blamed(error or Internal("no output"), link, session))
            return
        if message.replay != 1:
            self._pass_on(session, message, step, output)
        self._keep(session, step, output)
        self.tokens += output.shape[0] * output.shape[1]

    def _pass_on(self, session: ServedSession, message: wire.Step, step: StepInput, output: torch.Tensor) -> None:
        if session.next is not None:
            onward = replace(step, hidden=output)
            replay = max(message.replay - 1, 0)
            header, body = step_message(session.key, message.epoch, message.keep, onward, replay)
            self._send(session, session.next_link, header, body)
        elif not message.replay:
            kept = output[:, -message.keep :] if message.keep else output
            answer = wire.Output(message.session, message.epoch, message.number, tensors.spec_of(kept))
            self._send(session, session.client, answer, tensors.encode([kept]))

    def _keep(self, session: ServedSession, step: StepInput, output: torch.Tensor) -> None:
        """Upstream backup: remember what was passed on, as long as there is room for it."""
        if session.next is None:
            return
        if step.position == 0 and session.history is None:
            session.history = History()
        if session.history is not None and session.history.length < step.position:
            self._drop_history(session)  # it was the last hop before, and kept nothing
        if session.history is None:
            return
        before = session.history.nbytes
        session.history.record(step.number, step.position, output, step.rows, step.position_ids, step.mask)
        self._backup += session.history.nbytes - before
        while self._backup > BACKUP_BYTES:
            largest = max(self._sessions.values(), key=lambda one: one.history.nbytes if one.history else 0)
            self._drop_history(largest)

    def _drop_history(self, session: ServedSession) -> None:
        if session.history is not None:
            self._backup -= session.history.nbytes
            session.history = None

    async def _replay(self, link: Link, message: wire.Replay, body: memoryview) -> Reply:
        session = self._of_client(link, message.session)
        if session.next is None:
            raise Forgotten("nothing comes after this hop")
        # What was given to the compute thread before is part of the history, once it has been run.
        await self._executor.run(lambda: None)
        history = session.history
        if history is None or history.length < message.end:
            raise Forgotten(f"{history.length if history else 0} of {message.end} positions are kept")
        session.epoch = max(session.epoch, message.epoch)
        for piece in history.pieces(message.start, message.end, REPLAY_POSITIONS):
            step = StepInput(history.number, piece.position, piece.hidden, None, piece.position_ids, piece.mask)
            header, pieces = step_message(session.key, message.epoch, 0, step, message.hops)
            self._send(session, session.next_link, header, pieces)
        return wire.Done()

    def _send(self, session: ServedSession, link: Link | None, message: Message, body: Sequence[Buffer]) -> None:
        """At once where the way is free, else in the background; always in order."""
        if not session.outbox and link is not None and link.error is None and link.try_notify(message, body):
            return
        session.outbox.append((message, body))
        if len(session.outbox) == 1:
            self._rpc.spawn(self._drain(session))

    async def _drain(self, session: ServedSession) -> None:
        while session.outbox:
            message, body = session.outbox[0]
            try:
                link = session.client
                if isinstance(message, wire.Step):
                    if session.next_link is None or session.next_link.error is not None:
                        session.next_link = await self._dial(session.next)
                    link = session.next_link or session.client
                await link.notify(message, body)
            except RemoteError as error:
                log.info("cannot pass on session=%s error=%r", session.key.hex()[:8], str(error))
                if isinstance(message, wire.Step):
                    error.peer = session.next.peer if session.next else error.peer
                    self._refuse(session.client, message, error)
            session.outbox.popleft()

    # --- what went wrong -------------------------------------------------------------------------------------------

    def _refuse(self, link: Link, message: wire.Step, error: BaseException) -> None:
        """Tell whoever can do something about it that this step failed, and who is at fault."""
        code, text = to_wire(error)
        if not isinstance(error, ShoalError):
            log.error("step failed session=%s", message.session.hex()[:8], exc_info=error)
        peer = (error.peer if isinstance(error, RemoteError) else "") or self._rpc.peer
        self._tell(link, wire.StepFailed(message.session, message.epoch, message.number, peer, code, text[:2048]))

    def _failed_downstream(self, link: Link, message: wire.StepFailed, body: memoryview) -> None:
        """The next hop does not know the session's client; we do."""
        if (session := self._sessions.get(SessionId(message.session))) is not None:
            self._tell(session.client, message)

    def _tell(self, link: Link, message: Message) -> None:
        if link.error is None and not link.try_notify(message):
            self._rpc.spawn(link.notify(message))


def step_message(
    key: bytes, epoch: int, keep: int, step: StepInput, replay: int = 0
) -> tuple[wire.Step, Sequence[Buffer]]:
    """A step as it goes to the next hop."""
    extras = [extra for extra in (step.position_ids, step.mask) if extra is not None]
    header = wire.Step(
        key,
        epoch,
        step.number,
        step.position,
        keep,
        tensors.spec_of(step.hidden),
        step.rows,
        None if step.position_ids is None else tensors.spec_of(step.position_ids),
        None if step.mask is None else tensors.spec_of(step.mask),
        replay,
    )
    return header, tensors.encode([step.hidden, *extras])


def _step_input(message: wire.Step, body: memoryview) -> StepInput:
    views = iter(tensors.decode(body, message.specs()))
    return StepInput(
        number=message.number,
        position=message.position,
        hidden=next(views),
        rows=message.rows,
        position_ids=next(views) if message.position_ids is not None else None,
        mask=next(views) if message.mask is not None else None,
        replayed=message.replay > 0,
    )


def _blamed(error: BaseException, sender: Link, session: ServedSession) -> BaseException:
    """Nonsense that another hop sent is that hop's failure, not ours."""
    if isinstance(error, ProtocolError) and not error.peer and sender.peer != session.client.peer:
        error.peer = sender.peer
    return error
