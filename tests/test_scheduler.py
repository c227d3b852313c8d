"""Which work goes next: decodes first, prompts in pieces, shares that are fair, and nobody waits for ever."""

from __future__ import annotations

from collections import Counter

import pytest
from hypothesis import given
from hypothesis import strategies as st

from peer.scheduler import (
    BUDGETS,
    FIRST_BUDGET,
    FORGET,
    LOW,
    LOW_PATIENCE,
    NORMAL,
    OVER,
    PATIENCE,
    PIECE,
    SHORT,
    Budget,
    Scheduler,
    Slice,
    Work,
)


def work(session: int, count: int = 1, client: str = "a", arrived: float = 0.0, **more: object) -> Work:
    return Work(session, client, more.pop("rows", 1), count, arrived, **more)  # type: ignore[arg-type]


def taken(slices: list[Slice]) -> list[tuple[object, int, int]]:
    return [(piece.work.session, piece.start, piece.end) for piece in slices]


def scheduler(*works: Work, together: bool = True) -> Scheduler:
    scheduler = Scheduler(together)
    for each in works:
        scheduler.add(each)
    return scheduler


def test_decodes_go_first_and_a_prompt_fills_what_they_leave() -> None:
    waiting = scheduler(work(1, 100), work(2), work(3, SHORT), work(4))
    assert taken(waiting.turn(0.0, 64).slices) == [(2, 0, 1), (3, 0, SHORT), (4, 0, 1), (1, 0, 2 * PIECE)]
    assert taken(waiting.turn(0.0, 80).slices) == [(1, 32, 100)]
    assert len(waiting) == 0


def test_what_is_cut_is_cut_evenly_and_what_is_little_too_long_is_not_cut() -> None:
    waiting = scheduler(work(1, 6 * PIECE + 3))
    assert taken(waiting.turn(0.0, 4 * PIECE).slices) == [(1, 0, 4 * PIECE)]
    assert taken(waiting.turn(0.0, 2 * PIECE + 2).slices) == [(1, 4 * PIECE, 6 * PIECE + 3)]
    waiting = scheduler(work(1, 20), work(2, SHORT), work(3))
    assert taken(waiting.turn(0.0, SHORT + 17).slices) == [(2, 0, SHORT), (3, 0, 1), (1, 0, 20)]


def test_one_step_of_a_session_at_a_time_and_in_order() -> None:
    waiting = scheduler(work(1), work(1), work(2))
    assert taken(waiting.turn(0.0, 64).slices) == [(1, 0, 1), (2, 0, 1)]
    assert taken(waiting.turn(0.0, 64).slices) == [(1, 0, 1)]


def test_a_piece_is_not_cut_too_small_unless_it_would_be_alone() -> None:
    waiting = scheduler(work(1, 100), work(2, SHORT), work(3, rows=40))
    assert taken(waiting.turn(0.0, SHORT + PIECE - 1).slices) == [(2, 0, SHORT)]
    assert taken(waiting.turn(0.0, 3).slices) == [(3, 0, 1)]
    assert taken(waiting.turn(0.0, 3).slices) == [(1, 0, PIECE)]


def test_higher_priorities_go_first() -> None:
    waiting = scheduler(work(1, 40), work(2, 40, priority=1))
    assert taken(waiting.turn(0.0, 40).slices) == [(2, 0, 40)]


def test_what_nobody_waits_for_goes_last_but_not_never() -> None:
    waiting = scheduler(work(1, 40, priority=LOW), work(2, 40), work(3, 40, arrived=PATIENCE))
    assert taken(waiting.turn(PATIENCE, 40).slices) == [(2, 0, 40)]
    assert taken(waiting.turn(PATIENCE, 40).slices) == [(3, 0, 40)]
    waiting.add(work(4, 40, arrived=LOW_PATIENCE))
    assert taken(waiting.turn(LOW_PATIENCE, 40).slices) == [(1, 0, 40)]


def test_of_what_nobody_waits_for_no_more_goes_into_a_turn_than_can_be_spared() -> None:
    waiting = scheduler(work(1, 100, priority=LOW), work(2, 100, priority=LOW), work(3), work(4, SHORT, priority=LOW))
    assert taken(waiting.turn(0.0, 96, spare=32).slices) == [(3, 0, 1), (4, 0, SHORT), (1, 0, 32)]
    waiting.add(work(5, 40))
    assert taken(waiting.turn(0.0, 96, spare=PIECE).slices) == [(5, 0, 40), (1, 32, 48)]
    assert taken(waiting.turn(0.0, 96, spare=0).slices) == [(1, 48, 64)]  # the turn would be empty otherwise


def test_a_session_can_become_urgent_while_its_steps_wait() -> None:
    waiting = scheduler(work(1, 40, priority=LOW), work(1, priority=LOW), work(2, 40, arrived=0.1))
    waiting.prioritize(1, NORMAL)
    assert taken(waiting.turn(0.2, 40).slices) == [(1, 0, 40)]
    assert taken(waiting.turn(0.2, 1).slices) == [(1, 0, 1)]


def test_only_one_group_or_one_session_a_turn_where_it_must_be_so() -> None:
    waiting = scheduler(work(1, group="x"), work(2, group="y"), work(3, group="x"))
    assert taken(waiting.turn(0.0, 64).slices) == [(1, 0, 1), (3, 0, 1)]
    assert taken(waiting.turn(0.0, 64).slices) == [(2, 0, 1)]
    waiting = scheduler(work(1), work(2), together=False)
    assert taken(waiting.turn(0.0, 64).slices) == [(1, 0, 1)]


def test_what_is_too_late_is_told_and_not_run() -> None:
    late, next_one = work(1, deadline=5.0), work(1, deadline=50.0)
    waiting = scheduler(late, next_one, work(2))
    turn = waiting.turn(5.0, 64)
    assert turn.late == [late]
    assert taken(turn.slices) == [(1, 0, 1), (2, 0, 1)]


def test_work_can_be_cancelled_before_and_between_its_pieces() -> None:
    begun, other, after = work(1, 100), work(2), work(1)
    waiting = scheduler(begun, other, after)
    waiting.turn(0.0, 64)
    assert waiting.cancel(1, lambda each: each is begun) == [begun]
    assert taken(waiting.turn(0.0, 64).slices) == [(1, 0, 1)]
    assert waiting.cancel(1) == []
    waiting.add(work(3))
    assert len(waiting.cancel(3)) == 1
    assert waiting.turn(0.0, 64).slices == []


def test_two_clients_get_as_much_however_many_sessions_either_has() -> None:
    waiting, given_ = Scheduler(), Counter[object]()
    for session in range(10):
        waiting.add(work(session, 10_000, client="many"))
    waiting.add(work(10, 10_000, client="one"))
    for _ in range(200):
        for piece in waiting.turn(0.0, 32).slices:
            given_[piece.work.client] += piece.tokens
    assert abs(given_["many"] - given_["one"]) <= 32


def test_a_client_that_was_away_does_not_hold_up_the_others_when_it_comes_back() -> None:
    waiting = scheduler(work(1, 10_000, client="here"))
    for _ in range(100):
        waiting.turn(0.0, 32)
    waiting.add(work(2, 10_000, client="back"))
    given_ = Counter[object](piece.work.client for _ in range(20) for piece in waiting.turn(0.0, 32).slices)
    assert abs(given_["here"] - given_["back"]) <= 2


TURN = 0.05  # seconds, of the simulated ones

streams = st.lists(
    st.tuples(
        st.integers(1, 8),  # rows
        st.sampled_from([1, 1, 1, 4, 40, 300]),  # positions of every step
        st.sampled_from("abc"),  # client
        st.integers(-1, 1),  # priority
        st.sampled_from("xy"),  # group
    ),
    min_size=1,
    max_size=12,
)


@given(streams, st.integers(1, 100))
def test_nothing_waits_longer_than_patience_and_a_turn_for_each_session(
    sessions: list[tuple[int, int, str, int, str]], budget: int
) -> None:
    """Every session always has a step waiting: the worst that can be asked of a scheduler."""
    waiting, now = Scheduler(), 0.0
    longest = dict.fromkeys(range(len(sessions)), 0.0)

    def come(session: int) -> None:
        rows, count, client, priority, group = sessions[session]
        waiting.add(Work(session, client, rows, count, now, priority=priority, group=group))

    for session in range(len(sessions)):
        come(session)
    last = dict.fromkeys(range(len(sessions)), 0.0)
    for _ in range(120):
        turn = waiting.turn(now, budget)
        assert turn.slices
        assert turn.tokens <= OVER * budget or len(turn.slices) == 1
        assert len({piece.work.session for piece in turn.slices}) == len(turn.slices)
        assert len({piece.work.group for piece in turn.slices}) == 1
        for piece in turn.slices:
            session = piece.work.session
            assert isinstance(session, int)
            longest[session] = max(longest[session], now - last[session])
            last[session] = now
        now += TURN
        for piece in turn.slices:
            if piece.is_last:
                assert isinstance(piece.work.session, int)
                last[piece.work.session] = now
                come(piece.work.session)
    for session, (_, _, _, priority, _) in enumerate(sessions):
        patience = PATIENCE if priority >= NORMAL else LOW_PATIENCE
        assert max(longest[session], now - last[session]) <= patience + (len(sessions) + 1) * TURN + 1e-9


@given(st.lists(st.tuples(st.integers(1, 300), st.integers(1, 4)), min_size=1, max_size=10), st.integers(1, 400))
def test_every_position_is_run_once_and_in_order(steps: list[tuple[int, int]], budget: int) -> None:
    waiting = Scheduler()
    for session, (count, rows) in enumerate(steps):
        waiting.add(work(session, count, rows=rows))
    run: dict[object, list[int]] = {}
    while len(waiting):
        for piece in waiting.turn(0.0, budget).slices:
            run.setdefault(piece.work.session, []).extend(range(piece.start, piece.end))
    assert run == {session: list(range(count)) for session, (count, _) in enumerate(steps)}


@pytest.mark.parametrize(
    ("fixed", "each"), [(0.0, 1e-3), (0.05, 1e-3), (0.06, 5e-4), (0.0, 1e-5), (0.0, 0.1), (0.2, 1e-6)]
)
def test_the_budget_is_what_a_turn_can_do_in_its_time(fixed: float, each: float) -> None:
    """However much of a turn is the same for any number of tokens; and pieces have a multiple of some length."""
    budget, least, most = Budget(0.1), *BUDGETS
    assert budget.tokens == FIRST_BUDGET
    for _ in range(60):
        tokens = budget.tokens - budget.tokens % PIECE
        budget.took(tokens, fixed + each * tokens)
    assert min(max((0.1 - fixed) / each, least), most) == pytest.approx(budget.tokens, abs=PIECE)


def test_short_turns_tell_nothing_of_the_budget_and_a_single_slow_one_little() -> None:
    budget = Budget(0.1)
    budget.took(1, 5.0)
    budget.took(FIRST_BUDGET // 2 - 1, 5.0)
    assert budget.tokens == FIRST_BUDGET
    budget.took(FIRST_BUDGET, 5.0)
    assert budget.tokens == FIRST_BUDGET // 2
    budget.took(FIRST_BUDGET // 2, 0.025)
    assert budget.tokens == FIRST_BUDGET


def test_clients_that_are_done_are_forgotten_where_it_is_never_quiet() -> None:
    waiting = scheduler(work(0, 1000, client="always there"))
    for number in range(1, 500):
        waiting.add(work(number, client=f"client {number}"))
        waiting.turn(0.0, 2)
    assert len(waiting._given) <= FORGET * 2 + 2
    assert "always there" in waiting._given
