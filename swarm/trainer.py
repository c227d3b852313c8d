"""A trainer's place in the swarm: puts the parts together and holds no logic of its own."""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import Coroutine, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from swarm.agreement.attendance import TrainerAttendance
from swarm.console.conversation import Conversation
from swarm.discovery import Discovery
from swarm.errors import RemoteError, ShoalError
from swarm.files.checkpoint import Progress
from swarm.identity import Identity
from swarm.network import Network, Waiting
from swarm.runmodel import model_of_run
from swarm.runs.origin import config_of, plan_of, tokenizer_of
from swarm.runs.run import Run
from swarm.runs.samples import Samples
from swarm.runs.schedule import schedule_of
from swarm.runs.terms import refuse_another_file
from swarm.training import Trainer
from swarm.transport import TcpTransport
from swarm.types import PeerId
from swarm.wire import Endpoint

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedTokenizerBase

log = logging.getLogger(__name__)

T = TypeVar("T")

SEEK_SECONDS = 0.3  # between two looks at who takes part, as long as the run is not found
LOOK_SECONDS = 3.0  # and after that
_SAMPLE_WAITING = Waiting(first=10.0)  # a member that has just been seated tells the swarm so a moment later


class TrainerNode:
    """One trainer, from `start` to `close`.

    Attributes:
        failed: done when it cannot go on; its exception says why.
    """

    def __init__(self, run: Run, network: Network, discovery: Discovery, parts: Parts, want: int) -> None:
        self.run = run
        self._discovery = discovery
        self.network = network
        self._parts = parts
        self._known: dict[PeerId, Endpoint] = {}
        plan = plan_of(run, parts.config)
        self.attendance = TrainerAttendance(network.rpc, plan, lambda: self._known, want)
        rate, factor = run.optimizer.learning_rate, parts.factor
        self.trainer = Trainer(run, network.rpc, self.attendance, parts.samples, lambda step: rate * factor(step))
        self.failed: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._keeper = asyncio.create_task(self._keep())
        self._talk: Conversation | None = None

    @classmethod
    async def start(cls, run: Run, initial_peers: Sequence[str], want: int, progress: Progress) -> TrainerNode:
        """Read the data, join the swarm, look for the run.

        Raises what stands in the way: `UsageError` for data that cannot be used or a run that goes on with another
        file, `CannotJoin`.
        """
        parts = await asyncio.to_thread(Parts, run, progress)
        identity = Identity.generate()
        discovery = await Discovery.start(identity, initial_peers, client_mode=True)
        network = Network(TcpTransport(identity), discovery)
        try:
            await refuse_another_file(discovery, network.rpc, run)
            node = cls(run, network, discovery, parts, want)
        except BaseException:
            await network.close()
            raise
        node.attendance.start()
        return node

    async def _keep(self) -> None:
        """Know who takes part, as far as the DHT tells."""
        try:
            while True:
                with contextlib.suppress(RemoteError):  # the DHT did not answer in time: what was known stays
                    offers = await self.network.offers(self.run.id, self.run.num_blocks)
                    self._known = {
                        offer.peer: Endpoint(offer.peer, [(each.host, each.port) for each in offer.addresses])
                        for offer in offers
                        if offer.span in self.run.spans
                    }
                    if self.attendance.round < 0:
                        await refuse_another_file(self._discovery, self.network.rpc, self.run)
                await asyncio.sleep(SEEK_SECONDS if self.attendance.round < 0 else LOOK_SECONDS)
        except ShoalError as error:
            self.failed.set_exception(error)

    async def gather(self, folder: Path) -> int:
        """Write all weights to an ordinary folder that `from_pretrained` loads; the round that they are of.

        Raises `NoRoute` or a `RemoteError` where they cannot be had, `DiskFull` where they cannot be written.
        """
        from swarm.runs.weights import Fetcher, save_model, stage_plans

        plans = await asyncio.to_thread(stage_plans, self.run, self._parts.config)
        fetcher = Fetcher(self.run, self.network.rpc, plans)
        round_, weights = await fetcher.everything(await self.network.offers(self.run.id, self.run.num_blocks), folder)
        await save_model(folder, self._parts.config, weights, self._parts.tokenizer)
        return round_

    async def sample(self) -> str:
        """What the model says now after the run's prompt. Raises as generating does."""
        loop = asyncio.get_running_loop()
        return await asyncio.to_thread(self._sample, loop)

    def _sample(self, loop: asyncio.AbstractEventLoop) -> str:
        if self._talk is None:
            model = model_of_run(self.run, self._parts.config, self.network, _Elsewhere(loop), _SAMPLE_WAITING)
            self._talk = Conversation(model, self._parts.tokenizer)
        table = self.run.sample
        prompt = self._talk.encode(table.prompt, raw=True)
        answer = self._talk.answer(prompt, max_new_tokens=table.tokens, do_sample=False)
        self._talk.forget()
        return table.prompt + answer.text

    async def close(self) -> None:
        """Leave the run and the swarm."""
        self._keeper.cancel()
        self.failed.cancel()
        await self.attendance.close()
        await self.network.close()


class Parts:
    """What a trainer needs that takes a while to make."""

    def __init__(self, run: Run, progress: Progress) -> None:
        self.tokenizer: PreTrainedTokenizerBase = tokenizer_of(run, progress)
        self.config: PreTrainedConfig = config_of(run, self.tokenizer, progress)
        self.factor = schedule_of(run)
        progress("reading the data", 0, 0)
        self.samples = Samples(run, self.tokenizer)


class _Elsewhere:
    """A loop that runs in another thread, for the thread that generates."""

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        self._loop = loop

    def run(self, work: Coroutine[Any, Any, T]) -> T:
        return asyncio.run_coroutine_threadsafe(work, self._loop).result()

    def post(self, work: Coroutine[Any, Any, Any]) -> None:
        self._loop.call_soon_threadsafe(self._loop.create_task, work)
