"""Who decides, who runs what, who is to blame: the small pure parts of a round."""

from __future__ import annotations

from itertools import combinations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from swarm.agreement.assignments import LEAST_SECONDS, UNTOLD_SECONDS, Assignments, Plan, from_bits, to_bits
from swarm.agreement.judgement import accused, differing, doubly_counted, judge
from swarm.agreement.messages import Averaged, Finding, Report, Roster, Seat, Share
from swarm.agreement.roster import is_quorum, voters
from swarm.types import PeerId
from swarm.wire import Endpoint

A, B, C = PeerId("a"), PeerId("b"), PeerId("c")
ORDER = [A, B, C]


def a_roster(members: int, trainers: int) -> Roster:
    seats = [Seat(0, Endpoint(f"m{number}", [("h", 1)])) for number in range(members)]
    return Roster(b"r" * 16, b"l" * 16, "m0", seats, [f"t{number}" for number in range(trainers)])


@given(st.integers(1, 4), st.integers(0, 4))
def test_any_two_quorums_share_a_voter(members: int, trainers: int) -> None:
    roster = a_roster(members, trainers)
    everyone = voters(roster)
    quorums = [
        set(some)
        for count in range(len(everyone) + 1)
        for some in combinations(everyone, count)
        if is_quorum(roster, some)
    ]
    assert quorums
    assert all(first & second for first in quorums for second in quorums)


@pytest.mark.parametrize(("members", "trainers"), [(1, 0), (1, 5), (2, 1), (3, 1), (4, 9)])
def test_members_decide_without_any_trainer(members: int, trainers: int) -> None:
    assert is_quorum(a_roster(members, trainers), [f"m{number}" for number in range(members)])


def test_one_of_two_replicas_goes_on_with_a_trainer() -> None:
    assert is_quorum(a_roster(2, 1), ["m1", "t0"])
    assert not is_quorum(a_roster(2, 0), ["m1"])


@given(st.frozensets(st.integers(0, 300)))
def test_bits_there_and_back(indices: frozenset[int]) -> None:
    assert from_bits(to_bits(indices)) == indices


# --- assignments -----------------------------------------------------------------------------------------------------

PLAN = Plan(b"r" * 16, 1, samples=7, micro_batch=2)


def lent(assignments: Assignments, trainer: PeerId, want: int, now: float) -> list[int]:
    return [each.index for each in assignments.take(trainer, want, {}, now)]


def test_nobody_is_lent_what_another_has() -> None:
    assignments = Assignments(PLAN)
    assert lent(assignments, A, 3, 0.0) == [0, 1, 2]
    assert lent(assignments, B, 3, 0.0) == [3]
    assert PLAN.samples_of(range(PLAN.count)) == 7


def test_what_a_vanished_trainer_had_is_lent_again_with_another_lease() -> None:
    assignments = Assignments(PLAN)
    [first] = assignments.take(A, 1, {}, 0.0)
    assignments.forget(A)
    [again] = assignments.take(B, 1, {}, 0.0)
    assert (again.index, again.lease > first.lease) == (first.index, True)


def test_what_a_trainer_has_done_with_and_nobody_counts_is_lent_again_after_a_while() -> None:
    assignments = Assignments(PLAN)
    assignments.take(A, 4, {}, 0.0)
    assignments.hear(A, 4, [(1, 2), (2, 3), (3, 4)], 1.0)  # it is through with micro-batch 0
    assert lent(assignments, B, 4, 1.0 + UNTOLD_SECONDS) == []
    assert lent(assignments, B, 4, 1.1 + UNTOLD_SECONDS) == [0]


def test_what_was_lent_and_never_seen_is_told_again() -> None:
    assignments = Assignments(PLAN)
    assert lent(assignments, A, 2, 0.0) == [0, 1]
    assignments.hear(A, 0, [], 0.1)
    assert lent(assignments, A, 2, 0.1) == [0, 1]


def test_what_is_slow_is_lent_to_another_too() -> None:
    assignments = Assignments(PLAN)
    assert lent(assignments, A, 4, 0.0) == [0, 1, 2, 3]
    assert lent(assignments, B, 4, LEAST_SECONDS) == []
    assert lent(assignments, B, 4, LEAST_SECONDS + 0.1) == [0, 1, 2, 3]


def test_what_was_never_lent_or_is_not_there_cannot_be_counted() -> None:
    assignments = Assignments(PLAN)
    assignments.take(A, 2, {}, 0.0)
    assert assignments.unlent({0, 1, 2, 9}) == {2, 9}
    assert Assignments(PLAN, lent=None).unlent({0, 3, 9}) == {9}  # who came later cannot know
    assert Assignments(PLAN, lent={3}).unlent({0, 3}) == {0}


def test_what_is_counted_everywhere_is_lent_no_more() -> None:
    assignments = Assignments(PLAN)
    assignments.count(frozenset({0, 2}), 0.0)
    assert lent(assignments, A, 9, 0.0) == [1, 3]


# --- judgement -------------------------------------------------------------------------------------------------------


def a_report(digests: dict[PeerId, bytes], findings: dict[PeerId, float] | None = None) -> Report:
    found = [Finding("stage-0", peer, squared) for peer, squared in (findings or {}).items()]
    return Report(0, 1, [Averaged("stage-0", list(digests.items()), 1.0, True)], found, [], [])


SHARES = [Share(peer, 0, 2, 0.0) for peer in ORDER]
SAME = {A: b"1", B: b"2", C: b"3"}


def test_equal_digests_are_agreed_on() -> None:
    verdict = judge(SHARES, {peer: a_report(SAME) for peer in ORDER})
    assert not verdict.blamed
    assert verdict.finite
    assert verdict.norm == pytest.approx(3**0.5)
    assert [each.group for each in verdict.agreed] == ["stage-0"]


def test_the_one_that_holds_another_average_is_to_blame() -> None:
    reports = {A: a_report(SAME), B: a_report({**SAME, A: b"x"}), C: a_report(SAME)}
    assert set(judge(SHARES, reports).blamed) == {B}


def test_an_owner_that_told_two_stories_is_to_blame() -> None:
    reports = {A: a_report(SAME), B: a_report({**SAME, A: b"x"}), C: a_report({**SAME, A: b"x"})}
    assert set(judge(SHARES, reports).blamed) == {A}


def test_a_gradient_far_larger_than_the_others_is_to_blame() -> None:
    findings = {A: 1.0, B: 2.0, C: 1e60}
    reports = {peer: a_report(SAME, findings) for peer in ORDER}
    assert set(judge(SHARES, reports).blamed) == {C}


def test_of_mutual_accusations_the_most_voices_count() -> None:
    def accusing(*suspects: PeerId) -> Report:
        return Report(0, 1, [], [], list[str](suspects), [])

    assert accused({A: accusing(C), B: accusing(C), C: accusing(A, B)}, ORDER) == C
    assert accused({A: accusing(B), B: accusing(A)}, ORDER) == B
    assert accused({}, ORDER) is None


def test_of_those_who_have_the_same_micro_batches_who_claims_most_is_believed_least() -> None:
    assert doubly_counted({A: {1}, B: {1, 2, 3}, C: {4}}, ORDER) == {B}
    assert doubly_counted({A: {1, 2, 3, 4}, B: {1, 5}, C: {2, 5, 6, 7, 8}}, ORDER) == {C, A}
    assert doubly_counted({A: {1, 2}, B: {3, 4}, C: {1, 3}}, ORDER) == {C}
    assert doubly_counted({A: {1}, B: {2}}, ORDER) == set()


def test_the_replicas_that_are_fewer_are_ill_and_of_two_the_later() -> None:
    assert differing({A: b"x", B: b"y", C: b"y"}, ORDER) == {A}
    assert differing({A: b"x", B: b"y"}, ORDER) == {B}
    assert differing({A: b"x", B: b"x"}, ORDER) == set()
