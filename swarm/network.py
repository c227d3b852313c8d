"""A client's place in the swarm: its identity, its links, what it knows of the peers, and its sessions."""

from __future__ import annotations

import asyncio
import logging
import random
from collections.abc import Callable, Sequence

from swarm.discovery import Discovery
from swarm.errors import NoRoute
from swarm.identity import Identity
from swarm.routing import find_route, uncovered
from swarm.rpc import Rpc
from swarm.session import Session, Sessions
from swarm.transport import TcpTransport
from swarm.types import ModelId, Offer, PeerId, Route, Span

log = logging.getLogger(__name__)

POLL_SECONDS = 0.5  # between two looks at the DHT while waiting for blocks

OnMissing = Callable[[tuple[Span, ...]], None]


class Network:
    """What a client needs of the swarm. Lives in one event loop."""

    def __init__(self, identity: Identity, discovery: Discovery) -> None:
        self.discovery = discovery
        self.rpc = Rpc(TcpTransport(identity))
        self.sessions = Sessions(self.rpc)
        self._chance = random.Random()

    @classmethod
    async def start(cls, initial_peers: Sequence[str], identity: Identity | None = None) -> Network:
        """Join the swarm as a client. Raises `CannotJoin` or `UsageError`."""
        identity = identity or Identity.generate()
        return cls(identity, await Discovery.start(identity, initial_peers, client_mode=True))

    async def offers(self, model: ModelId, num_blocks: int) -> list[Offer]:
        """What peers offer for any block of the model now."""
        return await self.discovery.offers(model, num_blocks)

    async def find_route(
        self,
        model: ModelId,
        num_blocks: int,
        *,
        avoid: set[PeerId] | None = None,
        wait: float = 0.0,
        on_missing: OnMissing | None = None,
    ) -> Route:
        """The best route of the moment; waits up to `wait` seconds for blocks that nobody hosts.

        `on_missing` is told which blocks it waits for, each time they change. Raises `NoRoute`.
        """
        deadline = asyncio.get_running_loop().time() + wait
        told: tuple[Span, ...] = ()
        while True:
            offers = await self.offers(model, num_blocks)
            try:
                return find_route(offers, num_blocks, avoid=avoid or (), chance=self._chance)
            except NoRoute:
                if asyncio.get_running_loop().time() >= deadline:
                    raise
            missing = uncovered(offers, num_blocks)
            if missing != told and on_missing is not None:
                on_missing(missing)
            told = missing
            await asyncio.sleep(POLL_SECONDS)

    async def open_session(
        self,
        model: ModelId,
        num_blocks: int,
        *,
        batch: int,
        max_length: int,
        wait: float = 0.0,
        on_missing: OnMissing | None = None,
    ) -> Session:
        """A session of `batch` rows and up to `max_length` positions over a route. Raises as `Session.open`."""

        async def find(avoid: set[PeerId]) -> Route:
            return await self.find_route(model, num_blocks, avoid=avoid, wait=wait, on_missing=on_missing)

        session = Session(self.sessions, model, find, batch, max_length)
        try:
            await session.open()
        except BaseException:
            await session.close()
            raise
        return session

    async def close(self) -> None:
        """End all sessions and leave."""
        await self.sessions.close()
        await self.rpc.close()
        await self.discovery.close()
