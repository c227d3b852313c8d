"""Who takes part in a round, and who does not any more."""

from __future__ import annotations

import pytest

from swarm.agreement.assignments import Assignments, Plan, to_bits
from swarm.agreement.census import Census
from swarm.agreement.cohort import DOUBLES, GIVE_UP, SILENCE, SILENT, Cohort
from swarm.agreement.messages import Decision, Join, Roster, Seat, Status
from swarm.agreement.roster import members
from swarm.rounds import Coordinator
from swarm.routes.avoidance import Avoidance
from swarm.types import PeerId
from swarm.wire import Endpoint

A, B, C = PeerId("a"), PeerId("b"), PeerId("c")
TRAINER, STRANGER = PeerId("t"), PeerId("s")
STAGES = {A: 0, B: 0, C: 1}
PLAN = Plan(b"r" * 16, 2, samples=8, micro_batch=2)


def roster() -> Roster:
    seats = [Seat(stage, Endpoint(peer, [("h", 1)])) for peer, stage in STAGES.items()]
    return Roster(b"r" * 16, b"l" * 16, A, seats, [TRAINER])


def status(counted: frozenset[int] = frozenset(), digest: bytes = b"") -> Status:
    return Status(b"l" * 16, 0, 0, 1, True, -1, to_bits(counted), 0, None, digest, 0.0)


class World:
    """A cohort of a, b and c, in which all hold the state."""

    def __init__(self) -> None:
        self.census = Census(PLAN, roster(), Assignments(PLAN), Assignments(PLAN))
        self.avoidance = Avoidance()
        self.cohort = Cohort(A, roster(), self.census, self.avoidance, 0.0)
        self.census.statuses = {peer: status() for peer in STAGES}

    def silence_of(self, *peers: PeerId, until: float) -> list[PeerId]:
        """Time goes on, and all others are heard; which trainers are lost."""
        lost, now = [], 0.0
        while now < until:
            now += SILENCE / 4
            for peer in {*STAGES, TRAINER} - {*peers}:
                self.cohort.heard[peer] = now
            lost += self.cohort.drop_silent(now)
        return lost


def test_who_is_silent_is_out_even_the_last_of_a_stage_and_a_lost_trainer_is_told_of() -> None:
    world = World()
    assert world.silence_of(C, TRAINER, until=SILENCE * 1.5) == [TRAINER]
    assert world.census.out == {C: SILENT}
    assert world.cohort.trainers == set()
    assert not world.cohort.is_lost(0.0)
    assert world.cohort.is_lost(GIVE_UP + 0.1)
    assert members(world.cohort.survivors()) == [A, B]


def test_the_last_of_a_stage_stays_whatever_it_does_and_others_do_not() -> None:
    world = World()
    assert not world.cohort.expel(C, "is wrong", 0.0)
    assert world.cohort.expel(B, "is wrong", 0.0)
    assert world.avoidance.avoided(1.0) == {B}
    assert not world.cohort.expel(A, "is wrong, too", 0.0)
    assert world.census.living() == [A, C]


def test_who_slept_does_not_blame_the_others() -> None:
    world = World()
    assert world.cohort.drop_silent(10 * SILENCE) == []
    assert not world.census.out


def test_who_was_silent_comes_back_and_who_was_wrong_does_not() -> None:
    world = World()
    world.cohort.drop(B, SILENT)
    world.cohort.readmit(B, 1.0)
    assert not world.census.out
    assert world.census.void == {B: 0}
    world.cohort.expel(B, "is wrong", 1.0)
    world.cohort.readmit(B, 1.1)
    assert B in world.census.out


def test_who_holds_other_parameters_is_out_of_this_round_for_good() -> None:
    world = World()
    world.census.statuses |= {A: status(digest=b"1"), B: status(digest=b"2"), C: status(digest=b"3")}
    world.cohort.drop_differing()
    assert world.census.living() == [A, C]
    world.cohort.readmit(B, 100.0)
    assert world.census.living() == [A, C]


def test_who_comes_again_and_again_with_what_others_have_counted_is_out() -> None:
    world = World()
    for _ in range(DOUBLES - 1):
        world.cohort.void(B, 0.0)
        assert not world.census.out
    world.cohort.void(B, 0.0)
    assert B in world.census.out


def test_the_next_round_has_newcomers_who_hold_its_state_and_nobody_who_is_avoided() -> None:
    world = World()
    world.census.statuses |= {A: status(digest=b"1")}
    world.cohort.expel(B, "is wrong", 0.0)
    for name, digest, round_ in (("new", b"1", 4), ("other", b"2", 4), ("late", b"1", 3), ("b", b"1", 4)):
        join = Join(b"r" * 16, 0, Endpoint(name, [("h", 1)]), [], round_, digest)
        world.cohort.join(PeerId(name), join)
    world.cohort.join(PeerId("u"), Join(b"r" * 16, None, None, [], 4, b""))
    found = world.cohort.next_roster(4, 1.0)
    assert members(found) == [A, "new", C]
    assert found.trainers == [TRAINER, "u"]


@pytest.mark.parametrize("peer", [STRANGER, TRAINER])
def test_nobody_goes_on_without_who_is_no_member(peer: PeerId) -> None:
    world = World()
    assert not world.cohort.drop(peer, SILENT)
    assert not world.cohort.expel(peer, "is wrong", 0.0)
    assert not world.census.out
    assert not world.avoidance.avoided(0.0)


def test_a_stranger_that_claims_what_cannot_be_is_not_heard() -> None:
    begun = Decision(-1, 0, 0, "begin", 1.0, 0.0, [], roster())
    coordinator = Coordinator(PLAN, A, begun, 0.0)
    coordinator.hear(STRANGER, status(frozenset({0, 1})), 0.1)
    assert not coordinator.census.out
    assert coordinator.census.living() == [A, B, C]
