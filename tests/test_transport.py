"""Connections over real sockets: who proves what to whom, what goes between what, and how they end."""

from __future__ import annotations

import asyncio
import os
import socket
import ssl
import struct
from collections.abc import Awaitable, Callable
from unittest.mock import Mock

import pytest
from dataplane import ANYWHERE, WAIT, Inbox, Stranger, connected, listening, stranger

from swarm import wire
from swarm.errors import (
    Closed,
    DeadlineExceeded,
    Malformed,
    Oversized,
    PortInUse,
    ProtocolError,
    Unreachable,
    UsageError,
    WrongKey,
)
from swarm.identity import Identity
from swarm.links import frames
from swarm.links.connection import Limits, TcpConnection
from swarm.links.frames import CHUNK, MAX_STREAMS, FrameKind
from swarm.transport import TcpTransport
from swarm.types import Address

pytestmark = [pytest.mark.both_loops, pytest.mark.usefixtures("nothing_left")]

QUICK = Limits(handshake=0.3, frame=0.2, linger=0.3)
MIB = 1 << 20


def head(kind: int, stream: int = 0, header: int = 0, body: int = 0) -> bytes:
    """A frame's head, right or wrong."""
    return struct.pack(">B3xIII", kind, stream, header, body)


# --- who is there --------------------------------------------------------------------------------------------------


async def test_both_sides_know_each_other_by_their_keys() -> None:
    async with listening() as listener:
        dialler = TcpTransport(Identity.generate())
        connection = await dialler.dial(listener.identity.peer, [listener.address])
        inbox = await listener.next()
        assert connection.peer == listener.identity.peer
        assert inbox.connection.peer == dialler.peer
        await dialler.close()
        assert isinstance(await inbox.end(), Unreachable)


async def test_a_listener_with_the_wrong_key_is_told_nothing() -> None:
    heard: asyncio.Future[bytes] = asyncio.get_running_loop().create_future()

    async def impostor(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write(frames.whole(FrameKind.HANDSHAKE, wire.pack(wire.Hello(1, wanted, b"n" * 32))))
        heard.set_result(await reader.read())
        writer.close()

    wanted = Identity.generate().peer
    context = Identity.generate().server_context()
    server = await asyncio.start_server(impostor, "127.0.0.1", 0, ssl=context)
    dialler = TcpTransport(Identity.generate())
    with pytest.raises(WrongKey, match="was dialled") as caught:
        await dialler.dial(wanted, [Address("127.0.0.1", server.sockets[0].getsockname()[1])])
    assert caught.value.peer == wanted
    assert await asyncio.wait_for(heard, WAIT) == b""
    await dialler.close()
    server.close()
    await server.wait_closed()


async def test_the_next_address_is_tried_where_one_has_the_wrong_key() -> None:
    async with listening() as wrong, listening() as right:
        dialler = TcpTransport(Identity.generate())
        connection = await dialler.dial(right.identity.peer, [wrong.address, right.address])
        assert connection.peer == right.identity.peer
        assert wrong.arrived.empty()
        await dialler.close()


async def test_nobody_there() -> None:
    dialler = TcpTransport(Identity.generate())
    peer = Identity.generate().peer
    with socket.create_server(("127.0.0.1", 0)) as taken:
        free = Address("127.0.0.1", taken.getsockname()[1])
    for addresses in ([], [free], [free, Address("no.such.host.invalid", 1)]):
        with pytest.raises(Unreachable) as caught:
            await dialler.dial(peer, addresses)
        assert caught.value.peer == peer
        assert all(str(address) in str(caught.value) for address in addresses)
    await dialler.close()
    with pytest.raises(Closed):
        await dialler.dial(peer, [free])


async def _false_signature(stranger: Stranger) -> None:
    await stranger.greeted()
    proof = wire.Proof(stranger.identity.peer, b"s" * 64)
    stranger.say(frames.whole(FrameKind.HANDSHAKE, wire.pack(proof)))


async def _for_another(stranger: Stranger) -> None:
    hello = await stranger.greeted()
    proof = wire.Proof(Identity.generate().peer, stranger.identity.sign(b"shoal dial 1\0" + hello.nonce))
    stranger.say(frames.whole(FrameKind.HANDSHAKE, wire.pack(proof)))


async def _no_name(stranger: Stranger) -> None:
    stranger.say(frames.whole(FrameKind.HANDSHAKE, wire.pack(wire.Proof("nobody", b"s" * 64))))
    await stranger.greeted()


async def _hello(stranger: Stranger) -> None:
    hello = await stranger.greeted()
    stranger.say(frames.whole(FrameKind.HANDSHAKE, wire.pack(hello)))


async def _a_call(stranger: Stranger) -> None:
    await stranger.greeted()
    stranger.say(frames.whole(FrameKind.WHOLE, wire.pack_envelope(wire.Kind.REQUEST, 1, 1.0, wire.Echo())))


async def _garbage(stranger: Stranger) -> None:
    await stranger.greeted()
    stranger.say(b"GET / HTTP/1.1\r\nHost: x\r\n\r\n")


async def _long(stranger: Stranger) -> None:
    await stranger.greeted()
    stranger.say(head(FrameKind.HANDSHAKE, 0, 1 << 20))


async def _no_message(stranger: Stranger) -> None:
    await stranger.greeted()
    stranger.say(frames.whole(FrameKind.HANDSHAKE, b"\xc1"))


async def _silence(stranger: Stranger) -> None:
    await stranger.greeted()


async def _drip(stranger: Stranger) -> None:
    await stranger.greeted()
    stranger.say(head(FrameKind.HANDSHAKE, 0, 100)[:3])


@pytest.mark.parametrize(
    ("behave", "code"),
    [
        (_false_signature, WrongKey.code),
        (_for_another, WrongKey.code),
        (_no_name, Malformed.code),
        (_hello, Malformed.code),
        (_a_call, Malformed.code),
        (_garbage, Malformed.code),
        (_long, Oversized.code),
        (_no_message, Malformed.code),
        (_silence, DeadlineExceeded.code),
        (_drip, DeadlineExceeded.code),
    ],
)
async def test_a_dialler_that_does_not_prove_itself_is_sent_away_by_name(
    behave: Callable[[Stranger], Awaitable[None]], code: str
) -> None:
    async with listening(QUICK) as listener, stranger(listener.address) as other:
        await behave(other)
        assert await other.told() == code
        assert listener.arrived.empty()


@pytest.mark.parametrize("data", [b"", b"\x16\x03", b"GET / HTTP/1.1\r\n\r\n", os.urandom(100_000)])
async def test_who_speaks_no_tls_is_sent_away(data: bytes) -> None:
    async with listening(QUICK) as listener:
        reader, writer = await asyncio.open_connection(listener.address.host, listener.address.port)
        writer.write(data)
        async with asyncio.timeout(WAIT):
            said = await reader.read()
        assert said == b"" or said.startswith(b"\x15")  # an alert of TLS
        writer.close()
        await writer.wait_closed()
        assert listener.arrived.empty()


async def test_an_older_tls_is_refused() -> None:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.check_hostname = False
    context.verify_mode = ssl.CERT_NONE
    context.maximum_version = ssl.TLSVersion.TLSv1_2
    async with listening() as listener:
        with pytest.raises(ssl.SSLError):
            await asyncio.open_connection(listener.address.host, listener.address.port, ssl=context, server_hostname="")


@pytest.mark.parametrize("answer", [b"", b"HTTP/1.1 400 Bad Request\r\n\r\n"])
async def test_a_listener_that_speaks_no_tls_is_unreachable(answer: bytes) -> None:
    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write(answer)
        await reader.read()
        writer.close()

    server = await asyncio.start_server(serve, "127.0.0.1", 0)
    dialler = TcpTransport(Identity.generate(), QUICK)
    with pytest.raises(Unreachable):
        await dialler.dial(Identity.generate().peer, [Address("127.0.0.1", server.sockets[0].getsockname()[1])])
    await dialler.close()
    server.close()
    await server.wait_closed()


async def test_a_stranger_at_the_door_holds_up_nobody() -> None:
    async with listening() as listener:
        silent = [await asyncio.open_connection(listener.address.host, listener.address.port) for _ in range(20)]
        dialler = TcpTransport(Identity.generate())
        await dialler.dial(listener.identity.peer, [listener.address])
        await listener.next()
        await dialler.close()
        await listener.transport.close()  # does not wait for their handshake
        for reader, writer in silent:
            assert await asyncio.wait_for(reader.read(), WAIT) == b""
            writer.close()
            await writer.wait_closed()


async def test_more_connections_than_the_limit_are_refused() -> None:
    async with listening(Limits(connections=2)) as listener:
        diallers = [TcpTransport(Identity.generate()) for _ in range(3)]
        for dialler in diallers[:2]:
            await dialler.dial(listener.identity.peer, [listener.address])
        with pytest.raises(Unreachable):
            await diallers[2].dial(listener.identity.peer, [listener.address])
        inbox = await listener.next()
        await diallers[0].close()
        await inbox.end()
        async with asyncio.timeout(WAIT):
            while not await _reaches(diallers[2], listener.identity.peer, listener.address):
                continue
        for dialler in diallers[1:]:
            await dialler.close()


async def _reaches(dialler: TcpTransport, peer: str, address: Address) -> bool:
    try:
        await dialler.dial(peer, [address])  # type: ignore[arg-type]
    except Unreachable:
        return False
    return True


async def test_where_somebody_listens_already() -> None:
    async with listening() as listener:
        other = TcpTransport(Identity.generate())
        with pytest.raises(PortInUse, match="--listen"):
            await other.listen(listener.address, lambda _: pytest.fail("nobody comes"))
        with pytest.raises(UsageError, match="cannot listen"):
            await other.listen(Address("192.0.2.1", 0), lambda _: pytest.fail("nobody comes"))
        await other.close()


# --- messages ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [0, 1, 1200, frames.WHOLE_LIMIT, frames.WHOLE_LIMIT + 1, 5 * MIB + 3])
async def test_messages_of_any_size_come_as_they_went(size: int) -> None:
    body = os.urandom(size)
    async with connected() as (near, far):
        for sender, receiver in ((near, far), (far, near)):
            await sender.connection.send(b"header", [body[: size // 3], body[size // 3 :]])
            header, came = await receiver.next()
            assert (header, bytes(came)) == (b"header", body)


async def test_small_messages_keep_their_order() -> None:
    async with connected() as (near, far):
        await asyncio.gather(*(near.connection.send(b"%d" % number, [bytes(60_000)]) for number in range(200)))
        assert [int((await far.next())[0]) for _ in range(200)] == list(range(200))


async def test_a_small_message_takes_one_write_to_the_socket(monkeypatch: pytest.MonkeyPatch) -> None:
    async with connected() as (near, far):
        connection, written = near.connection, list[int]()
        assert isinstance(connection, TcpConnection)
        socket_ = connection._transport
        assert socket_ is not None

        def write(data: bytes) -> None:
            written.append(len(data))
            socket_.write(data)

        monkeypatch.setattr(connection, "_transport", Mock(wraps=socket_, write=write))
        await connection.send(b"header", [bytes(2304), bytes(64)])
        assert len((await far.next())[1]) == 2304 + 64
        assert len(written) == 1
        monkeypatch.undo()


async def test_a_large_message_does_not_hold_up_small_ones() -> None:
    async with connected() as (near, far):
        large = asyncio.create_task(near.connection.send(b"large", [bytes(64 * MIB)]))
        order = []
        for number in range(8):
            await near.connection.send(b"%d" % number, [b"small"])
            order.append((await far.next())[0])  # there and seen before the next is sent
        assert order == [b"%d" % number for number in range(8)]  # and before the large one was there
        assert len((await far.next())[1]) == 64 * MIB
        await large


async def test_large_messages_take_turns() -> None:
    async with connected() as (near, far):
        first = asyncio.create_task(near.connection.send(b"long", [bytes(32 * MIB)]))
        await asyncio.sleep(0)
        await near.connection.send(b"short", [bytes(MIB)])
        assert not first.done()
        assert [(await far.next())[0] for _ in range(2)] == [b"short", b"long"]
        await first


async def test_more_large_messages_than_streams_wait_for_each_other() -> None:
    async with connected() as (near, far):
        sends = [near.connection.send(b"%d" % number, [bytes(2 * CHUNK)]) for number in range(3 * MAX_STREAMS)]
        await asyncio.gather(*sends)
        assert {int((await far.next())[0]) for _ in sends} == set(range(3 * MAX_STREAMS))


async def test_more_bytes_than_the_other_side_takes_wait_for_each_other() -> None:
    async with connected(Limits(body=4 * MIB)) as (near, far):
        await asyncio.gather(*(near.connection.send(b"", [bytes(3 * MIB)]) for _ in range(6)))
        assert [len((await far.next())[1]) for _ in range(6)] == [3 * MIB] * 6


async def test_what_is_too_large_is_refused_here() -> None:
    async with connected() as (near, far):
        with pytest.raises(UsageError, match="too large"):
            await near.connection.send(bytes(wire.MAX_HEADER + 1), [])
        with pytest.raises(UsageError, match="too large"):
            await near.connection.send(b"", [memoryview(bytearray(wire.MAX_BODY + 1))])
        await near.connection.send(b"still", [])
        assert (await far.next())[0] == b"still"


async def test_a_sender_waits_for_a_receiver_that_does_not_read() -> None:
    async with listening() as listener, stranger(listener.address) as other:
        await other.prove()
        inbox = await listener.next()
        connection = inbox.connection
        assert isinstance(connection, TcpConnection)
        other.writer.transport.pause_reading()  # type: ignore[attr-defined]
        small, sent = bytes(50_000), 0
        while connection.try_send(b"small", [small]):
            sent += len(small)
            await asyncio.sleep(0)
            assert sent < 64 * MIB
        waiting = [asyncio.create_task(connection.send(b"", [bytes(size)])) for size in (100, MIB, 8 * MIB)]
        for _ in range(100):
            await asyncio.sleep(0)
        assert not any(task.done() for task in waiting)
        assert not connection.try_send(b"", [])
        assert connection._transport is not None
        assert connection._transport.get_write_buffer_size() <= 8 * CHUNK
        other.writer.transport.resume_reading()  # type: ignore[attr-defined]
        drain = asyncio.create_task(other.reader.readexactly(sent + 9 * MIB))
        async with asyncio.timeout(WAIT):
            await asyncio.gather(*waiting, drain)


async def test_a_message_that_is_given_up_hurts_no_other() -> None:
    async with connected() as (near, far):
        given_up = asyncio.create_task(near.connection.send(b"given up", [bytes(64 * MIB)]))
        await near.connection.send(b"first", [])
        await far.next()
        assert not given_up.done()
        given_up.cancel()
        await asyncio.wait([given_up])
        assert given_up.cancelled()
        await near.connection.send(b"large", [bytes(MIB)])
        assert (await far.next())[0] == b"large"
        connection = far.connection
        assert isinstance(connection, TcpConnection)
        assert not connection._reader.waiting


# --- what no correct peer sends ------------------------------------------------------------------------------------

SPOILED = [
    (b"\x00" * 16, Malformed),
    (b"GET / HTTP/1.1\r\n\r\n", Malformed),
    (head(FrameKind.WHOLE, 0, 0xFFFFFFFF, 0), Oversized),
    (head(FrameKind.WHOLE, 0, 0, 0xFFFFFFFF), Oversized),
    (head(FrameKind.BEGIN, 1, 0, 0xFFFFFFFF), Oversized),
    (head(FrameKind.CHUNK, 5, 0, 10), Malformed),
    (head(FrameKind.RESET, 5), Malformed),
    (frames.begin(1, b"", 10) * 2, Malformed),
    (b"".join(frames.begin(stream, b"", 10) for stream in range(MAX_STREAMS + 1)), Oversized),
    (frames.whole(FrameKind.HANDSHAKE, wire.pack(wire.Proof("again", b"s" * 64))), Malformed),
    (frames.whole(FrameKind.GOODBYE, b"\xc1"), Malformed),
    (frames.whole(FrameKind.GOODBYE, wire.pack(wire.Proof("p", b"s" * 64))), Malformed),
    (frames.whole(FrameKind.WHOLE, b"header")[:-1], DeadlineExceeded),
    (head(FrameKind.WHOLE)[:1], DeadlineExceeded),
    (frames.begin(1, b"", 10), DeadlineExceeded),
    (frames.begin(1, b"", 10) + head(FrameKind.CHUNK, 1, 0, 10) + b"five.", DeadlineExceeded),
]


@pytest.mark.parametrize(("data", "error"), SPOILED)
async def test_bytes_that_no_peer_sends_end_their_connection_only(data: bytes, error: type[ProtocolError]) -> None:
    async with listening(QUICK) as listener, stranger(listener.address) as other:
        dialler = TcpTransport(Identity.generate())
        bystander = await dialler.dial(listener.identity.peer, [listener.address])
        await listener.next()
        await other.prove()
        inbox = await listener.next()
        other.say(frames.whole(FrameKind.WHOLE, b"before"), data)
        assert (await inbox.next())[0] == b"before"
        assert await other.told() == error.code
        ended = await inbox.end()
        assert type(ended) is error
        assert ended.peer == other.identity.peer
        assert not bystander.closed
        await dialler.close()


async def test_a_slow_sender_that_goes_on_is_waited_for() -> None:
    async with listening(Limits(frame=0.3)) as listener, stranger(listener.address) as other:
        await other.prove()
        inbox = await listener.next()
        other.say(frames.begin(1, b"slow", 6))
        for _ in range(6):
            await asyncio.sleep(0.1)  # together longer than a frame may take, but each is a frame
            other.say(head(FrameKind.CHUNK, 1, 0, 1), b"x")
        assert bytes((await inbox.next())[1]) == b"xxxxxx"


async def test_a_truncated_connection_is_lost() -> None:
    async with listening() as listener, stranger(listener.address) as other:
        await other.prove()
        inbox = await listener.next()
        other.say(frames.begin(1, b"", 1000), head(FrameKind.CHUNK, 1, 0, 1000), bytes(400))
        await other.writer.drain()
        with socket.socket(fileno=os.dup(other.writer.get_extra_info("socket").fileno())) as same:
            same.shutdown(socket.SHUT_RDWR)  # the end of TCP, without that of TLS
        assert type(await inbox.end()) is Unreachable
        assert inbox.messages.empty()


# --- the end -------------------------------------------------------------------------------------------------------


async def test_the_other_side_is_told_why() -> None:
    async with connected() as (near, far):
        near.connection.close(Oversized("too much of it"))
        ended = await far.end()
        assert type(ended) is Oversized
        assert "too much of it" in str(ended)
        assert type(await near.end()) is Oversized
        with pytest.raises(Oversized):
            await far.connection.send(b"", [])
        with pytest.raises(Oversized):
            far.connection.try_send(b"", [])


async def test_the_reason_arrives_although_the_other_side_is_in_the_middle_of_sending() -> None:
    async with connected() as (near, far):
        sending = asyncio.create_task(far.connection.send(b"", [bytes(64 * MIB)]))
        await far.connection.send(b"small", [])
        await near.next()  # it went between two chunks
        assert not sending.done()
        near.connection.close(Malformed("enough"))
        assert type(await far.end()) is Malformed
        with pytest.raises(Malformed):
            await sending


async def test_whoever_waits_to_send_is_told_of_the_end() -> None:
    async with listening(QUICK) as listener, stranger(listener.address) as other:
        await other.prove()
        inbox = await listener.next()
        other.writer.transport.pause_reading()  # type: ignore[attr-defined]
        sends = [inbox.connection.send(b"", [bytes(size)]) for size in [64 * MIB, *[100] * 3, *[MIB] * 100]]
        tasks = [asyncio.create_task(send) for send in sends]
        while not (isinstance(inbox.connection, TcpConnection) and inbox.connection._small):
            tasks.append(asyncio.create_task(inbox.connection.send(b"", [bytes(60_000)])))
            await asyncio.sleep(0)
        inbox.connection.close()
        errors = await asyncio.wait_for(asyncio.gather(*tasks, return_exceptions=True), WAIT)
        assert {type(error) for error in errors} <= {Unreachable, type(None)}
        assert isinstance(errors[0], Unreachable)


async def test_closing_twice_and_closing_while_dialled_leaves_nothing() -> None:
    async with listening() as listener:
        dialler = TcpTransport(Identity.generate())
        connection = await dialler.dial(listener.identity.peer, [listener.address])
        connection.close()
        connection.close(Malformed("too late"))
        await dialler.close()
        await dialler.close()
        assert type(await (await listener.next()).end()) is Unreachable


@pytest.mark.parametrize("rounds", [0, 1, 2, 3, 4, 5, 6, 8, 12])
async def test_a_dial_that_is_given_up_leaves_nothing(rounds: int) -> None:
    async with listening() as listener:
        dialler = TcpTransport(Identity.generate())
        task = asyncio.create_task(dialler.dial(listener.identity.peer, [listener.address]))
        for _ in range(rounds):
            await asyncio.sleep(0)
        task.cancel()
        await asyncio.wait([task])
        await dialler.dial(listener.identity.peer, [listener.address])  # goes on, and is accepted after the other
        await dialler.close()


async def test_a_dial_that_comes_through_after_the_end_leaves_nothing(nothing_left: None) -> None:
    """Nobody could close what it had brought."""
    async with listening() as listener:
        dialler = TcpTransport(Identity.generate())
        named = Address("localhost", listener.address.port)  # a name is looked up in a thread: that takes a moment
        dial = asyncio.create_task(dialler.dial(listener.identity.peer, [named]))
        await asyncio.sleep(0)
        await dialler.close()
        with pytest.raises(Closed):
            await asyncio.wait_for(dial, WAIT)


async def test_closing_does_not_wait_for_a_peer_that_does_not_read() -> None:
    async with listening(QUICK) as listener, stranger(listener.address) as other:
        await other.prove()
        inbox = await listener.next()
        other.writer.transport.pause_reading()  # type: ignore[attr-defined]
        with pytest.raises(TimeoutError):
            await asyncio.wait_for(inbox.connection.send(b"", [bytes(64 * MIB)]), 0.1)
        async with asyncio.timeout(WAIT):
            await listener.transport.close()


async def test_messages_before_anybody_listens_are_kept() -> None:
    async with listening() as listener:
        dialler = TcpTransport(Identity.generate())
        connection = await dialler.dial(listener.identity.peer, [listener.address])
        inbox = await listener.next()
        for number in range(50):
            await inbox.connection.send(b"%d" % number, [bytes(10_000)])
        late = Inbox(connection)
        connection.attach(late)
        assert [int((await late.next())[0]) for _ in range(50)] == list(range(50))
        await dialler.close()


async def test_a_receiver_that_objects_closes_the_connection_with_that_name() -> None:
    async with connected() as (near, far):

        def object_to_it(header: bytes, body: memoryview) -> None:
            raise Malformed("not like this")

        far.received = object_to_it  # type: ignore[method-assign]
        await near.connection.send(b"header", [])
        assert type(await near.end()) is Malformed
        assert type(await far.end()) is Malformed
        assert repr(near.connection).endswith("closed>")


async def test_listening_ends_with_the_transport() -> None:
    transport = TcpTransport(Identity.generate())
    address = await transport.listen(ANYWHERE, lambda _: pytest.fail("nobody comes"))
    await transport.close()
    with pytest.raises(OSError, match=r"."):
        await asyncio.open_connection(address.host, address.port)
