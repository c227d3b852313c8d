"""Echoes between two processes over the transport: TLS 1.3 over TCP, both ends on uvloop.

A round makes many echoes of one size, one after another, and takes the median of their times. MB/s are the bytes that
move in both directions (twice the message) over that time, with MB of 10^6 bytes. The reference is the barest
exchange over the same TLS: a length, the bytes, and a preallocated buffer; no frames, checks, calls or deadlines.
"""

from __future__ import annotations

import asyncio
import json
import os
import statistics
import time
from collections.abc import Awaitable, Callable
from dataclasses import dataclass

from benches.child import running
from benches.echo import HOST, BareConnection
from benches.plan import Plan
from benches.rows import Must, Row
from swarm import wire
from swarm.background import BackgroundLoop
from swarm.identity import Identity, client_context
from swarm.rpc import Link, Rpc
from swarm.transport import TcpTransport
from swarm.types import Address, PeerId

ROUNDS = 9
TIMEOUT = 30.0  # seconds for one echo


@dataclass(frozen=True, slots=True)
class Case:
    """One size of message."""

    name: str
    size: int  # bytes
    echoes: int  # in a round
    must: Must | None = None
    speed: bool = False  # told in MB/s, else in milliseconds

    def figure(self, seconds: float) -> float:
        """What is told of an echo that took so long."""
        return 2 * self.size / 1e6 / seconds if self.speed else seconds * 1e3


CASES = (
    Case("1.2 KB", 1200, 500, Must("value", "<=", 0.2)),
    Case("16 KB", 16_000, 300),
    Case("1 MiB", 1 << 20, 40, Must("value", ">=", 500), speed=True),
    Case("8 MiB", 8 << 20, 8, speed=True),
)

Echo = Callable[[bytes], Awaitable[object]]


def measure(plan: Plan) -> list[Row]:
    """A row for each size."""
    background = BackgroundLoop()
    try:
        with running("echo.py") as (_, line):
            ours, bare = background.run(_connect(**json.loads(line)))
            rows = [_compare(plan, background, case, ours, bare) for case in CASES]
            background.run(_disconnect(ours, bare))
            return rows
    finally:
        background.close()


def _compare(plan: Plan, background: BackgroundLoop, case: Case, ours: Ours, bare: Bare) -> Row:
    message = os.urandom(case.size)
    name = f"wire: echo of {case.name}"
    rounds = plan.alternate(
        name,
        plan.rounds(ROUNDS),
        lambda: case.figure(background.run(_median_echo(ours.echo, message, case.echoes))),
        lambda: case.figure(background.run(_median_echo(bare.echo, message, case.echoes))),
    )
    return rounds.row(name, "MB/s" if case.speed else "ms", case.must)


async def _median_echo(echo: Echo, message: bytes, count: int) -> float:
    """Seconds."""
    times = []
    for _ in range(count + 2):
        started = time.perf_counter()
        await echo(message)
        times.append(time.perf_counter() - started)
    return statistics.median(times[2:])  # the first two warm up


class Ours:
    """The dialling end over our transport."""

    def __init__(self, rpc: Rpc, link: Link) -> None:
        self.rpc = rpc
        self._link = link

    async def echo(self, message: bytes) -> None:
        """There and back. Raises `AssertionError` where something else comes back."""
        _, body = await self._link.call(wire.Echo(), [message], timeout=TIMEOUT)
        assert len(body) == len(message)


class Bare:
    """The dialling end of the reference."""

    def __init__(self) -> None:
        self.connection = BareConnection(self._received)
        self._waiting: asyncio.Future[int] | None = None

    def _received(self, _: BareConnection, message: memoryview) -> None:
        assert self._waiting is not None
        self._waiting.set_result(len(message))

    async def echo(self, message: bytes) -> None:
        """There and back. Raises `AssertionError` where something else comes back."""
        self._waiting = asyncio.get_running_loop().create_future()
        self.connection.send(message)
        assert await self._waiting == len(message)


async def _connect(peer: str, port: int, bare_port: int) -> tuple[Ours, Bare]:
    rpc = Rpc(TcpTransport(Identity.generate()))
    link = await rpc.connect(PeerId(peer), [Address(HOST, port)])
    bare = Bare()
    loop = asyncio.get_running_loop()
    await loop.create_connection(lambda: bare.connection, HOST, bare_port, ssl=client_context(), server_hostname="")
    return Ours(rpc, link), bare


async def _disconnect(ours: Ours, bare: Bare) -> None:
    bare.connection.close()
    await ours.rpc.close()
