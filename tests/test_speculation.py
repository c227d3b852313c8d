"""What to draft, and how much of it: the pure parts."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from swarm.errors import UsageError
from swarm.speculation.lookup import LONGEST, Lookup
from swarm.speculation.tuning import MODEL, MOST, Counts, Speculate, Trips, Tuner

TEXTS = st.lists(st.integers(0, 3), max_size=40)


def looked_up(tokens: list[int]) -> Lookup:
    lookup = Lookup()
    lookup.extend(tokens)
    return lookup


def naively(tokens: list[int], most: int) -> tuple[list[int], int]:
    """The longest run at the end that stood earlier, its latest place, and what followed, over and over."""
    for length in range(min(LONGEST, len(tokens)), 0, -1):
        for start in range(len(tokens) - length - 1, -1, -1):
            if tokens[start : start + length] == tokens[-length:]:
                whole = list(tokens)
                for place in range(most):
                    whole.append(whole[start + length + place])
                return whole[len(tokens) :], length
    return [], 0


@given(TEXTS, st.integers(1, 12))
def test_a_draft_is_what_followed_the_longest_run_that_ends_the_text(tokens: list[int], most: int) -> None:
    assert looked_up(tokens).draft(most) == naively(tokens, most)


@given(TEXTS, st.integers(0, 40))
def test_a_text_may_come_in_parts(tokens: list[int], cut: int) -> None:
    lookup = looked_up(tokens[:cut])
    lookup.extend(tokens[cut:])
    assert len(lookup) == len(tokens)
    assert lookup.draft(5) == looked_up(tokens).draft(5)


def test_a_text_that_goes_in_circles_is_drafted_in_circles() -> None:
    assert looked_up([1, 2, 3, 1, 2, 3, 1]).draft(7) == ([2, 3, 1, 2, 3, 1, 2], 4)


def test_nothing_is_drafted_for_what_was_never_there() -> None:
    assert looked_up([]).draft(4) == looked_up([1, 2, 3]).draft(4) == ([], 0)


# --- what trips take --------------------------------------------------------------------------------------------------


def test_larger_trips_are_guessed_from_smaller_ones_and_bound_them() -> None:
    trips = Trips()
    assert trips.expected(1) is None
    trips.took(1, 0.1)
    assert trips.expected(1) == pytest.approx(0.1)
    assert 0.1 < (trips.expected(5) or 0) < 0.12
    only_large = Trips()
    only_large.took(9, 0.2)
    assert only_large.expected(1) == only_large.expected(9) == pytest.approx(0.2)


def test_one_trip_that_met_a_failure_is_not_believed() -> None:
    trips = Trips()
    for _ in range(2):
        trips.took(1, 0.1)
    trips.took(4, 30.0)
    assert (trips.expected(4) or 0) < 0.5
    trips.took(1, 30.0)
    assert trips.expected(1) == pytest.approx(0.1)


def test_what_was_measured_long_ago_is_forgotten() -> None:
    trips = Trips()
    trips.took(1, 0.1)
    trips.took(8, 0.4)
    for _ in range(300):
        trips.took(1, 0.1)
    assert (trips.expected(8) or 0) < 0.15


# --- how much to draft ------------------------------------------------------------------------------------------------


def tuner_that_saw(right: bool, kind: int, single: float, larger: float | None = None) -> Tuner:
    tuner = Tuner()
    tuner.brought(0, [1], None)  # the prompt
    tuner.brought(0, [1], single)
    if larger is not None:
        for sent in (1, 3, 7, 15, 31):
            tuner.trips.took(1 + sent, larger)
    for _ in range(100):
        tuner.compare([kind], [1], [1 if right else 2])
    return tuner


def test_where_drafts_are_right_long_ones_are_sent() -> None:
    assert tuner_that_saw(True, 6, 0.1).depth([6] * MOST) > 16


def test_where_drafts_are_wrong_none_is_sent_unless_one_must() -> None:
    tuner = tuner_that_saw(False, 1, 0.1)
    assert tuner.depth([1] * MOST) == 0
    assert tuner.depth([1] * MOST, least=1) == 1
    assert tuner.depth([], least=1) == 0


def test_where_more_positions_cost_as_much_as_they_bring_none_is_sent() -> None:
    assert tuner_that_saw(True, 3, 0.1, larger=4.0).depth([3] * 4) == 0
    assert tuner_that_saw(True, 3, 0.1, larger=0.11).depth([3] * 4) == 4


def test_a_trip_that_costs_hardly_more_than_a_draft_is_not_worth_one() -> None:
    tuner = tuner_that_saw(True, 6, 0.001)
    tuner.drafted(1, 0.001)
    assert tuner.depth([6] * 8) == 0
    assert tuner_that_saw(True, 6, 0.1).depth([6] * 8) == 8


def test_a_slow_draft_model_is_asked_for_less() -> None:
    quick, slow = tuner_that_saw(True, MODEL, 0.1), tuner_that_saw(True, MODEL, 0.1)
    for tuner, seconds in ((quick, 0.001), (slow, 0.09)):
        tuner.drafted(1, seconds)
        for _ in range(20):
            tuner.compare([MODEL] * 2, [1, 1], [1, 2])
    assert slow.depth([MODEL] * MOST, least=1) < quick.depth([MODEL] * MOST, least=1)


def test_a_draft_that_was_not_sent_teaches_as_well() -> None:
    tuner = tuner_that_saw(False, 2, 0.1)
    assert tuner.depth([2, 3, 4]) == 0
    for _ in range(60):
        tuner.compare([2, 3, 4], [7, 8, 9], [7])  # one token came, and it was the draft's first
    assert tuner.depth([2, 3, 4]) > 0


def test_counts_are_of_what_trips_brought() -> None:
    tuner = Tuner()
    tuner.brought(2, [1, 2, 3], None)
    tuner.brought(4, [1, 2], 0.1)
    tuner.brought(0, [5], 0.1)
    assert tuner.counts == Counts(trips=2, tokens=3, drafted=6, accepted=3)
    assert tuner.counts.since(Counts(1, 2, 2, 2)) == Counts(1, 1, 4, 1)


@pytest.mark.parametrize("text", ["", "on", "draft", "draft:", "lookup:5", "AUTO"])
def test_what_is_no_way_to_speculate_is_refused(text: str) -> None:
    with pytest.raises(UsageError, match="auto, off, lookup and draft:NAME"):
        Speculate.parse(text)


def test_ways_to_speculate() -> None:
    assert Speculate.parse("auto") == Speculate("auto")
    assert Speculate.parse("draft:org/model") == Speculate("draft", "org/model")
