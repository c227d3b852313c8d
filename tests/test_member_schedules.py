"""Members with the real all-reduce under faults, in virtual time: equal to the bit, and on the curve of one process."""

from __future__ import annotations

import asyncio
import itertools
import statistics
from collections.abc import Callable, Iterable

import pytest
from linear import SPOILS, LinearMember
from msgspec import structs
from virtualcrew import VirtualCrew, in_virtual_time, play

from peer.training.transfer import digest_of_state
from swarm.agreement.assignments import Plan, to_bits
from swarm.agreement.effects import Average, Effect
from swarm.agreement.member import Member
from swarm.agreement.messages import Chosen, Decision, Order, Roster, Seat, Share, Status
from swarm.rounds import Phase
from swarm.types import PeerId
from swarm.wire import Endpoint


@pytest.mark.parametrize("seed", range(18))
def test_every_replica_stays_on_the_curve_of_one_process_whatever_fails(seed: int) -> None:
    play(seed)


@pytest.mark.slow
@pytest.mark.timeout(280)
@pytest.mark.parametrize("fifty", range(4))
def test_two_hundred_schedules(fifty: int) -> None:
    for seed in range(50 * fifty, 50 * (fifty + 1)):
        play(seed)


@pytest.mark.parametrize("seed", range(4))
def test_one_of_two_left_without_its_trainer_begins_anew_and_counts_nothing_twice(seed: int) -> None:
    """It is no majority of those who were there, and has counted some of the round."""
    play(seed, [("kill", 2, Phase.AVERAGE), ("kill_a_trainer", 2, Phase.DECIDE)])


@pytest.mark.parametrize("fault", ["kill", "stall"])
def test_a_replica_that_is_lost_in_the_middle_of_averaging_costs_seconds(fault: str) -> None:
    async def main() -> float:
        crew = VirtualCrew(2)
        for _ in range(3):
            await crew.join(0)
        crew.new_trainer()
        try:
            assert await crew.until(lambda: crew.now() == (2, Phase.AVERAGE), 60.0)
            began, victim = asyncio.get_running_loop().time(), list(crew.members)[1]
            if fault == "kill":
                await crew.kill(victim)
            else:
                crew.network.stall(victim)
            others = [member.replica for peer, member in crew.members.items() if peer != victim]
            assert await crew.until(lambda: min(replica.round for replica in others) >= 3, 60.0)
            return asyncio.get_running_loop().time() - began
        finally:
            await crew.close()

    assert in_virtual_time(2, main()) < 8.0


def everything(crew: VirtualCrew) -> Iterable[int]:
    return range(crew.plan.count)


def what_there_is_not(crew: VirtualCrew) -> Iterable[int]:
    return [0, 16_000]


def what_the_others_have(crew: VirtualCrew) -> Iterable[int]:
    """The most plausible lie."""
    return set().union(*(member.attendance.participant.counted_indices for member in crew.members.values()))


@pytest.mark.parametrize(
    ("claim", "why"),
    [
        (everything, "claims micro-batches that nobody was lent"),
        (what_there_is_not, "claims micro-batches that nobody was lent"),
        (what_the_others_have, "claims what its replicas have counted"),
    ],
)
def test_who_claims_what_it_was_not_lent_is_left_out_and_nothing_is_missing(
    claim: Callable[[VirtualCrew], Iterable[int]], why: str
) -> None:
    """Of three replicas, the last lies; the others' parameters are those of one process that ran every sample once."""

    async def main() -> set[str]:
        crew, told = VirtualCrew(1, samples=24), set[str]()
        *others, liar = [await crew.join(0) for _ in range(3)]
        crew.new_trainer()
        machine = liar.attendance.participant
        honest = machine.status

        def lie() -> Status:
            status = honest()
            return structs.replace(status, counted=to_bits(claim(crew))) if crew.outcomes else status

        machine.status = lie  # type: ignore[method-assign]

        def over() -> bool:
            for member in others:
                coordinator = member.attendance.participant.coordinator
                told.update(coordinator.census.out.values() if coordinator is not None else ())
            return min(member.replica.round for member in others) >= 6

        try:
            assert await crew.until(over, 120.0)
        finally:
            await crew.close()
        return told

    assert why in in_virtual_time(1, main())


def test_a_gradient_of_a_thousand_million_times_its_weight_is_left_out() -> None:
    """A weight is nothing that a member says; to have more of one, it would have to send more."""

    async def main() -> set[str]:
        crew, told = VirtualCrew(1, samples=24), set[str]()
        *_, liar = [await crew.join(0) for _ in range(3)]
        crew.new_trainer()
        liar.replica.spoil = lambda values: 1e9 * values

        def over() -> bool:
            coordinator = crew.coordinator
            told.update(coordinator.census.out.values() if coordinator is not None else ())
            return crew.outcomes.get(5) == "commit"

        try:
            assert await crew.until(over, 120.0)
        finally:
            await crew.close()
        return told

    [why] = in_virtual_time(1, main())
    assert "sent a gradient of norm" in why


def test_an_attempt_whose_weights_are_more_than_a_round_has_is_not_made() -> None:
    plan = Plan(b"r" * 16, 1, samples=8, micro_batch=2)
    endpoint = Endpoint("m", [("127.0.0.1", 1)])
    member = Member(plan, 0, endpoint, b"l" * 16, 0.0)
    roster = Roster(plan.run, b"l" * 16, "c", [Seat(0, endpoint), Seat(0, Endpoint("c", []))], [])
    begun = Decision(-1, 0, 0, "begin", 1.0, 0.0, [], roster)
    member.receive(PeerId("c"), Chosen(begun), 0.0)
    member.holds(0, b"d", 0.0)

    def averaging(*samples: int) -> list[Effect]:
        shares = [Share(peer, 0, each, 0.0) for peer, each in zip("mc", samples, strict=True)]
        member.effects.clear()
        order = Order(roster.line, 0, 0, 2, member.order.attempt + 1 if member.order else 1, shares, [], begun)
        member.receive(PeerId("c"), order, 0.0)
        return [effect for effect in member.effects if isinstance(effect, Average)]

    assert averaging(2, 1_000_000_000) == averaging(8, 2) == averaging(2, 2) == []
    assert len(averaging(2, 6)) == 1


def test_a_decision_tells_how_many_steps_were_taken_before_it_which_skipped_rounds_are_not() -> None:
    """Also to a member that came after they were skipped."""

    async def main() -> tuple[dict[int, int], dict[int, str], list[int]]:
        crew, told = VirtualCrew(1, scaled=True), dict[int, int]()
        members = [await crew.join(0) for _ in range(2)]
        crew.new_trainer()

        def through(round_: int) -> bool:
            for member in members:
                decision = member.attendance.participant.previous
                if decision is not None and decision.round >= 0:
                    told[decision.round] = decision.steps
                skipping = member.replica.round in (1, 2)
                member.replica.spoil = SPOILS["nan" if skipping else ""]
            return min(member.replica.round for member in members) >= round_

        try:
            assert await crew.until(lambda: through(4), 60.0)
            members.append(await crew.join(0))
            assert await crew.until(lambda: through(8), 60.0)
        finally:
            await crew.close()
        return told, crew.outcomes, [member.attendance.participant.steps for member in members]

    told, outcomes, steps = in_virtual_time(1, main())
    assert [outcomes[round_] for round_ in range(5)] == ["commit", "skip", "skip", "commit", "commit"]
    taken = [outcomes[round_] == "commit" for round_ in range(max(told) + 1)]
    assert told == {round_: sum(taken[:round_]) for round_ in range(max(told) + 1)}
    assert all(each >= sum(taken[:8]) for each in steps)


LONG = 300_000  # values: chunks are large messages, which take turns on an uplink
UPLINK = 1e6  # bytes a second: averaging takes as long as computing, or longer


async def seconds_of_rounds(member: LinearMember, count: int) -> list[float]:
    """How long this one's next rounds take, from step to step."""
    loop, machine, found = asyncio.get_running_loop(), member.attendance.participant, []
    for round_ in range(member.replica.round + 1, member.replica.round + 2 + count):
        await member.attendance.until(lambda round_=round_: machine.held >= round_)
        found.append(loop.time())
    return [after - before for before, after in itertools.pairwise(found)]


@pytest.mark.parametrize("overlap", [False, True])
@pytest.mark.parametrize("dtype", ["float32", "float16", "int8"])
def test_a_newcomer_takes_its_share_of_a_replicas_link_and_gets_through(dtype: str, overlap: bool) -> None:
    """A round takes twice as long at most, and it has one of its own: what it is sent comes no slower than rounds end.

    Without overlap, with one newcomer to two replicas and fp16, rounds of 1.4 s become ones of 2.2 s for 8 s.
    """

    async def main() -> None:
        crew = VirtualCrew(3, compute=0.1, bandwidth=1e9, dtype=dtype, overlap=overlap, samples=16)
        replicas = [await crew.join(0, length=LONG) for _ in range(2)]
        for replica in replicas:
            crew.network.share_uplink(replica.rpc.peer, UPLINK)
        crew.new_trainer()
        try:
            await seconds_of_rounds(replicas[0], 2)  # in which they find each other
            usual = statistics.mean(await seconds_of_rounds(replicas[0], 4))
            late = await crew.join(0, length=LONG)
            during = asyncio.create_task(seconds_of_rounds(replicas[0], 4))
            async with asyncio.timeout(30.0):
                await late.attendance.until(lambda: late.attendance.participant.ready)
            assert max(await during) < 2.0 * usual
            everyone = [late.replica, *(each.replica for each in replicas)]
            await late.attendance.until(lambda: len({each.round for each in everyone}) == 1)
            assert len({digest_of_state(0, each.state()) for each in everyone}) == 1
        finally:
            await crew.close()

    in_virtual_time(3, main())


def rounds_within(seconds: float, overlap: bool) -> int:
    """How many rounds two replicas make whose averaging takes about as long as their computing."""

    async def main() -> int:
        crew = VirtualCrew(0, compute=0.1, bandwidth=1e5, overlap=overlap, samples=16)
        for _ in range(2):
            await crew.join(0, length=8_000)
        crew.new_trainer()
        await asyncio.sleep(seconds)
        rounds = [member.replica.round for member in crew.members.values()]
        await crew.close()
        return min(rounds)

    return in_virtual_time(0, main())


def test_rounds_that_overlap_are_faster_where_averaging_is_slow() -> None:
    """48 rounds a minute become 69."""
    assert rounds_within(30.0, overlap=True) > 1.35 * rounds_within(30.0, overlap=False) > 20
