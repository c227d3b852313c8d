"""Calls: many at once, with deadlines and cancellations that reach the other side, and errors that keep their names."""

from __future__ import annotations

import asyncio
import logging
import math
import os
from typing import Any

import msgpack
import pytest
from dataplane import ANYWHERE, WAIT, Stranger, linked, listening, stranger

from swarm import rpc, wire
from swarm.errors import (
    Busy,
    Closed,
    DeadlineExceeded,
    Internal,
    Malformed,
    NoRoom,
    ProtocolError,
    RemoteError,
    UnknownMessage,
    Unreachable,
    UsageError,
    WrongKey,
)
from swarm.identity import Identity
from swarm.links import frames
from swarm.links.frames import FrameKind
from swarm.rpc import Link, Reply, Rpc
from swarm.transport import TcpTransport
from swarm.wire import Kind

pytestmark = [pytest.mark.both_loops, pytest.mark.usefixtures("nothing_left")]

KEY = b"k" * 16
MIB = 1 << 20


class Handler:
    """Answers `KeepAlive` only when it is let, and counts."""

    def __init__(self, rpc: Rpc) -> None:
        self.started = asyncio.Semaphore(0)
        self.cancelled = asyncio.Semaphore(0)
        self.go = asyncio.Event()
        self.links: list[Link] = []
        rpc.answer(wire.KeepAlive, self.answer)

    async def answer(self, link: Link, message: wire.KeepAlive, body: memoryview) -> Reply:
        self.links.append(link)
        self.started.release()
        try:
            await self.go.wait()
        except asyncio.CancelledError:
            self.cancelled.release()
            raise
        return wire.Done()


async def soon(work: Any) -> Any:
    """What `work` gives, within the time that a test waits."""
    return await asyncio.wait_for(work, WAIT)


@pytest.mark.parametrize("size", [0, 1200, 3 * MIB])
async def test_an_echo_comes_back(size: int) -> None:
    data = os.urandom(size)
    async with linked() as (_, _, link):
        reply, body = await link.call(wire.Echo(), [data], timeout=WAIT)
        assert reply == wire.Echo()
        assert bytes(body) == data


async def test_many_calls_at_once_each_get_their_own_answer() -> None:
    async with linked() as (_, _, link):
        sizes = [0, 10, 5000, 200_000] * 25
        datas = [os.urandom(size) for size in sizes]
        replies = await asyncio.gather(*(link.call(wire.Echo(), [data], timeout=WAIT) for data in datas))
        assert [bytes(body) for _, body in replies] == datas


async def test_both_sides_call_on_one_connection() -> None:
    async with linked() as (near, far, link):
        handler = Handler(near)
        call = asyncio.create_task(link.call(wire.Echo(), timeout=WAIT))
        back = await far.connect(near.peer, [])  # there is no address to dial
        task = asyncio.create_task(back.call(wire.KeepAlive(KEY), timeout=WAIT))
        await soon(handler.started.acquire())
        handler.go.set()
        assert (await task)[0] == wire.Done()
        assert handler.links == [link]
        await call


async def test_a_small_call_does_not_wait_for_a_large_one() -> None:
    async with linked() as (_, _, link):
        large = asyncio.create_task(link.call(wire.Echo(), [bytes(48 * MIB)], timeout=WAIT))
        for _ in range(3):
            await link.call(wire.Echo(), [b"small"], timeout=WAIT)
        assert not large.done()
        await large


async def test_a_deadline_reaches_the_handler() -> None:
    async with linked() as (_, far, link):
        handler = Handler(far)
        with pytest.raises(DeadlineExceeded, match="KeepAlive within") as caught:
            await link.call(wire.KeepAlive(KEY), timeout=0.1)
        assert caught.value.peer == far.peer
        await soon(handler.cancelled.acquire())
        await link.call(wire.Echo(), timeout=WAIT)


async def test_the_handlers_deadline_is_its_own_too() -> None:
    async with linked() as (_, far, link):
        handler = Handler(far)
        link._connection.try_send(wire.pack_envelope(Kind.REQUEST, 1000, 0.05, wire.KeepAlive(KEY)), ())
        await soon(handler.started.acquire())
        await soon(handler.cancelled.acquire())


async def test_a_cancellation_reaches_the_handler() -> None:
    async with linked() as (_, far, link):
        handler = Handler(far)
        task = asyncio.create_task(link.call(wire.KeepAlive(KEY), timeout=WAIT))
        await soon(handler.started.acquire())
        task.cancel()
        await soon(handler.cancelled.acquire())
        assert "calls=0/0" in repr(link)


async def test_a_large_call_that_is_given_up_hurts_no_other() -> None:
    async with linked() as (_, _, link):
        other = asyncio.create_task(link.call(wire.Echo(), [bytes(8 * MIB)], timeout=WAIT))
        with pytest.raises(DeadlineExceeded):
            await link.call(wire.Echo(), [bytes(200 * MIB)], timeout=0.05)
        assert len((await other)[1]) == 8 * MIB
        assert len((await link.call(wire.Echo(), [bytes(MIB)], timeout=WAIT))[1]) == MIB


@pytest.mark.parametrize("timeout", [0.0, -1.0, math.nan])
async def test_a_call_without_time_is_not_made(timeout: float) -> None:
    async with linked() as (_, _, link):
        with pytest.raises(DeadlineExceeded):
            await link.call(wire.Echo(), timeout=timeout)
        await link.call(wire.Echo(), timeout=math.inf)  # as long as the protocol knows


async def test_errors_keep_their_names() -> None:
    async def full(link: Link, message: wire.KeepAlive, body: memoryview) -> Reply:
        raise NoRoom("the cache is full", "somebody")

    async with linked() as (_, far, link):
        far.answer(wire.KeepAlive, full)
        with pytest.raises(NoRoom, match="the cache is full") as caught:
            await link.call(wire.KeepAlive(KEY), timeout=WAIT)
        assert caught.value.peer == "somebody"


@pytest.mark.parametrize("error", [ValueError("a secret"), UsageError("a secret"), TimeoutError("a secret")])
async def test_a_mistake_of_the_handler_is_told_without_its_details(
    error: Exception, caplog: pytest.LogCaptureFixture
) -> None:
    async def mistaken(link: Link, message: wire.KeepAlive, body: memoryview) -> Reply:
        raise error

    async with linked() as (_, far, link):
        far.answer(wire.KeepAlive, mistaken)
        with caplog.at_level(logging.CRITICAL), pytest.raises(Internal) as caught:
            await link.call(wire.KeepAlive(KEY), timeout=WAIT)
        assert "secret" not in str(caught.value)
        await link.call(wire.Echo(), timeout=WAIT)


async def test_a_message_that_nobody_answers_is_refused_by_name() -> None:
    async with linked() as (_, _, link):
        with pytest.raises(UnknownMessage, match="not answered"):
            await link.call(wire.KeepAlive(KEY), timeout=WAIT)
        await link.call(wire.Echo(), timeout=WAIT)


async def test_notifications_come_in_order() -> None:
    heard: asyncio.Queue[bytes] = asyncio.Queue()
    async with linked() as (_, far, link):
        far.listen(wire.CloseSession, lambda link, message, body: heard.put_nowait(message.session))
        keys = [number.to_bytes(16, "big") for number in range(300)]
        for key in keys:
            if not link.try_notify(wire.CloseSession(key)):
                await link.notify(wire.CloseSession(key))
        assert [await soon(heard.get()) for _ in keys] == keys


async def test_a_mistake_of_a_listener_hurts_no_other(caplog: pytest.LogCaptureFixture) -> None:
    async with linked() as (_, far, link):
        far.listen(wire.CloseSession, lambda link, message, body: {}["missing"])
        await link.notify(wire.CloseSession(KEY))
        await link.call(wire.Echo(), timeout=WAIT)
        assert [record.message.split()[:2] for record in caplog.records] == [["listener", "failed"]]


async def test_more_calls_at_once_than_the_limit_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rpc, "MAX_CALLS", 8)
    async with linked() as (_, far, link):
        handler = Handler(far)
        calls = [asyncio.create_task(link.call(wire.KeepAlive(KEY), timeout=WAIT)) for _ in range(8)]
        for _ in calls:
            await soon(handler.started.acquire())
        with pytest.raises(Busy):
            await link.call(wire.Echo(), timeout=WAIT)
        handler.go.set()
        await asyncio.gather(*calls)
        await link.call(wire.Echo(), timeout=WAIT)


async def test_more_bytes_in_calls_at_once_than_the_limit_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rpc, "MAX_HELD", MIB)
    async with linked() as (_, far, link):
        handler = Handler(far)
        call = asyncio.create_task(link.call(wire.KeepAlive(KEY), [bytes(MIB)], timeout=WAIT))
        await soon(handler.started.acquire())
        with pytest.raises(Busy):
            await link.call(wire.Echo(), [b"x"], timeout=WAIT)
        await link.call(wire.Echo(), timeout=WAIT)
        handler.go.set()
        await call
        await link.call(wire.Echo(), [b"x"], timeout=WAIT)


# --- what no correct peer sends ------------------------------------------------------------------------------------


def header(*parts: Any) -> bytes:
    """A message whose header is `parts`."""
    return frames.whole(FrameKind.WHOLE, msgpack.packb(parts))


async def replies(other: Stranger) -> wire.Envelope:
    """The next message for a stranger."""
    kind, data = await other.hear()
    assert kind == FrameKind.WHOLE
    return wire.unpack_envelope(data)


@pytest.mark.parametrize(
    ("fields", "error"),
    [
        (["nonsense"], UnknownMessage),
        ([], UnknownMessage),
        ([None], UnknownMessage),
        (["hello", 1, "p", b"n" * 32], UnknownMessage),
        (["alive", "text"], Malformed),
        (["alive", KEY[1:]], Malformed),
        (["alive", KEY], UnknownMessage),  # which nobody answers here
    ],
)
async def test_a_call_that_makes_no_sense_ends_that_call_only(fields: list[Any], error: type[ProtocolError]) -> None:
    async with linked() as (_, far, link), stranger(far.address) as other:
        await other.prove()
        other.say(header(0, 7, 1.0, *fields), header(0, 8, 1.0, "echo"))
        told = [await replies(other) for _ in range(2)]
        by_call = {envelope.call: envelope for envelope in told}
        assert by_call[7].kind is Kind.ERROR
        assert wire.read_body(by_call[7]).code == error.code
        assert by_call[8].kind is Kind.REPLY
        await link.call(wire.Echo(), timeout=WAIT)


@pytest.mark.parametrize(
    "data",
    [
        header(0, 1, math.nan, "echo"),
        header(0, 1, -1.0, "echo"),
        header(0, 1, 1e9, "echo"),
        header(0, -1, 1.0, "echo"),
        header(0, "1", 1.0, "echo"),
        header(9, 1, 1.0, "echo"),
        header("0", 1, 1.0, "echo"),
        header(0, 1),
        header(4, 0, 0.0, "nonsense"),
        header(4, 0, 0.0, "close", KEY[1:]),
        header(4, 0, 0.0, "close", KEY),  # which nobody listens to here
        header(0, 1, 1.0, "alive", KEY) * 2,
        frames.whole(FrameKind.WHOLE, b"\xc1"),
        frames.whole(FrameKind.WHOLE, b""),
        frames.whole(FrameKind.WHOLE, b"\x93\x00\x01" + b"\x91" * 1000 + b"\x00"),
        frames.whole(FrameKind.WHOLE, b"\x91" * 5000),
    ],
)
async def test_what_belongs_to_no_call_ends_the_connection_only(data: bytes) -> None:
    async with linked() as (_, far, link), stranger(far.address) as other:
        handler = Handler(far)
        await other.prove()
        other.say(header(0, 100, 1.0, "echo"))
        assert (await replies(other)).call == 100
        other.say(data)
        assert await other.told() in (Malformed.code, UnknownMessage.code)
        handler.go.set()
        await link.call(wire.Echo(), timeout=WAIT)


async def test_answers_to_nothing_are_dropped() -> None:
    async with linked() as (_, far, _), stranger(far.address) as other:
        await other.prove()
        other.say(header(1, 5, 0.0, "done"), header(2, 5, 0.0, "busy", "", ""), header(3, 5, 0.0))
        other.say(header(0, 1, 1.0, "echo"))
        assert (await replies(other)).call == 1


async def test_an_answer_that_makes_no_sense_fails_its_call_only() -> None:
    async with listening() as listener:
        near = Rpc(TcpTransport(Identity.generate()))
        link = await near.connect(listener.identity.peer, [listener.address])
        inbox = await listener.next()
        calls = [asyncio.create_task(link.call(wire.Echo(), timeout=WAIT)) for _ in range(3)]
        numbers = [wire.unpack_envelope((await inbox.next())[0]).call for _ in calls]
        answers = (["alive", 5], [2, 2], ["done"])
        for kind, number, fields in zip((1, 2, 1), numbers, answers, strict=True):
            assert inbox.connection.try_send(msgpack.packb([kind, number, 0.0, *fields]), ())
        for call in calls[:2]:
            with pytest.raises(Malformed) as caught:
                await call
            assert caught.value.peer == listener.identity.peer
        assert (await calls[2])[0] == wire.Done()
        await near.close()


async def test_an_error_of_a_newer_version_is_an_error() -> None:
    async with listening() as listener:
        near = Rpc(TcpTransport(Identity.generate()))
        link = await near.connect(listener.identity.peer, [listener.address])
        inbox = await listener.next()
        call = asyncio.create_task(link.call(wire.Echo(), timeout=WAIT))
        number = wire.unpack_envelope((await inbox.next())[0]).call
        assert inbox.connection.try_send(msgpack.packb([2, number, 0.0, "on-fire", "it burns", ""]), ())
        with pytest.raises(RemoteError, match="it burns"):
            await call
        await near.close()


async def test_who_asks_and_does_not_read_is_sent_away(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rpc, "MAX_CALLS", 4)
    monkeypatch.setattr(rpc, "MAX_UNTOLD", 16)
    async with linked() as (_, far, link), stranger(far.address) as other:
        await other.prove()
        other.say(header(0, 1, 1.0, "echo"))
        await replies(other)
        theirs = far._links[other.identity.peer]  # type: ignore[index]
        other.writer.transport.pause_reading()  # type: ignore[attr-defined]
        numbers = iter(range(2, 1 << 30))
        async with asyncio.timeout(WAIT):
            while theirs.error is None:
                other.say(*(header(0, next(numbers), 1.0, "nonsense" * 8) for _ in range(500)))
                await asyncio.sleep(0)
        assert type(theirs.error) is ProtocolError
        assert "does not read" in str(theirs.error)
        await link.call(wire.Echo(), timeout=WAIT)


# --- links ---------------------------------------------------------------------------------------------------------


async def test_callers_at_the_same_time_share_one_dial() -> None:
    async with listening() as listener:
        near = Rpc(TcpTransport(Identity.generate()))
        links = await asyncio.gather(*(near.connect(listener.identity.peer, [listener.address]) for _ in range(5)))
        assert len(set(map(id, links))) == 1
        await listener.next()
        assert listener.arrived.empty()
        await near.close()


async def test_a_lost_link_fails_what_waits_and_cancels_what_runs() -> None:
    async with linked() as (near, far, link):
        handler = Handler(far)
        lost: list[Link] = []
        link.watch(lost.append)
        call = asyncio.create_task(link.call(wire.KeepAlive(KEY), timeout=WAIT))
        await soon(handler.started.acquire())
        far._links[near.peer].close(NoRoom("go away"))
        with pytest.raises(NoRoom, match="go away"):
            await call
        await soon(handler.cancelled.acquire())
        assert lost == [link]
        with pytest.raises(NoRoom):
            await link.call(wire.Echo(), timeout=WAIT)
        again = await near.connect(far.peer, [far.address])
        assert again is not link
        await again.call(wire.Echo(), timeout=WAIT)


async def test_a_silent_link_is_dialled_past() -> None:
    async with linked() as (near, far, link):
        Handler(far)
        lost: list[Link] = []
        link.watch(lost.append)
        with pytest.raises(DeadlineExceeded):
            await link.call(wire.KeepAlive(KEY), timeout=0.05)
        again = await near.connect(far.peer, [far.address])
        assert again is not link
        await link.call(wire.Echo(), timeout=WAIT)  # who has it may use it, should it live after all
        assert await near.connect(far.peer, []) is again
        link.unwatch(lost.append)
        with pytest.raises(Unreachable):
            await link.call(wire.Echo(), timeout=WAIT)  # nobody has it any more
        await again.call(wire.Echo(), timeout=WAIT)


async def test_a_link_that_was_silent_and_lives_is_the_link_again() -> None:
    async with linked() as (near, far, link):
        Handler(far)
        with pytest.raises(DeadlineExceeded):
            await link.call(wire.KeepAlive(KEY), timeout=0.05)
        await link.call(wire.Echo(), timeout=WAIT)
        assert await near.connect(far.peer, []) is link


async def test_a_large_call_on_a_link_that_is_lost_fails() -> None:
    async with linked() as (near, far, link):
        calls = [asyncio.create_task(link.call(wire.Echo(), [bytes(64 * MIB)], timeout=WAIT)) for _ in range(3)]
        await link.call(wire.Echo(), timeout=WAIT)
        far._links[near.peer].close()
        for call in calls:
            with pytest.raises(Unreachable):
                await call


async def test_a_dial_that_fails_says_why_and_is_tried_anew() -> None:
    async with listening() as listener:
        near = Rpc(TcpTransport(Identity.generate()))
        with pytest.raises(WrongKey):
            await near.connect(Identity.generate().peer, [listener.address])
        with pytest.raises(Unreachable):
            await near.connect(listener.identity.peer, [])
        await near.connect(listener.identity.peer, [listener.address])
        await near.close()
        with pytest.raises(Closed):
            await near.connect(Identity.generate().peer, [listener.address])


async def test_telling_a_peer_without_a_link_does_nothing() -> None:
    heard: asyncio.Queue[bytes] = asyncio.Queue()
    async with linked() as (near, far, _):
        far.listen(wire.CloseSession, lambda link, message, body: heard.put_nowait(message.session))
        near.tell(Identity.generate().peer, wire.CloseSession(KEY))
        near.tell(far.peer, wire.CloseSession(KEY))
        assert await soon(heard.get()) == KEY


async def test_closing_ends_calls_handlers_and_background_work() -> None:
    far = Rpc(theirs := TcpTransport(Identity.generate()))
    near = Rpc(TcpTransport(Identity.generate()))
    link = await near.connect(far.peer, [await theirs.listen(ANYWHERE, far.accept)])
    handler = Handler(far)
    call = asyncio.create_task(link.call(wire.KeepAlive(KEY), timeout=WAIT))
    forever = far.spawn(asyncio.Event().wait())
    await soon(handler.started.acquire())
    await soon(far.close())
    assert forever.cancelled()
    assert not handler.cancelled.locked()
    with pytest.raises(Unreachable):
        await call
    await near.close()
    await near.close()
