"""The parts of the all-reduce: codes, parts, robust means, error feedback; and averagers that meet with nonsense."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator
from dataclasses import replace

import pytest
import torch
from allocations import allocated
from dataplane import ListeningRpc
from hypothesis import example, given
from hypothesis import strategies as st

from peer.averaging import Averager
from peer.training.codecs import BLOCK, CHUNK, CODECS, size_of, vectors_of
from peer.training.exchange import WINDOW
from peer.training.feedback import Feedback
from peer.training.robust import ROBUST
from swarm.agreement.assignments import Plan
from swarm.agreement.judgement import accused
from swarm.agreement.messages import Decision, Order, Piece, Report, Roster, Seat, Share
from swarm.agreement.parts import group_of_stage, parts
from swarm.errors import BadTensor, StaleRound
from swarm.types import PeerId
from swarm.wire import Endpoint

LINE = b"l" * 16
GROUP = group_of_stage(0)
CODED = {"float32": 4, "float16": 2, "int8": 1}  # bytes of a value
ERRORS = {"float32": 0.0, "float16": 1e-3, "int8": 2e-2}  # relative


# --- codes -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", list(CODECS))
@pytest.mark.parametrize("length", [1, BLOCK - 1, BLOCK, 3 * BLOCK + 7])
@pytest.mark.parametrize("size", [1e-12, 1.0, 1e12])
def test_what_is_read_is_what_was_written_whatever_its_magnitude(dtype: str, length: int, size: float) -> None:
    values = torch.randn(length, generator=torch.Generator().manual_seed(length)) * size
    body = CODECS[dtype].encode(values)
    read = CODECS[dtype].decode(memoryview(bytearray(body)), torch.empty(length))
    assert (read - values).norm() <= ERRORS[dtype] * values.norm()


@pytest.mark.parametrize("dtype", list(CODECS))
def test_zeros_stay_zeros_and_what_is_not_finite_stays_so(dtype: str) -> None:
    codec = CODECS[dtype]
    zeros = codec.decode(memoryview(bytearray(codec.encode(torch.zeros(10)))), torch.empty(10))
    assert not zeros.any()
    spoilt = codec.decode(memoryview(bytearray(codec.encode(torch.tensor([1.0, float("nan")])))), torch.empty(2))
    assert not torch.isfinite(spoilt).all()


@pytest.mark.parametrize("dtype", list(CODECS))
@pytest.mark.parametrize("change", [-1, 1])
def test_bytes_of_another_length_are_refused(dtype: str, change: int) -> None:
    body = bytearray(CODECS[dtype].encode(torch.ones(8)))
    wrong = body[:change] if change < 0 else body + b"\0"
    with pytest.raises(BadTensor):
        CODECS[dtype].decode(memoryview(wrong), torch.empty(8))


def test_what_a_code_leaves_out_comes_with_the_next_round_and_not_after_a_discard() -> None:
    feedback, mine = Feedback(4), {PeerId("a"): range(4)}
    feedback.begin(mine)
    feedback.left_out(0, torch.full((4,), 0.5))
    feedback.begin(mine)  # the attempt was discarded
    assert feedback.added(0, torch.ones(4)).tolist() == [1.0] * 4
    feedback.left_out(0, torch.full((4,), 0.25))
    feedback.commit()
    feedback.begin(mine)
    assert feedback.added(0, torch.ones(4)).tolist() == [1.25] * 4
    feedback.begin({PeerId("b"): range(4)})
    assert feedback.added(0, torch.ones(4)).tolist() == [1.0] * 4


# --- parts and robust means ------------------------------------------------------------------------------------------


@given(st.lists(st.floats(0, 1e12), min_size=1, max_size=9), st.integers(0, 10_000))
@example(
    [1.0, 610409274515.75, 610409274515.75, 1.0], 217
)  # where each bound is rounded in two ways, one value is lost
def test_parts_cover_the_vector_once(bandwidths: list[float], length: int) -> None:
    shares = [Share(str(number), 0, 1, bandwidth) for number, bandwidth in enumerate(bandwidths)]
    covered = [index for part in parts(shares, length).values() for index in part]
    assert covered == list(range(length))


def test_who_is_slow_is_given_less() -> None:
    shares = [Share("fast", 0, 1, 8e6), Share("usual", 0, 1, 8e6), Share("slow", 0, 1, 2e6)]
    sizes = {peer: len(part) for peer, part in parts(shares, 9000).items()}
    assert sizes == {"fast": 4000, "usual": 4000, "slow": 1000}


@pytest.mark.parametrize("robust", list(ROBUST))
@given(st.integers(4, 9), st.sampled_from([-10.0, 1e6, -1e20]))
def test_one_liar_moves_a_robust_mean_no_further_than_the_honest_are_apart(robust: str, count: int, lie: float) -> None:
    honest = torch.randn(count, 64, generator=torch.Generator().manual_seed(count)) * 0.1 + 1.0
    mean = ROBUST[robust](torch.cat([honest, torch.full((1, 64), lie)]))
    assert (mean - honest.mean(dim=0)).norm() <= 2.0 * (honest - honest.mean(dim=0)).norm(dim=1).max()


# --- averagers -------------------------------------------------------------------------------------------------------


class Averagers:
    """Some that know of each other."""

    def __init__(self, rpcs: list[ListeningRpc], plan: Plan) -> None:
        self.rpcs = rpcs
        self.endpoints = {rpc.peer: Endpoint(rpc.peer, [(rpc.address.host, rpc.address.port)]) for rpc in rpcs}
        self.all = [Averager(rpc, plan) for rpc in rpcs]

    def order(self, attempt: int = 1) -> Order:
        seats = [Seat(0, endpoint) for endpoint in self.endpoints.values()]
        roster = Roster(b"r" * 16, LINE, self.rpcs[0].peer, seats, [])
        begin = Decision(-1, 0, 0, "begin", 1.0, 0.0, [], roster)
        return Order(LINE, 0, 0, 2, attempt, [Share(peer, 0, 1, 0.0) for peer in self.endpoints], [], begin)

    async def run(self, vectors: list[torch.Tensor], attempt: int = 1) -> list[Report]:
        order = self.order(attempt)
        runs = [
            each.run(order, {GROUP: vector}, self.endpoints) for each, vector in zip(self.all, vectors, strict=False)
        ]
        async with asyncio.timeout(30):
            return await asyncio.gather(*runs)


@contextlib.asynccontextmanager
async def averagers(count: int, **plan: object) -> AsyncIterator[Averagers]:
    rpcs = [ListeningRpc() for _ in range(count)]
    for rpc in rpcs:
        await rpc.start()
    try:
        yield Averagers(rpcs, replace(Plan(b"r" * 16, 1, count, 1, dtype="float32"), **plan))  # type: ignore[arg-type]
    finally:
        for rpc in rpcs:
            await rpc.close()


def vectors(count: int, length: int) -> list[torch.Tensor]:
    return [torch.randn(length, generator=torch.Generator().manual_seed(seed)) for seed in range(count)]


@pytest.mark.parametrize("count", [1, 2, 3])
@pytest.mark.parametrize("length", [1, 1000, 600_000])
async def test_all_hold_the_same_mean_and_the_same_digest(count: int, length: int, nothing_left: None) -> None:
    async with averagers(count, dtype="float16") as made:
        mine = vectors(count, length)
        reports = await made.run(mine)
        expected = sum(mine) / count
        for averager, report in zip(made.all, reports, strict=True):
            assert torch.equal(averager.mean[GROUP], made.all[0].mean[GROUP])
            assert (averager.mean[GROUP] - expected).norm() <= 1e-3 * expected.norm()
            assert report.averages[0].parts == reports[0].averages[0].parts
        squared = sum(report.averages[0].squared for report in reports)
        assert squared == pytest.approx(expected.square().sum().item(), rel=1e-2)


@pytest.mark.parametrize("dtype", list(CODECS))
@pytest.mark.parametrize("keeps", [False, True])
async def test_what_is_kept_for_those_who_follow_is_the_mean_to_the_bit(dtype: str, keeps: bool) -> None:
    async with averagers(3, dtype=dtype) as made:
        for each in made.all:
            each.keeps = keeps
        await made.run(vectors(3, 2_000_000))
        for each in made.all:
            coded = each.coded()
            assert torch.equal(vectors_of(coded)[GROUP], each.mean[GROUP])
            assert size_of(coded) < (1.02 * CODED[dtype] if keeps else 4.01) * 2_000_000
        kept = made.all[0].coded()
        before = made.all[0].mean[GROUP].clone()
        await made.run(vectors(4, 2_000_000)[1:], attempt=2)
        assert torch.equal(vectors_of(kept)[GROUP], before)


@pytest.mark.parametrize("dtype", ["float32", "float16"])
async def test_averaging_needs_one_buffer_and_what_is_on_its_way(dtype: str) -> None:
    """Each of two has its mean, a chunk to decode into, and at most its half of the values encoded."""
    async with averagers(2, dtype=dtype) as made:
        mine = vectors(2, 2_000_000)
        with allocated() as averaging:
            await made.run(mine)
        on_the_way = 4 * CHUNK * (1 + 2 * WINDOW) + (2_000_000 if dtype == "float16" else 0)
        assert 2 * 8_000_000 <= averaging.peak <= 2 * (8_000_000 + on_the_way)
        with allocated() as again:
            await made.run(mine, attempt=2)
        assert again.peak <= 2 * on_the_way


async def test_the_owner_of_a_part_finds_how_large_the_others_sums_are() -> None:
    async with averagers(2) as made:
        mine = vectors(2, 5000)
        mine[1] *= 1e25  # its square is beyond fp32
        reports = await made.run(mine)
        found = {
            peer: sum(f.squared for report in reports for f in report.findings if f.peer == peer)
            for peer in made.endpoints
        }
        for peer, vector in zip(made.endpoints, mine, strict=True):
            assert found[peer] == pytest.approx(vector.double().square().sum().item(), rel=1e-3)


async def test_a_sender_of_what_is_not_finite_is_named() -> None:
    async with averagers(2) as made:
        mine = vectors(2, 5000)
        mine[1][17] = float("nan")
        reports = await made.run(mine)
        named = {peer for report in reports for peer, _ in report.unsound}
        assert named == {made.rpcs[1].peer}
        assert not any(report.averages for report in reports if report.unsound)


async def test_a_member_that_does_not_take_part_is_suspected_and_the_others_end() -> None:
    async with averagers(3) as made:
        for each in made.all:
            each.stall = 0.5
        reports = await made.run(vectors(2, 5000))  # the third never begins
        assert all(made.rpcs[2].peer in report.suspects for report in reports)  # and perhaps who waits for it, too
        first, second, third = made.endpoints
        assert accused({first: reports[0], second: reports[1]}, [first, second, third]) == third


async def test_a_member_that_dies_is_suspected_at_once() -> None:
    async with averagers(3) as made:
        await made.rpcs[2].close()
        reports = await made.run(vectors(2, 5000))
        assert all(made.rpcs[2].peer in report.suspects for report in reports)


async def test_pieces_of_other_attempts_and_pieces_that_do_not_fit_are_refused() -> None:
    async with averagers(2) as made:
        first = asyncio.ensure_future(made.all[0].run(made.order(2), {GROUP: torch.ones(1000)}, made.endpoints))
        link = await made.rpcs[1].connect(made.rpcs[0].peer, [made.rpcs[0].address])
        late = Piece(LINE, 0, 0, 1, GROUP, 0, 500, False)
        with pytest.raises(StaleRound):
            await link.call(late, [bytes(2000)], timeout=10)
        with pytest.raises(BadTensor):
            await link.call(Piece(LINE, 0, 0, 2, GROUP, 7, 500, False), [bytes(2000)], timeout=10)
        report = await first
        assert [peer for peer, _ in report.unsound] == [made.rpcs[1].peer]
