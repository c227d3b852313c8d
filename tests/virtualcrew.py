"""Members and trainers of a run in virtual time: the real all-reduce and the real driver, over the transport in memory.

Run as `python virtualcrew.py SEED ...`: some schedules alone, and what happened in them.
"""

from __future__ import annotations

import asyncio
import logging
import os
import random
import sys
from collections.abc import Callable, Coroutine, Sequence
from typing import Any, TypeVar
from unittest import mock

import torch
from faults import chosen
from linear import RUN, SPOILS, Linear, LinearMember, LinearTrainer, gradient
from virtualexecutor import VirtualExecutor

from swarm.agreement.assignments import Plan
from swarm.links.virtualtime import VirtualLoop
from swarm.loopback import LoopbackNetwork
from swarm.rounds import Coordinator, Phase
from swarm.types import PeerId
from swarm.wire import Endpoint

T = TypeVar("T")

LENGTH = 6  # values: parts of two and three members are not equal
LOOK = 0.02  # seconds of virtual time between two looks at everyone
COMPUTE = 0.02  # seconds of a micro-batch at one stage
CLOSE = 1e-4  # relative: a micro-batch too many is a tenth


class _Loop(VirtualLoop):
    """Threads take no time in it."""

    def run_in_executor(self, executor: Any, func: Callable[..., T], *args: Any) -> asyncio.Future[T]:
        future: asyncio.Future[T] = self.create_future()
        try:
            future.set_result(func(*args))
        except Exception as error:  # noqa: BLE001 (as the real one)
            future.set_exception(error)
        return future


def in_virtual_time(seed: int, main: Coroutine[Any, Any, T]) -> T:
    """What `main` comes to; the same seed takes the same course."""
    random.seed(seed)  # a newcomer asks replicas in any order
    names = random.Random(seed)
    with mock.patch.object(os, "urandom", names.randbytes), asyncio.Runner(loop_factory=_Loop) as runner:
        return runner.run(main)


class _Watched(Linear):
    """A replica that looks after its own sums, and of which it is known how its rounds ended."""

    def __init__(self, plan: Plan, stage: int, outcomes: dict[int, str]) -> None:
        super().__init__(plan, stage, LENGTH)
        self.outcomes = outcomes  # of rounds, as anyone has seen them end
        self.counted: dict[int, list[int]] = {}

    def add(self, round_: int, index: int) -> torch.Tensor:
        found = super().add(round_, index)
        assert index not in self.counted.setdefault(round_, []), f"{index} is counted twice in round {round_}"
        self.counted[round_].append(index)
        return found

    def void(self, round_: int) -> None:
        super().void(round_)
        self.counted.pop(round_, None)

    def _entered(self, round_: int) -> None:
        super()._entered(round_)
        self.counted = {}

    def commit(self, mean: Any, factor: float) -> None:
        self._ends("commit")
        super().commit(mean, factor)

    def skip(self) -> None:
        self._ends("skip")
        super().skip()

    def _ends(self, outcome: str) -> None:
        if self.round >= 0:
            before = self.outcomes.setdefault(self.round, outcome)
            assert outcome == before, f"round {self.round} ends in {before} and in {outcome}"


class _Curve:
    """The parameters of a stage at the beginning of every round, as one process comes to them."""

    def __init__(self, plan: Plan, stage: int, outcomes: dict[int, str]) -> None:
        self._alone = Linear(plan, stage, LENGTH)
        self._alone.restore(0)
        self._plan, self._stage, self._outcomes = plan, stage, outcomes
        self._points = [self._alone.parameters.clone()]

    def at(self, round_: int) -> torch.Tensor:
        while len(self._points) <= round_:
            self._go_on(len(self._points) - 1)
        return self._points[round_]

    def _go_on(self, round_: int) -> None:
        alone, plan = self._alone, self._plan
        if self._outcomes.get(round_, "commit") == "commit":
            at = alone.earlier if plan.overlap else alone.parameters
            total = sum(gradient(plan, self._stage, round_, index, at) for index in range(plan.count))
            alone.commit({"stage": total / plan.samples}, 1.0)
        else:
            alone.skip()
        self._points.append(alone.parameters.clone())


class VirtualCrew:
    """Members, trainers and the network between them."""

    def __init__(self, seed: int, stages: int = 1, bandwidth: float = 1e8, compute: float = COMPUTE, **plan: Any):
        self.random = random.Random(seed)
        chosen = {"samples": 10, "micro_batch": 2, "dtype": "float32", "clip": 0.0, **plan}
        self.plan = Plan(RUN, stages, **chosen)
        self.network = LoopbackNetwork(seed, latency=0.004, bandwidth=bandwidth)
        self.known: dict[PeerId, Endpoint] = {}
        self.members: dict[PeerId, LinearMember] = {}
        self.trainers: dict[PeerId, LinearTrainer] = {}
        self.outcomes: dict[int, str] = {}
        self._compute = compute
        self._curves = [_Curve(self.plan, stage, self.outcomes) for stage in range(stages)]
        self._checked: dict[PeerId, int] = {}
        self._named = 0

    async def join(self, stage: int, length: int = LENGTH) -> LinearMember:
        """A new member."""
        peer = self._name("m")
        executor: Any = VirtualExecutor(self.network, peer, self._seconds)
        transport = self.network.transport(peer)
        member = LinearMember(self.plan, stage, length, lambda: self.known, transport, executor)
        if length == LENGTH:
            member.replica = _Watched(self.plan, stage, self.outcomes)
        self.known[peer] = await member.start()
        self.members[peer] = member
        return member

    def new_trainer(self) -> None:
        """And its micro-batches, four at once."""
        peer = self._name("t")
        self.trainers[peer] = LinearTrainer(self.plan, lambda: self.known, transport=self.network.transport(peer))
        self.trainers[peer].start()

    async def kill(self, peer: PeerId) -> None:
        """Its process is no more."""
        self.network.kill(peer)
        await (self.members.pop(peer, None) or self.trainers.pop(peer)).close()

    async def close(self) -> None:
        for peer in [*self.trainers, *self.members]:
            await self.kill(peer)

    def _name(self, kind: str) -> PeerId:
        self._named += 1
        return PeerId(f"{kind}{self._named}-{self.random.randrange(100)}")

    def _seconds(self, result: Any) -> float:
        return self._compute if isinstance(result, torch.Tensor) else 0.0

    # --- how things are --------------------------------------------------------------------------------------------

    @property
    def coordinator(self) -> Coordinator | None:
        """Of the latest round and term."""
        found = [member.attendance.participant.coordinator for member in self.members.values()]
        return max(filter(None, found), key=lambda one: (one.round, one.term), default=None)

    def now(self) -> tuple[int, Phase] | None:
        """What is going on."""
        coordinator = self.coordinator
        return (coordinator.round, coordinator.phase) if coordinator else None

    def check(self) -> None:
        """All that hold the same round's state hold the same to the bit, and it is what one process comes to."""
        states: dict[tuple[int, int], bytes] = {}
        for peer, member in self.members.items():
            assert not member.attendance.failure.done(), member.attendance.failure
            replica = member.replica
            if replica.round < 0:
                continue
            bits = b"".join(tensor.numpy().tobytes() for _, tensor in replica.state())
            same = states.setdefault((member.stage, replica.round), bits)
            assert bits == same, f"{peer} holds another state in round {replica.round}"
            if self._checked.get(peer) != replica.round:
                expected = self._curves[member.stage].at(replica.round)
                away = (replica.parameters - expected).norm() / (1.0 + expected.norm())
                assert away < CLOSE, f"{peer} is off the curve by {away:.2g} in round {replica.round}"
                self._checked[peer] = replica.round

    async def until(self, over: Callable[[], bool], seconds: float) -> bool:
        """Look at everyone again and again until it is so; False where it is not within so much virtual time."""
        loop = asyncio.get_running_loop()
        end = loop.time() + seconds
        while not over():
            if loop.time() > end:
                return False
            await asyncio.sleep(LOOK)
            self.check()
        return True


SHAPES = ((1, 2, 1), (1, 3, 2), (2, 2, 1), (2, 2, 2), (2, 3, 2))  # stages, replicas, trainers
ROUNDS = 5
LIMIT = 240.0  # seconds of virtual time
HELD = 2.0  # seconds that a liar lies


class Schedule:
    """One or two faults of a seed's choosing, each when a round comes to a phase of its choosing.

    Args:
        faults: others instead: what, in which round, at which phase.
    """

    def __init__(self, seed: int, faults: Sequence[tuple[str, int, Phase]] = ()) -> None:
        self.random = random.Random(seed)
        stages, self.replicas, self.trainers = SHAPES[0 if faults else seed // 9 % len(SHAPES)]
        self.crew = VirtualCrew(seed, stages, overlap=seed % 2 > 0)
        self.told: list[str] = []
        names = chosen(seed, self.random, two=seed // 2 % 2 > 0)
        self._waiting = [
            (getattr(self, name), self.random.choice((1, 2)), Phase(self.random.randrange(4))) for name in names
        ]
        if faults:
            self._waiting = [(getattr(self, name), round_, phase) for name, round_, phase in faults]

    async def play(self) -> None:
        """From the beginning until everyone is through and in step."""
        crew = self.crew
        for stage in range(crew.plan.stages):
            for _ in range(self.replicas):
                await crew.join(stage)
        for _ in range(self.trainers):
            crew.new_trainer()
        try:
            acting = asyncio.create_task(self._act())
            ended = await crew.until(lambda: acting.done() and not acting.result() and self._is_through(), LIMIT)
            assert ended, f"not through: {[(m.replica.round, m.attendance.round) for m in crew.members.values()]}"
        except AssertionError as error:
            raise AssertionError(f"{self.told}: {error}") from error
        finally:
            acting.cancel()
            await crew.close()

    def _is_through(self) -> bool:
        rounds = [member.replica.round for member in self.crew.members.values()]
        return min(rounds) >= ROUNDS and max(rounds) - min(rounds) <= 1

    async def _act(self) -> None:
        """Let what is due happen, and be over."""
        async with asyncio.TaskGroup() as faults:
            while self._waiting:
                now = self.crew.now()
                for each in [each for each in self._waiting if now is not None and now >= each[1:]]:
                    self._waiting.remove(each)
                    self.told.append(f"{each[0].__name__} in round {each[1]} at {each[2].name}")
                    faults.create_task(each[0]())
                await asyncio.sleep(LOOK / 4)

    def _spare(self) -> PeerId:
        """A member whose stage has another one: the coordinator, as often as not."""
        members = self.crew.members
        by_stage = [member.stage for member in members.values()]
        spare = [peer for peer, member in members.items() if by_stage.count(member.stage) > 1]
        coordinator = self.crew.coordinator
        if coordinator is not None and coordinator.me in spare and self.random.random() < 0.5:
            return coordinator.me
        return self.random.choice(spare or list(members))

    async def kill(self) -> None:
        peer = self._spare()
        if sum(member.stage == self.crew.members[peer].stage for member in self.crew.members.values()) > 1:
            await self.crew.kill(peer)

    async def kill_a_trainer(self) -> None:
        if self.crew.trainers:  # another was killed a moment ago, and the next has not come yet
            await self.crew.kill(self.random.choice(list(self.crew.trainers)))
            self.crew.new_trainer()

    async def stall(self) -> None:
        peer = self.random.choice([self._spare(), *self.crew.trainers])
        self.crew.network.stall(peer)
        await asyncio.sleep(self.random.choice([0.3, 1.0, 3.0, 8.0]))
        self.crew.network.resume(peer)

    async def slow(self) -> None:
        peer = self._spare()
        self.crew.network.slow(peer, self.random.choice([10.0, 50.0, 200.0]))
        await asyncio.sleep(4.0)
        self.crew.network.slow(peer, 1.0)

    async def partition(self) -> None:
        peers = [*self.crew.members, *self.crew.trainers]
        some = self.random.sample(peers, self.random.randrange(1, len(peers)))
        pairs = [(one, other) for one in some for other in peers if other not in some]
        for pair in pairs:
            self.crew.network.partition(*pair)
        await asyncio.sleep(self.random.choice([0.5, 2.5, 6.0]))
        for pair in pairs:
            self.crew.network.heal(*pair)

    async def drop(self) -> None:
        self.crew.network.drop(self.random.choice([0.1, 0.4]))
        await asyncio.sleep(2.0)
        self.crew.network.drop(0.0)

    async def duplicate(self) -> None:
        self.crew.network.duplicate(0.5)
        self.crew.network.reorder(0.2)
        await asyncio.sleep(2.0)
        self.crew.network.duplicate(0.0)
        self.crew.network.reorder(0.0)

    async def corrupt(self) -> None:
        """What it says is nonsense on its way, or what it computes is."""
        peer = self._spare()
        if self.random.random() < 0.5:
            self.crew.network.corrupt(peer, 0.3)
            await asyncio.sleep(HELD)
            self.crew.network.corrupt(peer, 0.0)
            return
        replica = self.crew.members[peer].replica
        replica.spoil = SPOILS["nan"]
        await asyncio.sleep(HELD)
        replica.spoil = SPOILS[""]

    async def late_join(self) -> None:
        await self.crew.join(self.random.randrange(self.crew.plan.stages))


def play(seed: int, faults: Sequence[tuple[str, int, Phase]] = ()) -> Schedule:
    """One schedule, checked all the time."""
    schedule = Schedule(seed, faults)
    in_virtual_time(seed, schedule.play())
    return schedule


if __name__ == "__main__":
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    for seed in map(int, sys.argv[1:]):
        print(seed, play(seed).told)
