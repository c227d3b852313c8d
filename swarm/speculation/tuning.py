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

AUTO, OFF, LOOKUP, DRAFT = "auto", "off", "lookup", "draft"

MOST = 32  # tokens of a draft
MODEL = 0  # the kind of a token that a draft model has drafted; else: how many tokens spoke for it

_RECENT = 9  # trips of a size
_STALE = 256  # trips after which a size that was not tried again is as new
_OUTLIER = 4.0  # times what was expected: no more is believed of a single trip
_PER_POSITION = 0.03  # of a trip's time, for each further position, before it was measured
_MUCH = 8.0  # times a draft's own cost: what a trip has to cost before drafting is thought of

# Acceptance by kind, before it was seen: between that of answers that repeat their question (SmolLM2-135M-Instruct,
# four passages of Python's help summarised, four functions of its library edited) and that of four free ones.
_PRIOR = (0.6, 0.12, 0.45, 0.5, 0.6, 0.65, 0.8, 0.85, 0.9, 0.92, 0.95)
_PRIOR_WEIGHT = 4.0  # tokens that this is worth
_MEMORY = 0.97  # how much of what was seen is left after each further token of that kind


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
        self._taken: dict[int, deque[float]] = {}  # seconds, by the size's power of two
        self._last: dict[int, int] = {}
        self.count = 0

    def took(self, positions: int, seconds: float) -> None:
        """A trip is over. One that met a failure tells little of the next."""
        size = positions.bit_length()
        if (expected := self.expected(positions)) is not None:
            seconds = min(seconds, _OUTLIER * expected)
        self._taken.setdefault(size, deque(maxlen=_RECENT)).append(seconds)
        self.count += 1
        self._last[size] = self.count
        for old in [old for old, last in self._last.items() if self.count - last > _STALE]:
            del self._taken[old], self._last[old]

    def expected(self, positions: int) -> float | None:
        """Seconds that a trip will take, None while nothing was measured.

        What a larger one took is an upper bound; from a smaller one it is not far.
        """
        size = positions.bit_length()
        smaller = [known for known in self._taken if known <= size]
        if not smaller:
            return statistics.median(self._taken[min(self._taken)]) if self._taken else None
        nearest = max(smaller)
        further = 0 if nearest == size else positions - (1 << (nearest - 1))
        return statistics.median(self._taken[nearest]) * (1.0 + _PER_POSITION * further)


class Acceptance:
    """How often a drafted token was right, given that those before it were, by its kind."""

    def __init__(self) -> None:
        self._right = [_PRIOR_WEIGHT * prior for prior in _PRIOR]
        self._seen = [_PRIOR_WEIGHT] * len(_PRIOR)

    def saw(self, kind: int, right: bool) -> None:
        """One more drafted token was compared with the one that came."""
        kind = min(kind, len(_PRIOR) - 1)
        self._right[kind] = _MEMORY * self._right[kind] + right
        self._seen[kind] = _MEMORY * self._seen[kind] + 1.0

    def of(self, kind: int) -> float:
        """The chance of the next one."""
        kind = min(kind, len(_PRIOR) - 1)
        return self._right[kind] / self._seen[kind]


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
        counts: what came of it.
    """

    def __init__(self) -> None:
        self.trips = Trips()
        self.acceptance = Acceptance()
        self.counts = Counts()
        self._draft_seconds = 0.0  # for one drafted token

    def depth(self, kinds: Sequence[int], least: int = 0) -> int:
        """How many of the tokens of these kinds are worth sending; where some are there, `least` in any case.

        The number for which the expected tokens per second are most.
        """
        single = self.trips.expected(1)
        least = min(least, len(kinds))
        if single is None:  # nothing is known yet: be modest
            return max(least, min(len(kinds), 1))
        if single < _MUCH * self._draft_seconds and not least:
            return 0
        best, best_rate = 0, 1.0 / single if not least else 0.0
        expected_tokens, chance = 1.0, 1.0
        for number, kind in enumerate(kinds, 1):
            chance *= self.acceptance.of(kind)
            expected_tokens += chance
            seconds = (self.trips.expected(1 + number) or single) + number * self._draft_seconds
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

    def compare(self, kinds: Sequence[int], drafted: Sequence[int], tokens: Sequence[int]) -> None:
        """Learn from a draft, sent or not, and from what came in its place."""
        for kind, guess, token in zip(kinds, drafted, tokens, strict=False):
            self.acceptance.saw(kind, guess == token)
            if guess != token:
                return
