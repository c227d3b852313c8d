"""State to a newcomer: the very bytes, the steps that follow, and what is refused."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator

import pytest
import torch
from dataplane import linked

from peer.training import transfer
from peer.training.codecs import CODECS, Chunk, as_it_is
from peer.training.transfer import Donor, Fetched, Named, digest_of_state
from swarm.agreement.messages import Decision, Roster, Seat
from swarm.errors import BadTensor, Busy, Forgotten, Malformed, StaleRound
from swarm.rpc import Link
from swarm.wire import Endpoint

LINE = b"l" * 16
ODD = torch.arange(3, dtype=torch.uint8)  # what follows it is not aligned
LARGE = torch.randn(700_000, generator=torch.Generator().manual_seed(0))


class Member:
    """One that has a state to give."""

    def __init__(self) -> None:
        self.round = 3
        large: Named = [("large", LARGE), ("moment", torch.ones(64))]
        self.state: Named = [("odd", ODD), *large, ("step", torch.tensor(7)), ("none", torch.empty(0, 2))]
        self.lie = b""

    async def copy(self) -> tuple[int, Named, bytes]:
        return self.round, self.state, self.lie or digest_of_state(self.round, self.state)


@contextlib.asynccontextmanager
async def donor() -> AsyncIterator[tuple[Member, Donor, Link]]:
    member = Member()
    async with linked() as (_, far, link):
        giving = Donor(far, lambda: asyncio.ensure_future(member.copy()), lambda: LINE)
        yield member, giving, link


def decision(round_: int, outcome: str = "commit") -> Decision:
    roster = Roster(b"r" * 16, LINE, "p", [Seat(0, Endpoint("p", [("h", 1)]))], [])
    return Decision(round_, 0, 1, outcome, 0.5, 1.0, [], roster)


async def test_a_state_comes_as_it_is(nothing_left: None) -> None:
    async with donor() as (member, _, link):
        fetched = await Fetched.open(link, LINE, Member().state)
        assert fetched.round == 3
        assert [name for name, _ in fetched.state] == [name for name, _ in member.state]
        for (_, came), (_, was) in zip(fetched.state, member.state, strict=True):
            assert came.dtype == was.dtype
            assert torch.equal(came, was)


async def test_every_step_after_it_comes_in_order_also_those_that_were_made_meanwhile() -> None:
    async with donor() as (_, giving, link):
        fetched = await Fetched.open(link, LINE, Member().state)
        assert giving.followed
        await giving.stepped(decision(3), {"stage-0": as_it_is(LARGE), "tied": as_it_is(torch.ones(5))})
        await giving.stepped(decision(4, "skip"), {})
        steps = fetched.steps(lambda round_: False)
        first, second = await anext(steps), await anext(steps)
        assert first.decision.factor == 0.5
        assert torch.equal(first.mean["stage-0"], LARGE)
        assert torch.equal(first.mean["tied"], torch.ones(5))
        assert (second.decision.outcome, second.mean) == ("skip", {})
        third = asyncio.ensure_future(anext(steps))
        await asyncio.sleep(0)
        await giving.stepped(decision(5), {"stage-0": as_it_is(LARGE)})
        assert (await third).decision.round == 5
        await steps.aclose()


@pytest.mark.parametrize("dtype", ["float16", "int8"])
async def test_a_step_comes_in_the_bytes_of_the_average(dtype: str) -> None:
    """They hold exactly what all replicas hold, in a half or a quarter of its bytes."""
    chunks = [Chunk(dtype, len(values), CODECS[dtype].encode(values)) for values in (LARGE[:500_001], LARGE[500_001:])]
    held = torch.cat([CODECS[dtype].decode(chunk.body, torch.empty(chunk.count)) for chunk in chunks])
    async with donor() as (_, giving, link):
        fetched = await Fetched.open(link, LINE, Member().state)
        await giving.stepped(decision(3), {"stage-0": chunks})
        step = await anext(fetched.steps(lambda round_: False))
        assert torch.equal(step.mean["stage-0"], held)
        assert sum(len(chunk.body) for chunk in step.coded["stage-0"]) < 0.51 * held.nbytes
        assert [bytes(chunk.body) for chunk in step.coded["stage-0"]] == [bytes(chunk.body) for chunk in chunks]


@pytest.mark.parametrize("lie", [Chunk("float64", 3, memoryview(bytes(24))), Chunk("int8", 1 << 40, memoryview(b""))])
async def test_a_step_in_a_code_that_there_is_not_is_refused(lie: Chunk) -> None:
    async with donor() as (_, giving, link):
        fetched = await Fetched.open(link, LINE, Member().state)
        await giving.stepped(decision(3), {"stage-0": [lie]})
        with pytest.raises(Malformed):
            await anext(fetched.steps(lambda round_: False))


async def test_a_state_that_is_not_what_its_digest_says_is_refused() -> None:
    async with donor() as (member, _, link):
        member.lie = b"x" * 32
        with pytest.raises(BadTensor):
            await Fetched.open(link, LINE, Member().state)


@pytest.mark.parametrize("other", [("large", torch.ones(7)), ("large", LARGE.half()), ("larger", LARGE)])
async def test_the_state_of_another_stage_is_refused_before_it_comes(other: tuple[str, torch.Tensor]) -> None:
    async with donor() as (member, _, link):
        like = [other if name == "large" else (name, tensor) for name, tensor in member.state]
        with pytest.raises(BadTensor, match="other tensors"):
            await Fetched.open(link, LINE, like)


async def test_a_mean_gradient_that_is_larger_than_the_state_is_refused_before_it_comes() -> None:
    async with donor() as (_, giving, link):
        fetched = await Fetched.open(link, LINE, Member().state)
        await giving.stepped(decision(3), {"stage-0": as_it_is(torch.ones(750_000))})
        with pytest.raises(Malformed, match="larger"):
            await anext(fetched.steps(lambda round_: False))


async def test_another_line_and_too_many_newcomers_are_refused() -> None:
    async with donor() as (_, _, link):
        with pytest.raises(StaleRound):
            await Fetched.open(link, b"x" * 16, Member().state)
        for _ in range(transfer.MAX_TRANSFERS):
            await Fetched.open(link, LINE, Member().state)
        with pytest.raises(Busy):
            await Fetched.open(link, LINE, Member().state)


async def test_a_newcomer_that_is_too_slow_is_told_so_and_costs_no_more_memory() -> None:
    async with donor() as (_, giving, link):
        fetched = await Fetched.open(link, LINE, Member().state)
        for round_ in range(3, 4 + transfer.MAX_BEHIND):
            assert giving.followed
            await giving.stepped(decision(round_), {"stage-0": as_it_is(LARGE)})
        assert not giving.followed
        with pytest.raises(Forgotten):
            await anext(fetched.steps(lambda round_: False))


async def test_a_newcomer_may_be_as_far_behind_as_costs_no_more_than_to_begin_anew() -> None:
    async with donor() as (_, giving, link):
        await Fetched.open(link, LINE, Member().state)
        quarter = [Chunk("int8", len(LARGE), CODECS["int8"].encode(LARGE))]
        for round_ in range(3, 3 + transfer.MAX_BEHIND):
            await giving.stepped(decision(round_, "skip"), {})
        for round_ in range(3 + transfer.MAX_BEHIND, 6 + transfer.MAX_BEHIND):
            await giving.stepped(decision(round_), {"stage-0": quarter})
            assert giving.followed
        await giving.stepped(decision(6 + transfer.MAX_BEHIND), {"stage-0": quarter})
        assert not giving.followed


async def test_who_is_through_is_forgotten() -> None:
    async with donor() as (_, giving, link):
        fetched = await Fetched.open(link, LINE, Member().state)
        fetched.close()
        await Fetched.open(link, LINE, Member().state)
        assert len(giving._transfers) == 1
