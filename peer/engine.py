"""Schedule, run, deliver: what is ready of all sessions goes through the stage together, turn after turn."""

from __future__ import annotations

import asyncio
import operator
import time
from collections import Counter
from collections.abc import Callable, Hashable, Iterable
from dataclasses import dataclass
from functools import partial
from typing import Protocol

import torch

from peer.executor import Executor
from peer.rhythm import Rhythm
from peer.scheduler import LONG_SECONDS, LOW_SHARE, NORMAL, TURN_SECONDS, Budget, Scheduler, Slice, Work
from peer.stage import SessionState, Stage, StepInput
from swarm.errors import Busy, Internal

Outcome = torch.Tensor | Exception


class Receiver(Protocol):
    """Who gets what comes of a step."""

    def deliver(self, piece: Slice, step: StepInput, outcome: Outcome) -> None:
        """Hand it on, at once: the next turn waits for this. `step` is the part of it that was run."""

    def keep(self, piece: Slice, step: StepInput, outcome: Outcome) -> None:
        """What is left to do when the next turn is under way."""


@dataclass(slots=True)
class Job:
    """What the engine needs of a step beside what the scheduler does."""

    state: SessionState
    step: StepInput
    receiver: Receiver


@dataclass(frozen=True, slots=True)
class Ran:
    """What came of a turn.

    Attributes:
        tokens: that went through the blocks.
        seconds: that it took.
        computing: the share of them in which its thread had a processor to itself.
    """

    outcomes: list[Outcome]
    tokens: int = 0
    seconds: float = 0.0
    computing: float = 1.0


class Engine:
    """The loop around one stage. Used from the event loop only."""

    def __init__(self, stage: Stage, executor: Executor, clock: Callable[[], float] = time.monotonic) -> None:
        self.turns = 0  # so far
        self.tokens = 0  # that were run in them
        self._stage = stage
        self._executor = executor
        self._clock = clock
        self._scheduler = Scheduler(stage.batches)
        self._usual, self._long = Budget(TURN_SECONDS), Budget(LONG_SECONDS)
        self._budget = self._usual  # of the turn that runs, or ran last
        self._rhythm = Rhythm()
        self._gathering: asyncio.TimerHandle | None = None  # until when a turn waits for more sessions
        self._running = False
        self._waiting = Counter[Hashable]()  # steps of each session that are not yet done
        self._settled: dict[Hashable, list[asyncio.Future[None]]] = {}

    def add(self, work: Work) -> None:
        """Have `work`, whose `what` is a `Job`, run in one of the next turns."""
        self._waiting[work.session] += 1
        self._scheduler.add(work)
        self._rhythm.came(work.session, work.arrived)
        if not self._running:
            self._begin()

    def last(self, session: Hashable) -> Work | None:
        """What came last for a session, if all of it still waits: it may be made to take in more."""
        return self._scheduler.last(session)

    def waiting(self, session: Hashable) -> int:
        """How many steps of a session came and are not yet done."""
        return self._waiting[session]

    def __len__(self) -> int:
        """How many steps of all sessions came and are not yet done."""
        return self._waiting.total()

    def cancel(self, session: Hashable, unwanted: Callable[[Work], bool] = lambda _: True) -> None:
        """Run no more of the session's `unwanted` steps; nobody is told. What runs now goes on to its piece's end."""
        self._done(work.session for work in self._scheduler.cancel(session, unwanted))

    def end(self, session: Hashable) -> None:
        """The same with all of its steps; and no more will come."""
        self.cancel(session)
        self._rhythm.ended(session)

    def prioritize(self, session: Hashable, priority: int) -> None:
        """What waits for a session has another priority from now on."""
        self._scheduler.prioritize(session, priority)

    async def settled(self, session: Hashable) -> None:
        """Wait until all that came for a session is done."""
        if self._waiting[session]:
            future: asyncio.Future[None] = asyncio.get_running_loop().create_future()
            self._settled.setdefault(session, []).append(future)
            await future

    def _begin(self) -> None:
        """Schedule, now or when more are here."""
        if self._gathering is not None:
            self._gathering.cancel()
            self._gathering = None
        since, now = self._scheduler.decodes_since(), self._clock()
        if since is not None and (seconds := self._rhythm.wait(self._scheduler.sessions, since, now)):
            self._gathering = asyncio.get_running_loop().call_later(seconds, self._begin)
        else:
            self._turn()

    def _turn(self) -> None:
        """Schedule the next turn and have it run, if there is anything to run."""
        now = self._clock()
        awaited = self._scheduler.has_decodes or self._rhythm.expects(now)
        self._budget = self._usual if awaited else self._long
        tokens = self._budget.tokens
        turn = self._scheduler.turn(now, tokens, round(LOW_SHARE * tokens) if awaited else tokens)
        for work in turn.late:
            job: Job = work.what
            job.receiver.deliver(Slice(work, work.done, work.count), job.step, Busy("the step waited too long"))
        self._done(work.session for work in turn.late)
        if turn.slices:
            self._running = True
            pieces = [(piece, piece.work.what.step.piece(piece.start, piece.end)) for piece in turn.slices]
            self._executor.submit(
                lambda: self._run([(piece.work.what.state, step) for piece, step in pieces]),
                lambda result, error: self._ran(pieces, result, error),
            )

    def _run(self, works: list[tuple[SessionState, StepInput]]) -> Ran:
        """Run, in the compute thread."""
        started, before, computed = self._clock(), self._stage.ran, time.thread_time()
        outcomes = self._stage.run_all(works)
        seconds, computed = self._clock() - started, time.thread_time() - computed
        return Ran(outcomes, self._stage.ran - before, seconds, min(1.0, computed / max(seconds, 1e-9)))

    def _ran(self, pieces: list[tuple[Slice, StepInput]], result: Ran | None, error: BaseException | None) -> None:
        """Deliver."""
        self._running = False
        failed = error if isinstance(error, Exception) else Internal("the compute thread gave up")
        turn = result or Ran([failed] * len(pieces))
        ran = [(piece, step, outcome) for (piece, step), outcome in zip(pieces, turn.outcomes, strict=True)]
        ended = [piece.work for piece, _, _ in ran if piece.is_last]
        for piece, step, outcome in ran:
            if isinstance(outcome, Exception):
                ended += self._scheduler.cancel(piece.work.session, partial(operator.is_, piece.work))
            piece.work.what.receiver.deliver(piece, step, outcome)
        self._told([piece.work for piece, _, _ in ran], turn)
        self._begin()
        for piece, step, outcome in ran:
            piece.work.what.receiver.keep(piece, step, outcome)
        self._done(work.session for work in ended)
        self._budget.took(turn.tokens, turn.seconds)
        self.turns += 1
        self.tokens += turn.tokens

    def _told(self, works: list[Work], turn: Ran) -> None:
        """What came of a turn."""
        now = self._clock()
        for work in works:
            if work.is_short and work.priority >= NORMAL:
                self._rhythm.left(work.session, now)
        if all(work.is_short for work in works):
            self._rhythm.took(turn.seconds, turn.computing)

    def _done(self, sessions: Iterable[Hashable]) -> None:
        for session in sessions:
            self._waiting[session] -= 1
            if not self._waiting[session]:
                del self._waiting[session]
                for future in self._settled.pop(session, ()):
                    if not future.done():
                        future.set_result(None)

    def __repr__(self) -> str:
        return f"<Engine turns={self.turns} budget={self._budget.tokens} {self._scheduler!r}>"
