"""How many tokens to draft for a trip along the chain: from what trips cost and what drafts were worth. Pure.

A trip verifies a draft and brings one token more than it accepts. Leviathan et al. 2023, "Fast Inference from
Transformers via Speculative Decoding": what counts is the expected number of tokens over the time of a trip, where a
token is only of use if all before it are. Here neither the acceptance nor the costs are given: both are measured.
"""

from __future__ import annotations

import statistics
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass

from swarm.errors import UsageError
from swarm.speculation.odds import Odds

AUTO, OFF, LOOKUP, DRAFT = "auto", "off", "lookup", "draft"

MOST = 32  # tokens of a draft

_RECENT = 9  # trips of a size
_STALE = 256  # trips after which a size that was not tried again is as new
_OUTLIER = 4.0  # times what was expected: no more is believed of a single trip
_PER_POSITION = 0.03  # of a trip's time, for each further position, before it was measured
_MUCH = 8.0  # times a draft's own cost: what a trip has to cost before drafting is thought of

_PRIOR = 0.6  # how often a draft model is right, before it was seen
_PRIOR_WEIGHT = 4.0  # tokens that this is worth
_MEMORY = 0.97  # how much of what was seen is left after each further token


@dataclass(frozen=True, slots=True)
class Speculate:
    """Whether to draft, and with what.

    Attributes:
        mode: `auto` looks drafts up in the text and sends what is worth it; `lookup` sends some whenever there are
            any; `draft` asks a small model; `off` does not draft.
        name: of the small model.
    """

    mode: str = OFF
    name: str = ""

    @classmethod
    def parse(cls, text: str) -> Speculate:
        """ "auto", "off", "lookup" or "draft:NAME". Raises `UsageError`."""
        mode, _, name = text.partition(":")
        if (mode == DRAFT) != bool(name) or mode not in (AUTO, OFF, LOOKUP, DRAFT):
            raise UsageError(f"speculate: {text!r} is none of {AUTO}, {OFF}, {LOOKUP} and {DRAFT}:NAME")
        return cls(mode, name)


class Trips:
    """How long trips of one session take, by how many positions they carry."""

    def __init__(self) -> None:
        self._taken: dict[int, deque[tuple[int, float]]] = {}  # positions and seconds, by the size's power of two
        self._last: dict[int, int] = {}
        self._points: list[tuple[float, float]] = []  # the same summed up: one for each power of two
        self.count = 0

    def took(self, positions: int, seconds: float) -> None:
        """A trip is over. One that met a failure tells little of the next."""
        size = positions.bit_length()
        if (expected := self.expected(positions)) is not None:
            seconds = min(seconds, _OUTLIER * expected)
        self._taken.setdefault(size, deque(maxlen=_RECENT)).append((positions, seconds))
        self.count += 1
        self._last[size] = self.count
        for old in [old for old, last in self._last.items() if self.count - last > _STALE]:
            del self._taken[old], self._last[old]
        self._points = [
            (statistics.fmean(positions for positions, _ in taken), statistics.median(seconds for _, seconds in taken))
            for _, taken in sorted(self._taken.items())
        ]

    def expected(self, positions: int) -> float | None:
        """Seconds that a trip will take, None while nothing was measured.

        Between two sizes that were measured it is in proportion, and beyond them not far from the nearest.
        """
        smaller = [point for point in self._points if point[0] <= positions]
        larger = self._points[len(smaller) :]
        if smaller and larger:
            (fewer, seconds), (more, longer) = smaller[-1], larger[0]
            return seconds + max(0.0, longer - seconds) * (positions - fewer) / (more - fewer)
        if not self._points:
            return None
        nearest, seconds = (smaller[-1:] or larger)[0]
        return seconds * _growth(positions) / _growth(nearest)


def _growth(positions: float) -> float:
    """What a trip takes over one of a single position, as long as nothing tells."""
    return 1.0 + _PER_POSITION * (positions - 1)


class Acceptance:
    """How often a token that a draft model drafted was right, given that those before it were."""

    def __init__(self) -> None:
        self._right = _PRIOR_WEIGHT * _PRIOR
        self._seen = _PRIOR_WEIGHT

    def saw(self, right: bool) -> None:
        """One more drafted token was compared with the one that came."""
        self._right = _MEMORY * self._right + right
        self._seen = _MEMORY * self._seen + 1.0

    @property
    def chance(self) -> float:
        """That of the next one."""
        return self._right / self._seen


@dataclass(slots=True)
class Counts:
    """What came of speculation so far."""

    trips: int = 0  # after the first, which reads the prompt
    tokens: int = 0  # that they brought
    drafted: int = 0  # tokens that were sent along
    accepted: int = 0  # of those

    def since(self, before: Counts) -> Counts:
        """What has come since."""
        return Counts(
            self.trips - before.trips,
            self.tokens - before.tokens,
            self.drafted - before.drafted,
            self.accepted - before.accepted,
        )


class Tuner:
    """Chooses how much of a draft to send. One for each session.

    Attributes:
        odds: what is known of tokens that are looked up.
        acceptance: of those of a draft model.
        counts: what came of it.
    """

    def __init__(self) -> None:
        self.trips = Trips()
        self.odds = Odds()
        self.acceptance = Acceptance()
        self.counts = Counts()
        self._draft_seconds = 0.0  # for one drafted token

    def depth(self, chances: Sequence[float], least: int = 0) -> int:
        """How many tokens of a draft are worth sending; where some are there, `least` in any case.

        The number for which the expected tokens per second are most. Each has its chance of being right, given that
        those before it are.
        """
        single = self.trips.expected(1)
        least = min(least, len(chances))
        if single is not None and single < _MUCH * self._draft_seconds and not least:
            return 0
        drafting = self._draft_seconds if single is not None else 0.0  # else a trip's is the unit
        best, best_rate = 0, 1.0 / (single or 1.0) if not least else 0.0
        expected_tokens, whole = 1.0, 1.0
        for number, chance in enumerate(chances, 1):
            whole *= chance
            expected_tokens += whole
            seconds = (self.trips.expected(1 + number) or _growth(1 + number)) + number * drafting
            if number >= least and expected_tokens / seconds > best_rate:
                best, best_rate = number, expected_tokens / seconds
        return best

    def drafted(self, tokens: int, seconds: float) -> None:
        """Drafting so many tokens took so long."""
        if tokens:
            each = seconds / tokens
            self._draft_seconds = 0.8 * self._draft_seconds + 0.2 * each if self._draft_seconds else each

    def brought(self, sent: int, tokens: Sequence[int], seconds: float | None) -> None:
        """A trip with `sent` drafted tokens brought these; `seconds` is None for the one that read the prompt."""
        accepted = len(tokens) - 1
        if seconds is not None:
            self.trips.took(1 + sent, seconds)
            self.counts.trips += 1
            self.counts.tokens += len(tokens)
        self.counts.drafted += sent
        self.counts.accepted += min(accepted, sent)

    def compare(self, drafted: Sequence[int], tokens: Sequence[int]) -> None:
        """Learn from what a draft model drafted, and from what came in its place."""
        for guess, token in zip(drafted, tokens, strict=False):
            self.acceptance.saw(guess == token)
            if guess != token:
                return
