"""A node that holds a stage of a training run: puts the parts together and holds no logic of its own."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import math
import random
from collections import Counter
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import swarm
from peer.cache import Leases
from peer.config import TrainSettings, parse_address
from peer.executor import Executor
from peer.joining import addresses_of, start_discovery
from peer.node import close_all, keep_memory
from swarm.agreement.roster import replicas
from swarm.discovery import Discovery
from swarm.errors import ModelDiverged, RemoteError, ShoalError, UsageError
from swarm.files.checkpoint import Progress
from swarm.identity import Identity
from swarm.imports import import_lightly
from swarm.rpc import Rpc
from swarm.runs.run import Run
from swarm.runs.terms import answer_terms, refuse_another_file
from swarm.transport import TcpTransport
from swarm.types import Address, Offer, PeerId, State
from swarm.wire import Endpoint

if TYPE_CHECKING:
    from peer.server import Server
    from peer.training.lender import Lender
    from peer.training.member import MemberAttendance
    from peer.training.passes import Passes
    from peer.training.stage import TrainingStage
    from swarm.agreement.assignments import Plan

log = logging.getLogger(__name__)

SEEK_SECONDS = 0.3  # between two looks at who else is there, as long as the swarm does not know that this one serves
LOOK_SECONDS = 3.0  # and after that
RENEW_SECONDS = 10.0  # between two looks at what the offer says
SERVED_TOKENS = 4096  # of cache for those who use the model while it is trained
CHECKPOINTS = Path("checkpoints")


@dataclass(frozen=True, slots=True)
class Status:
    """What a node can say of itself at a moment."""

    stage: int
    round: int
    rounds: int
    micro_batches: int  # done since the start
    tokens: int  # of these
    peers: tuple[int, ...]  # replicas of each stage
    sessions: int


class TrainNode:
    """One peer that holds a stage of a run, and serves it to whoever wants to use the model meanwhile.

    Attributes:
        failed: done when the node cannot go on; its exception says why.
    """

    def __init__(self, settings: TrainSettings, run: Run, identity: Identity, progress: Progress) -> None:
        self.settings = settings
        self.run = run
        self.identity = identity
        self._progress = progress
        self.transport = TcpTransport(identity)
        self.rpc = Rpc(self.transport)
        self.executor = Executor()
        self.leases = Leases(0, settings.lease_seconds)
        self.discovery: Discovery | None = None
        self.stage: TrainingStage | None = None
        self.passes: Passes | None = None
        self.server: Server | None = None
        self.lender: Lender | None = None
        self.member: MemberAttendance | None = None
        self._known: dict[PeerId, Endpoint] = {}
        self._told = -math.inf
        self._offer: Offer | None = None
        self._keeper: asyncio.Task[None] | None = None
        self._releaser: asyncio.Task[None] | None = None
        self.failed: asyncio.Future[None] = asyncio.get_running_loop().create_future()

    async def start(self) -> None:
        """Listen, join the swarm, take a stage, take part. Raises what stands in the way, with what to do about it."""
        listen = parse_address(self.settings.listen)
        heavy = asyncio.ensure_future(self.executor.run(_import_heavy))
        try:
            address = await self.transport.listen(listen, self.rpc.accept)
            answer_terms(self.rpc, self.run)
            self.discovery = await start_discovery(self.settings, self.identity, listen.port + 1 if listen.port else 0)
            await refuse_another_file(self.discovery, self.rpc, self.run)
            number = await self._choose()
            self._offer = self._first_offer(number, addresses_of(self.settings, self.discovery, address))
            await self.discovery.publish(self._offer)
        except BaseException:
            heavy.cancel()
            raise
        await heavy
        await self.executor.give_way(self.settings.nice)  # the import does not: somebody waits for it
        await self._take_part(number, self._offer)

    async def _take_part(self, number: int, offer: Offer) -> None:
        from peer.server import Server
        from peer.stage import PAGE, Stage
        from peer.training.lender import Lender
        from peer.training.member import MemberAttendance
        from peer.training.passes import Passes

        stage, plan = await self.executor.run(lambda: self._load(number))
        self.stage = stage
        endpoint = Endpoint(self.identity.peer, [(each.host, each.port) for each in offer.addresses])
        served = Stage(stage.model.served, tokens=SERVED_TOKENS)
        self.leases.capacity, self.leases.page = SERVED_TOKENS, PAGE
        self.server = Server(self.rpc, served, self.executor, self.leases, self.run.id)
        loop = asyncio.get_running_loop()
        changed = self.server.weights_changed
        stage.on_change = lambda: _ignored(loop.call_soon_threadsafe(changed))
        self.lender = Lender(self.rpc, self.executor, stage)
        self.member = MemberAttendance(self.rpc, self.executor, stage, plan, number, endpoint, lambda: self._known)
        self.passes = Passes(self.rpc, self.executor, stage, self.member)
        await self._look_around()
        self.member.start()
        self._keeper = asyncio.create_task(self._keep())
        self._releaser = asyncio.create_task(keep_memory())  # a copy for a newcomer leaves gaps behind
        log.info("holding stage=%d of run=%s", number, self.run.name)

    def _load(self, number: int) -> tuple[TrainingStage, Plan]:
        import torch

        from peer.training.checkpoints import Checkpoints
        from peer.training.stage import TrainingStage
        from swarm.runs.origin import config_of, plan_of, stage_of, tokenizer_of

        if self.settings.threads:
            torch.set_num_threads(self.settings.threads)
        run, device = self.run, self.settings.device
        config = config_of(run, tokenizer_of(run, self._progress), self._progress)
        checkpoints = Checkpoints(folder_of(self.settings, run), run, number, self.settings.resume)
        if self.settings.resume and not checkpoints.rounds():
            log.warning("nothing of stage %d is saved there, to resume from folder=%s", number, checkpoints.folder)
        stage = TrainingStage(run, partial(stage_of, run, config, number, device), checkpoints)
        return stage, plan_of(run, config)

    async def _keep(self) -> None:
        """Know the others, let the offer say what is, end what nobody needs any more, and notice what cannot go on."""
        assert self.server is not None
        assert self.lender is not None
        try:
            while True:
                self.server.expire()
                self.lender.expire(asyncio.get_running_loop().time())
                with contextlib.suppress(RemoteError):  # the DHT did not answer in time: what was known stays
                    await self._look_around()
                    await self._tell()
                await asyncio.sleep(LOOK_SECONDS if self._is_told else SEEK_SECONDS)
        except ShoalError as error:
            self.failed.set_exception(error)

    @property
    def _is_settled(self) -> bool:
        return self.member is not None and self.member.round >= 0

    @property
    def _is_told(self) -> bool:
        """Whether the swarm knows that this peer serves."""
        return self._offer is not None and self._offer.state is State.ONLINE

    async def _look_around(self) -> None:
        """Who else takes part, as far as the DHT tells; and as long as nobody is found, whether with another file."""
        assert self.discovery is not None
        offers = await self.discovery.everything(self.run.id, self.run.num_blocks)
        self._known = {
            offer.peer: Endpoint(offer.peer, [(each.host, each.port) for each in offer.addresses])
            for offer in offers
            if offer.span in self.run.spans
        }
        if not self._is_settled:
            await refuse_another_file(self.discovery, self.rpc, self.run)

    async def _tell(self) -> None:
        """An offer to serve is made as soon as there are weights."""
        assert self._offer is not None
        assert self.discovery is not None
        assert self.server is not None
        state = State.ONLINE if self._is_settled else State.JOINING
        tokens, now = self.leases.capacity, asyncio.get_running_loop().time()
        offer = replace(self._offer, state=state, cache_tokens=tokens, batched=self.server.batches)
        if offer == self._offer and now - self._told < RENEW_SECONDS:
            return
        offer = replace(offer, cache_free=self.leases.free, sessions=self.server.sessions)
        if offer != self._offer:
            await self.discovery.publish(offer)
        self._offer, self._told = offer, now

    def status(self) -> Status:
        """For a status line."""
        assert self._offer is not None
        stages = len(self.run.stages)
        roster = self.member.roster if self.member else None
        return Status(
            stage=self.run.spans.index(self._offer.span),
            round=self.member.round if self.member else -1,
            rounds=self.run.rounds,
            micro_batches=self.passes.done if self.passes else 0,
            tokens=self.passes.tokens if self.passes else 0,
            peers=tuple(replicas(roster, stages)) if roster else (0,) * stages,
            sessions=self.server.sessions if self.server else 0,
        )

    @property
    def is_finished(self) -> bool:
        """Whether the run's last round is over, and what came of it is held here."""
        return self.stage is not None and self.stage.round >= self.run.rounds

    async def ended(self) -> None:
        """Return when the run's last round is over.

        Raises what keeps this node from going on, and `ModelDiverged` where the run was stopped.
        """
        member = self.member
        assert member is not None
        over = asyncio.ensure_future(member.until(lambda: self.is_finished or member.stopped))
        waiting: set[asyncio.Future[None]] = {over, self.failed, member.failure}
        try:
            done, _ = await asyncio.wait(waiting, return_when=asyncio.FIRST_COMPLETED)
            for each in done:
                each.result()
        finally:
            over.cancel()
        if member.stopped and not self.is_finished:
            raise await self._diverged()

    async def _diverged(self) -> ModelDiverged:
        """What there is to say once the run was stopped; only good checkpoints are left then."""
        assert self.stage is not None
        good = await self.executor.run(self.stage.forsake)
        folder = folder_of(self.settings, self.run)
        left = f"the last good checkpoint is of round {good}, in {folder}" if good else "there is no good checkpoint"
        return ModelDiverged(f"the run was stopped: its loss or gradient is no finite number any more; {left}")

    async def failing(self) -> None:
        """Return never. Raises what keeps this node from going on."""
        assert self.member is not None
        done, _ = await asyncio.wait({self.failed, self.member.failure}, return_when=asyncio.FIRST_COMPLETED)
        for each in done:
            each.result()

    async def digest(self) -> bytes:
        """The hash of parameters and optimizer state."""
        from peer.training.transfer import digest_of_state

        stage = self.stage
        assert stage is not None
        return await self.executor.run(lambda: digest_of_state(stage.round, list(stage.state())))

    async def close(self) -> None:
        """Withdraw the offer and end everything."""
        for task in (self._keeper, self._releaser):
            if task is not None:
                task.cancel()
        self.failed.cancel()
        if self.member is not None:
            await self.member.close()
        await close_all(self.rpc, self.executor, self.discovery)

    async def _choose(self) -> int:
        """The stage to hold: as told, else one that the fewest hold."""
        assert self.discovery is not None
        count = len(self.run.stages)
        if (wanted := self.settings.stage) is not None:
            if wanted >= count:
                raise UsageError(f"--stage {wanted}: the run has stages 0 to {count - 1}")
            return wanted
        offers = await self.discovery.everything(self.run.id, self.run.num_blocks)
        held = Counter(offer.span for offer in offers)
        fewest = min(held[span] for span in self.run.spans)
        return random.choice([index for index, span in enumerate(self.run.spans) if held[span] == fewest])

    def _first_offer(self, number: int, addresses: tuple[Address, ...]) -> Offer:
        return Offer(
            peer=self.identity.peer,
            model=self.run.id,
            name=self.run.name,
            num_blocks=self.run.num_blocks,
            span=self.run.spans[number],
            addresses=addresses,
            state=State.JOINING,
            dtype="float32",
            tokens_per_second=0.0,
            cache_tokens=0,
            cache_free=0,
            sessions=0,
            version=swarm.__version__,
            issued=0.0,
            expires=0.0,
        )


def folder_of(settings: TrainSettings, run: Run) -> Path:
    """Where checkpoints go: as told, as the run's file says, or a folder of the run's name here."""
    return settings.checkpoints or Path(run.checkpoint.folder or CHECKPOINTS / run.name)


def _ignored(_: object) -> None:
    """For a callback that returns nothing."""


def _import_heavy() -> None:
    """Torch and transformers take seconds to import; do it in the compute thread while the loop joins the swarm."""
    import_lightly("peer.training.stage", "peer.training.member", "peer.server", "swarm.runs.origin")
