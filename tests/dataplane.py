"""Both ends of connections over loopback, and ends that do not keep to the rules."""

from __future__ import annotations

import asyncio
import contextlib
import ssl
import struct
from collections.abc import AsyncIterator

from swarm import wire
from swarm.errors import RemoteError
from swarm.identity import Identity, client_context
from swarm.links import frames
from swarm.links.connection import Limits
from swarm.links.frames import FrameKind
from swarm.links.interfaces import Connection
from swarm.rpc import Link, Rpc
from swarm.transport import TcpTransport
from swarm.types import Address

ANYWHERE = Address("127.0.0.1", 0)
WAIT = 10.0  # seconds after which a test that waits for something gives up


class Inbox:
    """Takes what comes in on a connection, and remembers it."""

    def __init__(self, connection: Connection) -> None:
        self.connection = connection
        self.messages: asyncio.Queue[tuple[bytes, memoryview]] = asyncio.Queue()
        self.ended: asyncio.Future[RemoteError] = asyncio.get_running_loop().create_future()

    def received(self, header: bytes, body: memoryview) -> None:
        self.messages.put_nowait((header, body))

    def lost(self, error: RemoteError) -> None:
        self.ended.set_result(error)  # raises where it is told twice

    async def next(self) -> tuple[bytes, memoryview]:
        """The next message."""
        async with asyncio.timeout(WAIT):
            return await self.messages.get()

    async def end(self) -> RemoteError:
        """Why it ended."""
        async with asyncio.timeout(WAIT):
            return await asyncio.shield(self.ended)


class Listener:
    """A transport that listens, and the connections that came to it."""

    def __init__(self, limits: Limits | None = None) -> None:
        self.identity = Identity.generate()
        self.transport = TcpTransport(self.identity, limits)
        self.address = ANYWHERE
        self.arrived: asyncio.Queue[Inbox] = asyncio.Queue()

    async def start(self) -> None:
        self.address = await self.transport.listen(ANYWHERE, self._accept)

    def _accept(self, connection: Connection) -> Inbox:
        inbox = Inbox(connection)
        self.arrived.put_nowait(inbox)
        return inbox

    async def next(self) -> Inbox:
        """The next connection that was proven."""
        async with asyncio.timeout(WAIT):
            return await self.arrived.get()


@contextlib.asynccontextmanager
async def listening(limits: Limits | None = None) -> AsyncIterator[Listener]:
    """A `Listener` for the time of a `with`."""
    listener = Listener(limits)
    await listener.start()
    try:
        yield listener
    finally:
        await listener.transport.close()


@contextlib.asynccontextmanager
async def connected(limits: Limits | None = None) -> AsyncIterator[tuple[Inbox, Inbox]]:
    """The two ends of one connection: the dialler's and the listener's."""
    dialler = TcpTransport(Identity.generate(), limits)
    async with listening(limits) as listener:
        connection = await dialler.dial(listener.identity.peer, [listener.address])
        inbox = Inbox(connection)
        connection.attach(inbox)
        try:
            yield inbox, await listener.next()
        finally:
            await dialler.close()


class Stranger:
    """A TLS client that says what it likes, byte by byte."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.reader = reader
        self.writer = writer
        self.identity = Identity.generate()

    def say(self, *data: bytes) -> None:
        """Send these bytes as they are."""
        self.writer.write(b"".join(data))

    async def hear(self) -> tuple[int, bytes]:
        """The kind and header of the next frame. Raises `IncompleteReadError` where the connection ended."""
        async with asyncio.timeout(WAIT):
            kind, _, header, body = struct.unpack(">B3xIII", await self.reader.readexactly(16))
            return kind, (await self.reader.readexactly(header + body))[:header]

    async def greeted(self) -> wire.Hello:
        """The listener's first words."""
        kind, header = await self.hear()
        hello = wire.unpack(header)
        assert kind == FrameKind.HANDSHAKE
        assert isinstance(hello, wire.Hello)
        return hello

    async def prove(self) -> None:
        """Do as a correct dialler does."""
        hello = await self.greeted()
        signature = self.identity.sign(b"shoal dial 1\0" + hello.peer.encode() + b"\0" + hello.nonce)
        self.say(frames.whole(FrameKind.HANDSHAKE, wire.pack(wire.Proof(self.identity.peer, signature))))

    async def told(self) -> str:
        """The code of the goodbye that comes next; nothing may follow it."""
        kind, header = await self.hear()
        goodbye = wire.unpack(header)
        assert kind == FrameKind.GOODBYE
        assert isinstance(goodbye, wire.Goodbye)
        assert await self.rest() == b""
        return goodbye.code

    async def rest(self) -> bytes:
        """All that still comes."""
        async with asyncio.timeout(WAIT):
            return await self.reader.read()


@contextlib.asynccontextmanager
async def stranger(address: Address) -> AsyncIterator[Stranger]:
    """A `Stranger` to whoever listens at `address`."""
    context = client_context()
    reader, writer = await asyncio.open_connection(address.host, address.port, ssl=context, server_hostname="")
    try:
        yield Stranger(reader, writer)
    finally:
        writer.close()
        with contextlib.suppress(ConnectionError, ssl.SSLError):
            await writer.wait_closed()


class ListeningRpc(Rpc):
    """An `Rpc` that others can dial."""

    def __init__(self) -> None:
        self._listener = TcpTransport(Identity.generate())
        self.address = ANYWHERE
        super().__init__(self._listener)

    async def start(self) -> None:
        self.address = await self._listener.listen(ANYWHERE, self.accept)


@contextlib.asynccontextmanager
async def linked() -> AsyncIterator[tuple[Rpc, ListeningRpc, Link]]:
    """Two `Rpc`s and a link from the first to the second."""
    near, far = Rpc(TcpTransport(Identity.generate())), ListeningRpc()
    await far.start()
    try:
        yield near, far, await near.connect(far.peer, [far.address])
    finally:
        await near.close()
        await far.close()
