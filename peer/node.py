"""A volunteer's node: puts the parts together and holds no logic of its own."""

from __future__ import annotations

import asyncio
import logging
import random
import time
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import swarm
from peer.announcer import Announcer
from peer.cache import Leases
from peer.config import ServeSettings, parse_address, parse_span
from peer.executor import Executor
from peer.hosting import Hosting
from peer.joining import addresses_of, start_discovery
from peer.mover import Means, Mover
from peer.placement import Policy, Survey, best_span, reconsider, survey_parts
from peer.quiet import Quiet
from swarm.directory.reading import Part
from swarm.discovery import Discovery
from swarm.errors import ShoalError, UsageError
from swarm.files.checkpoint import Checkpoint, Progress
from swarm.files.hub import resolve
from swarm.identity import Identity
from swarm.imports import import_lightly
from swarm.routes.bearings import Bearings
from swarm.routes.ping import bandwidth, ping
from swarm.rpc import Rpc
from swarm.transport import TcpTransport
from swarm.types import Address, Offer, Span, State

if TYPE_CHECKING:
    from peer.server import Server

log = logging.getLogger(__name__)

AROUND_SECONDS = 2.0  # to find our place among the others, before we say that we are online
BEARINGS_SECONDS = 30.0  # between two calls for nothing but their round trip, at most
RELEASE_SECONDS = 20.0  # between two times that memory which nobody uses is given back
BANDWIDTH_PEERS = 3  # whose bandwidth is measured
CHOICES = 3  # of a span, where others choose the same at the same moment


@dataclass(frozen=True, slots=True)
class Status:
    """What a node can say of itself at a moment."""

    span: Span
    state: State
    sessions: int
    tokens: int  # positions run since the start
    cache_used: int  # tokens
    cache_tokens: int
    peers: int
    queue: float  # steps that others wait for, on average of late
    note: str  # what it is about, beside serving


class Node:
    """One peer that serves a span.

    Attributes:
        broken: ends with what made serving impossible, if anything ever does.
    """

    def __init__(self, settings: ServeSettings, identity: Identity, progress: Progress) -> None:
        self.settings = settings
        self.identity = identity
        self.broken: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self.transport = TcpTransport(identity)
        self.rpc = Rpc(self.transport)
        self.bearings = Bearings()
        self.rpc.timed = self.bearings.timed
        self.executor = Executor()
        self.discovery: Discovery | None = None
        self.hosting: Hosting | None = None
        self.mover: Mover | None = None
        self._progress = progress
        self._announcer: Announcer | None = None
        self._tasks: list[asyncio.Task[None]] = []
        self._peers = 0  # seen when it was last looked
        self._bandwidth: float | None = None  # bytes per second, to the best of those that were asked

    @property
    def server(self) -> Server | None:
        """Serves the present span; None until one is loaded."""
        return self.hosting.server if self.hosting else None

    @property
    def remarks(self) -> list[str]:
        """On how the present span is run, where that is not as one would expect."""
        return self.hosting.remarks if self.hosting else []

    @property
    def leases(self) -> Leases:
        """Of the sessions here."""
        assert self.hosting is not None
        return self.hosting.leases

    # --- starting ---------------------------------------------------------------------------------------------------

    async def start(self) -> None:
        """Listen, join the swarm, load a span, say so. Raises what stands in the way, with what to do about it."""
        listen = parse_address(self.settings.listen)
        heavy = asyncio.ensure_future(self.executor.run(_import_heavy))  # seconds; the rest goes on meanwhile
        try:
            address = await self.transport.listen(listen, self.rpc.accept)
            dht_port = listen.port + 1 if listen.port else 0
            self.discovery = await start_discovery(self.settings, self.identity, dht_port)
            folder = await asyncio.to_thread(resolve, self.settings.model, self._progress)
            checkpoint = await asyncio.to_thread(Checkpoint, folder)
            offer = await self._blank_offer(checkpoint, address)
            self._announcer = Announcer(self.discovery, offer)
            around = self.rpc.spawn(self._look_around())
            if self.settings.blocks is not None:
                await self._announcer.tell()
        except BaseException:
            heavy.cancel()  # whoever is to hear of a mistake, or pressed Ctrl-C, does not wait for it
            raise
        await heavy
        await self.executor.give_way(self.settings.nice)  # the import does not: somebody waits for it
        self.hosting = Hosting(folder, offer.model, self.settings, self.rpc, self.executor, self._tell)
        await asyncio.wait({around}, timeout=AROUND_SECONDS)
        count = None if self.settings.blocks is not None else await self._take_place()
        await self._serve(self._announcer.offer.span)
        self._tasks.append(asyncio.create_task(self._keep()))
        self._tasks.append(asyncio.create_task(self._keep_bearings()))
        self._tasks.append(asyncio.create_task(keep_memory()))
        quiet = Quiet(self.hosting, self._announcer, lambda: self._bandwidth)
        self._tasks.append(asyncio.create_task(quiet.use()))
        if count is not None and self.settings.look_seconds:
            self._tasks.append(asyncio.create_task(self._move(count)))

    async def _blank_offer(self, checkpoint: Checkpoint, listening: Address) -> Offer:
        """What there is to say before anything is loaded. The span is the one asked for, else still open."""
        assert self.discovery is not None
        model = await asyncio.to_thread(lambda: checkpoint.model_id)
        # In the one thread that imports transformers: seen from another, it may be half there.
        blocks = await self.executor.run(lambda: _count_blocks(checkpoint))
        settings = self.settings
        span = parse_span(settings.blocks) if settings.blocks is not None else Span(0, blocks)
        if span.end > blocks:
            raise UsageError(f"--blocks {span}: the model has blocks 0:{blocks}")
        if settings.num_blocks is not None and settings.num_blocks > blocks:
            raise UsageError(f"--num-blocks {settings.num_blocks}: the model has {blocks}")
        return Offer(
            peer=self.identity.peer,
            model=model,
            name=_name_of(settings.model),
            num_blocks=blocks,
            span=span,
            addresses=addresses_of(settings, self.discovery, listening),
            state=State.JOINING,
            dtype=settings.dtype,
            quantize=settings.quantize,
            tokens_per_second=0.0,
            cache_tokens=settings.cache_tokens or 0,
            cache_free=0,
            sessions=0,
            version=swarm.__version__,
            issued=0.0,
            expires=0.0,
            fixed=settings.blocks is not None or not settings.look_seconds,
        )

    async def _take_place(self) -> int:
        """Measure the machine, choose the span that helps most and tell the swarm of it; of how many blocks it is."""
        assert self.hosting is not None
        assert self._announcer is not None
        chance, blocks = random.Random(), self._announcer.offer.num_blocks
        block, count = await self.hosting.probe(blocks // 2, blocks)
        speed = block.tokens_per_second(count, self._bandwidth)
        span: Span | None = best_span(await self._survey(), count, speed, chance)
        for _ in range(CHOICES):
            if span is None:
                break
            await self._announcer.tell(span=span, tokens_per_second=speed)
            span = reconsider(await self._parts(), self._announcer.offer, speed=speed, chance=chance)
        return count

    # --- serving ----------------------------------------------------------------------------------------------------

    async def _serve(self, span: Span) -> None:
        """Load `span`, and tell the swarm before and after."""
        assert self.hosting is not None
        assert self._announcer is not None
        if self._announcer.offer.span != span or self._announcer.offer.state is not State.JOINING:
            await self._announcer.tell(span=span, state=State.JOINING, cache_free=0, sessions=0, queue=0.0)
        capacity = await self.hosting.host(span)
        speed, tokens = capacity.tokens_per_second(len(span), self._bandwidth), self.leases.capacity
        assert self.server is not None
        await self._announcer.tell(
            state=State.ONLINE,
            batched=self.server.batches,
            tokens_per_second=speed,
            seconds_per_block=capacity.seconds_per_block,
            prefill_seconds_per_block=capacity.prefill_seconds_per_block,
            cache_tokens=tokens,
            cache_free=tokens,
            coordinate=self.bearings.coordinate,
        )
        for remark in self.hosting.remarks:
            log.info("%s", remark)
        log.info("online blocks=%s tokens_per_second=%.1f cache=%s", span, speed, tokens)

    async def _move(self, count: int) -> None:
        """Look for a better place as long as the node lives; where it loses its own, the node is of no more use."""
        assert self.hosting is not None
        assert self._announcer is not None
        stay = self.settings.stay_seconds
        policy = Policy(look=self.settings.look_seconds, min_stay=stay, urgent_stay=min(Policy().urgent_stay, stay))
        means = Means(self._survey, self._serve, self.settings.drain_timeout)
        self.mover = Mover(self.hosting, self._announcer, means, count, policy)
        try:
            await self.mover.run()
        except Exception as error:  # noqa: BLE001 (whoever runs the node is told)
            if not self.broken.done():
                self.broken.set_exception(error)

    def _tell(self, what: str, done: int, total: int, /) -> None:
        """How far loading is: in bars at the start, in the status line later."""
        self._progress(what, done, total) if self.mover is None else self.mover.tell(done, total)

    async def _offers(self) -> list[Offer]:
        """What others offer who are near, and some who are not."""
        assert self.discovery is not None
        assert self._announcer is not None
        mine = self._announcer.offer
        offers = await self.discovery.offers(mine.model, mine.num_blocks, self.bearings.coordinate)
        self.bearings.read(offers)
        return [offer for offer in offers if offer.peer != mine.peer]

    async def _parts(self, glance: bool = False) -> list[Part]:
        assert self.discovery is not None
        assert self._announcer is not None
        mine = self._announcer.offer
        return await self.discovery.survey(mine.model, mine.num_blocks, glance)

    async def _survey(self, glance: bool = False) -> Survey:
        return survey_parts(await self._parts(glance))

    # --- knowing the way to others ----------------------------------------------------------------------------------

    async def _look_around(self) -> None:
        """Call a few peers: where are we, and how fast do bytes travel?"""
        offers = await self._offers()
        await ping(self.rpc, self.bearings.anywhere(offers), AROUND_SECONDS)
        known = self.bearings.view().measured
        near = sorted((offer for offer in offers if offer.peer in known), key=lambda offer: known[offer.peer])
        found = [await bandwidth(self.rpc, offer, known[offer.peer]) for offer in near[:BANDWIDTH_PEERS]]
        self._bandwidth = max((each for each in found if each is not None), default=None)
        log.info("looked around peers=%d bandwidth_mb=%.1f", len(known), (self._bandwidth or 0.0) / 1e6)

    async def _keep_bearings(self) -> None:
        """Call somebody now and then: peers tell each other steps, which are not answered and so not timed."""
        chance = random.Random()
        while True:
            await asyncio.sleep(BEARINGS_SECONDS * chance.uniform(0.5, 1.0))
            try:
                others = await self._offers()
            except ShoalError as error:
                log.info("no offers error=%r", str(error))
                continue
            await ping(self.rpc, chance.sample(others, min(1, len(others))), BEARINGS_SECONDS)

    async def _keep(self) -> None:
        """Let the offer say what is, and end what nobody needs any more."""
        assert self.discovery is not None
        while True:
            try:
                if self.server is not None:
                    self.server.expire()
                self._peers = await self.discovery.peers_seen()
                await self._keep_offer()
            except ShoalError as error:
                log.warning("the swarm does not answer error=%r", str(error))
            await asyncio.sleep(1.0)

    async def _keep_offer(self) -> None:
        assert self._announcer is not None
        server = self.server
        if server is None or self._announcer.offer.state is State.JOINING:
            return
        await self._announcer.keep(
            cache_free=self.leases.free,
            sessions=server.sessions,
            queue=server.load.queue(time.monotonic()),
            seconds_per_block=server.load.seconds_per_block,
            coordinate=self.bearings.coordinate,
        )

    def status(self) -> Status:
        """For a status line."""
        assert self._announcer is not None
        offer, leases, server = self._announcer.offer, self.leases, self.server
        return Status(
            span=offer.span,
            state=offer.state,
            sessions=len(leases),
            tokens=server.tokens if server else 0,
            cache_used=leases.used,
            cache_tokens=leases.capacity,
            peers=self._peers,
            queue=offer.queue,
            note=self.mover.note if self.mover else "",
        )

    # --- leaving ----------------------------------------------------------------------------------------------------

    async def drain(self, timeout: float) -> bool:
        """Take no new sessions and have others take over the live ones; whether all were within `timeout` seconds."""
        for task in self._tasks[2:]:  # whoever leaves does not move any more
            task.cancel()
        if self.server is None or not self.server.sessions:
            return True
        assert self._announcer is not None
        try:
            await self._announcer.tell(state=State.DRAINING)
        except ShoalError as error:  # who does not see it is told when it asks
            log.warning("leaving unannounced error=%r", str(error))
        return await self.server.drain(timeout)

    async def close(self) -> None:
        """Withdraw the offer and end everything, within two seconds."""
        for task in self._tasks:
            task.cancel()
        self.broken.cancel()
        await close_all(self.rpc, self.executor, self.discovery)


async def close_all(*parts: Rpc | Executor | Discovery | None) -> None:
    """Close them at the same time; one that fails keeps no other from it."""
    closing = [part.close() for part in parts if part is not None]
    for outcome in await asyncio.gather(*closing, return_exceptions=True):
        if isinstance(outcome, Exception):
            log.warning("not closed cleanly error=%r", outcome)


async def keep_memory() -> None:
    """Stay as small as what is in use, whoever comes and goes."""
    from peer.capacity import keep_small

    while True:
        await asyncio.sleep(RELEASE_SECONDS)
        await asyncio.to_thread(keep_small)


def _name_of(model: str) -> str:
    """What people may call it; of a folder, be it ".", its own name."""
    return Path(model).resolve().name[:64]


def _import_heavy() -> None:
    """Torch and transformers take seconds to import; do it in the compute thread while the loop joins the swarm."""
    import_lightly("swarm.model", "peer.capacity", "peer.server")


def _count_blocks(checkpoint: Checkpoint) -> int:
    from swarm.cutting.skeleton import num_blocks

    return num_blocks(checkpoint.config())
