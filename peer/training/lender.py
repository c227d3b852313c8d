"""Weights of a stage for whoever asks: a client for the ends of the model, a trainer for all of it."""

from __future__ import annotations

import asyncio
import math

import torch

from peer.executor import Executor
from peer.training.stage import TrainingStage
from swarm import tensors
from swarm.errors import BadTensor, Forgotten, NotReady, WrongModel
from swarm.rpc import Link, Reply, Rpc
from swarm.runs.wire_weights import NEWEST, Slice, Weights

KEEP_SECONDS = 20.0  # after the last one who asked
KEPT = 2  # rounds whose weights are kept for those who fetch them in several pieces


class Lender:
    """Answers `Weights` of one run with one stage."""

    def __init__(self, rpc: Rpc, executor: Executor, stage: TrainingStage) -> None:
        self._run = bytes.fromhex(stage.run.id)[:16]
        self._number = stage.run.spans.index(stage.model.span)
        self._executor = executor
        self._stage = stage
        self._kept: dict[int, torch.Tensor] = {}  # by round
        self._asked = -math.inf
        rpc.answer(Weights, self._weights)

    async def _weights(self, link: Link, message: Weights, body: memoryview) -> Reply:
        if message.run != self._run:
            raise WrongModel("the peer takes part in another run")
        self._asked = asyncio.get_running_loop().time()
        place = slice(message.start, message.start + message.count)
        if place.stop > self._stage.optimizer.layout.size:
            raise BadTensor(f"weights {place.start}:{place.stop} of {self._stage.optimizer.layout.size}")
        part, round_ = await self._executor.run(lambda: self._part(message.round, place))
        return Slice(self._number, round_, self._stage.version, tensors.spec_of(part)), tensors.encode([part])

    def _part(self, round_: int, place: slice) -> tuple[torch.Tensor, int]:
        """In the compute thread: between two steps, so that all of it is of one round."""
        now = self._stage.round
        if now < 0:
            raise NotReady("the stage holds no weights yet")
        if round_ not in (NEWEST, now) and round_ not in self._kept:
            raise Forgotten(f"the weights of round {round_} are gone; {now} is collected")
        if round_ == NEWEST and place.stop - place.start == 1:  # that is to ask for the round alone
            return self._stage.optimizer.weights[place].clone().cpu(), now
        round_ = now if round_ == NEWEST else round_
        if round_ not in self._kept:  # whoever asks for a piece will ask for more, and the next step is near
            self._kept[round_] = self._stage.optimizer.weights.clone()
            for old in sorted(self._kept)[:-KEPT]:
                del self._kept[old]
        return self._kept[round_][place].cpu(), round_

    def expire(self, now: float) -> None:
        """Forget what was kept, if nobody has asked for a while; call it now and then."""
        if now - self._asked > KEEP_SECONDS:
            self._kept = {}
