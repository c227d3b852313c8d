"""Who is avoided for what: the one at fault, not the one who tells of it; for a while, and not for ever."""

from __future__ import annotations

import math

import pytest

from swarm.errors import BeyondCache, Busy, DeadlineExceeded, NoRoom, RemoteError, UnknownSession, Unreachable
from swarm.hops.blame import Blame
from swarm.routes.avoidance import Avoidance
from swarm.types import PeerId

A, B, C = PeerId("a"), PeerId("b"), PeerId("c")


def told(error: RemoteError, teller: PeerId) -> RemoteError:
    error.teller = teller
    return error


@pytest.fixture
def avoidance() -> Avoidance:
    return Avoidance()


@pytest.fixture
def blame(avoidance: Avoidance) -> Blame:
    blame = Blame(avoidance)
    blame.begin(begun=True)
    return blame


def test_a_peer_that_failed_is_avoided_longer_each_time_and_forgiven(avoidance: Avoidance) -> None:
    now, spans = 0.0, []
    for _ in range(8):
        avoidance.failed(A, now)
        until = next(t for t in range(1000) if A not in avoidance.avoided(now + t))
        spans.append(until)
        now += until
    assert spans == [5, 10, 20, 40, 80, 160, 300, 300]
    avoidance.failed(A, now + 1000)
    assert A not in avoidance.avoided(now + 1006)


def test_the_only_host_is_asked_again_within_a_second(avoidance: Avoidance) -> None:
    for time in range(10):
        avoidance.failed(A, float(time))
    assert avoidance.resting(9.5) == {A}
    assert avoidance.resting(10.0) == set()
    assert avoidance.avoided(10.0) == {A}


def test_who_fails_is_blamed_and_not_who_tells(blame: Blame, avoidance: Avoidance) -> None:
    assert blame.judge(told(DeadlineExceeded("lost", B), A), True, 0.0) == B
    assert avoidance.avoided(0.1) == {B}
    assert blame.trouble == 0.0


def test_a_way_that_is_cut_is_found_by_blaming_its_ends_in_turn(blame: Blame, avoidance: Avoidance) -> None:
    lost = told(DeadlineExceeded("lost", B), A)
    assert [blame.judge(lost, True, 0.0), blame.judge(lost, True, 1.0)] == [B, A]
    assert avoidance.avoided(1.5) == {A}  # B is not at fault, then
    assert [blame.judge(lost, True, 2.0), blame.judge(lost, True, 3.0)] == [B, A]
    again = [blame.judge(told(Unreachable("gone", C), A), False, float(time)) for time in range(3)]
    assert again == [C, C, C]  # we know ourselves that it is


def test_who_has_only_lost_its_place_is_asked_once_more(blame: Blame, avoidance: Avoidance) -> None:
    for error in (UnknownSession("which?", A), BeyondCache("a gap", B), told(Unreachable("no way", C), A)):
        assert blame.doubts(error, lives=True)
        assert not blame.doubts(error, lives=True)
    assert avoidance.avoided(0.0) == set()
    blame.begin(begun=True)
    assert blame.doubts(UnknownSession("which?", A), lives=True)
    assert not blame.doubts(told(Unreachable("no way", C), A), lives=False)
    assert not blame.doubts(DeadlineExceeded("silence", B), lives=True)


def test_who_says_no_is_asked_again_but_not_avoided(blame: Blame, avoidance: Avoidance) -> None:
    assert blame.judge(NoRoom("full", A), True, 0.0) == A
    assert blame.shunned(0.5) == ({A}, {A}, set())
    assert blame.shunned(1.0) == (set(), set(), set())
    assert avoidance.avoided(0.0) == set()


def test_a_swarm_that_is_full_is_not_waited_for_in_the_beginning(blame: Blame) -> None:
    blame.begin(begun=False)
    assert blame.trouble is None
    blame.judge(Busy("too much", A), True, 0.0)
    assert blame.trouble == -math.inf
    assert blame.shunned(1e6) == ({A}, {A}, {A})
    blame.begin(begun=True)
    blame.judge(Busy("too much", A), True, 7.0)
    assert blame.trouble == 7.0


def test_nobody_is_blamed_where_nobody_is_at_fault(blame: Blame, avoidance: Avoidance) -> None:
    assert blame.judge(Unreachable("the connection was lost"), False, 3.0) is None
    assert (blame.trouble, avoidance.avoided(3.0)) == (3.0, set())
