"""The smallest thing that trains: parameters drawn to the samples' targets, with momentum. Real members around it.

Run as `python linear.py JSON`: one member in a process of its own, which ends when its stdin does.
"""

from __future__ import annotations

import asyncio
import json
import logging
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch

from peer.executor import Executor
from peer.training.member import MemberAttendance
from peer.training.replica import STAGE
from peer.training.transfer import digest_of_state
from swarm import wire
from swarm.agreement.assignments import Plan
from swarm.agreement.attendance import TrainerAttendance
from swarm.agreement.messages import Lent
from swarm.errors import Closed, ShoalError, Unreachable
from swarm.identity import Identity
from swarm.rpc import Link, Reply, Rpc
from swarm.transport import TcpTransport
from swarm.types import Address, PeerId
from swarm.wire import Done, Endpoint

HOST = "127.0.0.1"
RUN = b"r" * 16


class RunMicroBatch(wire.Message, tag="test-run-micro-batch"):
    """A trainer's request, and all there is to a micro-batch here."""

    round: int
    index: int


class Tell(wire.Message, tag="test-tell"):
    """Say how far you are."""


class Told(wire.Message, tag="test-told"):
    round: int
    digest: bytes
    size: float  # the parameters' norm
    averaging: bool


wire.carry(RunMicroBatch, Tell, Told)


def gradient(plan: Plan, stage: int, round_: int, index: int, parameters: torch.Tensor) -> torch.Tensor:
    """The sum over the samples of a micro-batch of (parameters - target)."""
    total = torch.zeros_like(parameters)
    for sample in range(plan.size(index)):
        position = round_ * plan.samples + index * plan.micro_batch + sample
        generator = torch.Generator().manual_seed(1_000_003 * stage + position)
        total += parameters - torch.randn(len(parameters), generator=generator)
    return total


class Linear:
    """A `peer.training.replica.Replica`."""

    def __init__(self, plan: Plan, stage: int, length: int) -> None:
        self.plan = plan
        self.stage = stage
        self.round = -1
        self.parameters = torch.zeros(length)
        self.momentum = torch.zeros(length)
        self.sum = torch.zeros(length)
        self.spoil: Callable[[torch.Tensor], torch.Tensor] = lambda values: values  # a liar's last touch

    def add(self, round_: int, index: int) -> None:
        self.sum += self.spoil(gradient(self.plan, self.stage, round_, index, self.parameters))

    def saved(self) -> list[int]:
        return [0]

    def restore(self, round_: int) -> None:
        assert round_ == 0
        self.parameters.zero_()
        self.momentum.zero_()
        self._entered(0)

    def _entered(self, round_: int) -> None:
        self.round = round_
        self.sum.zero_()

    def sums(self) -> dict[str, torch.Tensor]:
        return {STAGE: self.sum}

    def void(self) -> None:
        self.sum.zero_()

    def commit(self, mean: Mapping[str, torch.Tensor], factor: float) -> None:
        self.momentum.mul_(0.5).add_(mean[STAGE], alpha=factor)
        self.parameters.sub_(self.momentum, alpha=0.3)
        self._entered(self.round + 1)

    def skip(self) -> None:
        self._entered(self.round + 1)

    def state(self) -> Iterator[tuple[str, torch.Tensor]]:
        yield "parameters", self.parameters
        yield "momentum", self.momentum

    def load(self, round_: int, state: Mapping[str, torch.Tensor]) -> None:
        self.parameters.copy_(state["parameters"])
        self.momentum.copy_(state["momentum"])
        self._entered(round_)


def alone(plan: Plan, length: int, rounds: int) -> list[Linear]:
    """What one process that holds all stages comes to."""
    stages = [Linear(plan, stage, length) for stage in range(plan.stages)]
    for replica in stages:
        replica.restore(0)
    for round_ in range(rounds):
        for replica in stages:
            for index in range(plan.count):
                replica.add(round_, index)
        means = [replica.sum / plan.samples for replica in stages]
        norm = torch.cat(means).norm().item()
        for replica, mean in zip(stages, means, strict=True):
            replica.commit({STAGE: mean}, min(1.0, plan.clip / norm) if plan.clip else 1.0)
    return stages


class LinearMember:
    """A member with everything around it but a node."""

    def __init__(self, plan: Plan, stage: int, length: int, known: Callable[[], Mapping[PeerId, Endpoint]]) -> None:
        self.plan = plan
        self.stage = stage
        self.replica = Linear(plan, stage, length)
        self.transport = TcpTransport(Identity.generate())
        self.rpc = Rpc(self.transport)
        self.executor = Executor()
        self._known = known
        self.rpc.answer(RunMicroBatch, self._run)
        self.rpc.answer(Tell, self._tell)

    async def start(self) -> Endpoint:
        address = await self.transport.listen(Address(HOST, 0), self.rpc.accept)
        endpoint = Endpoint(self.rpc.peer, [(HOST, address.port)])
        self.attendance = MemberAttendance(
            self.rpc, self.executor, self.replica, self.plan, self.stage, endpoint, self._known
        )
        self.attendance.start()
        return endpoint

    async def _run(self, link: Link, message: RunMicroBatch, body: memoryview) -> Reply:
        ledger = self.attendance
        await ledger.reached(message.round)
        if ledger.begin(message.round, message.index):
            try:
                await self.executor.run(lambda: self.replica.add(message.round, message.index))
            except BaseException:
                ledger.gave_up(message.round, message.index)
                raise
            ledger.counted(message.round, message.index)
        return Done()

    async def _tell(self, link: Link, message: Tell, body: memoryview) -> Reply:
        averaging = self.attendance._averager._attempt is not None
        return await self.executor.run(lambda: self._told(averaging))

    def _told(self, averaging: bool) -> Told:
        digest = digest_of_state(self.replica.round, self.replica.state())
        return Told(self.replica.round, digest, self.replica.parameters.norm().item(), averaging)

    async def close(self) -> None:
        await self.attendance.close()
        await self.rpc.close()
        await self.executor.close()


class LinearTrainer:
    """Runs micro-batches through one member of every stage, several at once."""

    def __init__(self, plan: Plan, known: Callable[[], Mapping[PeerId, Endpoint]], want: int = 4) -> None:
        self.plan = plan
        self.rpc = Rpc(TcpTransport(Identity.generate()))
        self.attendance = TrainerAttendance(self.rpc, plan, known, want)
        self._tasks: list[asyncio.Task[None]] = []

    def start(self) -> None:
        self.attendance.start()
        self._tasks = [asyncio.create_task(self._work(number)) for number in range(self.attendance.participant.want)]

    async def _work(self, number: int) -> None:
        try:
            while True:
                round_, lent = await self.attendance.next()
                try:
                    await self._through(round_, lent, number)
                except ShoalError:
                    await asyncio.sleep(0.05)
                self.attendance.done(round_, lent)
        except Closed:
            return

    async def _through(self, round_: int, lent: Lent, number: int) -> None:
        for stage in reversed(range(self.plan.stages)):
            hosts = self.attendance.hosts(stage)
            if not hosts:
                raise Unreachable(f"nobody holds stage {stage}")
            peer = next((each for each in hosts if each in lent.holders), hosts[(lent.index + number) % len(hosts)])
            endpoint = self.attendance.endpoint_of(peer)
            assert endpoint is not None
            link = await self.rpc.connect(peer, [Address(*pair) for pair in endpoint.addresses])
            await link.call(RunMicroBatch(round_, lent.index), timeout=5.0)

    async def close(self) -> None:
        await self.attendance.close()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        await self.rpc.close()


async def main(stage: int, length: int, plan: dict[str, Any], spoil: str) -> None:
    """One member: tells where it listens, is told line by line where the members are."""
    torch.set_num_threads(1)
    logging.basicConfig(level=logging.INFO, format=f"%(relativeCreated)d {stage} %(message)s")
    known: dict[PeerId, Endpoint] = {}
    member = LinearMember(Plan(RUN, **plan), stage, length, lambda: known)
    member.replica.spoil = SPOILS[spoil]
    endpoint = await member.start()
    print(json.dumps([endpoint.peer, endpoint.addresses[0][1]]), flush=True)
    while line := await asyncio.to_thread(sys.stdin.readline):
        known.update({PeerId(peer): Endpoint(peer, [(HOST, port)]) for peer, port in json.loads(line)})
    await member.close()


def _slowly(values: torch.Tensor) -> torch.Tensor:
    time.sleep(0.05)
    return values


SPOILS: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "": lambda values: values,
    "nan": lambda values: values * float("nan"),
    "huge": lambda values: values * 1e30,
    "flip": lambda values: -10.0 * values,
    "slow": _slowly,
}

if __name__ == "__main__":
    arguments = json.loads(sys.argv[1])
    asyncio.run(main(**arguments))
