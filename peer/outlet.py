"""The way from a session here to one other peer: in order, at once where the way is free, dialled again if it broke."""

from __future__ import annotations

import logging
from collections import deque
from collections.abc import Callable, Sequence

from swarm.errors import Internal, RemoteError, ShoalError, Unreachable
from swarm.links.frames import Buffer
from swarm.rpc import Link, Rpc
from swarm.types import Address, PeerId
from swarm.wire import Echo, Endpoint, Message

log = logging.getLogger(__name__)

Failed = Callable[[RemoteError], None]


class Outlet:
    """Sends one session's messages to one peer.

    Args:
        endpoint: where to dial again; None for a client, who dials us.
    """

    def __init__(self, rpc: Rpc, link: Link, endpoint: Endpoint | None = None) -> None:
        self.link = link
        self.endpoint = endpoint
        self._rpc = rpc
        self._waiting: deque[tuple[Message, Sequence[Buffer], Failed]] = deque()
        self._lost: Failed | None = None

    @classmethod
    async def open(cls, rpc: Rpc, endpoint: Endpoint) -> Outlet:
        """Dial. Raises `Unreachable` or `WrongKey`."""
        return cls(rpc, await _dial(rpc, endpoint), endpoint)

    @property
    def peer(self) -> PeerId:
        """Who is there."""
        return self.link.peer

    async def answers(self, timeout: float) -> bool:
        """Whether the way is free and leads there; where nothing comes back, it is ended for everybody."""
        try:
            await self.link.call(Echo(), timeout=timeout)
        except RemoteError:
            self.link.close()
            return False
        return True

    def watch(self, lost: Failed) -> None:
        """Have `lost` told where the connection breaks: what was sent over it may never have come."""
        self._lost = lost
        self.link.watch(self._broke)

    def close(self) -> None:
        """Nobody is to hear of it any more."""
        self._lost = None
        self.link.unwatch(self._broke)

    def _broke(self, link: Link) -> None:
        if self._lost is not None:
            self._lost(Unreachable(f"the connection to {self.peer[-6:]} was lost: {link.error}", self.peer))

    def send(self, message: Message, body: Sequence[Buffer], failed: Failed) -> None:
        """At once, or in the background after what waits already; `failed` is told if it cannot be sent."""
        if not self._waiting and self.link.error is None and self.link.try_notify(message, body):
            return
        self._waiting.append((message, body, failed))
        if len(self._waiting) == 1:
            self._rpc.spawn(self._flush())

    async def _flush(self) -> None:
        while self._waiting:
            message, body, failed = self._waiting[0]
            try:
                if self.link.error is not None and self.endpoint is not None:
                    self.link = await _dial(self._rpc, self.endpoint)
                    if self._lost is not None:
                        self.link.watch(self._broke)
                await self.link.notify(message, body)
            except ShoalError as error:
                log.info("cannot send to=%s error=%r", self.peer[-6:], str(error))
                failed(error if isinstance(error, RemoteError) else Internal(str(error), self.peer))
            finally:
                self._waiting.popleft()

    def __len__(self) -> int:
        """How many messages wait for the way to be free."""
        return len(self._waiting)


async def _dial(rpc: Rpc, endpoint: Endpoint) -> Link:
    return await rpc.connect(PeerId(endpoint.peer), [Address(*pair) for pair in endpoint.addresses])
