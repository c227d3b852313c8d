"""The listener of `wire`, a process of its own: echoes over our transport, and over bare TLS as the reference.

Run as `python echo.py`: says where it listens as one line of JSON, and ends when its stdin does.
"""

from __future__ import annotations

import asyncio
import json
import struct
import sys
from collections.abc import Callable
from typing import cast

import uvloop

from swarm.identity import Identity
from swarm.rpc import Rpc
from swarm.transport import TcpTransport
from swarm.types import Address

HOST = "127.0.0.1"
_LENGTH = struct.Struct(">I")
_MAX = 16 * 1024 * 1024  # bytes


class BareConnection(asyncio.BufferedProtocol):
    """Length-prefixed messages and nothing else: no checks, no flow control, no calls, one message at a time."""

    def __init__(self, received: Callable[[BareConnection, memoryview], None]) -> None:
        self._received = received
        self._buffer = memoryview(bytearray(_MAX))
        self._filled = 0
        self._transport: asyncio.Transport | None = None

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """Part of asyncio's protocol, as are the next two."""
        self._transport = cast(asyncio.Transport, transport)

    def get_buffer(self, sizehint: int) -> memoryview:
        return self._buffer[self._filled :]

    def buffer_updated(self, nbytes: int) -> None:
        self._filled += nbytes
        if self._filled < _LENGTH.size:
            return
        (length,) = _LENGTH.unpack_from(self._buffer)
        if self._filled == _LENGTH.size + length:
            self._filled = 0
            self._received(self, self._buffer[_LENGTH.size : _LENGTH.size + length])

    def send(self, message: bytes | memoryview) -> None:
        """Everything at once: what does not fit into the kernel waits in memory."""
        assert self._transport is not None
        self._transport.writelines((_LENGTH.pack(len(message)), message))

    def close(self) -> None:
        """End it."""
        assert self._transport is not None
        self._transport.close()


async def main() -> None:
    """Listen on both ways until stdin ends."""
    identity = Identity.generate()
    transport = TcpTransport(identity)
    rpc = Rpc(transport)  # it answers Echo by itself
    address = await transport.listen(Address(HOST, 0), rpc.accept)
    bare = await asyncio.get_running_loop().create_server(
        lambda: BareConnection(BareConnection.send), HOST, 0, ssl=identity.server_context()
    )
    places = {"peer": identity.peer, "port": address.port, "bare_port": bare.sockets[0].getsockname()[1]}
    print(json.dumps(places), flush=True)
    await asyncio.to_thread(sys.stdin.read)
    bare.close()
    await rpc.close()


if __name__ == "__main__":
    uvloop.run(main())
