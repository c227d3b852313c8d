"""A training swarm in this very process: real nodes, real sockets, a real DHT, tiny models."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import torch

from peer.config import BootstrapSettings, TrainSettings
from peer.joining import start_discovery
from peer.training.node import TrainNode
from swarm.discovery import Discovery
from swarm.files.checkpoint import silent
from swarm.identity import Identity
from swarm.runs.metrics import Round
from swarm.runs.run import Run
from swarm.runs.samples import Samples
from swarm.trainer import TrainerNode


class TrainingSwarm:
    """A bootstrap node, members and trainers of one run, all in this loop."""

    def __init__(self, run: Run, bootstrap: Discovery, folder: Path) -> None:
        self.run = run
        self.address = bootstrap.addresses[0]
        self.members: list[TrainNode] = []
        self.trainers: list[TrainerNode] = []
        self._folder = folder
        self._killed: list[TrainNode] = []

    async def member(self, stage: int | None, run: Run | None = None, **settings: Any) -> TrainNode:
        """Start a peer that holds a stage."""
        chosen = TrainSettings(
            stage=stage,
            initial_peers=[self.address],
            checkpoints=settings.pop("checkpoints", self._folder / "checkpoints"),
            **settings,
        )
        node = TrainNode(chosen, run or self.run, Identity.generate(), silent)
        self.members.append(node)
        await node.start()
        return node

    async def trainer(self, run: Run | None = None) -> TrainerNode:
        """Start a trainer; nothing is trained until its rounds are asked for."""
        run = run or self.run
        node = await TrainerNode.start(run, [self.address], 2 * len(run.stages), silent)
        self.trainers.append(node)
        return node

    async def kill(self, node: TrainNode) -> None:
        """End a member as SIGKILL does, as far as others can tell: its sockets close, its offer stays."""
        assert node._keeper is not None
        assert node.member is not None
        node._keeper.cancel()
        await node.member.close()
        await node.rpc.close()
        self.members.remove(node)
        self._killed.append(node)

    async def digests(self) -> list[bytes]:
        """Of every living member, once all have ended the run."""
        for node in self.members:
            await node.ended()
        return [await node.digest() for node in self.members]

    async def close(self) -> None:
        """Take everything down."""
        for trainer in self.trainers:
            await trainer.close()
        for node in (*self.members, *self._killed):
            await node.close()


@contextlib.asynccontextmanager
async def training_swarm(run: Run, folder: Path) -> AsyncIterator[TrainingSwarm]:
    """A `TrainingSwarm` for the time of a `with`."""
    async with await start_discovery(BootstrapSettings(), Identity.generate(), 0) as bootstrap:
        swarm = TrainingSwarm(run, bootstrap, folder)
        try:
            yield swarm
        finally:
            await swarm.close()


async def train(trainer: TrainerNode, seconds: float = 50.0) -> list[Round]:
    """All rounds until the run is over."""
    async with asyncio.timeout(seconds):
        return [ended async for ended in trainer.trainer.rounds()]


def samples_of_rounds(run: Run, samples: Samples) -> Any:
    """What a round's samples are, whole."""

    def of(round_: int) -> torch.Tensor:
        return torch.cat([samples.micro_batch(round_, index).ids for index in range(run.micro_batches)])

    return of
