"""The only sockets: dial a PeerId, prove who we are, send and receive messages under flow control.

TLS 1.3 over TCP. The dialler compares the key of the listener's certificate with the PeerId it wants before it says
anything; then the listener greets with a nonce, and the dialler signs it with its own key (Python's `ssl` cannot ask
for a self-signed client certificate). After that both sides are equal, and messages go as `swarm.frames` says.
"""

from __future__ import annotations

import asyncio
import logging
import os
import socket
import ssl
from collections import deque
from collections.abc import Callable, Sequence
from typing import Protocol, cast

from swarm import frames, wire
from swarm.errors import (
    Closed,
    DeadlineExceeded,
    Malformed,
    PortInUse,
    ProtocolError,
    RemoteError,
    Unreachable,
    UsageError,
    WrongKey,
    from_wire,
    to_wire,
)
from swarm.frames import Buffer, FrameKind, FrameReader, Received
from swarm.identity import Identity, client_context, peer_id_of_certificate, public_key_of, verify
from swarm.types import Address, PeerId

log = logging.getLogger(__name__)

HANDSHAKE_TIMEOUT = 10.0  # seconds for TLS and for our own greeting, each
FRAME_TIMEOUT = 30.0  # seconds in which a begun frame must be complete
MAX_CONNECTIONS = 2048
_HIGH_WATER = 2 * frames.CHUNK  # bytes that wait for the kernel; few, so that a small message waits for few
_NOTSENT_LOWAT = 256 * 1024  # bytes that the kernel takes beyond what is on its way
_PROOF_CONTEXT = b"shoal dial 1\0"


class Receiver(Protocol):
    """Who is told what comes in on a connection. Both are called from the loop and must not block."""

    def received(self, header: bytes, body: memoryview) -> None:
        """A message has come in completely. May raise `ProtocolError`, which closes the connection with that name."""

    def lost(self, error: RemoteError) -> None:
        """The connection is gone: told once, after the last message."""


class Connection(Protocol):
    """A way to one peer, over sockets or in memory."""

    peer: PeerId

    def attach(self, receiver: Receiver) -> None:
        """Tell `receiver` what comes in, from the first message on."""

    def try_send(self, header: bytes, body: Sequence[Buffer]) -> bool:
        """Send a small message at once, or say that it would have to wait."""

    async def send(self, header: bytes, body: Sequence[Buffer]) -> None:
        """Send a message; returns when its last byte is on its way. Raises `Unreachable`, `Oversized`."""

    def close(self, error: RemoteError | None = None) -> None:
        """End it, telling the other side why."""


class Transport(Protocol):
    """How connections come to be."""

    peer: PeerId

    async def dial(self, peer: PeerId, addresses: Sequence[Address]) -> Connection:
        """Connect to `peer`. Raises `Unreachable` or `WrongKey`."""

    async def close(self) -> None:
        """End all connections and stop listening."""


class TcpConnection(asyncio.BufferedProtocol):
    """One TLS connection, from the first byte of the handshake to the last."""

    peer = PeerId("")  # known once `ready` is done

    def __init__(self, owner: TcpTransport, wanted: PeerId | None) -> None:
        self._owner = owner
        self._wanted = wanted  # whom we dial; None for the listener's side
        self._loop = asyncio.get_running_loop()
        self._reader = FrameReader()
        self._receiver: Receiver | None = None
        self._early: list[Received] = []
        self._transport: asyncio.Transport | None = None
        self._paused = False
        self._urgent: deque[asyncio.Future[None]] = deque()  # small messages that wait for room, before
        self._bulk: deque[asyncio.Future[None]] = deque()  # the next chunk of a large one
        self._bulk_turn = asyncio.Lock()  # fair: large messages take turns chunk by chunk
        self._streams = 0
        self._nonce = os.urandom(32)
        self._error: RemoteError | None = None
        self._watch: asyncio.TimerHandle | None = None
        self._watched_frames = -1
        self.ready: asyncio.Future[None] = self._loop.create_future()
        self.ready.add_done_callback(lambda future: future.cancelled() or future.exception())  # never "not retrieved"

    # --- sending ---------------------------------------------------------------------------------------------------

    def try_send(self, header: bytes, body: Sequence[Buffer]) -> bool:
        """Send a small message at once; False where it is large or the way is not free."""
        if self._error is not None or self._transport is None:
            raise self._error or Unreachable("not connected", self.peer)
        if self._paused or len(header) + sum(map(len, body)) > frames.WHOLE_LIMIT:
            return False
        self._transport.write(frames.whole(FrameKind.WHOLE, header, body))
        return True

    async def send(self, header: bytes, body: Sequence[Buffer]) -> None:
        """Send a message of any size; small ones go between the chunks of large ones."""
        size = sum(map(len, body))
        if len(header) > wire.MAX_HEADER or size > wire.MAX_BODY:
            raise UsageError(f"a message of {len(header)} + {size} bytes is too large to send")
        if len(header) + size > frames.WHOLE_LIMIT:
            await self._send_large(header, body, size)
            return
        while not self.try_send(header, body):
            await self._room(self._urgent)

    async def _send_large(self, header: bytes, body: Sequence[Buffer], size: int) -> None:
        self._streams += 1
        stream = self._streams & 0xFFFFFFFF
        await self._write_in_turn((frames.begin(stream, header, size),))
        try:
            for parts in frames.chunks(stream, body):
                await self._write_in_turn(parts)
        except asyncio.CancelledError:
            # The other side waits for the rest of this stream, and nothing else can end it.
            self.close(Unreachable("a large message was given up in the middle"))
            raise

    async def _write_in_turn(self, parts: Sequence[Buffer]) -> None:
        async with self._bulk_turn:
            while self._paused or self._error is not None:
                await self._room(self._bulk)
            assert self._transport is not None
            self._transport.writelines(parts)

    async def _room(self, waiters: deque[asyncio.Future[None]]) -> None:
        if self._error is not None:
            raise self._error
        waiter = self._loop.create_future()
        waiters.append(waiter)
        await waiter

    def pause_writing(self) -> None:
        self._paused = True

    def resume_writing(self) -> None:
        self._paused = False
        for waiters in (self._urgent, self._bulk):
            while waiters:
                if not (waiter := waiters.popleft()).done():
                    waiter.set_result(None)

    # --- receiving -------------------------------------------------------------------------------------------------

    def get_buffer(self, sizehint: int) -> memoryview:
        return self._reader.buffer()

    def buffer_updated(self, nbytes: int) -> None:
        try:
            for message in self._reader.advance(nbytes):
                if self._error is not None:
                    return
                self._take(message)
        except RemoteError as error:
            self.close(error)

    def _take(self, message: Received) -> None:
        if message.kind is FrameKind.GOODBYE:
            goodbye = wire.unpack(message.header)
            if not isinstance(goodbye, wire.Goodbye):
                raise Malformed("a goodbye that is none")
            self._fail(from_wire(goodbye.code, f"the other side closed: {goodbye.message}", self.peer))
        elif not self.ready.done():
            self._handshake(message)
        elif message.kind is FrameKind.HANDSHAKE:
            raise Malformed("a second handshake")
        elif self._receiver is None:
            self._early.append(message)
        else:
            self._receiver.received(message.header, message.body)

    def attach(self, receiver: Receiver) -> None:
        """Tell `receiver` what comes in from now on."""
        self._receiver = receiver
        early, self._early = self._early, []
        for message in early:
            receiver.received(message.header, message.body)
        if self._error is not None:
            receiver.lost(self._error)

    # --- the handshake ---------------------------------------------------------------------------------------------

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast(asyncio.Transport, transport)  # uvloop's is one, but does not say so
        self._transport.set_write_buffer_limits(high=_HIGH_WATER, low=_HIGH_WATER // 4)
        _tune(transport.get_extra_info("socket"))
        self._watch = self._loop.call_later(HANDSHAKE_TIMEOUT, self._watch_handshake)
        try:
            self._greet(self._transport)
        except RemoteError as error:
            self._fail(error)  # without a goodbye: who holds the wrong key is told nothing

    def _greet(self, transport: asyncio.Transport) -> None:
        if self._wanted is None:
            self._owner.accepted(self)
            hello = wire.Hello(wire.PROTOCOL_VERSION, self._owner.peer, self._nonce)
            transport.write(frames.whole(FrameKind.HANDSHAKE, wire.pack(hello)))
            return
        certificate = transport.get_extra_info("ssl_object").getpeercert(binary_form=True)
        found = peer_id_of_certificate(certificate or b"")
        if found != self._wanted:
            raise WrongKey(f"{self._wanted} was dialled, {found} answers", self._wanted)

    def _handshake(self, received: Received) -> None:
        message = wire.unpack(received.header)
        if self._wanted is not None and isinstance(message, wire.Hello):
            self._answer(message)
        elif self._wanted is None and isinstance(message, wire.Proof):
            public_key_of(message.peer)
            verify(message.peer, _proof(self._owner.peer, self._nonce), message.signature)
            self.peer = PeerId(message.peer)
        else:
            raise Malformed(f"{type(message).__name__} at the wrong time")
        self.ready.set_result(None)
        self._watch_frames()

    def _answer(self, hello: wire.Hello) -> None:
        assert self._wanted is not None
        assert self._transport is not None
        if hello.version != wire.PROTOCOL_VERSION:
            raise ProtocolError(f"protocol {hello.version} there, {wire.PROTOCOL_VERSION} here", self._wanted)
        self.peer = self._wanted
        signature = self._owner.identity.sign(_proof(self._wanted, hello.nonce))
        proof = wire.Proof(self._owner.peer, signature)
        self._transport.write(frames.whole(FrameKind.HANDSHAKE, wire.pack(proof)))

    # --- the end ---------------------------------------------------------------------------------------------------

    def _watch_handshake(self) -> None:
        if not self.ready.done():
            self.close(DeadlineExceeded(f"no handshake within {HANDSHAKE_TIMEOUT:.0f} s"))

    def _watch_frames(self) -> None:
        """Close on a sender that begins a frame and does not finish it."""
        if self._watch is not None:
            self._watch.cancel()
        if self._error is not None:
            return
        if self._reader.waiting and self._reader.frames == self._watched_frames:
            self.close(DeadlineExceeded(f"a frame was begun and not finished within {FRAME_TIMEOUT:.0f} s"))
            return
        self._watched_frames = self._reader.frames if self._reader.waiting else -1
        self._watch = self._loop.call_later(FRAME_TIMEOUT, self._watch_frames)

    def close(self, error: RemoteError | None = None) -> None:
        """End the connection, telling the other side why. A second call does nothing."""
        if self._error is not None:
            return
        if error is not None and self._transport is not None and not self._transport.is_closing():
            code, message = to_wire(error)
            self._transport.write(frames.whole(FrameKind.GOODBYE, wire.pack(wire.Goodbye(code, message[:2048]))))
        self._fail(error or Unreachable("the connection was closed", self.peer))

    def connection_lost(self, exc: Exception | None) -> None:
        self._fail(Unreachable(f"the connection was lost{f': {exc}' if exc else ''}", self.peer))
        self._owner.forget(self)

    def _fail(self, error: RemoteError) -> None:
        if self._error is not None:
            return
        self._error = error
        error.peer = error.peer or self.peer
        if self._watch is not None:
            self._watch.cancel()
        if self._transport is not None:
            self._transport.close()
        if not self.ready.done():
            self.ready.set_exception(error)
        for waiter in (*self._urgent, *self._bulk):
            if not waiter.done():
                waiter.set_exception(error)
        if self._receiver is not None:
            self._receiver.lost(error)

    def abort(self) -> None:
        """Drop the socket now, whatever has not been sent."""
        if self._transport is not None:
            self._transport.abort()

    def __repr__(self) -> str:
        state = "closed" if self._error else "ready" if self.ready.done() else "handshaking"
        return f"<TcpConnection {self.peer or '?'} {state}>"


class TcpTransport:
    """Dials and listens with one identity."""

    def __init__(self, identity: Identity) -> None:
        self.identity = identity
        self.peer = identity.peer
        self._client_context: ssl.SSLContext = client_context()
        self._server: asyncio.Server | None = None
        self._accept: Callable[[Connection], Receiver] | None = None
        self._connections: set[TcpConnection] = set()
        self._gone = asyncio.Event()
        self._closed = False

    async def listen(self, address: Address, accept: Callable[[Connection], Receiver]) -> Address:
        """Take connections at `address` (port 0 for any free one) and give each, once proven, to `accept`.

        Returns where it listens. Raises `PortInUse` or `UsageError`.
        """
        self._accept = accept
        loop = asyncio.get_running_loop()
        try:
            self._server = await loop.create_server(
                lambda: TcpConnection(self, None),
                address.host,
                address.port,
                ssl=self.identity.server_context(),
                ssl_handshake_timeout=HANDSHAKE_TIMEOUT,
            )
        except OSError as error:
            raise _cannot_listen(address, error) from None
        return Address(address.host, self._server.sockets[0].getsockname()[1])

    def accepted(self, connection: TcpConnection) -> None:
        """A listener's new connection, TLS done, not yet proven."""
        self._connections.add(connection)
        if len(self._connections) > MAX_CONNECTIONS:
            raise Unreachable(f"more than {MAX_CONNECTIONS} connections")
        connection.ready.add_done_callback(lambda ready: self._proven(connection, ready))

    def _proven(self, connection: TcpConnection, ready: asyncio.Future[None]) -> None:
        if ready.cancelled() or ready.exception() is not None:
            log.info("connection refused error=%r", str(ready.exception()))
        elif self._accept is not None:
            connection.attach(self._accept(connection))

    async def dial(self, peer: PeerId, addresses: Sequence[Address]) -> TcpConnection:
        """Connect to `peer` at the first address that answers with its key.

        Raises `Unreachable` naming what was tried, or `WrongKey` where somebody else answers.
        """
        failures: list[str] = []
        wrong: WrongKey | None = None
        for address in addresses:
            try:
                return await self._dial(peer, address)
            except WrongKey as error:
                wrong = error
            except (OSError, RemoteError, TimeoutError) as error:
                failures.append(f"{address} ({error or type(error).__name__})")
        raise wrong or Unreachable(f"{peer} cannot be reached at {', '.join(failures) or 'no address'}", peer)

    async def _dial(self, peer: PeerId, address: Address) -> TcpConnection:
        if self._closed:
            raise Closed("the transport is closed")
        async with asyncio.timeout(HANDSHAKE_TIMEOUT):
            _, connection = await asyncio.get_running_loop().create_connection(
                lambda: TcpConnection(self, peer),
                address.host,
                address.port,
                ssl=self._client_context,
                server_hostname="",
                ssl_handshake_timeout=HANDSHAKE_TIMEOUT,
            )
            self._connections.add(connection)
            try:
                await connection.ready
            except asyncio.CancelledError:
                connection.close()
                raise
        return connection

    def forget(self, connection: TcpConnection) -> None:
        """A connection's socket is closed."""
        self._connections.discard(connection)
        if not self._connections:
            self._gone.set()

    async def close(self) -> None:
        """Stop listening and end all connections, within a second even where the other side does not answer."""
        self._closed = True
        if self._server is not None:
            self._server.close()
        for connection in list(self._connections):
            connection.close()
        if self._connections:
            self._gone.clear()
            asyncio.get_running_loop().call_later(0.5, self._abort)
            await self._gone.wait()
        if self._server is not None:
            await self._server.wait_closed()

    def _abort(self) -> None:
        for connection in list(self._connections):
            connection.abort()


def _proof(listener: str, nonce: bytes) -> bytes:
    return _PROOF_CONTEXT + listener.encode() + b"\0" + nonce


def _tune(sock: socket.socket) -> None:
    """No waiting for more bytes, a short queue in the kernel, and dead links are noticed."""
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    for name, value in (("TCP_NOTSENT_LOWAT", _NOTSENT_LOWAT), ("TCP_USER_TIMEOUT", 20_000), ("TCP_KEEPIDLE", 15)):
        if (option := getattr(socket, name, None)) is not None:
            sock.setsockopt(socket.IPPROTO_TCP, option, value)


def _cannot_listen(address: Address, error: OSError) -> Exception:
    if error.errno == 98 or "address already in use" in str(error).lower():
        return PortInUse(f"port {address.port} on {address.host} is in use; choose another with --listen HOST:PORT")
    return UsageError(f"cannot listen on {address}: {error.strerror or error}")
