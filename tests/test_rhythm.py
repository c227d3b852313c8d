"""Turns wait for those who come anyway: fewer turns, more tokens, and nobody waits for long or in vain."""

from __future__ import annotations

import asyncio
import random
import statistics
from collections.abc import Callable, Hashable
from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from peer.engine import Engine, Job
from peer.rhythm import LONGEST, Rhythm
from peer.scheduler import LONG_SECONDS, LOW, NORMAL, PIECE, TURN_SECONDS, Slice, Work
from swarm.links.virtualtime import run_virtually

TURN = 0.03


def rhythm(sessions: int, away: float, turn: float = TURN) -> Rhythm:
    """Of so many sessions, each of which has left at 0."""
    found = Rhythm()
    found.took(turn)
    for session in range(sessions):
        found.came(session, -away)
        found.left(session, -away)
        found.came(session, 0.0)
        found.left(session, 0.0)
    return found


def comes(found: Rhythm, *sessions: int, now: float) -> None:
    for session in sessions:
        found.came(session, now)


@pytest.mark.parametrize(
    ("sessions", "away", "group"),
    [
        (8, 0.04, 4),
        (8, 0.01, 8),
        (8, 0.02, 4),
        (8, 0.065, 2),
        (3, 0.04, 1),
        (2, 0.01, 2),
        (16, 0.04, 8),
        (8, 0.5, 1),
        (1, 0.04, 1),
    ],
)
def test_a_turn_waits_for_a_group(sessions: int, away: float, group: int) -> None:
    found, here = rhythm(sessions, away), list[int]()
    for session in range(sessions):
        comes(found, session, now=away)
        here.append(session)
        wait = found.wait(here, away, away)
        assert (wait > 0) == (len(here) < group)
        assert wait in (0.0, pytest.approx(1.25 * TURN))


def test_on_a_crowded_machine_there_are_no_more_than_two_groups() -> None:
    found = rhythm(8, 10 * TURN)
    comes(found, 0, now=0.1)
    assert found.wait([0], 0.1, 0.1) == 0.0
    for _ in range(40):
        found.took(TURN, 0.7)
    assert found.wait([0], 0.1, 0.1) > 0.0
    comes(found, 1, 2, now=0.1)
    assert found.wait([0, 1, 2], 0.1, 0.1) > 0.0
    comes(found, 3, now=0.1)
    assert found.wait([0, 1, 2, 3], 0.1, 0.1) == 0.0
    for _ in range(40):
        found.took(TURN, 1.0)
    assert found.wait([0], 0.1, 0.1) == 0.0


def test_nobody_waits_for_much_longer_than_a_turn_takes() -> None:
    found = rhythm(2, 0.01)
    comes(found, 0, now=0.01)
    assert found.wait([0], 0.01, 0.02) == pytest.approx(1.25 * TURN - 0.01)
    assert found.wait([0], 0.01, 0.01 + 1.25 * TURN + 1e-6) == 0.0


def test_whoever_is_late_or_has_ended_is_not_waited_for() -> None:
    found = rhythm(2, 0.01)
    comes(found, 0, now=0.01)
    found.ended(1)
    assert found.wait([0], 0.01, 0.01) == 0.0
    found = rhythm(2, 0.01)
    comes(found, 0, now=0.01)
    assert found.wait([0], 0.019, 0.019) > 0
    assert found.wait([0], 0.021, 0.021) == 0.0


def test_what_ends_while_it_is_run_is_forgotten() -> None:
    found = rhythm(1, 0.01)
    comes(found, 0, now=0.01)
    found.ended(0)
    found.left(0, 0.05)
    assert not found._left
    assert not found._away
    assert not found._here


def test_a_user_who_reads_and_types_is_not_a_session_that_is_slow() -> None:
    found = rhythm(1, 0.02)
    comes(found, 0, now=0.07)
    assert found._away[0] == pytest.approx(0.03)
    found.left(0, 1.0)
    comes(found, 0, now=1.1 + LONGEST)
    assert found._away[0] == pytest.approx(0.03)


@given(
    st.lists(st.tuples(st.sampled_from(["came", "left", "ended", "took", "wait"]), st.integers(0, 5), st.floats(0, 2)))
)
def test_whatever_happens_a_wait_is_none_or_ends(events: list[tuple[str, int, float]]) -> None:
    found, now, longest = Rhythm(), 0.0, 0.0
    for what, session, seconds in events:
        now += seconds
        if what == "took":
            longest = max(longest, 1.25 * seconds)
            found.took(seconds)
        elif what == "wait":
            assert 0 <= found.wait([session], now, now) <= longest
        elif what == "ended":
            found.ended(session)
        else:
            getattr(found, what)(session, now)


# --- with an engine, in virtual time ---------------------------------------------------------------------------------


class FakeStage:
    """Takes 30 ms for a turn, and 2 for each session in it; meanwhile, the clock is that far ahead."""

    batches = True

    def __init__(self) -> None:
        self.ran = 0
        self.ahead = 0.0
        self.turns: list[int] = []

    def run_all(self, works: list[Any]) -> list[Any]:
        self.turns.append(len(works))
        self.ran += len(works)
        self.ahead = TURN + 0.002 * len(works)
        return [None] * len(works)


class FakeStep:
    def __init__(self, count: int) -> None:
        self.count = count

    def piece(self, start: int, end: int) -> FakeStep:
        return FakeStep(end - start)


class LongStage(FakeStage):
    """Takes a millisecond for a token, besides."""

    def run_all(self, works: list[Any]) -> list[Any]:
        tokens = [step.count for _, step in works]
        self.turns.append(max(tokens))
        self.ran += sum(tokens)
        self.ahead = TURN + 0.001 * sum(tokens)
        return [None] * len(works)


class World:
    """An engine, and a machine on which all clients take turns."""

    def __init__(self, stage: FakeStage | None = None) -> None:
        self.computing = 1.0
        self.stage = stage or FakeStage()
        self.engine = Engine(self.stage, self, self.clock)  # type: ignore[arg-type]
        self.machine = asyncio.Lock()
        self.random = random.Random(1)
        self.waits: list[float] = []

    def clock(self) -> float:
        return asyncio.get_running_loop().time() + self.stage.ahead

    def submit(self, work: Callable[[], Any], done: Callable[..., Any]) -> None:
        """The compute thread."""
        result, seconds = replace(work(), computing=self.computing), self.stage.ahead
        self.stage.ahead = 0.0
        asyncio.get_running_loop().call_later(seconds, done, result, None)

    async def step(self, session: Hashable, count: int = 1, priority: int = NORMAL) -> None:
        told: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        came = self.clock()

        class Receiver:
            def deliver(self, piece: Slice, step: Any, outcome: Any) -> None:
                if piece.is_last:
                    told.set_result(None)

            def keep(self, piece: Slice, step: Any, outcome: Any) -> None:
                pass

        job = Job(None, FakeStep(count), Receiver())  # type: ignore[arg-type]
        self.engine.add(Work(session, session, 1, count, came, what=job, priority=priority))
        await told
        self.waits.append(self.clock() - came)

    async def client(self, session: int, until: float, away: float, alone: float) -> None:
        """Asks for a token, is about `away` after each, and computes `alone` on the machine."""
        while self.clock() < until:
            await self.step(session)
            await asyncio.sleep(away * self.random.uniform(0.7, 1.3))
            async with self.machine:
                await asyncio.sleep(alone)


def crowd(clients: int, away: float, alone: float) -> World:
    """Ten seconds of so many clients, each of which is `away` by a third more or less."""

    async def main() -> World:
        world = World()
        await asyncio.gather(*(world.client(number, 10.0, away, alone) for number in range(clients)))
        return world

    return run_virtually(main())


def without_waiting(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Rhythm, "wait", lambda *_: 0.0)


@pytest.mark.parametrize(
    ("clients", "away", "alone", "more"),
    [(2, 0.005, 0.0, 1.5), (8, 0.005, 0.0, 1.4), (8, 0.015, 0.0, 1.1), (8, 0.045, 0.0, 1.05), (4, 0.03, 0.005, 1.1)],
)
def test_groups_bring_more_tokens(
    clients: int, away: float, alone: float, more: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Clients with machines of their own, but for the last, who share one."""
    found = crowd(clients, away, alone)
    without_waiting(monkeypatch)
    plain = crowd(clients, away, alone)
    assert sum(found.stage.turns) >= more * sum(plain.stage.turns)
    assert statistics.mean(found.waits) < statistics.mean(plain.waits)


@pytest.mark.parametrize("clients", [1, 2, 3, 5, 8, 13])
@pytest.mark.parametrize("away", [0.01, 0.03, 0.06, 0.2])
def test_groups_never_bring_many_fewer(clients: int, away: float, monkeypatch: pytest.MonkeyPatch) -> None:
    found = crowd(clients, away, 0.001)
    without_waiting(monkeypatch)
    plain = crowd(clients, away, 0.001)
    assert sum(found.stage.turns) >= 0.94 * sum(plain.stage.turns)


@pytest.mark.parametrize(("clients", "away"), [(1, 0.03), (6, 0.4)])
def test_where_waiting_is_of_no_use_nobody_does(clients: int, away: float, monkeypatch: pytest.MonkeyPatch) -> None:
    found = crowd(clients, away, 0.0)
    without_waiting(monkeypatch)
    assert found.stage.turns == crowd(clients, away, 0.0).stage.turns


def test_a_client_that_leaves_is_waited_for_no_more_than_once() -> None:
    async def main() -> World:
        world = World()
        leaving = asyncio.create_task(world.client(1, 5.0, 0.0, 0.005))
        staying = asyncio.create_task(world.client(2, 10.0, 0.0, 0.005))
        await leaving
        world.engine.end(1)
        world.waits.clear()
        await staying
        return world

    world = run_virtually(main())
    assert sum(wait > TURN + 0.0021 for wait in world.waits) <= 1
    assert statistics.mean(world.stage.turns[10:100]) > 1.9


@pytest.mark.parametrize(("count", "priority"), [(100, NORMAL), (1, LOW)])
def test_prompts_and_what_nobody_waits_for_begin_at_once(count: int, priority: int) -> None:
    async def main() -> float:
        world = World()
        clients = [asyncio.create_task(world.client(number, 2.0, 0.0, 0.0)) for number in (1, 2)]
        await asyncio.gather(*clients)
        world.waits.clear()
        await world.step(1, count, priority)
        return world.waits[0]

    assert run_virtually(main()) < 2.2 * TURN  # a long one takes two turns


def test_a_turn_that_waits_for_more_begins_when_they_are_here() -> None:
    async def main() -> list[int]:
        world = World()
        world.engine._rhythm = rhythm(2, 0.01)
        first = asyncio.create_task(world.step(0))
        await asyncio.sleep(0.001)
        assert not world.stage.turns
        await world.step(1)
        await first
        return world.stage.turns

    assert run_virtually(main()) == [2]


@pytest.mark.parametrize("decoding", [False, True])
def test_a_prompt_goes_in_larger_pieces_while_nobody_waits_for_a_token(decoding: bool) -> None:
    async def main() -> list[int]:
        world = World(LongStage())
        client = asyncio.create_task(world.client(1, 60.0 if decoding else 0.2, 0.01, 0.0))
        await asyncio.sleep(1.0)
        for prompt in range(3):
            world.stage.turns.clear()
            await world.step(f"prompt {prompt}", 1000)
        turns = list(world.stage.turns)
        await client
        return turns

    seconds = TURN_SECONDS if decoding else LONG_SECONDS
    largest = max(run_virtually(main()))
    assert largest == pytest.approx(1000 * (seconds - TURN), abs=2 * PIECE)


def test_tokens_do_not_wait_for_whole_turns_of_what_nobody_waits_for() -> None:
    async def main() -> list[float]:
        world = World(LongStage())
        await world.step("learns what a turn can do", 2000)
        world.waits.clear()
        low = asyncio.create_task(world.step("catches up", 1000, LOW))
        await world.client(1, world.clock() + 1.0, 0.01, 0.0)
        assert not low.done()
        low.cancel()
        return world.waits[1:]  # the first waits for a turn from before it came

    assert max(run_virtually(main())) < 1.5 * TURN_SECONDS  # the rest of one such turn, and its own
