"""A volunteer's node: puts the parts together and holds no logic of its own."""

from __future__ import annotations

import asyncio
import gc
import importlib
import itertools
import logging
import os
import time
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

import swarm
from peer.cache import Leases
from peer.config import BootstrapSettings, ServeSettings, parse_address, parse_span
from peer.executor import Executor
from peer.placement import choose_span
from swarm.checkpoint import Checkpoint, Progress
from swarm.discovery import Discovery
from swarm.errors import InUse, ShoalError, UsageError
from swarm.hub import resolve
from swarm.identity import Identity
from swarm.rpc import Rpc
from swarm.transport import TcpTransport
from swarm.types import Address, Offer, Span, State

if TYPE_CHECKING:
    from peer.capacity import Capacity
    from peer.server import Server
    from peer.stage import Stage

log = logging.getLogger(__name__)

RENEW_SECONDS = 10.0  # between two looks at what the offer says


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


def identity_of(settings: BootstrapSettings | ServeSettings) -> Identity:
    """The identity in the file that the settings name, or in the first default one that no other peer here uses.

    Raises `UsageError`, or `InUse` where the settings name one that another peer uses.
    """
    if settings.identity is not None:
        return Identity.claim(settings.identity)
    default = default_identity_file()
    for number in itertools.count(1):
        file = default if number == 1 else default.with_stem(f"{default.stem}-{number}")
        try:
            return Identity.claim(file)
        except InUse:
            log.info("identity in use, trying the next file=%s", file)
    raise AssertionError("there is always another number")


def default_identity_file() -> Path:
    """Where a peer keeps its key if it is not told otherwise."""
    base = os.environ.get("XDG_DATA_HOME") or Path.home() / ".local" / "share"
    return Path(base) / "shoal" / "identity.key"


async def start_discovery(settings: BootstrapSettings | ServeSettings, identity: Identity, port: int) -> Discovery:
    """Join the swarm, or begin one. The DHT listens at the same host as the data plane, at `port`."""
    listen = parse_address(settings.listen)
    announce = [_multiaddr(parse_address(settings.announce).host, port)] if settings.announce and port else []
    return await Discovery.start(identity, settings.initial_peers, host=listen.host, port=port, announce=announce)


def _multiaddr(host: str, port: int) -> str:
    kind = "ip6" if ":" in host else "ip4" if host.replace(".", "").isdecimal() else "dns"
    return f"/{kind}/{host}/tcp/{port}"


class Node:
    """One peer that serves a span."""

    def __init__(self, settings: ServeSettings, identity: Identity, progress: Progress) -> None:
        self.settings = settings
        self.identity = identity
        self._progress = progress
        self.transport = TcpTransport(identity)
        self.rpc = Rpc(self.transport)
        self.discovery: Discovery | None = None
        self.server: Server | None = None
        self.leases = Leases(0, settings.lease_seconds)  # until the stage is there and its memory is known
        self.executor = Executor()
        self._offer: Offer | None = None
        self._keeper: asyncio.Task[None] | None = None
        self._peers = 0  # seen when it was last looked

    async def start(self) -> None:
        """Listen, join the swarm, load the span, say so. Raises what stands in the way, with what to do about it."""
        listen = parse_address(self.settings.listen)
        heavy = asyncio.ensure_future(self.executor.run(_import_heavy))  # seconds; the rest goes on meanwhile
        try:
            address = await self.transport.listen(listen, self.rpc.accept)
            dht_port = listen.port + 1 if listen.port else 0
            self.discovery = await start_discovery(self.settings, self.identity, dht_port)
            folder = await asyncio.to_thread(resolve, self.settings.model, self._progress)
            checkpoint = await asyncio.to_thread(Checkpoint, folder)
            self._offer = await self._first_offer(checkpoint, address)
            await self.discovery.publish(self._offer)
        except BaseException:
            heavy.cancel()  # whoever is to hear of a mistake, or pressed Ctrl-C, does not wait for it
            raise
        await heavy
        await self._serve(folder, self._offer)

    async def _first_offer(self, checkpoint: Checkpoint, listening: Address) -> Offer:
        assert self.discovery is not None
        model = await asyncio.to_thread(lambda: checkpoint.model_id)
        # In the one thread that imports transformers: seen from another, it may be half there.
        blocks = await self.executor.run(lambda: _count_blocks(checkpoint))
        span = await self._choose(model, blocks)
        settings = self.settings
        return Offer(
            peer=self.identity.peer,
            model=model,
            name=_name_of(settings.model),
            num_blocks=blocks,
            span=span,
            addresses=self._addresses(listening),
            state=State.JOINING,
            dtype=settings.dtype,
            tokens_per_second=0.0,
            cache_tokens=settings.cache_tokens or 0,
            cache_free=0,
            sessions=0,
            version=swarm.__version__,
            issued=0.0,
            expires=0.0,
        )

    def _addresses(self, listening: Address) -> tuple[Address, ...]:
        """Where others reach the data plane: as announced, or at every address of this machine if it listens at all."""
        assert self.discovery is not None
        if self.settings.announce:
            announced = parse_address(self.settings.announce)
            return (Address(announced.host, announced.port or listening.port),)
        if listening.host not in ("0.0.0.0", "::"):
            return (listening,)
        hosts = dict.fromkeys(address.split("/")[2] for address in self.discovery.addresses)
        near_last = sorted(hosts, key=lambda host: host.startswith("127.") or host == "::1")
        return tuple(Address(host, listening.port) for host in near_last[:8])

    async def _choose(self, model: str, blocks: int) -> Span:
        from swarm.types import ModelId

        assert self.discovery is not None
        if self.settings.blocks is not None:
            span = parse_span(self.settings.blocks)
            if span.end > blocks:
                raise UsageError(f"--blocks {span}: the model has blocks 0:{blocks}")
            return span
        count = self.settings.num_blocks or blocks
        if count > blocks:
            raise UsageError(f"--num-blocks {count}: the model has {blocks}")
        return choose_span(await self.discovery.offers(ModelId(model), blocks), blocks, count)

    async def _serve(self, folder: Path, offer: Offer) -> None:
        from peer.capacity import available_memory, cache_tokens
        from peer.server import Server
        from peer.stage import PAGE

        stage, capacity = await self.executor.run(lambda: self._load(folder, offer.span))
        tokens = cache_tokens(self.settings.cache_tokens, capacity, available_memory(stage.model.device))
        tokens = max(tokens - tokens % PAGE, PAGE)
        self.leases.capacity, self.leases.page = tokens, PAGE
        await self.executor.run(lambda: stage.reserve(tokens))
        self.server = Server(self.rpc, stage, self.executor, self.leases, offer.model)
        speed = capacity.tokens_per_second
        await self._publish(state=State.ONLINE, tokens_per_second=speed, cache_tokens=tokens, cache_free=tokens)
        log.info("online blocks=%s dtype=%s tokens_per_second=%.1f cache=%s", offer.span, offer.dtype, speed, tokens)
        gc.freeze()  # what was imported and loaded stays: no collection has to look through it, between two tokens
        self._keeper = asyncio.create_task(self._keep())

    def _load(self, folder: Path, span: Span) -> tuple[Stage, Capacity]:
        import torch

        from peer.capacity import measure
        from peer.stage import PAGE, Stage
        from swarm.model import load_stage

        if self.settings.threads:
            torch.set_num_threads(self.settings.threads)
        model = load_stage(
            folder,
            span,
            dtype=getattr(torch, self.settings.dtype),
            device=self.settings.device,
            progress=lambda done, total: self._progress(f"loading blocks {span}", done, total),
        )
        stage = Stage(model, tokens=PAGE)
        if stage.model.unbatched:
            log.info("sessions run one by one: %s", stage.model.unbatched)
        return stage, measure(stage)

    async def _publish(self, **changes: object) -> None:
        assert self._offer is not None
        assert self.discovery is not None
        offer = replace(self._offer, **changes)  # type: ignore[arg-type]
        if offer != self._offer:
            self._offer = offer
            await self.discovery.publish(offer)

    async def _keep(self) -> None:
        """Let the offer say what is, and end what nobody needs any more."""
        assert self.server is not None
        assert self.discovery is not None
        looked = time.monotonic()
        while True:
            self.server.expire()
            try:
                self._peers = await self.discovery.peers_seen()
                if time.monotonic() - looked >= RENEW_SECONDS:
                    looked = time.monotonic()
                    await self._publish(cache_free=self.leases.free, sessions=self.server.sessions)
            except ShoalError as error:
                log.warning("the swarm does not answer error=%r", str(error))
            await asyncio.sleep(1.0)

    def status(self) -> Status:
        """For a status line."""
        assert self._offer is not None
        offer, leases = self._offer, self.leases
        tokens = self.server.tokens if self.server else 0
        return Status(offer.span, offer.state, len(leases), tokens, leases.used, leases.capacity, self._peers)

    async def drain(self, timeout: float) -> bool:
        """Take no new sessions and have others take over the live ones; whether all were within `timeout` seconds."""
        if self.server is None or not self.server.sessions:
            return True
        try:
            await self._publish(state=State.DRAINING)
        except ShoalError as error:  # who does not see it is told when it asks
            log.warning("leaving unannounced error=%r", str(error))
        return await self.server.drain(timeout)

    async def close(self) -> None:
        """Withdraw the offer and end everything, within two seconds."""
        if self._keeper is not None:
            self._keeper.cancel()
        parts: list[Callable[[], Awaitable[None]]] = [self.rpc.close, self.executor.close]
        if self.discovery is not None:
            parts.append(self.discovery.close)
        for outcome in await asyncio.gather(*(part() for part in parts), return_exceptions=True):
            if isinstance(outcome, Exception):
                log.warning("not closed cleanly error=%r", outcome)


def _name_of(model: str) -> str:
    """What people may call it; of a folder, be it ".", its own name."""
    return Path(model).resolve().name[:64]


def _import_heavy() -> None:
    """Torch and transformers take seconds to import; do it in the compute thread while the loop joins the swarm."""
    for name in ("swarm.model", "peer.capacity", "peer.server"):
        importlib.import_module(name)


def _count_blocks(checkpoint: Checkpoint) -> int:
    from swarm.skeleton import num_blocks

    return num_blocks(checkpoint.config())
