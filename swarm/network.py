"""A client's place in the swarm: its identity, its links, what it knows of the peers, and its sessions."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import math
import random
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

from swarm.discovery import Discovery
from swarm.errors import NoRoute
from swarm.hops.finding import Neighbours, Shunned
from swarm.identity import Identity
from swarm.links.interfaces import Transport
from swarm.routes.bearings import Bearings
from swarm.routes.ping import ping
from swarm.routes.precision import Kinds, Precision
from swarm.routing import View, find_route, uncovered
from swarm.rpc import Rpc
from swarm.session import Session, Sessions
from swarm.transport import TcpTransport
from swarm.types import Coordinate, ModelId, Offer, PeerId, Route, Span
from swarm.wire import Priority, Rounding

log = logging.getLogger(__name__)

POLL_SECONDS = 0.2  # between two looks at the DHT while waiting for blocks
GRACE_SECONDS = 2.0  # more, where hosts that have failed are only given some rest
BEARINGS_SECONDS = 1.0  # for peers to answer, before a first route is chosen without them


@dataclass(frozen=True, slots=True)
class Waiting:
    """How long a user is ready to wait for blocks that nobody hosts, and who is told of it."""

    first: float = 0.0  # seconds, before the first step
    failover: float = 10.0  # seconds, in the middle of an answer; at least as long as before the first step
    on_missing: Callable[[tuple[Span, ...]], None] | None = None  # told which, each time they change


def warn_missing(missing: tuple[Span, ...]) -> None:
    """An `on_missing` that leaves a line in the log."""
    log.warning("waiting for a peer that hosts blocks=%s", ",".join(map(str, missing)))


class Directory(Protocol):
    """Where offers are read: the DHT, or what stands for it."""

    async def offers(self, model: ModelId, num_blocks: int, place: Coordinate | None = None) -> list[Offer]:
        """What somebody at `place` needs to know of the offers for all blocks of the model, to find a route."""

    async def close(self) -> None:
        """Leave."""


Quantized = Callable[[dict[str, list[Span]]], None]
"""Told which blocks of a session quantized peers run, by kind, each time that changes."""


def warn_quantized(blocks: dict[str, list[Span]]) -> None:
    """A `Quantized` that leaves a line in the log."""
    for kind, spans in blocks.items():
        log.warning("quantized peers serve blocks=%s kind=%s", ",".join(map(str, spans)), kind)


class Network:
    """What a client needs of the swarm. Lives in one event loop.

    Args:
        transport: how peers are reached.
        discovery: who they are.
        chance: spreads clients over peers that are about equally good.
        clock: what round trips are timed by.

    Attributes:
        bearings: where the client is, and how far it is to those it called.
    """

    def __init__(
        self,
        transport: Transport,
        discovery: Directory,
        chance: random.Random | None = None,
        clock: Callable[[], float] = time.perf_counter,
    ) -> None:
        self.discovery = discovery
        self.chance = chance or random.Random()
        self.rpc = Rpc(transport, clock)
        self.sessions = Sessions(self.rpc)
        self.bearings = Bearings(self.chance)
        self.rpc.timed = self.bearings.timed

    @classmethod
    async def start(cls, initial_peers: Sequence[str], identity: Identity | None = None) -> Network:
        """Join the swarm as a client. Raises `CannotJoin` or `UsageError`."""
        identity = identity or Identity.generate()
        return cls(TcpTransport(identity), await Discovery.start(identity, initial_peers, client_mode=True))

    async def offers(self, model: ModelId, num_blocks: int) -> list[Offer]:
        """What peers offer for the model's blocks, as far as we need to know. Raises `DeadlineExceeded`."""
        offers = await self.discovery.offers(model, num_blocks, self.bearings.coordinate)
        self.bearings.read(offers)
        return offers

    async def take_bearings(self, offers: Sequence[Offer], num_blocks: int) -> None:
        """Where there is a choice, call a few peers whose way is not known; wait for them only the first time."""
        if sum(len(offer.span) for offer in offers) <= num_blocks:
            return
        if self.bearings.coordinate is None:
            await ping(self.rpc, self.bearings.anywhere(offers), BEARINGS_SECONDS)
            await ping(self.rpc, self.bearings.near(offers, 0), BEARINGS_SECONDS)
        elif near := self.bearings.near(offers, 0):
            self.rpc.spawn(ping(self.rpc, near, BEARINGS_SECONDS))

    def session(
        self,
        model: ModelId,
        num_blocks: int,
        *,
        batch: int,
        max_length: int,
        waiting: Waiting = Waiting(),
        standby: int = 0,
        precision: Precision = Precision.STEADY,
        on_quantized: Quantized = warn_quantized,
        rounding: Rounding = "float32",
        priority: Priority = "normal",
    ) -> Session:
        """A session of `batch` rows and up to `max_length` positions; its first step opens it.

        `standby` is how many spares follow at each hop, `precision` says which peers will do,
        `rounding` what may be done to hidden states on their way, `priority` how urgent its steps are.
        """
        find = _Finder(self, model, num_blocks, batch * max_length, waiting, Kinds(precision), on_quantized)
        session = Session(self.sessions, model, num_blocks, find, batch, max_length, standby, waiting.first)
        session.round(rounding)
        session.prioritize(priority)
        find.begun = lambda: session.length > 0
        return session

    async def close(self) -> None:
        """End all sessions and leave."""
        await self.sessions.close()
        await self.rpc.close()
        await self.discovery.close()


class _Finder:
    """Finds routes for one session."""

    def __init__(
        self,
        network: Network,
        model: ModelId,
        num_blocks: int,
        tokens: int,
        waiting: Waiting,
        kinds: Kinds,
        on_quantized: Quantized,
    ) -> None:
        self.begun: Callable[[], bool] = lambda: False  # whether the session holds anything
        self._network = network
        self._model = model
        self._num_blocks = num_blocks
        self._tokens = tokens  # of cache, that the session needs at every hop
        self._waiting = waiting
        self._chance = network.chance
        self._told: tuple[Span, ...] = ()
        self._kinds = kinds
        self._on_quantized = on_quantized

    async def __call__(
        self,
        span: Span,
        shunned: Callable[[], Shunned],
        since: float | None,
        neighbours: Neighbours,
    ) -> Route:
        """The best route of the moment over `span`. Raises `NoRoute` when it has waited long enough."""
        loop = asyncio.get_running_loop()
        wait = self._waiting.first
        deadline = loop.time() + wait if since is None else since + max(wait, self._waiting.failover)
        waits = since is not None and since > -math.inf
        while True:
            offers = await self._network.offers(self._model, self._num_blocks)
            if since is None:
                await self._network.take_bearings(offers, self._num_blocks)
            view, late = self._view(offers, neighbours), loop.time() - deadline
            rather, now, ever = shunned()
            if waits and late > GRACE_SECONDS:
                return self._route(offers, span, rather, view)  # or it raises, and says which blocks
            for avoid in (rather, _dispensable(offers, span, rather, now), now):
                with contextlib.suppress(NoRoute):
                    return self._route(offers, span, avoid, view)
            if late >= 0:  # raises unless those who only rest could help
                self._route(offers, span, ever if waits else now, view)
            self._tell(uncovered(self._allowed(offers, span, now), span))
            await asyncio.sleep(POLL_SECONDS)

    def _allowed(self, offers: Sequence[Offer], span: Span, avoid: set[PeerId]) -> list[Offer]:
        return self._kinds.allowed([offer for offer in offers if offer.peer not in avoid], span, self.begun())

    def _route(self, offers: Sequence[Offer], span: Span, avoid: set[PeerId], view: View) -> Route:
        allowed = self._allowed(offers, span, avoid)
        try:
            route = find_route(allowed, span, chance=self._chance, view=view, tokens_needed=self._tokens)
        except NoRoute as error:
            others = [offer for offer in offers if offer.peer not in avoid]
            why = self._kinds.refused(others, [Span(*missing) for missing in error.missing])
            raise NoRoute(f"{error}{why}", error.missing) from None
        before = self._kinds.quantized()
        self._kinds.note(route)
        if (quantized := self._kinds.quantized()) != before:
            self._on_quantized(quantized)
        return route

    def _view(self, offers: Sequence[Offer], neighbours: Neighbours) -> View:
        known = {offer.peer: offer for offer in offers}
        before, after = (known.get(peer) if peer else None for peer in neighbours)
        return self._network.bearings.view(before, after)

    def _tell(self, missing: tuple[Span, ...]) -> None:
        if missing != self._told and missing and self._waiting.on_missing is not None:
            self._waiting.on_missing(missing)
        self._told = missing


def _dispensable(offers: Sequence[Offer], span: Span, rather: set[PeerId], now: set[PeerId]) -> set[PeerId]:
    """Whom of `rather` the span can do without, and all of `now`: nobody is trusted again for another's sake."""
    missing = uncovered([offer for offer in offers if offer.peer not in rather], span)
    needed = {o.peer for o in offers if any(o.span.start < gap.end and gap.start < o.span.end for gap in missing)}
    return now | (rather - needed)
