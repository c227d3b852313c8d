"""A member of a run, driven: what `swarm.agreement.member` decides, done with a replica and an averager."""

from __future__ import annotations

import asyncio
import logging
import os
import random
from collections.abc import Callable, Mapping
from typing import Any

import torch

from peer.averaging import Averager
from peer.executor import Executor
from peer.training.codecs import Coded
from peer.training.replica import STAGE, Replica
from peer.training.transfer import Donor, Fetched, Named, Step, digest_of_state
from swarm.agreement.assignments import Plan
from swarm.agreement.attendance import Attendance, Known
from swarm.agreement.effects import Abandon, Apply, Average, Effect, Fetch, Restore, Settled, Void
from swarm.agreement.member import Member
from swarm.agreement.messages import MAX_MEMBERS, Decision, Order, Roster
from swarm.agreement.parts import group_of_stage
from swarm.errors import NotReady, ShoalError, Unreachable
from swarm.rpc import Rpc
from swarm.types import Address, PeerId
from swarm.wire import Endpoint

log = logging.getLogger(__name__)

REACH_SECONDS = 10.0  # that a micro-batch waits for this member to come to its round


class MemberAttendance(Attendance):
    """Drives one member.

    Args:
        replica: the stage, which is touched in `executor` only.
        stage: its number.
        endpoint: where this peer listens.
    """

    participant: Member

    def __init__(
        self,
        rpc: Rpc,
        executor: Executor,
        replica: Replica,
        plan: Plan,
        stage: int,
        endpoint: Endpoint,
        known: Known,
    ) -> None:
        now = asyncio.get_running_loop().time()
        member = Member(plan, stage, endpoint, os.urandom(16), now, replica.saved)
        super().__init__(rpc, member, known)
        self.replica = replica
        self._executor = executor
        self._averager = Averager(rpc, plan)
        self._donor = Donor(rpc, lambda: asyncio.ensure_future(self._copy()), self._line)
        self._names = {STAGE: group_of_stage(stage)}  # the replica's names of groups to those on the wire
        self._effects: asyncio.Queue[Effect] = asyncio.Queue()
        self._worker: asyncio.Task[None] | None = None
        self._averaging: asyncio.Task[None] | None = None
        self._fetching: asyncio.Task[None] | None = None
        self._digesting: asyncio.Task[bytes] | None = None
        self._told_out: dict[PeerId, str] = {}
        self._crowded_out = False
        self._alone = True
        self.failure: asyncio.Future[None] = asyncio.get_running_loop().create_future()

    def start(self) -> None:
        super().start()
        self._worker = asyncio.create_task(self._work())

    # --- micro-batches: what the stage's server asks and tells -------------------------------------------------------

    async def reached(self, round_: int) -> None:
        """Wait until micro-batches of the round are taken here. Raises `StaleRound`, or `NotReady` after a while."""
        try:
            async with asyncio.timeout(REACH_SECONDS):
                await self.until(lambda: self._is_at(round_))
        except TimeoutError:
            raise NotReady(f"round {round_} has not begun here within {REACH_SECONDS:.0f} s") from None
        self.participant.check(round_)

    def _is_at(self, round_: int) -> bool:
        return self.participant.ready and self.participant.reaches(round_)

    def begin(self, round_: int, index: int) -> bool:
        """One is about to be run backward; whether it is to be added to the sum. Raises `StaleRound` or `NotReady`."""
        return self.participant.begin(round_, index)

    def counted(self, round_: int, index: int) -> None:
        """It is in the sum."""
        self.participant.counted(round_, index, self.now)
        self.flush()

    def gave_up(self, round_: int, index: int) -> None:
        """It is not in the sum: something failed."""
        self.participant.gave_up(round_, index, self.now)
        self.flush()

    def voided(self, round_: int) -> None:
        """The sum of a round is gone, and with it all that was counted."""
        self.participant.voided(round_, self.now)
        self.flush()

    # --- doing what was decided --------------------------------------------------------------------------------------

    def flush(self) -> None:
        effects, self.participant.effects = self.participant.effects, []
        for effect in effects:
            self._effects.put_nowait(effect)
        super().flush()
        self._say_who_is_out()
        self._say_whether_alone()
        if self.participant.crowded_out != self._crowded_out:
            self._crowded_out = self.participant.crowded_out
            if self._crowded_out:
                log.warning("the run is full: it has %d members; waiting for one to leave", MAX_MEMBERS)

    def _say_who_is_out(self) -> None:
        """A coordinator tells whoever runs it whom the round goes on without, and why."""
        coordinator = self.participant.coordinator
        out = dict(coordinator.census.out) if coordinator is not None else {}
        for peer, why in out.items():
            if peer not in self._told_out:
                log.warning("round=%d goes on without peer=%s, which %s", self.round, peer[-6:], why)
        self._told_out = out

    def _say_whether_alone(self) -> None:
        """A run that comes to no end any more waits for others, which whoever runs it has to know."""
        before, self._alone = self._alone, self.roster is None
        if self._alone and not before:
            log.warning(
                "the run cannot go on with those who are left: waiting for a round that every stage has somebody for; "
                "here that is rounds=%s",
                sorted({round_ for round_ in (self.participant.held, *self.replica.saved()) if round_ >= 0}),
            )

    async def _work(self) -> None:
        """One effect after another; what takes long goes on beside them, until it is abandoned or settled."""
        while True:
            effect = await self._effects.get()
            try:
                await self._do(effect)
            except Exception as error:
                log.exception("training cannot go on here effect=%r", effect)
                self.failure.set_exception(error)
                return
            self.flush()

    async def _do(self, effect: Effect) -> None:
        match effect:
            case Average(order=order):
                self._averaging = self.rpc.spawn(self._average(order))
            case Abandon():
                await _end(self._averaging)
            case Apply(decision=decision):
                await self._apply(decision, self._averager.mean, self._averager.coded)
                if decision.outcome == "commit":
                    self._averager.commit()
            case Void(round=round_):
                await self._executor.run(lambda: self.replica.void(round_))
                self.participant.voided(round_, self.now)
            case Restore(round=round_):
                await self._settle_digest()
                await self._executor.run(lambda: self.replica.restore(round_))
                await self._held()
            case Fetch(sources=sources, roster=roster):
                if self.participant.held >= 0:
                    log.warning(
                        "round=%d here is behind the replicas, or differs: taking their state", self.participant.held
                    )
                await self._stop_fetching()
                self._fetching = self.rpc.spawn(self._fetch(list(sources), roster))
            case Settled():
                await self._stop_fetching()

    async def _average(self, order: Order) -> None:
        sums = await self._executor.run(self.replica.sums)
        vectors = {self._names.get(group, group): vector for group, vector in sums.items()}
        self._averager.keeps = self._donor.followed
        assert self.roster is not None
        endpoints = {PeerId(seat.endpoint.peer): seat.endpoint for seat in self.roster.members}
        report = await self._averager.run(order, vectors, endpoints)
        self.participant.bandwidth = self._averager.bandwidth
        self.participant.averaged(report, self.now)
        self.flush()

    async def _apply(self, decision: Decision, mean: Mapping[str, torch.Tensor], coded: Callable[[], Coded]) -> None:
        """End the round as was decided; `coded` is the mean as those who follow are to have it."""
        await self._settle_digest()
        names = {wire: group for group, wire in self._names.items()}
        gradient = {names.get(group, group): vector for group, vector in mean.items()}
        stepping = decision.outcome == "commit"
        kept = coded() if stepping and self._donor.followed else {}
        if stepping:
            await self._executor.run(lambda: self.replica.commit(gradient, decision.factor))
        else:
            await self._executor.run(self.replica.skip)
        await self._donor.stepped(decision, kept)
        await self._held()
        log.info("round=%d %s norm=%.3g factor=%.3g", decision.round, decision.outcome, decision.norm, decision.factor)

    async def _held(self) -> None:
        """Say which state is held; its digest follows, computed beside whatever comes next."""
        round_ = self.replica.round
        state = await self._executor.run(lambda: list(self.replica.state()))
        self._digesting = self.rpc.spawn(self._digest(round_, state))
        self.participant.steps = self.replica.steps
        self.participant.holds(round_, b"", self.now)
        self.flush()

    async def _digest(self, round_: int, state: Named) -> bytes:
        digest = await asyncio.to_thread(digest_of_state, round_, state)
        if self.replica.round == round_:
            self.participant.holds(round_, digest, self.now)
            self.flush()
        return digest

    async def _settle_digest(self) -> bytes:
        """What is digested is not changed meanwhile."""
        return await asyncio.shield(self._digesting) if self._digesting is not None else b""

    # --- state to others, state from others --------------------------------------------------------------------------

    def _line(self) -> bytes | None:
        return self.roster.line if self.roster is not None and self.participant.ready else None

    async def _copy(self) -> tuple[int, Named, bytes]:
        """The state as it is now, in the midst of a round: parameters change at its end only."""
        digest = await self._settle_digest()
        round_, state = await self._executor.run(
            lambda: (self.replica.round, [(name, tensor.clone()) for name, tensor in self.replica.state()])
        )
        if self._digesting is None or not self._digesting.done() or self._digesting.result() != digest:
            raise NotReady("a step came in between: ask again")
        return round_, state, digest

    async def _fetch(self, sources: list[PeerId], roster: Roster) -> None:
        """Take the state of one of `sources`, and follow it. Ends by being cancelled, or in failure."""
        random.shuffle(sources)
        for source in sources:
            try:
                await self._follow(source, roster)
            except ShoalError as error:
                log.info("cannot take the state from=%s error=%r", source[-6:], str(error))
        await asyncio.sleep(0.5)  # before the same are asked again
        self.participant.failed_to_fetch(self.now)
        self.flush()

    async def _stop_fetching(self) -> None:
        """What was being loaded is held, even where nobody waits for it any more."""
        await _end(self._fetching)
        if await self._executor.run(lambda: self.replica.round) != self.participant.held:
            await self._settle_digest()
            await self._held()

    async def _follow(self, source: PeerId, roster: Roster) -> None:
        endpoint = self.endpoint_of(source)
        if endpoint is None:
            raise Unreachable(f"nobody knows where {source} listens", source)
        link = await self.rpc.connect(source, [Address(*pair) for pair in endpoint.addresses])
        log.info("taking the state from=%s", source[-6:])
        like = await self._executor.run(lambda: list(self.replica.state()))
        fetched = await Fetched.open(link, roster.line, like)
        try:
            await self._load(fetched)
            async for step in fetched.steps(lambda round_: self.round > round_):
                await self._take_step(step)
        finally:
            fetched.close()

    async def _load(self, fetched: Fetched) -> None:
        await self._settle_digest()
        state = dict(fetched.state)
        await self._executor.run(lambda: self.replica.load(fetched.round, state))
        fetched.state.clear()
        self._digesting = self.rpc.spawn(_known(fetched.digest))  # of what came: none that is other would be here
        self.participant.steps = self.replica.steps
        self.participant.holds(fetched.round, fetched.digest, self.now)
        self.flush()
        log.info("holds the state of round=%d", fetched.round)

    async def _take_step(self, step: Step) -> None:
        await self._apply(step.decision, step.mean, lambda: step.coded)
        await self._settle_digest()

    async def close(self) -> None:
        await super().close()
        await _end(self._worker)
        for task in (self._averaging, self._fetching, self._digesting):
            await _end(task)
        self.failure.cancel()


async def _known(digest: bytes) -> bytes:
    return digest


async def _end(task: asyncio.Task[Any] | None) -> None:
    """Cancel it and wait until it has ended; what it was doing in the compute thread still runs to its end there."""
    if task is not None:
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)
