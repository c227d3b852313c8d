"""A slow link between any two peers of one machine: what one says, the other hears a given time later.

Every peer announces an address of the relay as its own, so that whoever dials it is led through here. Bytes keep their
order and come as fast as they were sent, only later: throughput is that of loopback as long as no more than `WINDOW`
bytes are on their way. A dial is not delayed; the first bytes on the connection are.

Run as `python relay.py SECONDS`, for each direction. On stdin, `open` is answered with a port to announce, and
`lead PORT PID` tells which process listens behind it. Ends when its stdin does.
"""

from __future__ import annotations

import asyncio
import contextlib
import subprocess
import sys
from collections.abc import AsyncIterator
from pathlib import Path

import psutil
import uvloop

HOST = "127.0.0.1"
WINDOW = 64 * 1024 * 1024  # bytes under way in one direction of a connection
_PIECE = 256 * 1024  # bytes


class Delayed:
    """One direction of a connection."""

    def __init__(self, seconds: float) -> None:
        self._seconds = seconds
        self._pieces: asyncio.Queue[tuple[float, bytes]] = asyncio.Queue()
        self._under_way = 0
        self._room = asyncio.Event()

    async def carry(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        """Until `reader` ends or either side breaks; the end is told as late as all else."""
        writing = asyncio.ensure_future(self._write(writer))
        try:
            await self._read(reader)
            await writing
        finally:
            writing.cancel()

    async def _read(self, reader: asyncio.StreamReader) -> None:
        loop = asyncio.get_running_loop()
        piece = b" "
        while piece:
            piece = await reader.read(_PIECE)
            self._pieces.put_nowait((loop.time() + self._seconds, piece))
            self._under_way += len(piece)
            while self._under_way > WINDOW:
                self._room.clear()
                await self._room.wait()

    async def _write(self, writer: asyncio.StreamWriter) -> None:
        loop = asyncio.get_running_loop()
        while True:
            due, piece = await self._pieces.get()
            if (left := due - loop.time()) > 0:
                await asyncio.sleep(left)
            if not piece:
                if writer.can_write_eof():
                    writer.write_eof()
                return
            writer.write(piece)
            await writer.drain()
            self._under_way -= len(piece)
            self._room.set()


class Relay:
    """Ports that others are led through, each to one process of this machine."""

    def __init__(self, seconds: float) -> None:
        self._seconds = seconds
        self._leads: dict[int, asyncio.Future[int]] = {}  # which process listens behind each port
        self._servers: list[asyncio.Server] = []

    async def open(self) -> int:
        """A new port to announce."""
        server = await asyncio.start_server(self._accept, HOST, 0)
        self._servers.append(server)
        port: int = server.sockets[0].getsockname()[1]
        self._leads[port] = asyncio.get_running_loop().create_future()
        return port

    def lead(self, port: int, pid: int) -> None:
        """Whoever dials `port` is led to where process `pid` listens."""
        self._leads[port].set_result(pid)

    async def close(self) -> None:
        """Take no more connections; returns when the last one has ended."""
        for server in self._servers:
            server.close()
            await server.wait_closed()

    async def _accept(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        async with _closing(writer):
            pid = await self._leads[writer.get_extra_info("sockname")[1]]
            far_reader, far_writer = await asyncio.open_connection(HOST, listening_port(pid))
            async with _closing(far_writer):
                there, back = Delayed(self._seconds), Delayed(self._seconds)
                async with asyncio.TaskGroup() as group:  # either side's failure ends both ways
                    group.create_task(there.carry(reader, far_writer))
                    group.create_task(back.carry(far_reader, writer))


@contextlib.asynccontextmanager
async def _closing(writer: asyncio.StreamWriter) -> AsyncIterator[None]:
    """Close it at the end; that a side has broken the connection is what links do."""
    try:
        yield
    except* OSError:
        writer.transport.abort()
    finally:
        writer.close()


def listening_port(pid: int) -> int:
    """The port of the data plane of the peer with this process id: the DHT listens in a child of it."""
    listening = [each for each in psutil.Process(pid).net_connections("tcp") if each.status == psutil.CONN_LISTEN]
    (port,) = (each.laddr.port for each in listening)
    return int(port)


async def serve(seconds: float) -> None:
    """Do what comes in on stdin."""
    relay = Relay(seconds)
    reader = asyncio.StreamReader()
    loop = asyncio.get_running_loop()
    await loop.connect_read_pipe(lambda: asyncio.StreamReaderProtocol(reader), sys.stdin)
    while line := await reader.readline():
        command, *numbers = line.decode().split()
        if command == "open":
            print(await relay.open(), flush=True)
        else:
            relay.lead(*map(int, numbers))


class RelayProcess:
    """A relay in a process of its own, so that nothing else on its loop or its interpreter makes a link slower."""

    def __init__(self, seconds: float) -> None:
        pipe = subprocess.PIPE
        command = [sys.executable, "-P", str(Path(__file__)), str(seconds)]
        self._process = subprocess.Popen(command, stdin=pipe, stdout=pipe, text=True, start_new_session=True)

    def open(self) -> int:
        """A new port to announce."""
        self._tell("open")
        assert self._process.stdout is not None
        return int(self._process.stdout.readline())

    def lead(self, port: int, pid: int) -> None:
        """Whoever dials `port` is led to where process `pid` listens."""
        self._tell(f"lead {port} {pid}")

    def _tell(self, line: str) -> None:
        assert self._process.stdin is not None
        self._process.stdin.write(line + "\n")
        self._process.stdin.flush()

    def close(self) -> None:
        """End it."""
        self._process.kill()
        self._process.communicate()


if __name__ == "__main__":
    uvloop.run(serve(float(sys.argv[1])))
