"""The transport in memory and its virtual time: what TCP would do, what it would not, and the same every time."""

from __future__ import annotations

import asyncio
import functools
import time
from collections.abc import Awaitable, Callable
from typing import Any

import pytest

from swarm import wire
from swarm.errors import DeadlineExceeded, Malformed, RemoteError, Unreachable, WrongKey
from swarm.links.virtualtime import Deadlock, run_virtually
from swarm.loopback import LoopbackNetwork
from swarm.rpc import Link, Rpc
from swarm.types import Address, PeerId

A, B = PeerId("a"), PeerId("b")
ANYWHERE = Address("memory", 0)
BODY = bytes(range(256)) * 4


def virtual(test: Callable[..., Awaitable[Any]]) -> Callable[..., Any]:
    """A test that runs in virtual time."""

    @functools.wraps(test)
    def run(*args: Any, **kwargs: Any) -> Any:
        return run_virtually(test(*args, **kwargs))  # type: ignore[arg-type]

    return run


def now() -> float:
    return asyncio.get_running_loop().time()


class Pair:
    """Two peers; the first has dialled the second."""

    def __init__(self, network: LoopbackNetwork) -> None:
        self.network = network
        self.near = Rpc(network.transport(A))
        self.listener = network.transport(B)
        self.far = Rpc(self.listener)

    async def link(self) -> Link:
        self.address = await self.listener.listen(ANYWHERE, self.far.accept)
        return await self.near.connect(B, [self.address])


async def linked(**options: Any) -> tuple[LoopbackNetwork, Pair, Link]:
    network = LoopbackNetwork(**{"latency": 0.01, **options})
    pair = Pair(network)
    return network, pair, await pair.link()


async def echo(link: Link, timeout: float = 1.0, body: bytes = BODY) -> bytes:
    answer, data = await link.call(wire.Echo(), [body], timeout=timeout)
    assert isinstance(answer, wire.Echo)
    return bytes(data)


# --- time -------------------------------------------------------------------------------------------------------------


def test_an_hour_of_virtual_time_takes_no_time() -> None:
    async def hour() -> float:
        await asyncio.sleep(3600)
        with pytest.raises(TimeoutError):
            async with asyncio.timeout(0.25):
                await asyncio.Event().wait()
        return now()

    started = time.perf_counter()
    assert run_virtually(hour()) == pytest.approx(3600.25)
    assert time.perf_counter() - started < 60


def test_what_would_hang_is_told() -> None:
    async def hang() -> None:
        await asyncio.Event().wait()

    with pytest.raises(Deadlock, match="nothing will ever happen"):
        run_virtually(hang())


def test_there_are_no_threads() -> None:
    async def leave() -> None:
        await asyncio.to_thread(print)

    with pytest.raises(RuntimeError, match="no threads"):
        run_virtually(leave())


# --- what goes well ---------------------------------------------------------------------------------------------------


@virtual
async def test_a_call_takes_a_round_trip_and_its_bytes() -> None:
    _, _, link = await linked(bandwidth=1e6)
    started = now()
    assert await echo(link) == BODY
    assert now() - started == pytest.approx(0.02 + 2 * len(BODY) / 1e6, rel=0.1)


@virtual
async def test_a_small_message_overtakes_a_large_one() -> None:
    _, _, link = await linked(bandwidth=1e6)
    large = asyncio.create_task(echo(link, 10.0, bytes(1_000_000)))
    await asyncio.sleep(0.1)
    started = now()
    await echo(link)
    assert now() - started < 0.05
    assert not large.done()
    assert await large == bytes(1_000_000)
    assert now() >= 2.0


@virtual
async def test_messages_come_in_order() -> None:
    _, pair, link = await linked(latency=0.005)
    heard: list[bytes] = []
    pair.far.listen(wire.CloseSession, lambda link, message, body: heard.append(message.session))
    keys = [bytes([index]) * 16 for index in range(50)]
    for key in keys:
        assert link.try_notify(wire.CloseSession(key))
    await asyncio.sleep(1)
    assert heard == keys


@virtual
async def test_nobody_else_than_was_dialled_is_taken() -> None:
    network, pair, _ = await linked()
    with pytest.raises(WrongKey):
        await pair.near.connect(PeerId("c"), [pair.address])
    with pytest.raises(Unreachable, match="nobody listens"):
        await pair.near.connect(PeerId("c"), [Address("memory", 99)])
    assert network.at(pair.address) is pair.listener


# --- what goes wrong --------------------------------------------------------------------------------------------------


@virtual
async def test_a_killed_peer_resets_its_connections() -> None:
    network, pair, link = await linked()
    network.kill(B)
    started = now()
    with pytest.raises(Unreachable):
        await echo(link, 5.0)
    assert now() - started == pytest.approx(0.01)
    with pytest.raises(Unreachable, match="nobody listens"):
        await pair.near.connect(B, [pair.address])


@virtual
async def test_a_stopped_peer_says_nothing_and_goes_on() -> None:
    network, pair, link = await linked()
    network.stall(B)
    with pytest.raises(DeadlineExceeded):
        await echo(link, 60.0)
    assert link.error is None
    waiting = asyncio.create_task(echo(link, 60.0))
    await asyncio.sleep(30)
    network.resume(B)
    await waiting
    assert now() < 91
    network.stall(B)
    stranger = Rpc(network.transport(PeerId("c")))
    with pytest.raises(Unreachable):
        await stranger.connect(B, [pair.address])


@virtual
async def test_a_cut_way_is_given_up_after_a_while() -> None:
    network, _, link = await linked()
    network.partition(A, B)
    waiting = asyncio.create_task(echo(link, 60.0))
    await asyncio.sleep(10)
    network.heal(A, B)
    assert await waiting == BODY  # retransmitted
    network.partition(A, B, one_way=True)
    started = now()
    with pytest.raises(Unreachable, match="nothing came through"):
        await echo(link, 60.0)
    assert now() - started == pytest.approx(20.01)


@virtual
async def test_a_slow_peer_is_slow() -> None:
    network, _, link = await linked(latency=0.01)
    network.slow(B, 10)
    started = now()
    await echo(link)
    assert now() - started == pytest.approx(0.2, rel=0.01)
    assert network.slowness(B) == 10


@virtual
async def test_dropped_messages_vanish() -> None:
    network, _, link = await linked()
    network.drop(1.0)
    with pytest.raises(DeadlineExceeded):
        await echo(link)
    network.drop(0.0)
    assert await echo(link) == BODY


@virtual
async def test_messages_come_twice_and_overtake_each_other() -> None:
    network, pair, link = await linked()
    heard: list[int] = []
    pair.far.listen(wire.CloseSession, lambda link, message, body: heard.append(message.session[0]))
    network.duplicate(0.5)
    network.reorder(0.5)
    for index in range(100):
        link.try_notify(wire.CloseSession(bytes([index]) * 16))
        await asyncio.sleep(0.005)
    await asyncio.sleep(1)
    assert set(heard) == set(range(100))
    assert 120 < len(heard) < 180
    assert heard != sorted(heard)


@virtual
async def test_nonsense_closes_the_connection_and_names_it() -> None:
    network, pair, link = await linked()
    failures: list[RemoteError] = []
    for _ in range(20):
        network.corrupt(B)
        try:
            answer = await echo(link)
        except RemoteError as error:
            failures.append(error)
        else:
            assert answer in (BODY[: len(BODY) // 2], b"\xff" * len(BODY))
        network.corrupt(B, 0.0)
        link = await pair.near.connect(B, [pair.address])
    assert any(isinstance(error, Malformed) for error in failures)
    assert await echo(link) == BODY


@virtual
async def test_a_peer_that_starts_again_is_another_process() -> None:
    network, pair, link = await linked()
    listener = network.transport(B)
    await asyncio.sleep(1)
    assert link.error is not None
    again = Rpc(listener)
    assert await listener.listen(pair.address, again.accept) == pair.address
    assert await echo(await pair.near.connect(B, [pair.address])) == BODY


@virtual
async def test_a_sender_waits_where_nothing_is_taken() -> None:
    network, _, link = await linked()
    network.stall(B)
    sending = [asyncio.create_task(link.notify(wire.Echo(), [bytes(600_000)])) for _ in range(4)]
    await asyncio.sleep(5)
    assert [task.done() for task in sending] == [True, True, False, False]
    network.kill(B)
    await asyncio.sleep(1)
    assert isinstance(sending[3].exception(), Unreachable)


def test_the_same_seed_takes_the_same_course() -> None:
    async def course(seed: int) -> str:
        network, pair, link = await linked(seed=seed)
        network.drop(0.1)
        network.duplicate(0.2)
        network.reorder(0.2)
        network.corrupt(B, 0.05)
        for _ in range(50):
            try:
                await echo(link, 0.2)
            except RemoteError:
                link = await pair.near.connect(B, [pair.address])
        return network.trace

    assert run_virtually(course(3)) == run_virtually(course(3))
    assert run_virtually(course(3)) != run_virtually(course(4))


@virtual
async def test_who_shares_an_uplink_gets_as_much_as_any_other() -> None:
    """Of three seconds for three bodies, a long one takes all and a short one, in turns with it, two of its own."""
    network = LoopbackNetwork(latency=0.01, bandwidth=1e9)
    sender = Rpc(network.transport(A))
    network.share_uplink(A, 1e6)
    ended = {}
    for name, size in (("long", 2_000_000), ("short", 1_000_000)):
        listener = network.transport(PeerId(name))
        address = await listener.listen(ANYWHERE, Rpc(listener).accept)
        link = await sender.connect(PeerId(name), [address])
        task = asyncio.create_task(link.notify(wire.CloseSession(bytes(16)), [bytes(size)]))
        task.add_done_callback(lambda _, name=name: ended.setdefault(name, now()))
    began = now()
    await asyncio.sleep(5.0)
    assert ended["short"] - began == pytest.approx(2.0, abs=0.3)
    assert ended["long"] - began == pytest.approx(3.0, abs=0.3)
