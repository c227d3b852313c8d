"""Members and trainers over real sockets, in one process: rounds, averages, newcomers, liars."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Sequence

import pytest
from linear import RUN, SPOILS, LinearMember, LinearTrainer, alone

from swarm.agreement.assignments import Plan
from swarm.types import PeerId
from swarm.wire import Endpoint

LENGTH = 3000
WAIT = 40.0  # seconds


class Crew:
    """Members and trainers that know of each other."""

    def __init__(self, plan: Plan, length: int = LENGTH) -> None:
        self.plan = plan
        self.length = length
        self.known: dict[PeerId, Endpoint] = {}
        self.members: list[LinearMember] = []
        self.trainers: list[LinearTrainer] = []

    async def member(self, stage: int) -> LinearMember:
        member = LinearMember(self.plan, stage, self.length, lambda: self.known)
        endpoint = await member.start()
        self.known[PeerId(endpoint.peer)] = endpoint
        self.members.append(member)
        return member

    def trainer(self) -> LinearTrainer:
        trainer = LinearTrainer(self.plan, lambda: self.known)
        trainer.start()
        self.trainers.append(trainer)
        return trainer

    async def reach(self, round_: int) -> None:
        """Wait until every member holds the state of that round."""
        async with asyncio.timeout(WAIT):
            for member in self.members:
                machine = member.attendance.participant
                await member.attendance.until(lambda machine=machine: machine.held >= round_)

    async def seat_all(self) -> None:
        """Wait until every member counts."""
        async with asyncio.timeout(WAIT):
            for member in self.members:
                await member.attendance.until(lambda member=member: self._everyone_counts(member))

    def _everyone_counts(self, member: LinearMember) -> bool:
        roster = member.attendance.roster
        return member.attendance.participant.ready and roster is not None and len(roster.members) == len(self.members)

    def why_out(self, member: LinearMember) -> str:
        """Why the round goes on without a member; empty where it does not."""
        coordinators = [each.attendance.participant.coordinator for each in self.members]
        return "".join(one.census.out.get(member.rpc.peer, "") for one in coordinators if one is not None)

    async def remove(self, member: LinearMember) -> None:
        self.members.remove(member)
        await member.close()

    async def close(self) -> None:
        for each in (*self.trainers, *self.members):
            await each.close()


@contextlib.asynccontextmanager
async def crew(plan: Plan, replicas: int, trainers: int = 1, length: int = LENGTH) -> AsyncIterator[Crew]:
    made = Crew(plan, length)
    try:
        for stage in range(plan.stages):
            for _ in range(replicas):
                await made.member(stage)
        for _ in range(trainers):
            made.trainer()
        yield made
    finally:
        await made.close()


async def differences(made: Crew, members: Sequence[LinearMember] = ()) -> list[float]:
    """Of these members, or all, from one process, at the round that each holds: relative."""
    found = []
    for member in members or made.members:
        replica = member.replica
        round_, held = await member.executor.run(lambda r=replica: (r.round, r.parameters.clone()))
        expected = alone(made.plan, made.length, round_)[member.stage].parameters
        found.append(float((held - expected).norm() / expected.norm()))
    return found


@pytest.mark.parametrize(
    ("stages", "replicas"),
    [(1, 1), pytest.param(2, 1, marks=pytest.mark.slow), pytest.param(1, 3, marks=pytest.mark.slow), (2, 2)],
)
async def test_replicas_train_as_one_process_does(stages: int, replicas: int, nothing_left: None) -> None:
    plan = Plan(RUN, stages, samples=11, micro_batch=2, dtype="float32")
    async with crew(plan, replicas) as made:
        await made.reach(5)
        assert max(await differences(made)) < 1e-5
        assert len({member.attendance.participant._digest for member in made.members if member.stage == 0}) == 1


@pytest.mark.parametrize("dtype", ["float16", "int8"])
async def test_fewer_bits_on_the_wire_stay_close(dtype: str) -> None:
    async with crew(Plan(RUN, 1, samples=8, micro_batch=2, dtype=dtype), 2) as made:
        await made.reach(6)
        assert max(await differences(made)) < 0.02


async def test_a_newcomer_takes_the_state_and_counts(nothing_left: None) -> None:
    plan = Plan(RUN, 1, samples=8, micro_batch=2, dtype="float32")
    async with crew(plan, 2) as made:
        await made.reach(2)
        late = await made.member(0)
        async with asyncio.timeout(WAIT):
            await late.attendance.until(lambda: late.attendance.participant.ready)
        began = late.attendance.round
        await made.reach(began + 2)
        assert max(await differences(made)) < 1e-5


async def test_a_replica_whose_state_differs_heals() -> None:
    plan = Plan(RUN, 1, samples=8, micro_batch=2, dtype="float32")
    async with crew(plan, 3) as made:
        await made.seat_all()  # of two that differ, nobody knows which is ill
        ill = made.members[1]
        await ill.executor.run(lambda: ill.replica.momentum.add_(1.0))
        await made.reach(ill.replica.round + 5)
        assert max(await differences(made)) < 1e-5


@pytest.mark.parametrize("lie", ["nan", "huge"])
async def test_what_cannot_be_a_gradient_is_left_out(lie: str) -> None:
    """Of so many micro-batches, no round's are all the liar's: there is always somebody to compare it with."""
    plan = Plan(RUN, 1, samples=16, micro_batch=1, dtype="float32")
    async with crew(plan, 2) as made:
        await made.seat_all()
        liar, honest = await made.member(0), made.members[:2]
        liar.replica.spoil = SPOILS[lie]
        first = honest[0].attendance
        async with asyncio.timeout(WAIT):
            await first.until(lambda: "sent a gradient" in made.why_out(liar))
            round_ = first.round
            await first.until(lambda: first.participant.held >= round_ + 2)
        assert max(await differences(made, honest)) < 1e-5
