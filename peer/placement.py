"""Which span a peer should host, and when to move. Pure: the time and chance come from the caller.

A block is as strong as the tokens per second of all its hosts together, and a model as its weakest block. What a
peer is worth on a span is how much it relieves the blocks there: the sum over the blocks of
`1 / strength**2 - 1 / (strength + mine)**2`, which weighs the weak ones most. A block without any host comes before
everything else. (Petals, Borzunov et al. 2023, section 3.2, looks for the weakest window too, and moves whenever the
weakest block would gain; what is different here is that nobody ever uncovers a block, and that chance, a minimum
stay and a margin keep peers from running after each other.)
"""

from __future__ import annotations

import random
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from itertools import accumulate

from swarm.directory.reading import Part
from swarm.directory.sampling import lot
from swarm.types import Offer, PeerId, Span, State

EQUAL = 0.05  # spans whose worth differs by less are equally good to a newcomer
_LEAST_SPEED = 1e-3  # tokens per second that any host is taken to have
_COVERED = 1e-9  # below, a strength is what adding and taking away leaves of zero

_Rank = tuple[bool, int, PeerId]  # whose turn it is to stay: first who was told to, then by lot


@dataclass(frozen=True, slots=True)
class Policy:
    """How readily a peer moves. Times are in seconds."""

    look: float = 600.0  # between two looks, on average
    min_stay: float = 3600.0  # on a span, before it is left for one that is worth more
    urgent_stay: float = 120.0  # on a span, before it is left for blocks that nobody hosts
    margin: float = 0.5  # how much more another span must be worth, as a fraction
    chance: float = 0.2  # of moving, for a peer that should: many see the same weak span
    keepers: int = 2  # hosts of each block that never leave it for a better place
    urgent_keepers: int = 1  # nor for blocks that nobody hosts


@dataclass(frozen=True, slots=True)
class Survey:
    """What placement needs to know of the hosts of a model, read at one moment.

    Attributes:
        strength: tokens per second of each block's hosts, those still joining included, those leaving not.
        keepers: for each block the online hosts that may be asked to stay: those that stay anyway, then by lot.
        spans: by peer, as far as they were read.
        added: by peer, what it added to the strength: spans and tokens per second.
    """

    strength: tuple[float, ...]
    keepers: tuple[tuple[PeerId, ...], ...]
    spans: dict[PeerId, Span]
    added: dict[PeerId, tuple[tuple[Span, float], ...]]

    @property
    def has_hole(self) -> bool:
        """Whether some block has nobody, nor anybody who is about to come."""
        return min(self.strength) <= _COVERED

    def without(self, peer: PeerId) -> Survey:
        """What there would be if that peer were not there. Of the keepers it may still be one."""
        strength = list(self.strength)
        for span, speed in self.added.get(peer, ()):
            for block in span:
                strength[block] = max(0.0, strength[block] - speed)
        left = tuple(value if value > _COVERED else 0.0 for value in strength)
        spans = {other: span for other, span in self.spans.items() if other != peer}
        return replace(self, strength=left, spans=spans)

    def is_needed(self, peer: PeerId, span: Span) -> bool:
        """Whether some block of `span` has nobody online but that peer."""
        return any(set(self.keepers[block]) <= {peer} for block in span)


@dataclass(frozen=True, slots=True)
class Move:
    """Drain, then host `span`."""

    span: Span
    reason: str


@dataclass(frozen=True, slots=True)
class Stay:
    """Nothing is to be done."""

    reason: str


def survey(offers: Iterable[Offer], num_blocks: int, keepers: int = 2) -> Survey:
    """Count what is there, where all offers are known."""
    known = tuple(offers)
    return survey_parts([Part(Span(0, num_blocks), known, known)], keepers)


def survey_parts(parts: Sequence[Part], keepers: int = 2) -> Survey:
    """Count what is there in all the parts of a model, one after another. O(offers x blocks of a span).

    Where offers were drawn, each stands for several. A block that none of them hosts has the hosts that are certain.
    """
    counts = [_count(part, keepers) for part in parts]
    added: dict[PeerId, tuple[tuple[Span, float], ...]] = {}
    for count in counts:
        for peer, one in count.added.items():
            added[peer] = (*added.get(peer, ()), one)
    spans = {offer.peer: offer.span for part in parts for offer in (*part.certain, *part.drawn) if _counts(offer)}
    strength = (value for count in counts for value in count.strength)
    staying = (tuple(peer for *_, peer in row) for count in counts for row in count.staying)
    return Survey(tuple(strength), tuple(staying), spans, added)


@dataclass(frozen=True, slots=True)
class _Count:
    """One part of a model: `strength` and `staying` of each of its blocks, and what each peer added."""

    strength: list[float]
    staying: list[list[_Rank]]
    added: dict[PeerId, tuple[Span, float]]


def _count(part: Part, keepers: int) -> _Count:
    staying: list[list[_Rank]] = [[] for _ in part.blocks]
    for offer in {offer.peer: offer for offer in (*part.drawn, *part.certain)}.values():
        if offer.state is State.ONLINE:
            _add_keeper(staying, part.blocks, offer, keepers)
    strength, added = _strength(part.drawn, part.blocks, part.weight)
    certain, certainly = _strength(part.certain, part.blocks, 1.0)
    for index, value in enumerate(certain):
        if strength[index] <= _COVERED < value:  # whose hosts were not drawn
            strength[index] = value
    return _Count(strength, staying, {**certainly, **added} if part.weight == 1.0 else added)


def _strength(
    offers: Iterable[Offer], blocks: Span, weight: float
) -> tuple[list[float], dict[PeerId, tuple[Span, float]]]:
    """What each of `blocks` has of `offers`, and what each peer adds to that."""
    added = {}
    for offer in offers:
        start, end = max(offer.span.start, blocks.start), min(offer.span.end, blocks.end)
        if start < end and _counts(offer):
            added[offer.peer] = Span(start, end), weight * max(offer.tokens_per_second, _LEAST_SPEED)
    changes = [0.0] * (len(blocks) + 1)
    for span, speed in added.values():
        changes[span.start - blocks.start] += speed
        changes[span.end - blocks.start] -= speed
    hosted = _hosted((span for span, _ in added.values()), blocks)
    totals = accumulate(changes[:-1])
    return [total if count else 0.0 for total, count in zip(totals, hosted, strict=True)], added


def _counts(offer: Offer) -> bool:
    return offer.state is not State.DRAINING


def _add_keeper(staying: list[list[_Rank]], blocks: Span, offer: Offer, keepers: int) -> None:
    rank = (not offer.fixed, lot(offer.peer), offer.peer)
    for block in range(max(offer.span.start, blocks.start), min(offer.span.end, blocks.end)):
        row = staying[block - blocks.start]
        if len(row) < keepers or rank < row[-1]:
            row.append(rank)
            row.sort()
            del row[keepers:]


def _hosted(spans: Iterable[Span], blocks: Span) -> list[int]:
    changes = [0] * (len(blocks) + 1)
    for span in spans:
        changes[span.start - blocks.start] += 1
        changes[span.end - blocks.start] -= 1
    return list(accumulate(changes[:-1]))


# --- a newcomer -------------------------------------------------------------------------------------------------------


def choose_span(
    offers: Iterable[Offer],
    num_blocks: int,
    count: int,
    *,
    speed: float = 1.0,
    chance: random.Random | None = None,
) -> Span:
    """The `count` contiguous blocks that the swarm can use most: uncovered ones first, then the weakest.

    Args:
        speed: tokens per second that the newcomer expects to do through the whole span.
        chance: spreads newcomers that come at the same time over spans that are about equally good.

    Raises `ValueError` where the model has fewer blocks.
    """
    return best_span(survey(offers, num_blocks), count, speed, chance)


def best_span(seen: Survey, count: int, speed: float, chance: random.Random | None = None) -> Span:
    """Like `choose_span`, by what was seen. O(blocks + offers).

    Of spans that are about equally good, one that another hosts as well: each of the two can then do without the
    other, and go where it is needed. Who stands across the borders of others is needed on both sides.
    """
    strength, hosted = seen.strength, set(seen.spans.values())
    if not 0 < count <= len(strength):
        raise ValueError(f"{count} blocks of a model that has {len(strength)}")
    empty = [0, *accumulate(value <= _COVERED for value in strength)]
    relief = [0.0, *accumulate(_relief(value, speed) for value in strength)]
    windows = [Span(start, start + count) for start in range(len(strength) - count + 1)]
    most = max(empty[w.end] - empty[w.start] for w in windows)
    windows = [w for w in windows if empty[w.end] - empty[w.start] == most]
    worth = {w: relief[w.end] - relief[w.start] for w in windows}
    if most:
        windows = [w for w in windows if _leaves_no_chink(w, empty)] or windows
    least = max(worth[w] for w in windows) * (1 - EQUAL if chance else 1)
    good = [w for w in windows if worth[w] >= least]
    good = [w for w in good if w in hosted] or good
    return chance.choice(good) if chance else good[0]


def _relief(strength: float, speed: float) -> float:
    """How much better a block is for one host more: see the head of this file. None where there was no host."""
    return 1 / strength**2 - 1 / (strength + speed) ** 2 if strength > _COVERED else 0.0


def _leaves_no_chink(window: Span, empty: Sequence[int]) -> bool:
    """Whether the uncovered blocks before the window are as many as whole windows of that size would fill."""
    start = window.start
    while start > 0 and empty[start] > empty[start - 1]:
        start -= 1
    return (window.start - start) % len(window) == 0


def reconsider(
    parts: Sequence[Part], mine: Offer, *, speed: float = 1.0, chance: random.Random | None = None
) -> Span | None:
    """Where a newcomer that has just said where it goes should go instead, None if it is well where it is.

    Two that come at the same moment see the same hole. Whoever's lot is higher gives way, if another span has more
    blocks that nobody hosts.
    """
    rank = (lot(mine.peer), mine.peer)

    def counts(offer: Offer) -> bool:
        later = offer.state is State.JOINING and (lot(offer.peer), offer.peer) > rank
        return offer.peer != mine.peer and not later

    before = [
        Part(part.blocks, tuple(filter(counts, part.certain)), tuple(filter(counts, part.drawn)), part.weight)
        for part in parts
    ]
    seen = survey_parts(before)
    better = best_span(seen, len(mine.span), speed, chance)
    return better if _holes(seen.strength, better) > _holes(seen.strength, mine.span) else None


# --- a resident -------------------------------------------------------------------------------------------------------


def decide(
    seen: Survey,
    mine: Offer,
    *,
    since: float,
    now: float,
    chance: random.Random,
    count: int | None = None,
    policy: Policy = Policy(),
) -> Move | Stay:
    """Whether the host of `mine` should move, to `count` blocks (as many as now, if None).

    Args:
        seen: of offers read a moment ago; that of `mine` may be among them or not.
        since: when it came to its span, in seconds of the same clock as `now`.
    """
    if mine.state is not State.ONLINE:
        return Stay(f"it is {mine.state}")
    if mine.fixed:
        return Stay("it was told to")
    stayed = now - since
    if stayed < policy.urgent_stay:
        return Stay(f"it came only {stayed:.0f} s ago")
    others = seen.without(mine.peer)
    speed = max(mine.tokens_per_second, _LEAST_SPEED)
    target = best_span(others, count or len(mine.span), speed, chance)
    urgent = _holes(others.strength, target) > _holes(others.strength, mine.span)
    if not urgent and stayed < policy.min_stay:
        return Stay(f"it came only {stayed:.0f} s ago")
    if not urgent and (reason := _not_worth_it(others.strength, mine.span, target, speed, policy.margin)):
        return Stay(reason)
    keepers = policy.urgent_keepers if urgent else policy.keepers
    if held := _held(seen, mine.peer, mine.span, keepers):
        return Stay(f"blocks {held[0]}.. need it")
    if chance.random() >= (_one_of_the_spare(seen, keepers, policy) if urgent else policy.chance):
        return Stay(f"{target} is left to others this time")
    return Move(target, f"nobody hosts all of {target}" if urgent else f"{target} is weaker")


def _holes(strength: Sequence[float], span: Span) -> int:
    return sum(strength[block] <= _COVERED for block in span)


def _not_worth_it(others: Sequence[float], here: Span, there: Span, speed: float, margin: float) -> str:
    if _holes(others, here) > 0:
        return "nobody else hosts some of its blocks"
    now, then = (sum(_relief(others[block], speed) for block in span) for span in (here, there))
    return "" if then > (1 + margin) * now else f"{there} is worth no more than {then / now - 1:+.0%}"


def _one_of_the_spare(seen: Survey, keepers: int, policy: Policy) -> float:
    """The chance with which one of all that may leave does, on average; not less than usual, many look seldom."""
    spare = sum(not _held(seen, peer, span, keepers) for peer, span in seen.spans.items())
    return max(policy.chance, 1.0 / max(spare, 1))


def _held(seen: Survey, peer: PeerId, span: Span, keepers: int) -> list[int]:
    """The blocks that its host may not leave: those of which it is one of the first online hosts.

    The order of hosts is the same for all, so of the hosts that decide at the same moment, from the same offers, the
    first ones stay: however many move, `keepers` hosts of every block remain. Blocks that a move would come back to
    count as well: they are not served between the drain and the new start.
    """
    return [block for block in span if peer in (row := seen.keepers[block])[:keepers] or len(row) < keepers]


def pauses(policy: Policy, chance: random.Random) -> float:
    """Seconds until the next look: random, so that not all look at once."""
    return policy.look * chance.uniform(0.5, 1.5)
