"""What to draft, and how much of it: the pure parts."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from swarm.errors import UsageError
from swarm.speculation.drafting import LookupDrafter
from swarm.speculation.lookup import LONGEST, LONGEST_SAID, Candidate, Lookup
from swarm.speculation.odds import AHEAD, Guess, Odds
from swarm.speculation.tuning import MOST, Counts, Speculate, Trips, Tuner

TEXTS = st.lists(st.integers(0, 3), max_size=40)


def looked_up(tokens: list[int]) -> Lookup:
    lookup = Lookup()
    lookup.extend(tokens)
    return lookup


def common(one: list[int], other: list[int], most: int) -> int:
    """How many tokens they end with in common."""
    pairs = zip(reversed(one[-most:]), reversed(other[-most:]), strict=False)
    return sum(1 for _ in itertools.takewhile(lambda pair: pair[0] == pair[1], pairs))


def naively(tokens: list[int], drafted: list[int]) -> set[Candidate]:
    """All that followed the last token: the longest run before it, and how often."""
    latest, found = tokens + drafted, {}
    for place in range(1, len(tokens)):
        if run := common(tokens[:place], latest, LONGEST):
            found.setdefault(tokens[place], []).append(run)
    return {Candidate(token, max(runs), len(runs)) for token, runs in found.items()}


# --- what may come next -----------------------------------------------------------------------------------------------


@given(TEXTS, st.lists(st.integers(0, 3), max_size=12))
def test_candidates_are_what_followed_the_last_token(tokens: list[int], drafted: list[int]) -> None:
    candidates = looked_up(tokens).candidates(drafted)
    assert len(candidates) == len(set(candidates))
    assert set(candidates) == naively(tokens, drafted)


@given(TEXTS, st.integers(0, 40))
def test_a_text_may_come_in_parts(tokens: list[int], cut: int) -> None:
    lookup = looked_up(tokens[:cut])
    lookup.extend(tokens[cut:])
    assert len(lookup) == len(tokens)
    assert lookup.candidates() == looked_up(tokens).candidates()


def test_of_a_token_that_stands_everywhere_only_the_latest_places_are_looked_at() -> None:
    assert looked_up([0, 1, *[0, 2] * 100, 0]).candidates()[0].token == 2
    assert [each.token for each in looked_up([0, 1, *[0, 2] * 100, 0]).candidates()] == [2]


def test_nothing_is_found_for_what_was_never_there() -> None:
    assert looked_up([]).candidates() == looked_up([1, 2, 3]).candidates() == looked_up([1, 1, 2]).candidates([5]) == []


@given(
    TEXTS.filter(bool),
    st.lists(st.tuples(st.lists(st.integers(0, 3), min_size=1, max_size=5), st.integers(4, 6)), max_size=4),
)
def test_what_the_model_said_where_a_draft_went_astray_is_a_candidate(
    tokens: list[int], sayings: list[tuple[list[int], int]]
) -> None:
    lookup = looked_up(tokens)
    for drafted, token in sayings:
        lookup.said(drafted, token)
    runs = [common(tokens + drafted, tokens, LONGEST_SAID) for drafted, _ in sayings]
    said = {each for each in lookup.candidates() if each.said}
    if any(runs):
        latest = max(place for place, run in enumerate(runs) if run == max(runs))
        assert said == {Candidate(sayings[latest][1], 0, 0, max(runs))}
    else:
        assert not said
    assert {each for each in lookup.candidates() if not each.said} == naively(tokens, [])


def test_what_was_said_and_stood_there_too_is_one_candidate() -> None:
    lookup = looked_up([1, 2, 3, 1, 2])
    lookup.said([4, 2], 3)
    lookup.said([1, 2], 3)
    assert lookup.candidates() == [Candidate(3, run=2, times=1, said=2)]


# --- how likely it is -------------------------------------------------------------------------------------------------

CANDIDATES = st.lists(
    st.builds(Candidate, st.integers(0, 9), st.integers(0, LONGEST), st.integers(0, 99), st.integers(0, LONGEST_SAID)),
    min_size=1,
    max_size=6,
    unique_by=lambda each: each.token,
)


@given(CANDIDATES, st.data(), st.integers(0, MOST))
def test_chances_leave_room_for_none_of_them(candidates: list[Candidate], data: st.DataObject, ahead: int) -> None:
    likes = st.lists(st.floats(-1e3, 20.0), min_size=len(candidates), max_size=len(candidates))
    guess = Odds().guess(candidates, data.draw(st.one_of(st.just([]), likes)), ahead)
    assert all(chance > 0.0 for chance in guess.chances)
    assert sum(guess.chances) < 1.0
    assert (guess.chance, guess.token) in zip(guess.chances, [each.token for each in candidates], strict=True)
    assert guess.chance == max(guess.chances)


def chance(*candidates: Candidate, liked: tuple[float, ...] = (), ahead: int = 0) -> float:
    """That of the first."""
    return Odds().guess(candidates, liked, ahead).chances[0]


def test_more_that_speaks_for_a_token_makes_it_likelier() -> None:
    runs = [chance(Candidate(1, run, 1)) for run in range(1, LONGEST + 1)]
    said = [chance(Candidate(1, 1, 1, length)) for length in range(LONGEST_SAID + 1)]
    liked = [chance(Candidate(1, 1, 1), liked=(likes,)) for likes in (-10.0, -6.0, -1.0)]
    for rising in (runs, said, liked, [chance(Candidate(1, 1, times)) for times in (1, 2, 9)]):
        assert rising == sorted(set(rising))
    assert chance(Candidate(1, 3, 1), Candidate(2, 3, 1)) < chance(Candidate(1, 3, 1), Candidate(2, 1, 1))


def test_what_the_model_thought_counts_for_less_the_further_ahead_and_then_for_nothing() -> None:
    liked = [chance(Candidate(1, 1, 1), liked=(0.0,), ahead=ahead) for ahead in range(AHEAD + 1)]
    assert liked == sorted(set(liked), reverse=True)
    assert liked[-1] == chance(Candidate(1, 1, 1))


@given(CANDIDATES)
def test_odds_go_to_where_what_comes_is(candidates: list[Candidate]) -> None:
    odds, right = Odds(), candidates[0].token
    before = odds.guess(candidates)
    odds.saw(before, right)
    after = odds.guess(candidates)
    assert math.log(after.chances[0]) > math.log(before.chances[0])
    odds.saw(after, -1)  # none of them
    assert sum(odds.guess(candidates).chances) < sum(after.chances)


def test_a_guess_is_the_likeliest() -> None:
    assert Guess([Candidate(5, 1, 1), Candidate(7, 2, 1)], [0.2, 0.5]).token == 7


# --- drafts that are looked up ----------------------------------------------------------------------------------------


def drafted(drafter: LookupDrafter, *tokens: int) -> list[int]:
    return drafter.draft(torch.tensor([tokens]), MOST)


def scores(*rows: dict[int, float]) -> torch.Tensor:
    """[1, N, 10], zero where they are not given."""
    return torch.tensor([[[row.get(token, 0.0) for token in range(10)] for row in rows]])


def test_a_text_that_goes_in_circles_is_drafted_in_circles() -> None:
    text = [1, 2, 3, 4, 5, 6, 7] * 4
    assert drafted(LookupDrafter(Tuner(), 1), *text)[:16] == (text * 2)[:16]


def test_no_more_is_drafted_than_there_is_room_for() -> None:
    assert LookupDrafter(Tuner(), 1).draft(torch.tensor([[1, 2] * 20]), 3) == [1, 2, 1]
    assert LookupDrafter(Tuner(), 1).draft(torch.tensor([[1, 2] * 20]), 0) == []
    assert LookupDrafter(Tuner(), 1).draft(torch.tensor([[1, 2]]), 9) == []


def test_what_the_model_would_have_said_after_a_wrong_token_is_drafted_after_it_later() -> None:
    drafter = LookupDrafter(Tuner(), 1)
    text = [1, 2, 3, 4, 5, 1, 2, 3]
    assert drafted(drafter, *text)[:2] == [4, 5]
    wrong = scores({8: 9.0}, {9: 9.0}, {6: 9.0})  # 8 in place of 4; after a 4 it would have been 9, then 6
    for token in (8, 7, 4):
        text.append(token)
        sent, came = (2, wrong) if token == 8 else (0, scores({token: 9.0}))
        drafter.learn(sent, [token], came, torch.tensor([text]))
        assert drafted(drafter, *text)[:1] == ([9] if token == 4 else [])


def test_of_two_tokens_that_stood_there_the_one_that_the_model_thought_of_before_is_drafted() -> None:
    text = [1, 2, 5, 1, 3, 5, 4, 1]
    for likely, unlikely in ((2, 3), (3, 2)):
        drafter = LookupDrafter(Tuner(), 1)
        drafted(drafter, *text[:-1])
        drafter.learn(0, [1], scores({1: 9.0, likely: 5.0, unlikely: -5.0}), torch.tensor([text]))
        assert drafted(drafter, *text)[0] == likely


# --- what trips take --------------------------------------------------------------------------------------------------


def test_larger_trips_are_guessed_from_smaller_ones_and_bound_them() -> None:
    trips = Trips()
    assert trips.expected(1) is None
    trips.took(1, 0.1)
    assert trips.expected(1) == pytest.approx(0.1)
    assert 0.1 < (trips.expected(5) or 0) < 0.12
    only_large = Trips()
    only_large.took(9, 0.2)
    assert only_large.expected(9) == pytest.approx(0.2)
    assert 0.1 < (only_large.expected(1) or 0) < 0.2


def test_between_sizes_that_were_measured_time_is_in_proportion() -> None:
    trips = Trips()
    trips.took(1, 0.1)
    trips.took(9, 0.2)
    assert [trips.expected(size) for size in (1, 3, 5, 9)] == pytest.approx([0.1, 0.125, 0.15, 0.2])
    assert (trips.expected(17) or 0) > 0.2


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


def tuner_with(single: float, larger: float | None = None) -> Tuner:
    tuner = Tuner()
    tuner.brought(0, [1], None)  # the prompt
    tuner.brought(0, [1], single)
    if larger is not None:
        for sent in (1, 3, 7, 15, 31):
            tuner.trips.took(1 + sent, larger)
    return tuner


def test_where_drafts_are_right_long_ones_are_sent() -> None:
    assert tuner_with(0.1).depth([0.97] * MOST) > 16


def test_where_drafts_are_wrong_none_is_sent_unless_one_must() -> None:
    tuner = tuner_with(0.1)
    assert tuner.depth([0.01] * MOST) == 0
    assert tuner.depth([0.01] * MOST, least=1) == 1
    assert tuner.depth([], least=1) == 0


def test_a_draft_ends_where_it_becomes_doubtful() -> None:
    assert tuner_with(0.1).depth([0.9, 0.9, 0.01, 0.9]) == 2


def test_before_anything_was_measured_likely_drafts_are_sent() -> None:
    assert Tuner().depth([0.9] * 4) == 4
    assert Tuner().depth([0.01] * 4) == 0
    assert Tuner().depth([0.01] * 4, least=1) == 1


@given(st.lists(st.floats(0.0, 1.0), max_size=MOST), st.floats(1e-3, 1.0), st.floats(1.0, 9.0))
def test_what_is_sent_brings_most_tokens_a_second(chances: list[float], single: float, larger: float) -> None:
    tuner = tuner_with(single, single * larger)

    def rate(sent: int) -> float:
        tokens = sum(math.prod(chances[:length]) for length in range(sent + 1))
        return tokens / (tuner.trips.expected(1 + sent) or math.nan)

    assert rate(tuner.depth(chances)) == pytest.approx(max(rate(sent) for sent in range(len(chances) + 1)))


def test_where_more_positions_cost_as_much_as_they_bring_none_is_sent() -> None:
    assert tuner_with(0.1, larger=4.0).depth([0.95] * 4) == 0
    assert tuner_with(0.1, larger=0.11).depth([0.95] * 4) == 4


def test_a_trip_that_costs_hardly_more_than_a_draft_is_not_worth_one() -> None:
    tuner = tuner_with(0.001)
    tuner.drafted(1, 0.001)
    assert tuner.depth([0.95] * 8) == 0
    assert tuner_with(0.1).depth([0.95] * 8) == 8


def test_a_slow_draft_model_is_asked_for_less() -> None:
    quick, slow = tuner_with(0.1), tuner_with(0.1)
    quick.drafted(1, 0.001)
    slow.drafted(1, 0.09)
    assert slow.depth([0.7] * MOST, least=1) < quick.depth([0.7] * MOST, least=1)


def test_a_draft_model_is_believed_as_it_was_right() -> None:
    tuner = Tuner()
    before = tuner.acceptance.chance
    tuner.compare([1, 1, 1], [1, 1, 2])
    better = tuner.acceptance.chance
    for _ in range(200):
        tuner.compare([1, 1, 1], [2, 1, 1])  # what comes after the first wrong one tells nothing
    assert tuner.acceptance.chance < 0.1 < before < better + 0.1


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
