"""What a transport is to whoever uses it, over sockets or in memory."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

from swarm.errors import RemoteError
from swarm.links.frames import Buffer
from swarm.types import Address, PeerId


class Receiver(Protocol):
    """Who is told what comes in on a connection. Both are called from the loop and must not block."""

    def received(self, header: bytes, body: memoryview) -> None:
        """A message has come in completely. May raise `ProtocolError`, which closes the connection with that name."""

    def lost(self, error: RemoteError) -> None:
        """The connection is gone: told once, after the last message."""


class Connection(Protocol):
    """A way to one peer, over sockets or in memory."""

    peer: PeerId

    @property
    def host(self) -> str:
        """The IP address of the other side; "" where it is in this process."""

    def attach(self, receiver: Receiver) -> None:
        """Tell `receiver` what comes in, from the first message on."""

    def try_send(self, header: bytes, body: Sequence[Buffer]) -> bool:
        """Send a small message at once, or say that it would have to wait."""

    async def send(self, header: bytes, body: Sequence[Buffer]) -> None:
        """Send a message; returns when its last byte is on its way. Raises `Unreachable`, `UsageError`.

        Small ones go in the order of the calls, ahead of large ones. Cancelled, a message is not sent, or not
        completely: then the other side forgets what has come of it.
        """

    def close(self, error: RemoteError | None = None) -> None:
        """End it, telling the other side why."""


class Transport(Protocol):
    """How connections come to be."""

    peer: PeerId

    async def dial(self, peer: PeerId, addresses: Sequence[Address]) -> Connection:
        """Connect to `peer`. Raises `Unreachable` or `WrongKey`."""

    async def close(self) -> None:
        """End all connections and stop listening."""
