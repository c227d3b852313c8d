"""One span after another: loaded, measured, served, and left again with nothing of it kept in memory."""

from __future__ import annotations

import asyncio
import gc
import logging
from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from peer.cache import Leases
from peer.config import ServeSettings
from peer.executor import Executor
from peer.load import Load
from swarm.errors import UsageError
from swarm.files.checkpoint import Progress
from swarm.rpc import Rpc
from swarm.types import ModelId, Span

if TYPE_CHECKING:
    from peer.capacity import Capacity
    from peer.server import Server
    from peer.stage import Stage
    from swarm.model import StageModel

log = logging.getLogger(__name__)


class Hosting:
    """What this peer hosts of a model.

    Attributes:
        server: serves the present span, or served the last one; None before the first.
        tell: how far loading has come.
        remarks: on how the present span is run, where that is not as one would expect.
    """

    def __init__(
        self, folder: Path, model: ModelId, settings: ServeSettings, rpc: Rpc, executor: Executor, tell: Progress
    ) -> None:
        self.server: Server | None = None
        self.leases = Leases(0, settings.lease_seconds)  # until a stage is there and its memory is known
        self.tell = tell
        self.remarks: list[str] = []
        self._folder, self._model, self._settings = folder, model, settings
        self._rpc, self._executor = rpc, executor
        self._stage: Stage | None = None
        self._capacity: Capacity | None = None
        self._threads: list[int] = []  # how many to compute with, the fastest of these
        self._unrehearsed: list[int] = []  # tokens of steps
        self._quiet = asyncio.Lock()  # while the stage is used for itself: nobody lets it go meanwhile

    async def probe(self, block: int, num_blocks: int) -> tuple[Capacity, int]:
        """Measure one block, and how many like it fit. Raises `UsageError` where none does, or fewer than wanted."""
        from peer.capacity import fitting_blocks, release_memory

        settings, room = self._settings, self._room()
        capacity = await self._executor.run(lambda: self._load(Span(block, block + 1))[1])
        await self._executor.run(release_memory)
        fit = fitting_blocks(capacity, settings.cache_tokens, room, num_blocks)
        if settings.num_blocks and settings.num_blocks > fit:
            raise UsageError(f"--num-blocks {settings.num_blocks}: there is memory for {fit} with their cache")
        log.info(
            "measured decode_ms=%.2f prefill_ms=%.1f weights_mb=%.1f fit=%d",
            1000 * capacity.seconds_per_block,
            1000 * capacity.prefill_seconds_per_block,
            capacity.weights / 1e6,
            fit,
        )
        return capacity, settings.num_blocks or fit

    async def host(self, span: Span) -> Capacity:
        """Load `span` and serve it. Raises what loading raises, and `UsageError` where the cache would not fit."""
        from peer.capacity import LONG_SECONDS, cache_tokens, host_tokens, keep_small, rehearsals
        from peer.server import Server
        from peer.stage import PAGE

        room = self._room()
        stage, capacity = await self._executor.run(lambda: self._load(span))
        left = None if room is None else room - capacity.weights
        tokens = cache_tokens(self._settings.cache_tokens, capacity.bytes_per_token, left)
        self.leases.capacity, self.leases.page = max(tokens - tokens % PAGE, PAGE), PAGE
        beside = left if self._settings.device == "cpu" else None  # a GPU's host has memory of its own
        self.leases.host = host_tokens(self.leases.capacity, capacity.bytes_per_token, beside)
        await self._executor.run(lambda: stage.reserve(self.leases.capacity))
        before, self.server = (
            self.server,
            Server(self._rpc, stage, self._executor, self.leases, self._model, rounding=self._settings.wire_dtype),
        )
        self.server.load = Load(capacity.seconds_per_block)
        self.server.tokens = before.tokens if before else 0
        await self._executor.run(keep_small)  # what loading has left behind
        gc.freeze()  # what was imported and loaded stays: no collection has to look through it, between two tokens
        self._stage, self._capacity = stage, capacity
        short = capacity.seconds_per_block * len(span) <= LONG_SECONDS
        self._unrehearsed = rehearsals(self.leases.capacity) if stage.batches and short else []
        return capacity

    @property
    def is_used(self) -> bool:
        """Whether anybody has a session here, or nothing is served yet."""
        return self._stage is None or self.server is None or self.server.sessions > 0

    async def rehearse(self) -> bool:
        """Rehearse a step; False where nothing is left to rehearse, or somebody uses the stage."""
        from peer.capacity import rehearse

        async with self._quiet:
            stage, server = self._stage, self.server
            if stage is None or server is None or server.sessions or not self._unrehearsed:
                return False
            tokens = self._unrehearsed.pop(0)
            await self._executor.run(lambda: rehearse(stage, tokens))
            return True

    async def measure_again(self) -> Capacity | None:
        """What the stage can do now, while nobody uses it; None where somebody does, or it is as fast as was thought.

        It was measured first while it was loaded, perhaps with much else going on: others that start at the same time.
        """
        import torch

        from peer.capacity import RUNS, decode, fastest

        async with self._quiet:
            stage, capacity, server = self._stage, self._capacity, self.server
            if stage is None or capacity is None or server is None:
                return None
            taken: dict[int, list[float]] = {count: [] for count in self._threads}
            for count in self._threads * RUNS:
                if server.sessions:
                    return None
                taken[count].append(await self._executor.run(partial(decode, stage, count)))
            threads, seconds = fastest(taken)
            await self._executor.run(lambda: torch.set_num_threads(threads))
            if not server.load.measured(seconds):
                return None
            log.info("measured again decode_ms=%.2f threads=%d", 1000 * seconds, threads)
            self._capacity = replace(capacity, seconds_per_block=seconds)
            return self._capacity

    async def leave(self) -> None:
        """Let the stage go, and its memory with it. Sessions that are still there are ended."""
        from peer.capacity import release_memory

        assert self.server is not None
        async with self._quiet:
            self._stage = self._capacity = None
        await self.server.close()
        await self._executor.run(release_memory)

    def _room(self) -> int | None:
        import torch

        from peer.capacity import budget

        return budget(torch.device(self._settings.device), self._settings.memory)

    def _load(self, span: Span) -> tuple[Stage, Capacity]:
        import torch

        from peer.capacity import PREFILL, measure, thread_counts
        from peer.stage import Stage
        from swarm.model import load_stage

        if not self._threads:
            most = self._settings.threads or torch.get_num_threads()
            self._threads = [most] if self._settings.threads or self._settings.device != "cpu" else thread_counts(most)
        torch.set_num_threads(self._threads[0])
        model = load_stage(
            self._folder,
            span,
            dtype=getattr(torch, self._settings.dtype),
            device=self._settings.device,
            quantize=None if self._settings.quantize == "none" else self._settings.quantize,
            progress=lambda done, total: self.tell(f"loading blocks {span}", done, total),
        )
        kept = None if self._settings.cache_dtype is None else getattr(torch, self._settings.cache_dtype)
        stage = Stage(model, tokens=PREFILL, dtype=kept)  # until it is known how many there is room for
        self.remarks = list(remarks(model, self._settings.quantize))
        return stage, measure(stage, self._threads)


def remarks(model: StageModel, quantize: str) -> Iterator[str]:
    if model.unbatched:
        yield f"sessions run one by one: {model.unbatched}"
    if quantize != "none":
        from swarm.quantization.experts import left_whole

        if left := left_whole(model.model):
            yield f"{left / 1e6:.0f} MB of experts stay in full precision: their family has a layout of its own"
