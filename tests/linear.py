"""The smallest thing that trains: parameters drawn to the samples' targets, with momentum. Real members around it.

Run as `python linear.py ARGUMENTS`, it is one member; its stdin is a socket to whoever started it.
"""

from __future__ import annotations

import asyncio
import json
import logging
import os
import socket
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
from swarm.errors import Closed, ShoalError, StaleRound, Unreachable
from swarm.identity import Identity
from swarm.links.interfaces import Transport
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
        self.steps = 0
        self.parameters = torch.zeros(length)
        self.momentum = torch.zeros(length)
        self.earlier = torch.zeros(length)  # parameters of the beginning of the round before
        self.sum = torch.zeros(length)
        self.ahead = torch.zeros(length)  # the next round's
        self.spoil: Callable[[torch.Tensor], torch.Tensor] = lambda values: values  # a liar's last touch

    def add(self, round_: int, index: int) -> torch.Tensor:
        ahead = round_ - self.round
        if ahead not in (0, int(self.plan.overlap)):
            raise StaleRound(f"round {self.round} is collected, not {round_}")
        parameters = self.earlier if self.plan.overlap and not ahead else self.parameters
        found = self.spoil(gradient(self.plan, self.stage, round_, index, parameters))
        (self.ahead if ahead else self.sum).add_(found)
        return found

    def saved(self) -> list[int]:
        return [0]

    def restore(self, round_: int) -> None:
        assert round_ == 0
        self.parameters.zero_()
        self.momentum.zero_()
        self.earlier.zero_()
        self.steps = 0
        self._entered(0)

    def _entered(self, round_: int) -> None:
        self.round = round_
        self.sum.zero_()
        self.ahead.zero_()

    def _turn(self) -> None:
        self.round += 1
        self.sum.copy_(self.ahead)
        self.ahead.zero_()

    def sums(self) -> dict[str, torch.Tensor]:
        return {STAGE: self.sum}

    def void(self, round_: int) -> None:
        if round_ in (self.round, self.round + 1):
            (self.sum if round_ == self.round else self.ahead).zero_()

    def commit(self, mean: Mapping[str, torch.Tensor], factor: float) -> None:
        self.earlier.copy_(self.parameters)
        self.momentum.mul_(0.5).add_(mean[STAGE], alpha=factor)
        self.parameters.sub_(self.momentum, alpha=0.3)
        self.steps += 1
        self._turn()

    def skip(self) -> None:
        self.earlier.copy_(self.parameters)
        self._turn()

    def state(self) -> Iterator[tuple[str, torch.Tensor]]:
        yield "parameters", self.parameters
        yield "momentum", self.momentum
        yield "earlier", self.earlier
        yield "steps", torch.tensor([self.steps])

    def load(self, round_: int, state: Mapping[str, torch.Tensor]) -> None:
        self.parameters.copy_(state["parameters"])
        self.momentum.copy_(state["momentum"])
        self.earlier.copy_(state["earlier"])
        self.steps = int(state["steps"])
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

    def __init__(
        self,
        plan: Plan,
        stage: int,
        length: int,
        known: Callable[[], Mapping[PeerId, Endpoint]],
        transport: Transport | None = None,
        executor: Executor | None = None,
    ) -> None:
        self.plan = plan
        self.stage = stage
        self.replica = Linear(plan, stage, length)
        self.transport = transport or TcpTransport(Identity.generate())
        self.rpc = Rpc(self.transport, asyncio.get_running_loop().time)
        self.executor = executor or Executor()
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
            ended: asyncio.Future[None] = asyncio.get_running_loop().create_future()
            self.executor.submit(
                lambda: self.replica.add(message.round, message.index),
                lambda _, error: self._added(message, error, ended),
            )
            await ended
        return Done()

    def _added(self, message: RunMicroBatch, error: BaseException | None, ended: asyncio.Future[None]) -> None:
        """The ledger is told also where nobody waits for it any more."""
        (self.attendance.gave_up if error else self.attendance.counted)(message.round, message.index)
        if not ended.done():
            ended.set_result(None) if error is None else ended.set_exception(error)

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

    def __init__(
        self,
        plan: Plan,
        known: Callable[[], Mapping[PeerId, Endpoint]],
        want: int = 4,
        transport: Transport | None = None,
    ) -> None:
        self.plan = plan
        self.rpc = Rpc(transport or TcpTransport(Identity.generate()), asyncio.get_running_loop().time)
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


async def main(ours: socket.socket, stage: int, length: int, plan: dict[str, Any], spoil: str) -> None:
    """One member: tells where it listens, is told line by line where the members are, and ends with the last one."""
    torch.set_num_threads(1)
    logging.basicConfig(level=logging.INFO, format=f"%(relativeCreated)d {stage} %(message)s", force=True)
    known: dict[PeerId, Endpoint] = {}
    member = LinearMember(Plan(RUN, **plan), stage, length, lambda: known)
    member.replica.spoil = SPOILS[spoil]
    endpoint = await member.start()
    reader, writer = await asyncio.open_connection(sock=ours)
    writer.write(json.dumps([endpoint.peer, endpoint.addresses[0][1]]).encode() + b"\n")
    while line := await reader.readline():
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
    asyncio.run(main(socket.socket(fileno=os.dup(0)), **json.loads(sys.argv[1])))
