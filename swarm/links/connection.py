"""One connection: TLS, the proof of who is at each end, messages both ways under flow control, and its end.

The dialler compares the key of the listener's certificate with the PeerId it wants before it says anything; then it
proves its own (`swarm.links.proof`). After that both sides are equal, and messages go as `swarm.links.frames` says.
"""

from __future__ import annotations

import asyncio
import os
import socket
import ssl
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import cast

import numpy as np

from swarm import wire
from swarm.errors import (
    DeadlineExceeded,
    Malformed,
    RemoteError,
    Unreachable,
    UsageError,
    WrongKey,
    from_wire,
    to_wire,
)
from swarm.identity import Identity, peer_id_of_certificate
from swarm.links import frames, proof
from swarm.links.frames import Buffer, FrameKind, FrameReader, Received
from swarm.links.interfaces import Connection, Receiver
from swarm.links.tls import TlsPipe
from swarm.types import PeerId

_READ = 128 * 1024  # bytes taken from the kernel at once: what stays in the processor's cache until it is decrypted
_HIGH_WATER = 3 * frames.CHUNK  # bytes that wait for the kernel; few, so that a small message waits for few
_NOTSENT_LOWAT = 256 * 1024  # bytes that the kernel takes beyond what is on its way


@dataclass(frozen=True, slots=True)
class Limits:
    """How long a connection waits for whom, and how much it takes. Seconds, bytes."""

    handshake: float = 10.0  # for the connection, TLS and our own greeting, together
    frame: float = 30.0  # in which a message that was begun must go on
    linger: float = 1.0  # for the other side to take what was last said
    body: int = wire.MAX_BODY  # of large messages that are on their way in at once
    connections: int = 2048  # of one transport


class TcpConnection(asyncio.BufferedProtocol):
    """One connection, from the first byte to the last.

    Args:
        identity: ours.
        context: for TLS, of the listener's or the dialler's side.
        wanted: whom we dial; None for the listener's side.
        gone: called once the socket is closed.
        accept: called once a dialler has proven itself: who is told what it says.
    """

    peer = PeerId("")  # known once `ready` is done

    def __init__(
        self,
        identity: Identity,
        context: ssl.SSLContext,
        wanted: PeerId | None,
        limits: Limits,
        gone: Callable[[TcpConnection], None],
        accept: Callable[[Connection], Receiver] | None = None,
    ) -> None:
        self._identity = identity
        self._wanted = wanted
        self._limits = limits
        self._gone = gone
        self._accept = accept
        self._loop = asyncio.get_running_loop()
        self._tls = TlsPipe(context, server_side=wanted is None)
        self._raw = np.empty(_READ, np.uint8).data  # not zeroed: pages that are never used cost nothing
        self._reader = FrameReader(limits.body)
        self._receiver: Receiver | None = None
        self._early: list[Received] = []
        self._transport: asyncio.Transport | None = None
        self._may_speak = False  # whether the other side may hear more than TLS of us
        self._paused = False
        self._small: deque[tuple[bytes, asyncio.Future[None]]] = deque()  # wait for room, before
        self._room: asyncio.Future[None] | None = None  # the next chunk of a large one
        self._turn = asyncio.Lock()  # fair: large messages take turns chunk by chunk
        self._streams = frames.StreamBudget(limits.body)
        self._entry = asyncio.Lock()  # fair: large messages that may not begin yet
        self._left: asyncio.Future[None] | None = None  # the first of them waits for another's end
        self._nonce = os.urandom(32)
        self._error: RemoteError | None = None
        self._watch: asyncio.TimerHandle | None = None
        self._watched_frames = -1
        self.ready: asyncio.Future[None] = self._loop.create_future()
        self.ready.add_done_callback(lambda future: future.cancelled() or future.exception())  # never "not retrieved"

    @property
    def opened(self) -> bool:
        """Whether it ever had a socket."""
        return self._transport is not None

    @property
    def closed(self) -> bool:
        """Whether it is over, or about to be."""
        return self._error is not None

    # --- sending ---------------------------------------------------------------------------------------------------

    def try_send(self, header: bytes, body: Sequence[Buffer]) -> bool:
        """Send a small message at once; False where it is large or the way is not free."""
        if self._error is not None:
            raise self._error
        if self._paused or self._small or not frames.is_small(header, body):
            return False
        self._write(frames.whole(FrameKind.WHOLE, header, body))
        return True

    async def send(self, header: bytes, body: Sequence[Buffer]) -> None:
        """Send a message of any size; small ones go between the chunks of large ones."""
        if self.try_send(header, body):
            return
        size = sum(map(len, body))
        if len(header) > wire.MAX_HEADER or size > wire.MAX_BODY:
            raise UsageError(f"a message of {len(header)} + {size} bytes is too large to send")
        if frames.is_small(header, body):
            sent = self._loop.create_future()
            self._small.append((frames.whole(FrameKind.WHOLE, header, body), sent))
            await sent
        else:
            await self._send_large(header, body, size)

    async def _send_large(self, header: bytes, body: Sequence[Buffer], size: int) -> None:
        stream = await self._enter(size)
        begun = False
        try:
            async with self._turn:
                await self._wait_for_room()
                self._write(frames.begin(stream, header, size))
                begun = True
            for head, part in frames.chunks(stream, body):
                async with self._turn:
                    await self._wait_for_room()
                    self._write(head, part)
        except asyncio.CancelledError:
            if begun and self._error is None:
                self._write(frames.reset(stream))  # a few bytes, even where the way is not free
            raise
        finally:
            self._streams.leave(stream)
            if self._left is not None and not self._left.done():
                self._left.set_result(None)

    async def _enter(self, size: int) -> int:
        """Wait until the other side takes one more large message. The stream that it is to go on."""
        async with self._entry:
            while not self._streams.has_room(size):
                self._left = self._waiter()
                await self._left
            return self._streams.enter(size)

    async def _wait_for_room(self) -> None:
        while self._paused or self._error is not None:
            self._room = self._waiter()
            await self._room

    def _waiter(self) -> asyncio.Future[None]:
        if self._error is not None:
            raise self._error
        return self._loop.create_future()

    def _write(self, *parts: Buffer) -> None:
        for part in parts:
            self._tls.write(part)
        self._flush()

    def _flush(self) -> None:
        if self._transport is not None and (data := self._tls.outgoing()):
            self._transport.write(data)

    def pause_writing(self) -> None:
        self._paused = True

    def resume_writing(self) -> None:
        self._paused = False
        while self._small and not self._paused:
            data, sent = self._small.popleft()
            if not sent.done():  # else its sender gave up
                self._write(data)
                sent.set_result(None)
        if not self._paused and self._room is not None and not self._room.done():
            self._room.set_result(None)

    # --- receiving -------------------------------------------------------------------------------------------------

    def get_buffer(self, sizehint: int) -> memoryview:
        return self._raw

    def buffer_updated(self, nbytes: int) -> None:
        if self._error is not None:
            return  # it lingers: what still comes is read only so that what was last said is not lost
        try:
            self._tls.feed(self._raw[:nbytes])
            if self._tls.secure or self._secure():
                self._read()
            self._flush()
        except RemoteError as error:
            self.close(error)

    def _read(self) -> None:
        reader, tls = self._reader, self._tls
        while self._error is None:
            # Between chunks record by record: a chunk's head is one, and the next goes straight to where it belongs.
            count = tls.fill(reader.buffer()) if reader.in_chunk else tls.read_into(reader.buffer())
            if not count:
                break
            for message in reader.advance(count):
                if self._error is None:
                    self._take(message)
        if tls.ended:
            self._fail(Unreachable("the other side closed the connection", self.peer))

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

    def eof_received(self) -> None:
        self._fail(Unreachable("the other side ended the connection", self.peer))

    def attach(self, receiver: Receiver) -> None:
        """Tell `receiver` what comes in from now on."""
        self._receiver = receiver
        early, self._early = self._early, []
        try:
            for message in early:
                receiver.received(message.header, message.body)
        except RemoteError as error:
            self.close(error)
            return
        if self._error is not None:
            receiver.lost(self._error)
        elif self._transport is not None:
            self._transport.resume_reading()

    # --- the handshake ---------------------------------------------------------------------------------------------

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast(asyncio.Transport, transport)  # uvloop's is one, but does not say so
        if self._error is not None:
            self._transport.abort()
            return
        self._transport.set_write_buffer_limits(high=_HIGH_WATER, low=_HIGH_WATER // 4)
        _tune(transport.get_extra_info("socket"))
        self._watch = self._loop.call_later(self._limits.handshake, self._watch_handshake)
        self._secure()
        self._flush()

    def _secure(self) -> bool:
        """Take TLS's handshake a step further, and our own if it is done."""
        if not self._tls.handshake():
            return False
        if self._wanted is None:
            self._may_speak = True
            self._write(frames.whole(FrameKind.HANDSHAKE, wire.pack(proof.greeting(self._identity, self._nonce))))
        else:
            found = peer_id_of_certificate(self._tls.certificate())
            if found != self._wanted:
                raise WrongKey(f"{self._wanted} was dialled, {found} answers", self._wanted)
            self._may_speak = True
        return True

    def _handshake(self, received: Received) -> None:
        message = wire.unpack(received.header)
        if self._wanted is not None and isinstance(message, wire.Hello):
            self.peer = self._wanted
            answer = proof.answer(message, self._identity, self._wanted)
            self._write(frames.whole(FrameKind.HANDSHAKE, wire.pack(answer)))
        elif self._wanted is None and isinstance(message, wire.Proof):
            self.peer = proof.proven(message, self._identity, self._nonce)
        else:
            raise Malformed(f"{type(message).__name__} at the wrong time")
        self.ready.set_result(None)
        self._watch_frames()
        if self._accept is not None:
            self.attach(self._accept(self))
        elif self._transport is not None:
            self._transport.pause_reading()  # until somebody listens

    # --- the end ---------------------------------------------------------------------------------------------------

    def _watch_handshake(self) -> None:
        self.close(DeadlineExceeded(f"no handshake within {self._limits.handshake:.1f} s"))

    def _watch_frames(self) -> None:
        """Close on a sender that begins a frame and does not finish it."""
        if self._watch is not None:
            self._watch.cancel()
        if self._reader.waiting and self._reader.frames == self._watched_frames:
            self.close(DeadlineExceeded(f"a message was begun and did not go on for {self._limits.frame:.1f} s"))
            return
        self._watched_frames = self._reader.frames if self._reader.waiting else -1
        self._watch = self._loop.call_later(self._limits.frame, self._watch_frames)

    @property
    def host(self) -> str:
        """Part of `swarm.links.interfaces.Connection`."""
        name = self._transport.get_extra_info("peername") if self._transport is not None else None
        return str(name[0]) if name else ""

    def close(self, error: RemoteError | None = None) -> None:
        """End the connection, telling the other side why. A second call does nothing."""
        if self._error is not None:
            return
        if error is not None and self._may_speak:
            code, message = to_wire(error)
            self._write(frames.whole(FrameKind.GOODBYE, wire.pack(wire.Goodbye(code, message[:2048]))))
        self._fail(error or Unreachable("the connection was closed", self.peer))

    def connection_lost(self, exc: Exception | None) -> None:
        self._fail(Unreachable(f"the connection was lost{f': {exc}' if exc else ''}", self.peer))
        if self._watch is not None:
            self._watch.cancel()
        self._raw, self._receiver = memoryview(b""), None  # so that nothing of it has to wait for a search for cycles
        self._gone(self)

    def _fail(self, error: RemoteError) -> None:
        if self._error is not None:
            return
        self._error = error
        error.peer = error.peer or self.peer
        if self._watch is not None:
            self._watch.cancel()
        for waiter in (self.ready, self._room, self._left, *(sent for _, sent in self._small)):
            if waiter is not None and not waiter.done():
                waiter.set_exception(error)
        self._small.clear()
        if self._receiver is not None:
            self._receiver.lost(error)
        self._linger()

    def _linger(self) -> None:
        """Send what was last said and read on for a while: closed at once, the kernel would throw it away."""
        if self._transport is None or self._transport.is_closing():
            return
        self._tls.shut()
        self._flush()
        try:
            self._transport.write_eof()
        except OSError:  # the other side has gone already
            self._transport.abort()
            return
        self._transport.resume_reading()
        self._watch = self._loop.call_later(self._limits.linger, self._transport.abort)

    def __repr__(self) -> str:
        state = "closed" if self._error else "ready" if self.ready.done() else "handshaking"
        return f"<TcpConnection {self.peer or '?'} {state}>"


def _tune(sock: socket.socket) -> None:
    """No waiting for more bytes, a short queue in the kernel, and dead links are noticed."""
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    for name, value in (("TCP_NOTSENT_LOWAT", _NOTSENT_LOWAT), ("TCP_USER_TIMEOUT", 20_000), ("TCP_KEEPIDLE", 15)):
        if (option := getattr(socket, name, None)) is not None:
            sock.setsockopt(socket.IPPROTO_TCP, option, value)
