"""Message in, the right room called, reply out: what a peer does with sessions and their steps."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch

from peer.cache import Leases
from peer.engine import Engine, Job, Outcome
from peer.executor import Executor
from peer.load import Load
from peer.outlet import Failed, Outlet
from peer.scheduler import Slice, Work
from peer.stage import SessionState, Stage, StepInput
from swarm import tensors, wire
from swarm.errors import (
    BadTensor,
    BeyondCache,
    Busy,
    Draining,
    Forgotten,
    ProtocolError,
    RemoteError,
    ShoalError,
    UnknownSession,
    WrongModel,
    to_wire,
)
from swarm.frames import Buffer
from swarm.history import History, Piece
from swarm.rpc import Link, Reply, Rpc
from swarm.types import ModelId, PeerId, SessionId, Span

log = logging.getLogger(__name__)

MAX_WAITING_STEPS = 1024  # steps of one session that may wait for the compute thread
REPLAY_POSITIONS = 256  # of a replayed step, at most: other sessions' steps go between
FEED_SECONDS = 0.2  # between two times that spares are told what is new
BACKUP_BYTES = 256 * 1024 * 1024  # of what was passed on, of all sessions together


class ServedSession:
    """A session as its peer sees it: its state here, the ways to the client and to the next hop."""

    def __init__(self, key: SessionId, client: Outlet, state: SessionState) -> None:
        self.key = key
        self.client = client
        self.state = state
        self.next: Outlet | None = None
        self.spares: dict[PeerId, tuple[Outlet, int]] = {}  # who is told late what next is told, over how many hops
        self.feeding: asyncio.TimerHandle | None = None
        self.history: History | None = History()  # what was passed on; None where that was too much to keep
        self.epoch = 0
        self.answering = 0, 0  # epoch and number of the step that is answered
        self.answer: list[torch.Tensor] = []  # what the client wants of the step that is run in pieces

    def __repr__(self) -> str:
        return f"<ServedSession {self.key.hex()[:8]} {self.state.model.span} at {self.state.length}>"


@dataclass(slots=True, eq=False)
class Receipt:
    """A step that came: where from, and whose it is. Told by the engine what comes of it."""

    server: Server
    session: ServedSession
    link: Link
    message: wire.Step
    came: float  # on the server's clock
    alone: bool  # no other step was there

    def deliver(self, piece: Slice, step: StepInput, outcome: Outcome) -> None:
        """Part of `peer.engine.Receiver`, as is the next."""
        self.server.ran(self, piece, step, outcome)

    def keep(self, piece: Slice, step: StepInput, outcome: Outcome) -> None:
        """Bookkeeping."""
        self.server.ran_since(self, step, outcome)


class Server:
    """Serves one stage to many sessions.

    Attributes:
        draining: it takes no new sessions.
        load: how busy it is of late.
        tokens: positions that were run so far, of all rows.
    """

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
        self._engine = Engine(stage, executor, clock)
        self._leases = leases
        self._model = model
        self._clock = clock
        self._sessions: dict[SessionId, ServedSession] = {}
        self._empty = asyncio.Event()
        self._empty.set()
        self.draining = False
        self.load = Load(0.0)
        self.tokens = 0
        self._backup = 0  # bytes of all sessions' histories
        rpc.answer(wire.OpenSession, self._open)
        rpc.answer(wire.KeepAlive, self._keep_alive)
        rpc.answer(wire.Replay, self._replay)
        rpc.answer(wire.Feed, self._feed)
        rpc.listen(wire.CloseSession, self._close)
        rpc.listen(wire.Step, self._step)
        rpc.listen(wire.StepFailed, self._failed_downstream)

    @property
    def sessions(self) -> int:
        """How many sessions hold a lease."""
        return len(self._sessions)

    @property
    def turns(self) -> int:
        """How many forwards there were so far."""
        return self._engine.turns

    # --- opening and closing ---------------------------------------------------------------------------------------

    async def _open(self, link: Link, message: wire.OpenSession, body: memoryview) -> Reply:
        key = SessionId(message.session)
        session = self._sessions.get(key)
        if session is None:
            session = await self._admit(key, link, message)
        elif session.client.peer != link.peer:
            raise UnknownSession("the session is another client's")
        state, span = session.state, session.state.model.span
        if (message.start, message.end, message.batch) != (span.start, span.end, state.batch):
            raise WrongModel(f"the session has {state.batch} rows and blocks {span}; neither can change")
        length = max(message.max_length, state.length)  # what it holds stays, and stays leased
        self._leases.grant(key, self._leases.room(message.batch, length), self._clock())
        if session.client.link is not link:  # a client that lost its connection comes back on another
            session.client = Outlet(self._rpc, link)
        state.max_length = length
        try:
            await self._set_next(session, message.next)
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
        self._leases.grant(key, self._leases.room(message.batch, message.max_length), self._clock())
        span = Span(message.start, message.end)
        try:
            state = await self._executor.run(lambda: self._stage.open(span, message.batch, message.max_length))
        except BaseException:
            self._leases.release(key)
            raise
        self._empty.clear()
        session = self._sessions[key] = ServedSession(key, Outlet(self._rpc, link), state)
        log.info("session opened session=%s client=%s span=%s", key.hex()[:8], link.peer[-6:], state.model.span)
        return session

    async def _set_next(self, session: ServedSession, endpoint: wire.Endpoint | None) -> None:
        if endpoint is None:
            session.next = None
        elif endpoint.peer in session.spares:
            session.next, _ = session.spares.pop(PeerId(endpoint.peer))
        elif session.next is None or session.next.endpoint != endpoint or session.next.link.error is not None:
            session.next = await Outlet.open(self._rpc, endpoint)

    async def _keep_alive(self, link: Link, message: wire.KeepAlive, body: memoryview) -> Reply:
        session = self._of_client(link, message.session)
        if session.client.link is not link:
            session.client = Outlet(self._rpc, link)
        self._leases.renew(session.key, self._clock())
        return wire.Alive(session.state.number, session.epoch, self._engine.waiting(session.key))

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
            if session.feeding is not None:
                session.feeding.cancel()
            self._engine.cancel(key)
            self._executor.submit(lambda: self._stage.close(session.state), _closed)
        self._leases.release(key)
        if not self._sessions:
            self._empty.set()

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
        if message.epoch > session.epoch:
            session.epoch = message.epoch
            self._engine.cancel(session.key, _was_given_up)
        try:
            self._check_room(session, message)
            step = _step_input(message, body)
        except RemoteError as error:
            self._refuse(session.client.link, message, _blamed(error, link, session))
            return
        self._leases.renew(session.key, self._clock())
        rows, count, _ = message.hidden.shape
        now = self._clock()
        self._engine.add(
            Work(
                session=session.key,
                client=session.client.peer,
                rows=rows,
                count=count,
                arrived=now,
                what=Job(session.state, step, Receipt(self, session, link, message, now, not len(self._engine))),
                group=session.state.model.span,
                deadline=now + self._leases.duration,
            )
        )

    def _check_room(self, session: ServedSession, message: wire.Step) -> None:
        """Before anything is kept of it: whether the step can be taken at all."""
        outward = len(session.client) + (len(session.next) if session.next else 0)
        if self._engine.waiting(session.key) + outward >= MAX_WAITING_STEPS:
            raise Busy(f"more than {MAX_WAITING_STEPS} steps of one session wait")
        state = session.state
        if len(message.hidden.shape) != 3 or 0 in message.hidden.shape:
            raise BadTensor(f"hidden states of shape {message.hidden.shape}; [B, N, H] are taken")
        rows, count, _ = message.hidden.shape
        if rows > state.batch or message.position + count > state.max_length:
            end = message.position + count
            raise BeyondCache(f"{rows} rows to position {end}; {state.batch} to {state.max_length} are leased")

    def ran(self, receipt: Receipt, piece: Slice, step: StepInput, outcome: Outcome) -> None:
        """A piece of a step was run, or not: pass on what came of it."""
        session, message = receipt.session, receipt.message
        if self._sessions.get(session.key) is not session:
            return
        if isinstance(outcome, Exception):
            self._refuse(session.client.link, message, _blamed(outcome, receipt.link, session))
            return
        if message.replay != 1:
            self._pass_on(session, message, step, outcome, message.more or not piece.is_last)
        if outcome.shape[:2] == (1, 1):
            now, alone = self._clock(), receipt.alone and len(self._engine) == 1
            self.load.took(now - receipt.came, len(session.state.model.span), alone, now)

    def ran_since(self, receipt: Receipt, step: StepInput, outcome: Outcome) -> None:
        """What is left to do when the next turn is under way."""
        if self._sessions.get(receipt.session.key) is receipt.session and isinstance(outcome, torch.Tensor):
            self._keep(receipt.session, step, outcome)
            self.tokens += outcome.shape[0] * outcome.shape[1]

    def _pass_on(
        self, session: ServedSession, message: wire.Step, step: StepInput, output: torch.Tensor, more: bool
    ) -> None:
        if session.next is not None:
            onward = replace(step, hidden=output)
            replay = max(message.replay - 1, 0)
            header, body = step_message(session.key, message.epoch, message.keep, onward, replay, more)
            session.next.send(header, body, lambda error: self._refuse(session.client.link, message, error))
        elif not message.replay:
            self._answer(session, message, output, more)

    def _answer(self, session: ServedSession, message: wire.Step, output: torch.Tensor, more: bool) -> None:
        """Tell the client, once the last piece is there."""
        if (message.epoch, message.number) != session.answering:
            session.answering, session.answer = (message.epoch, message.number), []
        session.answer.append(output)
        wanted = session.answer[0] if len(session.answer) == 1 else torch.cat(session.answer, 1)
        wanted = wanted[:, -message.keep :] if message.keep else wanted
        session.answer = [wanted] if more and message.keep else session.answer
        if not more:
            answer = wire.Output(message.session, message.epoch, message.number, tensors.spec_of(wanted))
            session.client.send(answer, tensors.encode([wanted]), _unheard)
            session.answer = []

    def _keep(self, session: ServedSession, step: StepInput, output: torch.Tensor) -> None:
        """Upstream backup: remember what was passed on, as long as there is room for it."""
        if session.next is None:
            return
        if session.spares and session.feeding is None:
            session.feeding = asyncio.get_running_loop().call_later(FEED_SECONDS, self._feed_spares, session)
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
        if message.epoch > session.epoch:
            self._engine.cancel(session.key, _was_given_up)
        await self._engine.settled(session.key)  # what came before is part of the history, once it has been run
        history = session.history
        if history is None or history.length < message.end:
            raise Forgotten(f"{history.length if history else 0} of {message.end} positions are kept")
        session.epoch = max(session.epoch, message.epoch)
        history.truncate(message.end)
        start = min(message.start, history.given(session.next.peer))  # a spare has most of it already
        session.spares.clear()

        def failed(error: RemoteError) -> None:
            self._fail(session.client.link, message.session, message.epoch, 0, error)

        for piece in history.pieces(start, message.end, REPLAY_POSITIONS):
            self._send_piece(session, session.next, piece, message.hops, failed)
        return wire.Done()

    def _send_piece(self, session: ServedSession, outlet: Outlet, piece: Piece, hops: int, failed: Failed) -> None:
        assert session.history is not None
        step = StepInput(session.history.number, piece.position, piece.hidden, None, piece.position_ids, piece.mask)
        header, body = step_message(session.key, session.epoch, 0, step, hops)
        outlet.send(header, body, failed)

    # --- spares and leaving ----------------------------------------------------------------------------------------

    async def _feed(self, link: Link, message: wire.Feed, body: memoryview) -> Reply:
        session = self._of_client(link, message.session)
        if session.history is None:
            raise Forgotten("what was passed on is not kept")
        outlet = await Outlet.open(self._rpc, message.spare)
        session.history.follow(outlet.peer)
        session.spares[outlet.peer] = outlet, message.hops
        self._feed_spares(session)
        return wire.Done()

    def _feed_spares(self, session: ServedSession) -> None:
        """Tell the spares what is new: after the step, together with others, so that no step waits for it."""
        session.feeding = None
        if session.history is None:
            session.spares.clear()
        for outlet, hops in session.spares.values():
            assert session.history is not None
            for piece in session.history.news(outlet.peer, REPLAY_POSITIONS):
                self._send_piece(session, outlet, piece, hops, _unheard)

    async def drain(self, timeout: float) -> bool:
        """Take no new sessions, ask the clients of the others to move, wait until they have; whether they did."""
        self.draining = True
        for session in self._sessions.values():
            session.client.send(wire.Leaving(session.key), (), _unheard)
        try:
            async with asyncio.timeout(timeout):
                await self._empty.wait()
        except TimeoutError:
            log.warning("sessions were left behind number=%d", len(self._sessions))
            return False
        return True

    def resume(self) -> None:
        """Take new sessions again, after a `drain` that came to nothing."""
        self.draining = False

    async def close(self) -> None:
        """End all sessions and let the stage go; who asks for a session is told that the peer is leaving."""
        self.draining = True
        for key in list(self._sessions):
            self._forget(key)
        await self._executor.run(lambda: None)  # whatever was to be done for them
        del self._stage, self._engine  # this server goes on answering until the next one does

    # --- what went wrong -------------------------------------------------------------------------------------------

    def _refuse(self, link: Link, message: wire.Step, error: BaseException) -> None:
        """Tell whoever can do something about it that this step failed, and who is at fault."""
        if not isinstance(error, ShoalError):
            log.error("step failed session=%s", message.session.hex()[:8], exc_info=error)
        self._fail(link, message.session, message.epoch, message.number, error)

    def _fail(self, link: Link, key: bytes, epoch: int, number: int, error: BaseException) -> None:
        code, text = to_wire(error)
        peer = (error.peer if isinstance(error, RemoteError) else "") or self._rpc.peer
        link.tell(wire.StepFailed(key, epoch, number, peer, code, text[:2048]))

    def _failed_downstream(self, link: Link, message: wire.StepFailed, body: memoryview) -> None:
        """The next hop does not know the session's client; we do."""
        if (session := self._sessions.get(SessionId(message.session))) is not None:
            session.client.send(message, (), _unheard)


def _unheard(error: RemoteError) -> None:
    """The client is gone: nobody is left to tell, and its lease will end."""


def _was_given_up(work: Work) -> bool:
    """Of a session that came to a new epoch: a replay is not sent again, all else is."""
    receipt: Receipt = work.what.receiver
    return receipt.message.replay == 0


def _closed(_: None, error: BaseException | None) -> None:
    if error is not None:
        log.error("a session's pages were not given back", exc_info=error)


def step_message(
    key: bytes, epoch: int, keep: int, step: StepInput, replay: int = 0, more: bool = False
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
        more,
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
