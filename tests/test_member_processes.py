"""Members as real processes that are killed and stopped in mid-averaging, and some whose gradients are a lie."""

from __future__ import annotations

import asyncio
import contextlib
import json
import random
import signal
import socket
import subprocess
import sys
from collections.abc import AsyncIterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
from linear import HOST, RUN, LinearTrainer, Tell, Told, alone
from nursery import Forked

from swarm.agreement.assignments import Plan
from swarm.errors import RemoteError
from swarm.types import Address, PeerId
from swarm.wire import Endpoint

pytestmark = [pytest.mark.slow, pytest.mark.timeout(540)]

LONG = 200_000  # values: averaging takes long enough to be met in the middle
KILLS = 20
FLOCKS = 4
WAIT = 120.0  # seconds


class Process:
    """One member in a process of its own."""

    def __init__(self, process: Forked, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._process = process
        self.peer = PeerId("")
        self.port = 0
        self._reader = reader
        self._writer = writer

    async def started(self) -> None:
        peer, self.port = json.loads(await self._reader.readline())
        self.peer = PeerId(peer)

    def tell(self, line: bytes) -> None:
        self._writer.write(line)

    def signal(self, number: signal.Signals) -> None:
        self._process.send_signal(number)

    async def gone(self) -> None:
        """Wait until it has ended."""
        with contextlib.suppress(ConnectionError):
            await self._reader.read()
        self._writer.close()
        self._process.wait()


async def start_member(**arguments: Any) -> Process:
    ours, theirs = socket.socketpair()
    script = str(Path(__file__).with_name("linear.py"))
    with theirs:
        started = Forked(
            [sys.executable, script, json.dumps(arguments)], stdin=theirs.fileno(), stdout=subprocess.DEVNULL
        )
    process = Process(started, *await asyncio.open_connection(sock=ours))
    await process.started()
    return process


class Flock:
    """Member processes, and a trainer in this one."""

    def __init__(self, plan: Plan, length: int) -> None:
        self.plan = plan
        self.length = length
        self.known: dict[PeerId, Endpoint] = {}
        self.processes: list[Process] = []
        self.trainer = LinearTrainer(plan, lambda: self.known)

    async def add(self, stage: int = 0, spoil: str = "") -> Process:
        plan = {key: value for key, value in asdict(self.plan).items() if key != "run"}
        process = await start_member(stage=stage, length=self.length, plan=plan, spoil=spoil)
        self.processes.append(process)
        self.known[process.peer] = Endpoint(process.peer, [(HOST, process.port)])
        self.introduce()
        return process

    def introduce(self) -> None:
        """Tell all of all, as the DHT would."""
        places = json.dumps([[process.peer, process.port] for process in self.processes]).encode() + b"\n"
        for process in self.processes:
            process.tell(places)

    async def ask(self, process: Process, timeout: float = 5.0) -> Told | None:
        """How far it is; None where it does not answer."""
        try:
            link = await self.trainer.rpc.connect(process.peer, [Address(HOST, process.port)])
            told, _ = await link.call(Tell(), timeout=timeout)
        except RemoteError:
            return None
        assert isinstance(told, Told)
        return told

    async def reach(self, round_: int, processes: list[Process] | None = None) -> list[Told]:
        """Wait until these (all) hold the state of that round."""
        async with asyncio.timeout(WAIT):
            while True:
                told = [await self.ask(process) for process in processes or self.processes]
                if all(each is not None and each.round >= round_ for each in told):
                    return [each for each in told if each is not None]
                await asyncio.sleep(0.05)

    async def agree(self, processes: list[Process] | None = None) -> Told:
        """Wait for a moment at which all hold the same round's state, and check that it is the same state."""
        async with asyncio.timeout(WAIT):
            while True:
                told = [await self.ask(process) for process in processes or self.processes]
                if None not in told and len({each.round for each in told if each}) == 1:
                    assert len({each.digest for each in told if each}) == 1, told
                    assert told[0] is not None
                    return told[0]
                await asyncio.sleep(0.02)

    async def averaging(self, process: Process) -> None:
        """Wait until a member is in the middle of averaging."""
        async with asyncio.timeout(WAIT):
            while True:
                told = await self.ask(process)
                if told is not None and told.averaging:
                    return

    async def remove(self, process: Process) -> None:
        process.signal(signal.SIGKILL)
        self.processes.remove(process)
        await process.gone()

    async def close(self) -> None:
        await self.trainer.close()
        for process in self.processes:
            process.signal(signal.SIGCONT)
            process.signal(signal.SIGKILL)
            await process.gone()


@contextlib.asynccontextmanager
async def flock(
    count: int, length: int = LONG, start: bool = True, spoil: str = "", **plan: Any
) -> AsyncIterator[Flock]:
    made = Flock(Plan(RUN, 1, **{"samples": 8, "micro_batch": 2, "dtype": "float32", "clip": 0.0, **plan}), length)
    try:
        for _ in range(count):
            await made.add(spoil=spoil)
        if start:
            made.trainer.start()
        yield made
    finally:
        await made.close()


def check_curve(made: Flock, told: Told) -> None:
    """The parameters are about as large as one process makes them: nothing was lost or counted twice on the way."""
    expected = alone(made.plan, made.length, told.round)[0].parameters.norm().item()
    assert told.size == pytest.approx(expected, rel=1e-4)


async def test_members_killed_in_mid_averaging_leave_equal_survivors() -> None:
    """Twenty times, in four flocks at once: most of it is waiting for those who are silent."""
    async with asyncio.TaskGroup() as group:
        for seed in range(FLOCKS):
            group.create_task(lose_some(seed))


async def lose_some(seed: int) -> None:
    chance = random.Random(seed)
    async with flock(3, spoil="slow", samples=4, micro_batch=1) as made:
        round_ = 1
        for _ in range(KILLS // FLOCKS):
            await made.reach(round_)
            victim = chance.choice(made.processes)
            await made.averaging(victim)
            await made.remove(victim)
            told = await made.agree()
            newcomer = await made.add(spoil="slow")
            round_ = max(told.round, (await made.reach(told.round, [newcomer]))[0].round) + 1
        await made.reach(round_ + 1)
        check_curve(made, await made.agree())


async def test_a_member_stopped_in_mid_averaging_is_left_behind_and_heals() -> None:
    async with flock(3) as made:
        await made.reach(2)
        victim = made.processes[1]
        await made.averaging(victim)
        victim.signal(signal.SIGSTOP)
        others = [process for process in made.processes if process is not victim]
        told = await made.reach((await made.agree(others)).round + 2, others)
        victim.signal(signal.SIGCONT)
        await made.reach(told[0].round + 1)
        check_curve(made, await made.agree())


@pytest.mark.parametrize("robust", ["clip", "trimmed"])
async def test_flipped_gradients_do_not_turn_a_robust_mean(robust: str) -> None:
    async with flock(4, length=2000, start=False, samples=20, robust=robust) as made:
        await made.add(spoil="flip")
        made.trainer.start()
        told = await made.reach(10)
        assert told[0].size < 0.5 * made.length**0.5  # as far from the targets' centre as from any target: 1.0


async def test_all_trainers_die_and_another_goes_on() -> None:
    async with flock(2, length=2000) as made:
        told = await made.reach(2)
        await made.trainer.close()
        made.trainer = LinearTrainer(made.plan, lambda: made.known)
        made.trainer.start()
        await made.reach(told[0].round + 3)
        await made.agree()
