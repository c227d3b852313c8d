"""A peer's sessions and their steps, over real sockets: what it runs, what it refuses, and what that costs others."""

from __future__ import annotations

import asyncio
import os
import threading
from collections.abc import AsyncIterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
from dataplane import WAIT, ListeningRpc
from inprocess import save_llama

from peer.cache import Leases
from peer.executor import Executor
from peer.outlet import Outlet
from peer.served import ServedSession
from peer.server import Server
from peer.stage import Stage, StepInput
from swarm import tensors, wire
from swarm.errors import (
    BadTensor,
    BeyondCache,
    Draining,
    NoRoom,
    RemoteError,
    UnknownSession,
    Unreachable,
    WrongModel,
    from_wire,
)
from swarm.identity import Identity
from swarm.model import StageModel, load_stage
from swarm.rpc import Link, Rpc
from swarm.transport import TcpTransport
from swarm.types import ModelId, Span

pytestmark = pytest.mark.usefixtures("nothing_left")

MODEL = ModelId("m" * 64)
HIDDEN = 32
BLOCKS = 4


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, StageModel]:
    """All blocks, and the same in two parts."""
    torch.set_num_threads(1)
    folder: Path = tmp_path_factory.mktemp("llama")
    save_llama(folder, num_hidden_layers=BLOCKS)
    spans = {"all": Span(0, 4), "first": Span(0, 2), "last": Span(2, 4)}
    return {name: load_stage(folder, span, dtype=torch.float32) for name, span in spans.items()}


@dataclass
class Peer:
    """A server, and the clock of its leases."""

    rpc: ListeningRpc
    executor: Executor
    leases: Leases
    server: Server
    now: list[float]

    def endpoint(self) -> wire.Endpoint:
        return wire.Endpoint(self.rpc.peer, [(self.rpc.address.host, self.rpc.address.port)])


@dataclass
class Client:
    """Opens sessions and sends steps, right and wrong."""

    rpc: Rpc = field(default_factory=lambda: Rpc(TcpTransport(Identity.generate())))
    answers: asyncio.Queue[tuple[Any, memoryview]] = field(default_factory=asyncio.Queue)

    def __post_init__(self) -> None:
        for kind in (wire.Output, wire.StepFailed):
            self.rpc.listen(kind, lambda link, message, body: self.answers.put_nowait((message, body)))

    async def link(self, peer: Peer) -> Link:
        return await self.rpc.connect(peer.rpc.peer, [peer.rpc.address])

    async def open(self, peer: Peer, key: bytes, **changes: Any) -> wire.SessionOpened:
        terms = {"model": MODEL, "start": 0, "end": BLOCKS, "batch": 1, "max_length": 16, "next": None, **changes}
        link = await self.link(peer)
        opened, _ = await link.call(wire.OpenSession(key, **terms), timeout=WAIT)
        assert isinstance(opened, wire.SessionOpened)
        return opened

    async def send(
        self, peer: Peer, key: bytes, hidden: torch.Tensor, number: int, position: int, **changes: Any
    ) -> None:
        extras = [extra for name in ("position_ids", "mask") if (extra := changes.pop(name, None)) is not None]
        specs = [tensors.spec_of(extra) for extra in extras]
        terms = {"epoch": 1, "keep": 0, "rows": None, "position_ids": None, "mask": specs[0] if specs else None}
        terms.update(changes)
        spec = terms.pop("spec", tensors.spec_of(hidden))
        step = wire.Step(session=key, number=number, position=position, hidden=spec, **terms)
        body = terms.get("body") or tensors.encode([hidden, *extras])
        await (await self.link(peer)).notify(step, body)

    async def answer(self) -> torch.Tensor:
        """The next answer. Raises what a `StepFailed` says."""
        message, body = await asyncio.wait_for(self.answers.get(), WAIT)
        if isinstance(message, wire.StepFailed):
            raise from_wire(message.code, message.message, message.peer)
        return tensors.decode(body, [message.hidden])[0]

    async def step(
        self, peer: Peer, key: bytes, hidden: torch.Tensor, number: int, position: int, **changes: Any
    ) -> Any:
        await self.send(peer, key, hidden, number, position, **changes)
        return await self.answer()


class Swarm:
    """Peers and clients of one test."""

    def __init__(self, models: dict[str, StageModel]) -> None:
        self._models = models
        self.peers: list[Peer] = []
        self.clients: list[Client] = []

    async def peer(self, model: str = "all", capacity: int = 64) -> Peer:
        rpc, executor, leases, now = ListeningRpc(), Executor(), Leases(capacity, 30.0), [0.0]
        server = Server(rpc, Stage(self._models[model]), executor, leases, MODEL, lambda: now[0])
        await rpc.start()
        self.peers.append(Peer(rpc, executor, leases, server, now))
        return self.peers[-1]

    def client(self) -> Client:
        self.clients.append(Client())
        return self.clients[-1]

    async def close(self) -> None:
        for client in self.clients:
            await client.rpc.close()
        for peer in self.peers:
            await peer.rpc.close()
            await peer.executor.close()

    def expected(self, hidden: torch.Tensor) -> torch.Tensor:
        """What all blocks make of it, in one piece."""
        stage = Stage(self._models["all"])
        state = stage.open(Span(0, BLOCKS), hidden.shape[0], hidden.shape[1])
        return stage.run(state, StepInput(1, 0, hidden))


@pytest.fixture
async def swarm(nothing_left: None, models: dict[str, StageModel]) -> AsyncIterator[Swarm]:
    swarm = Swarm(models)
    yield swarm
    await swarm.close()


def key() -> bytes:
    return os.urandom(16)


def states(positions: int, rows: int = 1) -> torch.Tensor:
    generator = torch.Generator().manual_seed(positions * 100 + rows)
    return torch.randn(rows, positions, HIDDEN, generator=generator)


# --- what it is for ------------------------------------------------------------------------------------------------


async def test_steps_give_what_the_whole_model_gives(swarm: Swarm) -> None:
    peer, client, session, hidden = await swarm.peer(), swarm.client(), key(), states(8)
    opened = await client.open(peer, session)
    assert (opened.lease, opened.number, opened.length) == (30.0, 0, 0)
    pieces = [await client.step(peer, session, hidden[:, :5], 1, 0)]
    pieces += [await client.step(peer, session, hidden[:, n : n + 1], n - 3, n) for n in range(5, 8)]
    torch.testing.assert_close(torch.cat(pieces, 1), swarm.expected(hidden))
    assert peer.server.tokens == 8
    assert (await client.open(peer, session)).length == 8


async def test_hops_pass_on_and_the_last_one_answers(swarm: Swarm) -> None:
    first, last, client, session = await swarm.peer("first"), await swarm.peer("last"), swarm.client(), key()
    hidden = states(6, rows=2)
    await client.open(last, session, start=2, batch=2)
    await client.open(first, session, end=2, batch=2, next=last.endpoint())
    output = await client.step(first, session, hidden, 1, 0, keep=1)
    torch.testing.assert_close(output, swarm.expected(hidden)[:, -1:])


@pytest.fixture
def small_turns(monkeypatch: pytest.MonkeyPatch) -> None:
    """No turn takes more than the smallest piece of a prompt."""
    monkeypatch.setattr("peer.scheduler.FIRST_BUDGET", 16)
    monkeypatch.setattr("peer.scheduler.BUDGETS", (16, 16))


@pytest.mark.usefixtures("small_turns")
@pytest.mark.parametrize("keep", [0, 1, 25])
async def test_a_prompt_goes_through_the_hops_in_pieces_and_is_answered_whole(swarm: Swarm, keep: int) -> None:
    first, last, client, session = await swarm.peer("first"), await swarm.peer("last"), swarm.client(), key()
    hidden = states(40)
    await client.open(last, session, start=2, max_length=41)
    await client.open(first, session, end=2, max_length=41, next=last.endpoint())
    output = await client.step(first, session, hidden, 1, 0, keep=keep)
    torch.testing.assert_close(output, swarm.expected(hidden)[:, -keep:])
    assert [peer.server.turns for peer in (first, last)] == [3, 3]
    again = await client.step(first, session, hidden[:, 5:], 1, 5, keep=keep, epoch=2)
    torch.testing.assert_close(again, swarm.expected(hidden)[:, 5:][:, -keep:])
    await client.step(first, session, states(1), 2, 40, keep=1, epoch=2)


@pytest.mark.usefixtures("small_turns")
async def test_a_decode_does_not_wait_for_the_end_of_anothers_prompt(swarm: Swarm) -> None:
    peer, client, busy, quick = await swarm.peer(capacity=256), swarm.client(), key(), key()
    await client.open(peer, busy, max_length=160)
    await client.open(peer, quick)
    await client.step(peer, quick, states(2), 1, 0)
    await client.send(peer, busy, states(160), 1, 0)
    await client.send(peer, quick, states(1), 2, 2)
    assert [(await client.answer()).shape[1] for _ in range(2)] == [1, 160]


@pytest.mark.usefixtures("small_turns")
async def test_a_prompt_that_is_given_up_is_not_run_to_its_end(swarm: Swarm) -> None:
    peer, client, session = await swarm.peer(capacity=256), swarm.client(), key()
    await client.open(peer, session, max_length=160)
    await client.send(peer, session, states(160), 1, 0)
    output = await client.step(peer, session, states(3), 1, 0, epoch=2)
    torch.testing.assert_close(output, swarm.expected(states(3)))
    assert peer.server.turns < 10


@pytest.mark.usefixtures("small_turns")
async def test_what_nobody_waits_for_lets_others_pass_until_somebody_does(swarm: Swarm) -> None:
    peer, client, gate = await swarm.peer(capacity=256), swarm.client(), threading.Event()
    lengths = {key(): 11, key(): 12, key(): 13}
    for session, priority in zip(lengths, ("low", "low", "normal"), strict=True):
        await client.open(peer, session, priority=priority)
    peer.executor.submit(gate.wait, lambda result, error: None)
    for session, length in lengths.items():
        await client.send(peer, session, states(length), 1, 0)
    gate.set()
    assert [(await client.answer()).shape[1] for _ in lengths] == [11, 13, 12]


async def test_steps_of_many_sessions_run_in_one_turn(swarm: Swarm) -> None:
    peer, client, gate = await swarm.peer(capacity=256), swarm.client(), threading.Event()
    sessions = [key() for _ in range(5)]
    for number, session in enumerate(sessions):
        await client.open(peer, session)
        await client.step(peer, session, states(number + 2), 1, 0)
    before = peer.server.turns
    peer.executor.submit(gate.wait, lambda result, error: None)
    for number, session in enumerate(sessions):
        await client.send(peer, session, states(1), 2, number + 2)
    await (await client.link(peer)).call(wire.Echo(), timeout=WAIT)  # all have come by now
    gate.set()
    outputs = [await client.answer() for _ in sessions]
    assert peer.server.turns <= before + 2  # the first of them went alone
    for number, output in enumerate(sorted(outputs, key=lambda each: each.sum().item())):
        expected = sorted(
            (swarm.expected(torch.cat([states(n + 2), states(1)], 1))[:, -1:] for n in range(5)),
            key=lambda each: each.sum().item(),
        )
        torch.testing.assert_close(output, expected[number])


async def test_what_a_spare_was_told_late_and_waits_runs_in_one_turn(swarm: Swarm) -> None:
    """One after another they would take a turn each, and a spare that is behind would never catch up."""
    peer, client, session, hidden = await swarm.peer(capacity=256), swarm.client(), key(), states(12)
    gate, other = threading.Event(), key()
    await client.open(peer, session)
    await client.open(peer, other)
    before = peer.server.turns
    peer.executor.submit(gate.wait, lambda result, error: None)
    await client.send(peer, other, states(1), 1, 0)  # takes the turn that has begun
    for since, number, start, end in ((0, 5, 0, 5), (5, 7, 5, 7), (7, 8, 7, 8), (8, 9, 6, 9), (9, 11, 9, 11)):
        await client.send(peer, session, hidden[:, start:end], number, start, replay=1, since=since, epoch=number)
    await (await client.link(peer)).call(wire.Echo(), timeout=WAIT)  # all have come by now
    gate.set()
    await client.answer()
    output = await client.step(peer, session, hidden[:, 11:], 12, 11, epoch=12)
    torch.testing.assert_close(output, swarm.expected(hidden)[:, 11:])
    assert (
        peer.server.turns == before + 4
    )  # the other's, up to where two positions are taken back, from there, the last


async def test_a_step_sent_twice_counts_once(swarm: Swarm) -> None:
    peer, client, session, hidden = await swarm.peer(), swarm.client(), key(), states(6)
    await client.open(peer, session)
    await client.step(peer, session, hidden[:, :4], 1, 0)
    once = await client.step(peer, session, hidden[:, 4:], 2, 4)
    again = await client.step(peer, session, hidden[:, 4:], 2, 4, epoch=2)
    torch.testing.assert_close(once, again)
    await client.send(peer, session, hidden[:, 4:], 2, 4, epoch=1)  # left over, and not answered
    last = await client.step(peer, session, states(1), 3, 6, epoch=2)
    torch.testing.assert_close(last, swarm.expected(torch.cat([hidden, states(1)], 1))[:, -1:])


async def test_rows_are_picked_once_however_often_the_step_comes(swarm: Swarm) -> None:
    peer, client, session, hidden = await swarm.peer(), swarm.client(), key(), states(4, rows=3)
    await client.open(peer, session, batch=3)
    await client.step(peer, session, hidden, 1, 0)
    for wrong in ([3, 0], [3, 3, 3]):
        with pytest.raises(BadTensor):
            await client.step(peer, session, states(1, rows=len(wrong)), 2, 4, rows=wrong)
    expected = swarm.expected(torch.cat([hidden[[2, 2]], states(1, rows=2)], 1))[:, -1:]
    for epoch in (1, 2):
        output = await client.step(peer, session, states(1, rows=2), 2, 4, rows=[2, 2], epoch=epoch)
        torch.testing.assert_close(output, expected)


# --- opening -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "error"),
    [
        ({"model": "another"}, WrongModel),
        ({"end": BLOCKS + 1}, WrongModel),
        ({"start": 2, "end": 2}, WrongModel),
        ({"start": 3, "end": 1}, WrongModel),
        ({"max_length": 65}, NoRoom),
        ({"batch": 5, "max_length": 13}, NoRoom),
        ({"batch": wire.MAX_BATCH, "max_length": wire.MAX_POSITIONS}, NoRoom),
    ],
)
async def test_a_session_that_cannot_be_is_refused_by_name(
    swarm: Swarm, changes: dict[str, Any], error: type[RemoteError]
) -> None:
    peer, client = await swarm.peer(), swarm.client()
    with pytest.raises(error):
        await client.open(peer, key(), **changes)
    assert (peer.server.sessions, peer.leases.used) == (0, 0)
    await client.open(peer, key())


async def test_a_full_cache_says_so_at_once(swarm: Swarm) -> None:
    peer, client, session = await swarm.peer(capacity=20), swarm.client(), key()
    await client.open(peer, session)
    with pytest.raises(NoRoom, match="16 tokens of cache, 4 of 20"):
        await client.open(peer, key())
    with pytest.raises(NoRoom):
        await client.open(peer, session, max_length=21)
    await client.step(peer, session, states(16), 1, 0)  # its older terms stand
    (await client.link(peer)).tell(wire.CloseSession(session))
    await client.open(peer, key(), max_length=20)


async def test_an_idle_session_makes_room_and_comes_back_as_it_was(swarm: Swarm) -> None:
    peer, client, idle, other, hidden = await swarm.peer(capacity=32), swarm.client(), key(), key(), states(9)
    await client.open(peer, idle)
    await client.step(peer, idle, hidden[:, :8], 1, 0)
    peer.now[0] = 10.0
    await client.open(peer, other, max_length=24)
    await client.step(peer, other, states(24), 1, 0)
    assert (peer.server.sessions, peer.leases.used, peer.leases.out) == (2, 24, 16)
    await client.send(peer, idle, hidden[:, 8:], 2, 8)  # it waits in the queue
    await (await client.link(peer)).call(wire.Echo(), timeout=WAIT)
    (await client.link(peer)).tell(wire.CloseSession(other))
    torch.testing.assert_close(await client.answer(), swarm.expected(hidden)[:, -1:])
    assert (peer.leases.used, peer.leases.out) == (16, 0)


async def test_a_client_may_wait_for_room(swarm: Swarm) -> None:
    peer, client, first, second = await swarm.peer(capacity=20), swarm.client(), key(), key()
    await client.open(peer, first)
    opening = asyncio.create_task(client.open(peer, second, wait=WAIT))
    await (await client.link(peer)).call(wire.Echo(), timeout=WAIT)
    (await client.link(peer)).tell(wire.CloseSession(first))
    await opening
    await client.step(peer, second, states(16), 1, 0)


async def test_a_hop_that_cannot_be_reached_is_named(swarm: Swarm) -> None:
    peer, client = await swarm.peer("first"), swarm.client()
    nobody = wire.Endpoint(Identity.generate().peer, [("127.0.0.1", 1)])
    with pytest.raises(Unreachable) as caught:
        await client.open(peer, key(), end=2, next=nobody)
    assert caught.value.peer == nobody.peer
    assert (peer.server.sessions, peer.leases.used) == (0, 0)


async def test_a_session_that_ends_while_its_next_hop_is_dialled_leaves_nothing_there(
    swarm: Swarm, monkeypatch: pytest.MonkeyPatch
) -> None:
    peer, last, client, session = await swarm.peer("first"), await swarm.peer("last"), swarm.client(), key()
    dialling, go_on, dial = asyncio.Event(), asyncio.Event(), ServedSession.dial

    async def slowly(served: ServedSession, *arguments: Any) -> Outlet:
        dialling.set()
        await go_on.wait()
        return await dial(served, *arguments)

    monkeypatch.setattr(ServedSession, "dial", slowly)
    opening = asyncio.create_task(client.open(peer, session, end=2, next=last.endpoint()))
    await asyncio.wait_for(dialling.wait(), WAIT)
    (await client.link(peer)).tell(wire.CloseSession(session))
    await (await client.link(peer)).call(wire.Echo(), timeout=WAIT)
    go_on.set()
    with pytest.raises(UnknownSession):
        await opening
    link = peer.rpc.link_to(last.rpc.peer)
    assert link is not None
    assert link._watchers == []
    assert (peer.server.sessions, peer.leases.used) == (0, 0)


async def test_a_session_that_is_given_up_while_it_is_opened_leaves_nothing_in_the_stage(swarm: Swarm) -> None:
    peer, client, busy = await swarm.peer(), swarm.client(), threading.Event()
    link = await client.link(peer)
    peer.executor.submit(busy.wait, lambda *_: None)
    opening = asyncio.create_task(client.open(peer, key()))
    await link.call(wire.Echo(), timeout=WAIT)
    assert len(peer.leases) == 1
    opening.cancel()
    await asyncio.wait({opening})
    await link.call(wire.Echo(), timeout=WAIT)
    busy.set()
    await peer.executor.run(lambda: None)
    assert len(peer.leases) == 0
    assert peer.server._stage.pages._claims == {}


async def test_a_draining_peer_takes_no_new_sessions(swarm: Swarm) -> None:
    peer, client, session = await swarm.peer(), swarm.client(), key()
    await client.open(peer, session)
    peer.server._sessions.draining = True
    with pytest.raises(Draining):
        await client.open(peer, key())
    await client.step(peer, session, states(1), 1, 0)


async def test_a_stranger_can_do_nothing_with_anothers_session(swarm: Swarm) -> None:
    peer, client, stranger, session = await swarm.peer(), swarm.client(), swarm.client(), key()
    await client.open(peer, session)
    with pytest.raises(UnknownSession):
        await stranger.open(peer, session, max_length=1)
    link = await stranger.link(peer)
    with pytest.raises(UnknownSession):
        await link.call(wire.KeepAlive(session), timeout=WAIT)
    link.tell(wire.CloseSession(session))
    await link.call(wire.Echo(), timeout=WAIT)  # the other was heard by now
    await client.step(peer, session, states(16), 1, 0)
    assert peer.server.sessions == 1


async def test_a_client_that_comes_back_on_another_connection_has_its_session(swarm: Swarm) -> None:
    peer, client, session = await swarm.peer(), swarm.client(), key()
    await client.open(peer, session)
    await client.step(peer, session, states(4), 1, 0)
    (await client.link(peer)).close()
    assert (await client.open(peer, session)).length == 4
    await client.step(peer, session, states(1), 2, 4)


@pytest.mark.parametrize("changes", [{"batch": 2, "max_length": 8}, {"end": 2}, {"start": 1}])
async def test_a_session_for_other_rows_or_blocks_begins_anew(swarm: Swarm, changes: dict[str, Any]) -> None:
    peer, client, session = await swarm.peer(), swarm.client(), key()
    await client.open(peer, session)
    await client.step(peer, session, states(4), 1, 0)
    assert (await client.open(peer, session, **changes)).length == 0
    assert (peer.server.sessions, peer.leases.used) == (1, 16)


async def test_terms_from_before_are_refused(swarm: Swarm) -> None:
    peer, client, session = await swarm.peer(), swarm.client(), key()
    await client.open(peer, session, epoch=3)
    with pytest.raises(UnknownSession, match="since"):
        await client.open(peer, session, epoch=2, end=2)
    assert (await client.open(peer, session, epoch=3)).length == 0


async def test_what_a_session_holds_stays_leased(swarm: Swarm) -> None:
    peer, client, session = await swarm.peer(), swarm.client(), key()
    await client.open(peer, session)
    await client.step(peer, session, states(10), 1, 0)
    await client.open(peer, session, max_length=1)
    assert peer.leases.used == 10
    with pytest.raises(BeyondCache):
        await client.step(peer, session, states(1), 2, 10)


# --- leases --------------------------------------------------------------------------------------------------------


async def test_the_lease_of_a_client_that_vanished_ends(swarm: Swarm) -> None:
    peer, client, gone = await swarm.peer(capacity=32), swarm.client(), swarm.client()
    mine, theirs = key(), key()
    await client.open(peer, mine)
    await gone.open(peer, theirs)
    await gone.rpc.close()
    peer.now[0] = 29.0
    assert await (await client.link(peer)).call(wire.KeepAlive(mine), timeout=WAIT)
    peer.now[0] = 31.0
    peer.server.expire()
    assert (peer.server.sessions, peer.leases.used) == (1, 16)
    await client.open(peer, key())
    peer.now[0] = 50.0
    await client.step(peer, mine, states(1), 1, 0)  # a step is a sign of life too
    peer.now[0] = 62.0
    peer.server.expire()
    assert (peer.server.sessions, peer.leases.used) == (1, 16)
    peer.now[0] = 81.0
    peer.server.expire()
    assert (peer.server.sessions, peer.leases.used) == (0, 0)
    with pytest.raises(UnknownSession):
        await client.step(peer, mine, states(1), 2, 1)
    with pytest.raises(UnknownSession):
        await (await client.link(peer)).call(wire.KeepAlive(mine), timeout=WAIT)


# --- steps that make no sense --------------------------------------------------------------------------------------


async def test_a_step_for_a_session_that_is_not_is_refused(swarm: Swarm) -> None:
    peer, client = await swarm.peer(), swarm.client()
    with pytest.raises(UnknownSession) as caught:
        await client.step(peer, key(), states(1), 1, 0)
    assert caught.value.peer == peer.rpc.peer


@pytest.mark.parametrize(
    ("hidden", "changes", "error"),
    [
        (states(17), {}, BeyondCache),
        (states(1), {"position": 16}, BeyondCache),
        (states(1), {"position": 5}, BeyondCache),
        (states(1), {"position": 4, "number": 4}, BeyondCache),
        (states(1, rows=2), {"position": 0}, BeyondCache),
        (states(1, rows=2), {"position": 4}, RemoteError),
        (states(1)[..., :-1], {}, BadTensor),
        (states(1)[0], {}, BadTensor),
        (states(1)[None], {}, BadTensor),
        (torch.empty(1, 0, HIDDEN), {}, BadTensor),
        (torch.empty(0, 1, HIDDEN), {}, BadTensor),
        (states(1).to(torch.int64), {}, BadTensor),
        (states(1) * float("nan"), {}, BadTensor),
        (states(1) / 0, {}, BadTensor),
        (states(1), {"spec": wire.TensorSpec("float32", [1, 2, HIDDEN])}, BadTensor),
        (states(1), {"spec": wire.TensorSpec("complex64", [1, 1, HIDDEN])}, BadTensor),
        (states(1), {"spec": wire.TensorSpec("float32", [wire.MAX_POSITIONS] * 4)}, BadTensor),
        (states(1), {"rows": [1]}, BadTensor),
        (states(1), {"rows": [0, 0]}, BadTensor),
        (states(1), {"rows": []}, BadTensor),
        (states(1), {"mask": torch.ones(1, 2, dtype=torch.int64)}, BadTensor),
        (states(1), {"mask": torch.ones(1, 1)}, BadTensor),
    ],
)
async def test_a_step_that_makes_no_sense_is_refused_by_name_and_changes_nothing(
    swarm: Swarm, hidden: torch.Tensor, changes: dict[str, Any], error: type[RemoteError]
) -> None:
    peer, client, session, other = await swarm.peer(), swarm.client(), key(), key()
    before = states(4)
    for each in (session, other):
        await client.open(peer, each)
        await client.step(peer, each, before, 1, 0)
    with pytest.raises(error):
        await client.step(peer, session, hidden, **{"number": 2, "position": 4, **changes})
    expected = swarm.expected(torch.cat([before, states(1)], 1))[:, -1:]
    for each in (session, other):
        torch.testing.assert_close(await client.step(peer, each, states(1), 2, 4), expected)


async def test_more_steps_than_may_wait_are_refused(swarm: Swarm, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("peer.server.MAX_WAITING_STEPS", 4)
    peer, client, session = await swarm.peer(), swarm.client(), key()
    await client.open(peer, session)
    gate = threading.Event()
    peer.executor.submit(gate.wait, lambda result, error: None)
    for number in range(1, 6):
        await client.send(peer, session, states(1), number, number - 1)
    with pytest.raises(RemoteError, match="steps of one session wait"):
        await client.answer()
    gate.set()
    for _ in range(4):
        assert (await client.answer()).shape == (1, 1, HIDDEN)
