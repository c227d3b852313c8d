"""Message in, the right room called, reply out: what a peer does with the steps of its sessions."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch

from peer.cache import Leases
from peer.engine import Engine, Job, Outcome
from peer.executor import Executor
from peer.load import Load
from peer.outlet import Failed
from peer.scheduler import Slice, Work
from peer.served import REPLAY_POSITIONS, ServedSession, step_input, unheard
from peer.sessions import Sessions
from peer.stage import Stage, StepInput
from swarm import wire
from swarm.errors import (
    BadTensor,
    BeyondCache,
    Busy,
    NoRoom,
    ProtocolError,
    RemoteError,
    ShoalError,
    UnknownSession,
    WeightsChanged,
    to_wire,
)
from swarm.rpc import Link, Reply, Rpc
from swarm.types import ModelId
from swarm.wire import Rounding

log = logging.getLogger(__name__)

MAX_WAITING_STEPS = 1024  # steps of one session that may wait for the compute thread
BACKUP_BYTES = 256 * 1024 * 1024  # of what was passed on, of all sessions together


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
        rounding: Rounding = "auto",
    ) -> None:
        self._rpc = rpc
        self._stage = stage
        self._engine = Engine(stage, executor, clock)
        self._leases = leases
        self._clock = clock
        self._sessions = Sessions(rpc, stage, executor, self._engine, leases, model, clock, rounding)
        self.load = Load(0.0)
        self.tokens = 0
        rpc.answer(wire.Replay, self._replay)
        rpc.answer(wire.Feed, self._feed)
        rpc.listen(wire.Step, self._step)
        rpc.listen(wire.StepFailed, self._failed_downstream)

    @property
    def sessions(self) -> int:
        """How many sessions hold a lease."""
        return len(self._sessions)

    @property
    def draining(self) -> bool:
        """Whether it takes no new sessions."""
        return self._sessions.draining

    @property
    def batches(self) -> bool:
        """Whether steps of several sessions run together."""
        return self._stage.batches

    @property
    def turns(self) -> int:
        """How many forwards there were so far."""
        return self._engine.turns

    def weights_changed(self) -> None:
        """What all sessions hold is not what they would hold now: they have to begin anew."""
        for session in self._sessions:
            session.outdated = True

    def expire(self) -> None:
        """End the sessions whose clients have not been heard of for too long; call it now and then."""
        self._sessions.expire()

    # --- steps: in, run, out ---------------------------------------------------------------------------------------

    def _step(self, link: Link, message: wire.Step, body: memoryview) -> None:
        session = self._sessions.get(message.session)
        if session is None:
            self._refuse(link, message, UnknownSession("the peer holds no such session; its lease may have ended"))
            return
        if message.epoch < session.epoch:
            return  # left over from before a retry
        if message.epoch > session.epoch:
            session.epoch = message.epoch
            self._engine.cancel(session.key, _was_given_up)
        if session.outdated:
            self._refuse(session.client.link, message, WeightsChanged("the weights have changed since it began"))
            return
        if not message.replay:
            session.came = message.epoch
        try:
            self._check_room(session, message)
            step = step_input(message, body)
        except RemoteError as error:
            self._refuse(_asker(link, message, session), message, _blamed(error, link, session))
            return
        self._leases.stepped(session.key, self._clock())
        if not self._engine.waiting(session.key) and (kept := session.kept_output(message)) is not None:
            session.pass_on(message, step, kept, message.more, self._teller(session, message))
            return
        now = self._clock()
        receipt = Receipt(self, session, link, message, now, not len(self._engine))
        if self._joined(receipt, step):
            return
        rows, count, _ = message.hidden.shape
        work = Work(
            session=session.key,
            client=session.client.peer,
            rows=rows,
            count=count,
            arrived=now,
            what=Job(session.state, step, receipt),
            group=session.state.model.span,
            priority=session.priority,
            deadline=now + self._leases.duration,
        )
        if session.returning or self._leases.is_out(session.key):
            session.returning.append(work)
            if len(session.returning) == 1:
                self._rpc.spawn(self._return(session))
        else:
            self._engine.add(work)

    def _joined(self, receipt: Receipt, step: StepInput) -> bool:
        """Whether a step that comes late was put to the one that waits before it.

        A spare is told what is new a few times a second; where it cannot follow, each time would take a turn.
        """
        message, work = receipt.message, self._engine.last(receipt.session.key)
        if work is None or not message.replay:
            return False
        job: Job = work.what
        assert isinstance(job.receiver, Receipt)  # steps of sessions have no other
        before = job.receiver.message
        alike = before.replay == message.replay and not before.more and not message.more
        room = work.count + message.hidden.shape[1] <= REPLAY_POSITIONS
        if not alike or not room or (both := job.step.joined(step)) is None:
            return False
        job.step, job.receiver, work.count = both, receipt, both.hidden.shape[1]
        return True

    async def _return(self, session: ServedSession) -> None:
        """Have what the session holds come back to the pool, in its turn, and run the steps that wait for it."""
        failed: NoRoom | None = None
        try:
            here = await self._sessions.bring_back(session)
        except NoRoom as error:
            failed, here = error, self._sessions.holds(session)
        works, session.returning = session.returning, []
        for work in works if here else ():
            message = work.what.receiver.message
            if failed is not None:
                self._refuse(session.client.link, message, failed)
            elif message.replay or message.epoch >= session.epoch:
                self._engine.add(work)

    def _check_room(self, session: ServedSession, message: wire.Step) -> None:
        """Before anything is kept of it: whether the step can be taken at all."""
        if self._engine.waiting(session.key) + session.outward >= MAX_WAITING_STEPS:
            raise Busy(f"more than {MAX_WAITING_STEPS} steps of one session wait")
        state = session.state
        if message.block != state.model.span.start:
            raise UnknownSession(f"a step for block {message.block}; the session has blocks {state.model.span} here")
        if len(message.hidden.shape) != 3 or 0 in message.hidden.shape:
            raise BadTensor(f"hidden states of shape {message.hidden.shape}; [B, N, H] are taken")
        rows, count, _ = message.hidden.shape
        if rows > state.batch or message.position + count > state.max_length:
            end = message.position + count
            raise BeyondCache(f"{rows} rows to position {end}; {state.batch} to {state.max_length} are leased")

    def ran(self, receipt: Receipt, piece: Slice, step: StepInput, outcome: Outcome) -> None:
        """A piece of a step was run, or not: pass on what came of it."""
        session, message = receipt.session, receipt.message
        if not self._sessions.holds(session):
            return
        if isinstance(outcome, Exception):
            asker = _asker(receipt.link, message, session)
            self._refuse(asker, message, _blamed(outcome, receipt.link, session))
            return
        if message.replay != 1:
            more = message.more or not piece.is_last
            session.pass_on(message, step, outcome, more, self._teller(session, message))
        if outcome.shape[:2] == (1, 1):
            now, alone = self._clock(), receipt.alone and len(self._engine) == 1
            self.load.took(now - receipt.came, len(session.state.model.span), alone, now)

    def ran_since(self, receipt: Receipt, step: StepInput, outcome: Outcome) -> None:
        """What is left to do when the next turn is under way."""
        if self._sessions.holds(receipt.session) and isinstance(outcome, torch.Tensor):
            receipt.session.keep(step, outcome)
            self._bound_backup()
            self.tokens += outcome.shape[0] * outcome.shape[1]

    def _bound_backup(self) -> None:
        """What was passed on is kept as long as there is room for it; the longest is forgotten first."""
        kept = {session: session.history.nbytes for session in self._sessions if session.history is not None}
        while sum(kept.values()) > BACKUP_BYTES:
            largest = max(kept, key=lambda session: kept[session])
            largest.history = None
            del kept[largest]

    # --- failover and leaving --------------------------------------------------------------------------------------

    async def _replay(self, link: Link, message: wire.Replay, body: memoryview) -> Reply:
        session = self._sessions.of_client(link, message.session)
        if message.epoch > session.epoch:
            self._engine.cancel(session.key, _was_given_up)
        await self._engine.settled(session.key)  # what came before is part of the history, once it has been run
        session.replay(message, self._teller(session, message))
        return wire.Done()

    async def _feed(self, link: Link, message: wire.Feed, body: memoryview) -> Reply:
        session = self._sessions.of_client(link, message.session)
        session.feed(await session.dial(message.spare), message.hops)
        return wire.Done()

    async def drain(self, timeout: float) -> bool:
        """Take no new sessions, ask the clients of the others to move, wait until they have; whether they did."""
        return await self._sessions.drain(timeout)

    def resume(self) -> None:
        """Take new sessions again, after a `drain` that came to nothing."""
        self._sessions.draining = False

    async def close(self) -> None:
        """End all sessions and let the stage go; who asks for a session is told that the peer is leaving."""
        await self._sessions.close()
        del self._stage, self._engine  # this server goes on answering until the next one does

    # --- what went wrong -------------------------------------------------------------------------------------------

    def _teller(self, session: ServedSession, message: wire.Step | wire.Replay) -> Failed:
        """Tells the client where what `message` asks for cannot be passed on."""
        number = message.number if isinstance(message, wire.Step) else 0
        return lambda error: self._fail(session.client.link, message.session, message.epoch, number, error)

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
        """The next hop does not know the session's client, or a spare can follow no more; we tell the client."""
        if (session := self._sessions.get(message.session)) is not None:
            if session.drop_spare(link.peer):  # which has nothing to do with the step under way
                message = wire.StepFailed(message.session, 0, 0, link.peer, message.code, message.message)
            session.client.send(message, (), unheard)


def _asker(link: Link, message: wire.Step, session: ServedSession) -> Link:
    """Who is to know that a step failed: of a replayed one, whoever replays it."""
    return link if message.replay else session.client.link


def _was_given_up(work: Work) -> bool:
    """Of a session that came to a new epoch: a replay is not sent again, all else is."""
    receipt: Receipt = work.what.receiver
    return receipt.message.replay == 0


def _blamed(error: BaseException, sender: Link, session: ServedSession) -> BaseException:
    """Nonsense that another hop sent is that hop's failure, not ours."""
    if isinstance(error, ProtocolError) and not error.peer and sender.peer != session.client.peer:
        error.peer = sender.peer
    return error
