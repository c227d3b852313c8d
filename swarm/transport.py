"""The only sockets: dial a PeerId at one of its addresses, listen for those who dial us, and keep count of both."""

from __future__ import annotations

import asyncio
import contextlib
import errno
import logging
import ssl
from collections.abc import Callable, Sequence

from swarm.errors import Busy, Closed, PortInUse, RemoteError, Unreachable, UsageError, WrongKey
from swarm.identity import Identity, client_context
from swarm.links.connection import Limits, TcpConnection
from swarm.links.interfaces import Connection, Receiver
from swarm.types import Address, PeerId

log = logging.getLogger(__name__)


class TcpTransport:
    """Dials and listens with one identity."""

    def __init__(self, identity: Identity, limits: Limits | None = None) -> None:
        self.identity = identity
        self.peer = identity.peer
        self._limits = limits or Limits()
        self._client_context: ssl.SSLContext = client_context()
        self._server: asyncio.Server | None = None
        self._connections: set[TcpConnection] = set()
        self._gone = asyncio.Event()
        self._closed = False

    async def listen(self, address: Address, accept: Callable[[Connection], Receiver]) -> Address:
        """Take connections at `address` (port 0 for any free one) and give each, once proven, to `accept`.

        Returns where it listens. Raises `PortInUse` or `UsageError`.
        """
        context = self.identity.server_context()
        loop = asyncio.get_running_loop()
        try:
            self._server = await loop.create_server(lambda: self._accepted(context, accept), address.host, address.port)
        except OSError as error:
            raise _cannot_listen(address, error) from None
        return Address(address.host, self._server.sockets[0].getsockname()[1])

    def _accepted(self, context: ssl.SSLContext, accept: Callable[[Connection], Receiver]) -> TcpConnection:
        """The listener's side of a new connection, of whom nothing is known yet."""
        connection = TcpConnection(self.identity, context, None, self._limits, self._forget, accept)
        connection.ready.add_done_callback(_log_refusal)
        if self._closed or len(self._connections) >= self._limits.connections:
            connection.close(Busy(f"more than {self._limits.connections} connections"))
        self._connections.add(connection)
        return connection

    async def dial(self, peer: PeerId, addresses: Sequence[Address]) -> TcpConnection:
        """Connect to `peer` at the first address that answers with its key.

        Raises `Unreachable` naming what was tried, `WrongKey` where somebody else answers, or `Closed`.
        """
        failures: list[str] = []
        wrong: WrongKey | None = None
        for address in addresses:
            if self._closed:
                break
            try:
                return await self._dial(peer, address)
            except WrongKey as error:
                wrong = error
            except (OSError, RemoteError, TimeoutError) as error:
                failures.append(f"{address} ({error or type(error).__name__})")
        if self._closed:
            raise Closed("the transport is closed")
        raise wrong or Unreachable(f"{peer} cannot be reached at {', '.join(failures) or 'no address'}", peer)

    async def _dial(self, peer: PeerId, address: Address) -> TcpConnection:
        connection = TcpConnection(self.identity, self._client_context, peer, self._limits, self._forget)
        try:
            async with asyncio.timeout(self._limits.handshake):
                loop = asyncio.get_running_loop()
                await loop.create_connection(lambda: self._dialled(connection), address.host, address.port)
                await connection.ready
        except BaseException:
            self._end(connection)
            raise
        return connection

    def _dialled(self, connection: TcpConnection) -> TcpConnection:
        """The dialler's side of a new connection, which has a socket now."""
        if self._closed:  # in the meantime
            connection.close()
        self._connections.add(connection)
        return connection

    def _end(self, connection: TcpConnection) -> None:
        connection.close()
        if not connection.opened:  # given up before it had a socket: nobody would tell us that it is gone
            self._forget(connection)

    def _forget(self, connection: TcpConnection) -> None:
        """A connection's socket is closed."""
        self._connections.discard(connection)
        if not self._connections:
            self._gone.set()

    async def close(self) -> None:
        """Stop listening and end all connections, at once or nearly so even where the other side does not answer."""
        self._closed = True
        if self._server is not None:
            self._server.close()
        for connection in list(self._connections):
            self._end(connection)
        if self._connections:
            self._gone.clear()
            # Bounded: a connection that was accepted in the moment the server closed may never be made, nor lost.
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(self._gone.wait(), 1.5 * self._limits.linger)
        if self._server is not None:
            await self._server.wait_closed()


def _log_refusal(ready: asyncio.Future[None]) -> None:
    if not ready.cancelled() and (error := ready.exception()) is not None:
        log.info("connection refused error=%r", str(error))


def _cannot_listen(address: Address, error: OSError) -> Exception:
    if error.errno == errno.EADDRINUSE or "address already in use" in str(error).lower():
        return PortInUse(f"port {address.port} on {address.host} is in use; choose another with --listen HOST:PORT")
    return UsageError(f"cannot listen on {address}: {error.strerror or error}")
