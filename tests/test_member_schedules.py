"""Members with the real all-reduce under faults, in virtual time: equal to the bit, and on the curve of one process."""

from __future__ import annotations

import asyncio

import pytest
from virtualcrew import VirtualCrew, in_virtual_time, play

from swarm.rounds import Phase


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
