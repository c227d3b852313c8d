"""The trainer: reads data, sends micro-batches through the stages, holds no weights.

Which micro-batches are its own is agreed with the coordinator (`swarm.agreement.borrower`); several are under way at
once, so that all stages work. A micro-batch that cannot be brought to its end is given back, and is lent again.
"""

from __future__ import annotations

import asyncio
import logging
import math
from collections.abc import AsyncIterator, Callable, Sequence
from typing import Any, Protocol

from swarm.agreement.messages import Decision, Lent, Roster
from swarm.agreement.roster import replicas
from swarm.errors import ModelDiverged, RemoteError, StaleRound
from swarm.routes.avoidance import Avoidance
from swarm.rpc import Rpc
from swarm.runs.metrics import Round
from swarm.runs.passing import EVALUATION, Parcel, Passing, ordered
from swarm.runs.run import Run
from swarm.runs.samples import Batch, Samples
from swarm.runs.wire_passes import MAX_CANDIDATES
from swarm.wire import Endpoint

log = logging.getLogger(__name__)


class Attendance(Protocol):
    """A trainer's place in the rounds, driven: what it is lent, and how rounds end."""

    @property
    def roster(self) -> Roster | None:
        """Who takes part in the round that is collected; None as long as that is not known."""

    async def next(self) -> tuple[int, Lent]:
        """The next micro-batch to run, and its round."""

    def done(self, round_: int, lent: Lent) -> None:
        """It was run, or could not be."""

    async def decided(self) -> Decision:
        """How the next round ended; each once, in order."""


class Trainer:
    """One trainer of a run.

    Args:
        learning_rate: of a step, by how many were taken before.
    """

    def __init__(
        self,
        run: Run,
        rpc: Rpc,
        attendance: Attendance,
        samples: Samples,
        learning_rate: Callable[[int], float],
    ) -> None:
        self.run = run
        self._rpc = rpc
        self._attendance = attendance
        self._samples = samples
        self._learning_rate = learning_rate
        self._passing = Passing(rpc, bytes.fromhex(run.id)[:16])
        self._avoidance = Avoidance()
        self._losses: dict[int, dict[int, float]] = {}  # per round and micro-batch, the sum over samples
        self._lost: dict[int, list[str]] = {}
        self._reading = asyncio.Lock()  # samples are read in a thread, one micro-batch at a time
        self.under_way = 0
        self._idle = asyncio.Event()
        self._idle.set()
        self._going_on = asyncio.Event()
        self._going_on.set()

    @property
    def samples_of_round(self) -> int:
        """How many samples of the round that is collected were run by this trainer."""
        last = max(self._losses, default=-1)
        return sum(len(self.run.samples_of(index)) for index in self._losses.get(last, ()))

    async def rounds(self) -> AsyncIterator[Round]:
        """Train, and tell of each round that ends, until the run is over.

        Raises `ModelDiverged` where the members have stopped the run.
        """
        taking = asyncio.ensure_future(self._take())
        taking.add_done_callback(lambda task: task.cancelled() or task.exception())  # perhaps nobody looks any more
        try:
            async for ended in self._ends(taking):
                yield ended
        finally:
            taking.cancel()
            await asyncio.wait({taking})

    async def _ends(self, taking: asyncio.Future[None]) -> AsyncIterator[Round]:
        loop = asyncio.get_running_loop()
        began = loop.time()
        while True:
            deciding = asyncio.ensure_future(self._attendance.decided())
            try:
                both: set[asyncio.Future[Any]] = {deciding, *({taking} if not taking.done() else ())}
                await asyncio.wait(both, return_when=asyncio.FIRST_COMPLETED)
                if not deciding.done():
                    taking.result()  # raises where it failed; where it has ended, all is taken that there was
                    continue
                decision = deciding.result()
            finally:
                deciding.cancel()
            if decision.outcome in ("begin", "lost"):
                self._losses.clear()  # of weights that nobody has any more
            if decision.outcome == "begin":
                if decision.round + 1 >= self.run.rounds:
                    return
                began = loop.time()
                continue
            ended = self._ended(decision, loop.time() - began)
            began = loop.time()
            if self._evaluates(decision.round):
                ended.evaluation = await self.evaluate()
            yield ended
            if decision.outcome == "stop":
                raise ModelDiverged(
                    f"the run was stopped after round {decision.round + 1}: {decision.skipped} in a row had a loss or "
                    "a gradient that is no finite number; its peers say which checkpoint was the last good one, and "
                    "swarm gather --checkpoints makes a model of it"
                )
            if decision.round + 1 >= self.run.rounds:
                return

    def _evaluates(self, round_: int) -> bool:
        every = self.run.evaluation.every
        return bool(every) and ((round_ + 1) % every == 0 or round_ + 1 == self.run.rounds)

    def _ended(self, decision: Decision, seconds: float) -> Round:
        losses = self._losses.pop(decision.round, {})
        lost = self._lost.pop(decision.round, [])
        for old in [round_ for round_ in self._losses if round_ < decision.round]:
            del self._losses[old]
        samples = sum(len(self.run.samples_of(index)) for index in losses)
        return Round(
            round=decision.round,
            loss=sum(losses.values()) / samples if samples else math.nan,
            samples=samples,
            tokens=samples * self.run.batch.sequence_length,
            seconds=seconds,
            peers=replicas(decision.roster, len(self.run.stages)),
            outcome=decision.outcome,
            norm=decision.norm,
            learning_rate=self._learning_rate(decision.steps),
            lost=lost,
        )

    # --- micro-batches -----------------------------------------------------------------------------------------------

    async def _take(self) -> None:
        """Run what is lent, as it is lent: how many at once is for the attendance to say."""
        async with asyncio.TaskGroup() as group:
            while True:
                await self._going_on.wait()
                round_, lent = await self._attendance.next()
                if round_ >= self.run.rounds:
                    return
                group.create_task(self._run(round_, lent))

    def pause(self) -> None:
        """Begin no micro-batch until `resume`; what is under way goes on, and others may be lent what this one was."""
        self._going_on.clear()

    async def idle(self) -> None:
        """Return when no micro-batch is under way."""
        await self._idle.wait()

    def resume(self) -> None:
        """Go on after `pause`."""
        self._going_on.set()

    async def _run(self, round_: int, lent: Lent) -> None:
        self.under_way += 1
        self._idle.clear()
        try:
            await self._bring_through(round_, lent)
        except StaleRound as error:
            log.info("too late round=%d index=%d error=%r", round_, lent.index, str(error))
        except RemoteError as error:
            log.info("given back round=%d index=%d error=%r", round_, lent.index, str(error))
        finally:
            self.under_way -= 1
            if not self.under_way:
                self._idle.set()
            self._attendance.done(round_, lent)

    async def _bring_through(self, round_: int, lent: Lent) -> None:
        batch = await self._read(round_, lent.index)
        route = self._route(lent.holders, lent.index)
        if route is None:
            return
        answer = await self._passing.send(_parcel(round_, lent.index, batch), route)
        now = asyncio.get_running_loop().time()
        for peer in answer.lost:
            self._avoidance.failed(peer, now)
            self._lost.setdefault(round_, []).append(peer)
        self._losses.setdefault(round_, {})[lent.index] = answer.loss

    async def _read(self, round_: int, index: int) -> Batch:
        async with self._reading:
            return await asyncio.to_thread(self._samples.micro_batch, round_, index)

    def _route(self, holders: Sequence[str], turn: int) -> list[list[Endpoint]] | None:
        """For every stage, its replicas, whom to ask first; None where some stage has none."""
        roster = self._attendance.roster
        if roster is None:
            return None
        avoided = self._avoidance.avoided(asyncio.get_running_loop().time())
        stages: list[list[Endpoint]] = [[] for _ in self.run.stages]
        for seat in roster.members:
            if seat.stage < len(stages):
                stages[seat.stage].append(seat.endpoint)
        route = [ordered(seats, holders, avoided, turn)[:MAX_CANDIDATES] for seats in stages]
        return route if all(route) else None

    async def evaluate(self) -> float | None:
        """The mean loss on the held-out samples, in nats a token; None where the stages could not be asked."""
        total, count = 0.0, 0
        try:
            for turn, batch in enumerate(self._samples.held_out()):
                if (route := self._route((), turn)) is None:
                    return None
                answer = await self._passing.send(_parcel(EVALUATION, 0, batch), route)
                total, count = total + answer.loss, count + len(batch.ids)
        except RemoteError as error:
            log.warning("not evaluated error=%r", str(error))
            return None
        return total / count


def _parcel(round_: int, index: int, batch: Batch) -> Parcel:
    return Parcel(round_, index, batch.ids, batch.labels, batch.position_ids)
