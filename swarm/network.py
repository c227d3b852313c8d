"""A client's place in the swarm: its identity, its links, what it knows of the peers, and its sessions."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import random
from collections.abc import Callable, Sequence
from dataclasses import replace

from swarm.discovery import Discovery
from swarm.errors import NoRoute
from swarm.identity import Identity
from swarm.routing import find_route, uncovered
from swarm.rpc import Rpc
from swarm.session import Session, Sessions, Shunned
from swarm.transport import TcpTransport
from swarm.types import ModelId, Offer, PeerId, Route, Span

log = logging.getLogger(__name__)

POLL_SECONDS = 0.5  # between two looks at the DHT while waiting for blocks
FAILOVER_WAIT = 10.0  # seconds, at least, to wait for a new host in the middle of an answer

OnMissing = Callable[[tuple[Span, ...]], None]


class Network:
    """What a client needs of the swarm. Lives in one event loop."""

    def __init__(self, identity: Identity, discovery: Discovery) -> None:
        self.discovery = discovery
        self.rpc = Rpc(TcpTransport(identity))
        self.sessions = Sessions(self.rpc)

    @classmethod
    async def start(cls, initial_peers: Sequence[str], identity: Identity | None = None) -> Network:
        """Join the swarm as a client. Raises `CannotJoin` or `UsageError`."""
        identity = identity or Identity.generate()
        return cls(identity, await Discovery.start(identity, initial_peers, client_mode=True))

    async def offers(self, model: ModelId, num_blocks: int) -> list[Offer]:
        """What peers offer for any block of the model now."""
        return await self.discovery.offers(model, num_blocks)

    def session(
        self,
        model: ModelId,
        num_blocks: int,
        *,
        batch: int,
        max_length: int,
        wait: float = 0.0,
        on_missing: OnMissing | None = None,
    ) -> Session:
        """A session of `batch` rows and up to `max_length` positions; its first step opens it.

        For blocks that nobody hosts it waits up to `wait` seconds, and tells `on_missing` each time they change.
        """
        find = _Finder(self, model, num_blocks, wait, on_missing)
        return Session(self.sessions, model, num_blocks, find, batch, max_length)

    async def close(self) -> None:
        """End all sessions and leave."""
        await self.sessions.close()
        await self.rpc.close()
        await self.discovery.close()


class _Finder:
    """Finds routes for one session."""

    def __init__(
        self, network: Network, model: ModelId, num_blocks: int, wait: float, on_missing: OnMissing | None
    ) -> None:
        self._network = network
        self._model = model
        self._num_blocks = num_blocks
        self._wait = wait
        self._on_missing = on_missing
        self._chance = random.Random()
        self._told: tuple[Span, ...] = ()

    async def __call__(self, span: Span, shunned: Callable[[], Shunned]) -> Route:
        """The best route of the moment over `span`. Raises `NoRoute` when it has waited long enough."""
        loop = asyncio.get_running_loop()
        whole = len(span) == self._num_blocks
        deadline = loop.time() + (self._wait if whole else max(self._wait, FAILOVER_WAIT))
        while True:
            offers = await self._network.offers(self._model, self._num_blocks)
            rather, ever = shunned()
            for avoid in (rather, ever):
                with contextlib.suppress(NoRoute):
                    return _route(offers, span, avoid, self._chance)
            if loop.time() >= deadline:
                return _route(offers, span, ever, self._chance)  # raises, and says which blocks
            self._tell(uncovered(offers, self._num_blocks))
            await asyncio.sleep(POLL_SECONDS)

    def _tell(self, missing: tuple[Span, ...]) -> None:
        if missing != self._told and missing and self._on_missing is not None:
            self._on_missing(missing)
        self._told = missing


def _route(offers: list[Offer], span: Span, avoid: set[PeerId], chance: random.Random) -> Route:
    if span.start == 0 and all(offer.num_blocks == span.end for offer in offers):
        return find_route(offers, span.end, avoid=avoid, chance=chance)
    inside = []
    for offer in offers:
        start, end = max(offer.span.start, span.start), min(offer.span.end, span.end)
        if start < end:
            inside.append(replace(offer, span=Span(start - span.start, end - span.start)))
    route = find_route(inside, len(span), avoid=avoid, chance=chance)
    moved = (replace(hop, span=Span(hop.span.start + span.start, hop.span.end + span.start)) for hop in route)
    return Route(tuple(moved))
