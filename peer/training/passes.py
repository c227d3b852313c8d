"""Micro-batches in, gradients back: what a stage of a run does with a pass.

Forward, on to the next stage, and when its answer is there, backward. What the stage was given is kept by the handler
that waits meanwhile; a next hop that dies is replaced and given the same again.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Protocol, TypeVar

import torch

from peer.executor import Executor
from peer.training.stage import MicroBatch, TrainingStage
from swarm import tensors
from swarm.errors import BadTensor, StaleRound, SumLost, WrongModel
from swarm.rpc import Link, Reply, Rpc
from swarm.runs.passing import EVALUATION, Answer, Parcel, Passing
from swarm.runs.wire_passes import Pass, Passed

T = TypeVar("T")


class Ledger(Protocol):
    """Who knows which round is collected and which micro-batches are counted: the member's driver."""

    async def reached(self, round_: int) -> None:
        """Return when micro-batches of the round are taken here. Raises `StaleRound`, or `NotReady` after a while."""

    def begin(self, round_: int, index: int) -> bool:
        """One is about to be run backward; whether it is to be added to the sum. Raises `StaleRound` or `NotReady`."""

    def counted(self, round_: int, index: int) -> None:
        """It is in the sum."""

    def gave_up(self, round_: int, index: int) -> None:
        """It is not in the sum: something failed."""

    def voided(self, round_: int) -> None:
        """The sum of a round is gone, and with it all that was counted."""


class Passes:
    """Answers passes of one run with one stage.

    Attributes:
        done: how many micro-batches were run forward and backward. tokens: how many these had.
    """

    def __init__(self, rpc: Rpc, executor: Executor, stage: TrainingStage, ledger: Ledger) -> None:
        self._run = bytes.fromhex(stage.run.id)[:16]
        self._stage = stage
        self._executor = executor
        self._ledger = ledger
        self._onward = Passing(rpc, self._run)
        self._following = len(stage.run.stages) - 1 - stage.run.spans.index(stage.model.span)
        self.done = 0
        self.tokens = 0
        rpc.answer(Pass, self._pass)

    async def _pass(self, link: Link, message: Pass, body: memoryview) -> Reply:
        if message.run != self._run:
            raise WrongModel("the peer takes part in another run")
        if len(message.onward) != self._following:
            raise WrongModel(f"{self._following} stages come after this one, not {len(message.onward)}")
        inputs, labels, *positions = tensors.decode(body, message.specs())
        if labels.ndim != 2 or inputs.shape[:2] != labels.shape:
            raise BadTensor(f"labels of shape {list(labels.shape)} for inputs of {list(inputs.shape)}")
        round_ = message.round if message.round != EVALUATION else None
        batch = MicroBatch(inputs, labels, positions[0] if positions else None, round_)
        if message.round == EVALUATION:
            return await self._evaluate(message, batch)
        if len(inputs) != len(self._stage.run.samples_of(message.index)):
            raise BadTensor(f"{len(inputs)} samples in micro-batch {message.index}")
        if message.round >= self._stage.run.rounds:
            raise StaleRound(f"the run is over: it has {self._stage.run.rounds} rounds")
        await self._ledger.reached(message.round)
        answer = await self._through(message, batch)
        self.done += 1
        self.tokens += labels.numel()
        if answer.gradient is None:
            return Passed(answer.loss, None, list(answer.lost))
        passed = Passed(answer.loss, tensors.spec_of(answer.gradient), list(answer.lost))
        return passed, tensors.encode([answer.gradient])

    async def _through(self, message: Pass, batch: MicroBatch) -> Answer:
        """Here and beyond: the loss, and the gradient with respect to what came in."""
        if not message.onward:
            loss, gradient = await self._counting(message, lambda add: self._stage.finish(batch, add))
            return Answer(loss, gradient, ())
        hidden = await self._executor.run(lambda: self._stage.forward(batch))
        beyond = await self._send(message, batch, hidden)
        assert beyond.gradient is not None  # `Passing` has seen to it
        back = beyond.gradient
        gradient = await self._counting(message, lambda add: self._stage.backward(batch, back, add))
        return Answer(beyond.loss, gradient, beyond.lost)

    async def _send(self, message: Pass, batch: MicroBatch, hidden: torch.Tensor) -> Answer:
        assert batch.labels is not None
        parcel = Parcel(message.round, message.index, hidden, batch.labels, batch.position_ids)
        return await self._onward.send(parcel, message.onward)

    async def _counting(self, message: Pass, work: Callable[[bool], T]) -> T:
        """Run a backward; the ledger is told whether it is in the sum also where nobody waits for it any more."""
        add = self._ledger.begin(message.round, message.index)
        ended: asyncio.Future[T] = asyncio.get_running_loop().create_future()
        ended.add_done_callback(lambda future: future.cancelled() or future.exception())

        def done(result: T, error: BaseException | None) -> None:
            if error is None:
                if add:
                    self._ledger.counted(message.round, message.index)
            else:
                if add:
                    self._ledger.gave_up(message.round, message.index)
                if isinstance(error, SumLost):
                    self._ledger.voided(message.round)
            if ended.done():
                return
            if error is None:
                ended.set_result(result)
            else:
                ended.set_exception(error)

        self._executor.submit(lambda: work(add), done)
        return await ended

    async def _evaluate(self, message: Pass, batch: MicroBatch) -> Reply:
        if not message.onward:
            return Passed(await self._executor.run(lambda: self._stage.evaluate(batch)), None, [])
        hidden = await self._executor.run(lambda: self._stage.forward(batch))
        beyond = await self._send(message, batch, hidden)
        return Passed(beyond.loss, None, list(beyond.lost))
