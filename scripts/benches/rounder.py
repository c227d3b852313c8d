"""One member of `round`, a process of its own: counts its share of every round at once, and says when it had stepped.

Run as `python rounder.py RANK REPLICAS ROUNDS`: says where it listens as a line of JSON, is told in the same way where
all do, and says when each round was counted and when it was over. It ends when its stdin does. The last, of RANK
REPLICAS, is the trainer: it is lent every micro-batch, as nobody may count what was lent to nobody.
"""

from __future__ import annotations

import asyncio
import json
import sys
import time
from collections.abc import Iterator, Mapping
from typing import Any

import torch
import uvloop

from peer.executor import Executor
from peer.training.member import MemberAttendance
from peer.training.replica import STAGE
from swarm import wire
from swarm.agreement.assignments import Plan
from swarm.agreement.attendance import Attendance, TrainerAttendance
from swarm.identity import Identity
from swarm.rpc import Rpc
from swarm.transport import TcpTransport
from swarm.types import Address, PeerId
from swarm.wire import Endpoint

HOST = "127.0.0.1"
LENGTH = 1024  # values of the gradient: next to nothing to transfer
COUNT = 8  # micro-batches of a round
AHEAD = 0.02  # seconds between a round's beginning and its last gradient: everyone is there by then


class AllLent(wire.Message, tag="bench-all-lent"):
    """The trainer has been lent all micro-batches of a round."""

    round: int


wire.carry(AllLent)


class Nothing:
    """A `peer.training.replica.Replica` whose steps take no time."""

    def __init__(self) -> None:
        self.round = -1
        self.steps = 0
        self._parameters, self._sum = torch.zeros(LENGTH), torch.ones(LENGTH)

    def saved(self) -> list[int]:
        return [0]

    def restore(self, round_: int) -> None:
        self.round = round_

    def sums(self) -> dict[str, torch.Tensor]:
        return {STAGE: self._sum}

    def void(self, round_: int) -> None:
        """There is nothing to forget."""

    def commit(self, mean: Mapping[str, torch.Tensor], factor: float) -> None:
        self._parameters.sub_(mean[STAGE], alpha=factor)
        self.round += 1
        self.steps += 1

    def skip(self) -> None:
        self.round += 1

    def state(self) -> Iterator[tuple[str, torch.Tensor]]:
        yield "parameters", self._parameters

    def load(self, round_: int, state: Mapping[str, torch.Tensor]) -> None:
        self._parameters.copy_(state["parameters"])
        self.round = round_


async def count(
    member: MemberAttendance, lent: asyncio.Queue[int], rank: int, replicas: int, rounds: int
) -> dict[int, Any]:
    """Of every round: when the last of this member's gradients was there, and when its step was made."""
    participant, times = member.participant, {}
    for _ in range(rounds):
        round_ = await lent.get()
        await member.until(lambda round_=round_: participant.ready and member.round >= round_)  # type: ignore[misc]
        await asyncio.sleep(AHEAD)
        for index in range(rank, COUNT, replicas):
            if participant.ready and member.round == round_ and participant.begin(round_, index):
                member.counted(round_, index)
        counted = time.time()
        await member.until(lambda round_=round_: participant.held > round_)  # type: ignore[misc]
        times[round_] = counted, time.time()
    return times


async def lend(trainer: TrainerAttendance, rpc: Rpc) -> None:
    """Take all micro-batches of one round after another, and tell the members so."""
    while True:
        for _ in range(COUNT):
            round_, _ = await trainer.next()
        assert trainer.roster is not None
        for seat in trainer.roster.members:
            link = await rpc.connect(PeerId(seat.endpoint.peer), [Address(*pair) for pair in seat.endpoint.addresses])
            link.tell(AllLent(round_))


async def main(rank: int, replicas: int, rounds: int) -> None:
    """Take part until stdin ends."""
    torch.set_num_threads(1)
    transport = TcpTransport(Identity.generate())
    rpc, executor = Rpc(transport), Executor()
    address = await transport.listen(Address(HOST, 0), rpc.accept)
    print(json.dumps([rpc.peer, address.port]), flush=True)
    places = json.loads(await asyncio.to_thread(sys.stdin.readline))
    known = {PeerId(peer): Endpoint(peer, [(HOST, port)]) for peer, port in places[:replicas]}  # the members
    plan = Plan(b"r" * 16, 1, COUNT, 1)
    place: Attendance
    if rank == replicas:
        trainer = place = TrainerAttendance(rpc, plan, lambda: known, want=COUNT)
        trainer.start()
        rpc.spawn(lend(trainer, rpc))
    else:
        lent: asyncio.Queue[int] = asyncio.Queue()
        rpc.listen(AllLent, lambda link, message, body: lent.put_nowait(message.round))
        member = place = MemberAttendance(rpc, executor, Nothing(), plan, 0, known[rpc.peer], lambda: known)
        member.start()
        print(json.dumps(await count(member, lent, rank, replicas, rounds)), flush=True)
    await asyncio.to_thread(sys.stdin.read)
    await place.close()
    await rpc.close()
    await executor.close()


if __name__ == "__main__":
    uvloop.run(main(int(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3])))
