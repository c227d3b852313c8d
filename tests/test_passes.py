"""Micro-batches through real stages over real sockets: forward along the route, backward along it reversed."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator
from functools import partial

import pytest
import torch
from dataplane import ListeningRpc
from runs import small_run, tokens

from peer.executor import Executor
from peer.training.checkpoints import Checkpoints
from peer.training.passes import Passes
from peer.training.stage import MicroBatch, TrainingStage
from swarm import tensors
from swarm.errors import BadTensor, RemoteError, StaleRound, Unreachable, WrongModel
from swarm.identity import Identity
from swarm.rpc import Rpc
from swarm.runs.origin import byte_tokenizer, config_of, stage_of
from swarm.runs.passing import EVALUATION, Parcel, Passing, ordered
from swarm.runs.run import Run
from swarm.runs.wire_passes import Pass
from swarm.transport import TcpTransport
from swarm.wire import Endpoint

WAIT = 20.0


class Book:
    """Counts micro-batches of one round, as a member does."""

    def __init__(self) -> None:
        self.round = 0
        self.in_sum: set[int] = set()
        self.under_way: set[int] = set()
        self.asked = asyncio.Event()
        self.entered = asyncio.Event()
        self.entered.set()

    async def reached(self, round_: int) -> None:
        self.asked.set()
        await self.entered.wait()
        if round_ < self.round:
            raise StaleRound(f"round {round_} is over")

    def begin(self, round_: int, index: int) -> bool:
        if index in self.in_sum | self.under_way:
            return False
        self.under_way.add(index)
        return True

    def counted(self, round_: int, index: int) -> None:
        self.under_way.discard(index)
        self.in_sum.add(index)

    def gave_up(self, round_: int, index: int) -> None:
        self.under_way.discard(index)

    def voided(self, round_: int) -> None:
        self.in_sum.clear()


class Peer:
    """One stage in this process, behind sockets of its own."""

    def __init__(self, run: Run, index: int) -> None:
        config = config_of(run, byte_tokenizer())
        self.stage = TrainingStage(run, partial(stage_of, run, config, index), Checkpoints(None, run, index))
        self.stage.restore(0)
        self.rpc = ListeningRpc()
        self.executor = Executor()
        self.book = Book()
        self.passes = Passes(self.rpc, self.executor, self.stage, self.book)
        self.forwards = 0
        self.forwarded: asyncio.Queue[None] = asyncio.Queue()
        forward, loop = self.stage.forward, asyncio.get_running_loop()

        def counting(batch: MicroBatch) -> torch.Tensor:
            self.forwards += 1
            loop.call_soon_threadsafe(self.forwarded.put_nowait, None)
            return forward(batch)

        self.stage.forward = counting  # type: ignore[method-assign]

    @property
    def endpoint(self) -> Endpoint:
        return Endpoint(self.rpc.peer, [(self.rpc.address.host, self.rpc.address.port)])

    def sum(self) -> torch.Tensor:
        return self.stage.sums()["stage"]


class Chain:
    """Peers of a run, some of them replicas of one stage, and who sends to them."""

    def __init__(self, run: Run, replicas: tuple[int, ...]) -> None:
        self.run = run
        self.stages = [[Peer(run, index) for _ in range(count)] for index, count in enumerate(replicas)]
        self.rpc = Rpc(TcpTransport(Identity.generate()))
        self.passing = Passing(self.rpc, bytes.fromhex(run.id)[:16])

    @property
    def route(self) -> list[list[Endpoint]]:
        return [[peer.endpoint for peer in peers] for peers in self.stages]

    def parcel(self, index: int, round_: int = 0) -> Parcel:
        ids = tokens(len(self.run.samples_of(index)), self.run.batch.sequence_length, 259, seed=index)
        return Parcel(round_, index, ids, ids)


@contextlib.asynccontextmanager
async def chain(*replicas: int) -> AsyncIterator[Chain]:
    spans = {1: ("0:4",), 2: ("0:2", "2:4"), 3: ("0:1", "1:3", "3:4")}
    made = Chain(small_run(spans[len(replicas)]), replicas)
    peers = [peer for stage in made.stages for peer in stage]
    for peer in peers:
        await peer.rpc.start()
    try:
        async with asyncio.timeout(WAIT):
            yield made
    finally:
        await made.rpc.close()
        for peer in peers:
            await peer.rpc.close()
            await peer.executor.close()


async def test_a_micro_batch_goes_through_all_stages_and_back(nothing_left: None) -> None:
    async with chain(1, 1, 1) as swarm, chain(1) as alone:
        for index in range(swarm.run.micro_batches):
            answer = await swarm.passing.send(swarm.parcel(index), swarm.route)
            expected = await alone.passing.send(alone.parcel(index), alone.route)
            assert answer.loss == pytest.approx(expected.loss, rel=1e-5)
            assert answer.gradient is None
        ((whole,),) = alone.stages
        together = torch.cat([peer.sum() for (peer,) in swarm.stages])
        assert together.norm() == pytest.approx(float(whole.sum().norm()), rel=1e-5)
        for (peer,) in swarm.stages:
            assert peer.book.in_sum == set(range(swarm.run.micro_batches))


async def test_several_micro_batches_are_under_way_at_once(nothing_left: None) -> None:
    async with chain(1, 1) as swarm:
        (first,), (last,) = swarm.stages
        last.book.entered.clear()
        parcels = [swarm.parcel(index) for index in range(3)]
        sending = [asyncio.ensure_future(swarm.passing.send(parcel, swarm.route)) for parcel in parcels]
        for _ in parcels:
            await first.forwarded.get()
        last.book.entered.set()
        await asyncio.gather(*sending)
        assert first.book.in_sum == last.book.in_sum == {0, 1, 2}


async def test_a_stage_that_dies_is_replaced_and_nothing_before_it_is_done_again(nothing_left: None) -> None:
    async with chain(1, 2) as swarm:
        (first,), (dying, other) = swarm.stages
        dying.book.entered.clear()  # it takes the micro-batch and never gets to it
        sending = asyncio.ensure_future(swarm.passing.send(swarm.parcel(0), swarm.route))
        await dying.book.asked.wait()
        await dying.rpc.close()
        answer = await sending
        assert answer.lost == (dying.rpc.peer,)
        assert first.forwards == 1
        assert first.book.in_sum == other.book.in_sum == {0}
        assert not dying.book.in_sum


async def test_done_again_a_micro_batch_is_counted_where_it_was_not_and_nowhere_twice(nothing_left: None) -> None:
    async with chain(2, 1) as swarm:
        (one, two), (last,) = swarm.stages
        route = swarm.route
        before = await swarm.passing.send(swarm.parcel(0), [[one.endpoint], route[1]])
        total = last.sum().clone()
        again = await swarm.passing.send(swarm.parcel(0), [[two.endpoint], route[1]])
        assert again.loss == before.loss
        assert torch.equal(last.sum(), total)
        assert torch.equal(two.sum(), one.sum())


async def test_a_round_that_is_over_is_refused_and_one_that_has_not_begun_is_waited_for(nothing_left: None) -> None:
    async with chain(1, 1) as swarm:
        (_,), (last,) = swarm.stages
        last.book.round = 1
        with pytest.raises(StaleRound):
            await swarm.passing.send(swarm.parcel(0, round_=0), swarm.route)
        assert not last.book.in_sum


async def test_a_backward_that_fails_is_given_up_and_what_was_counted_is_forgotten(
    nothing_left: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with chain(1) as swarm:
        ((peer,),) = swarm.stages
        await swarm.passing.send(swarm.parcel(0), swarm.route)
        with monkeypatch.context() as broken:
            broken.setattr(torch.autograd, "backward", lambda *_: exec("raise MemoryError"))
            with pytest.raises(RemoteError, match="failed halfway"):
                await swarm.passing.send(swarm.parcel(1), swarm.route)
        assert not peer.book.in_sum | peer.book.under_way
        await swarm.passing.send(swarm.parcel(1), swarm.route)
        assert peer.book.in_sum == {1}


async def test_an_evaluation_counts_nothing(nothing_left: None) -> None:
    async with chain(1, 1) as swarm:
        answer = await swarm.passing.send(swarm.parcel(0, EVALUATION), swarm.route)
        trained = await swarm.passing.send(swarm.parcel(0), swarm.route)
        assert answer.loss == trained.loss
        assert all(peer.book.in_sum == {0} for (peer,) in swarm.stages)


async def test_a_trainer_that_vanishes_leaves_the_sum_whole(nothing_left: None) -> None:
    async with chain(1, 1) as swarm:
        (first,), (last,) = swarm.stages
        sending = asyncio.ensure_future(swarm.passing.send(swarm.parcel(0), swarm.route))
        await first.forwarded.get()
        sending.cancel()
        await asyncio.wait({sending})
        await first.executor.run(lambda: None)
        await last.executor.run(lambda: None)
        await asyncio.sleep(0)
        for peer in (first, last):
            assert not peer.book.under_way
            assert bool(peer.sum().any()) == (peer.book.in_sum == {0})


@pytest.mark.parametrize("wrong", ["run", "stages", "labels", "tokens", "samples"])
async def test_a_pass_that_cannot_be_is_refused(nothing_left: None, wrong: str) -> None:
    async with chain(1) as swarm:
        ((peer,),) = swarm.stages
        link = await swarm.rpc.connect(peer.rpc.peer, [peer.rpc.address])
        ids = tokens(2, 16, 259)
        labels = ids[:1] if wrong == "labels" else ids
        if wrong == "tokens":
            ids = ids + 259
        if wrong == "samples":
            ids = labels = tokens(1, 16)
        run = bytes(16) if wrong == "run" else bytes.fromhex(swarm.run.id)[:16]
        onward = [[peer.endpoint]] if wrong == "stages" else []
        message = Pass(run, 0, 0, tensors.spec_of(ids), tensors.spec_of(labels), None, onward)
        expected = WrongModel if wrong in ("run", "stages") else BadTensor
        with pytest.raises(expected):
            await link.call(message, tensors.encode([ids, labels]), timeout=5.0)
        assert not peer.book.in_sum | peer.book.under_way


async def test_without_a_living_replica_the_last_reason_is_told(nothing_left: None) -> None:
    async with chain(1, 1) as swarm:
        (_,), (last,) = swarm.stages
        await last.rpc.close()
        with pytest.raises(Unreachable):
            await swarm.passing.send(swarm.parcel(0), swarm.route)


def test_replicas_take_turns_and_those_that_hold_a_micro_batch_come_first() -> None:
    seats = [Endpoint(name, [("127.0.0.1", 1)]) for name in "abc"]
    assert [seat.peer for seat in ordered(seats, (), (), turn=1)] == ["b", "c", "a"]
    assert [seat.peer for seat in ordered(seats, "a", (), turn=1)] == ["a", "b", "c"]
    assert [seat.peer for seat in ordered(seats, (), "b", turn=1)] == ["c", "a", "b"]
    assert ordered([], (), (), 3) == []
