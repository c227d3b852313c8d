"""Offers in, a route out. Pure: no clock, no network; chance comes from the caller.

What a token costs on a route: for every hop the way there, its turn (queue, or no room for the session) and the time
of its blocks; at the end the way back to the client.
"""

from __future__ import annotations

import random
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Protocol

import numpy as np
import numpy.typing as npt

from swarm.errors import NoRoute
from swarm.routes.costs import seconds_per_block, turn_seconds
from swarm.types import Coordinate, Hop, Offer, PeerId, Route, Span, State

SPREAD = 0.15  # offers that differ by less are about equally good; clients spread over them
DOUBT = 0.5  # a queue may have become so much longer or shorter since the offer was made

Vector = npt.NDArray[np.float64]
Indices = npt.NDArray[np.intp]
_STAYED = -1  # parent of an offer that ran the block before too
_BEGAN = -2  # parent of the first hop


@dataclass(frozen=True, slots=True)
class View:
    """From where a route is looked for.

    Attributes:
        client: the client's place, None where it is not known.
        measured: round trips in seconds that the client measured itself; they count more than any estimate.
        before: the peer that feeds the route, None where that is the client.
        after: the peer that the route feeds, None where that is the client.
    """

    client: Coordinate | None = None
    measured: Mapping[PeerId, float] = field(default_factory=dict)
    before: Offer | None = None
    after: Offer | None = None


class Latencies(Protocol):
    """One-way latencies in seconds between the offers of a sequence, which are named by their index."""

    def between(self, senders: Indices, receivers: Indices) -> Vector:
        """[senders, receivers]."""

    def first(self) -> Vector:
        """[offers], from whoever comes before the route."""

    def last(self) -> Vector:
        """[offers], to whoever comes after it."""


@dataclass(frozen=True, slots=True)
class Work:
    """What the hops themselves take, in seconds: [offers] each."""

    turn: Vector  # before the first block is run
    block: Vector  # for each block
    favour: Vector  # what all costs of an offer are multiplied by: chance, near 1


def uncovered(offers: Iterable[Offer], blocks: int | Span) -> tuple[Span, ...]:
    """The ranges of blocks that no online peer hosts."""
    span = _span(blocks)
    covered = {block for offer in offers if offer.state is State.ONLINE for block in offer.span}
    missing = [block for block in span if block not in covered]
    starts = [block for block in missing if block - 1 in covered or block == span.start]
    ends = [block + 1 for block in missing if block + 1 in covered or block + 1 == span.end]
    return tuple(Span(start, end) for start, end in zip(starts, ends, strict=True))


def find_route(
    offers: Sequence[Offer],
    blocks: int | Span,
    *,
    avoid: Collection[PeerId] = (),
    chance: random.Random | None = None,
    view: View | None = None,
    tokens_needed: int = 1,
) -> Route:
    """The route of least expected time per token; any part of a peer's span may serve, no peer serves twice.

    Args:
        blocks: all that many, or a part of them: to put others in the place of hops that failed.
        avoid: whom to do without.
        chance: spreads clients over peers that are about equally good.
        view: where the client is, and who comes before and after the blocks.
        tokens_needed: of cache, at every hop; who has less is chosen only where nobody has enough.

    Raises:
        NoRoute: some blocks have no online peer that is not to be avoided; it names them.
    """
    span = _span(blocks)
    usable = [offer for offer in offers if _is_usable(offer, span) and offer.peer not in avoid]
    if missing := uncovered(usable, span):
        names = ", ".join(map(str, missing))
        raise NoRoute(f"no online peer for blocks {names} of {blocks}", tuple((s.start, s.end) for s in missing))
    return cheapest(usable, span, Estimates(usable, view or View()), work_of(usable, tokens_needed, chance))


def _span(blocks: int | Span) -> Span:
    return Span(0, blocks) if isinstance(blocks, int) else blocks


def _is_usable(offer: Offer, span: Span) -> bool:
    return offer.state is State.ONLINE and offer.span.start < span.end and span.start < offer.span.end


# --- what it costs ----------------------------------------------------------------------------------------------------


def work_of(offers: Sequence[Offer], tokens_needed: int = 1, chance: random.Random | None = None) -> Work:
    """What each offer's own part of a token takes. `chance` lets clients that read the same see it differently.

    Without that, all who come between two renewals of an offer choose the same peer, which was idle a moment ago
    (Mitzenmacher, "How Useful Is Old Information?", 2000).
    """

    def near_one(spread: float) -> float:
        return chance.uniform(1.0 - spread, 1.0 + spread) if chance else 1.0

    favour = [near_one(SPREAD) for _ in offers]
    turn = [turn_seconds(offer, tokens_needed, near_one(DOUBT)) for offer in offers]
    return Work(np.array(turn), np.array([seconds_per_block(offer) for offer in offers]), np.array(favour))


class Estimates:
    """Latencies as the coordinates in the offers say, and the client's measurements at the two ends.

    Who has no coordinate is taken to be as far as the others are on average: zero where nobody has one.
    """

    def __init__(self, offers: Sequence[Offer], view: View) -> None:
        self._offers = offers
        self._view = view
        self._places = _matrix([offer.coordinate for offer in offers])  # [offers, 4]
        self._usual = 0.0
        known = np.flatnonzero(~np.isnan(self._places[:, 0]))[:64]
        if len(known) > 1:
            self._usual = float(self.between(known, known).mean())

    def between(self, senders: Indices, receivers: Indices) -> Vector:
        """One way in seconds, [senders, receivers]."""
        return self._one_way(self._places[senders][:, None], self._places[receivers][None, :])

    def first(self) -> Vector:
        """From the peer before, or from the client, [offers]."""
        return self._end(self._view.before)

    def last(self) -> Vector:
        """To the peer after, or to the client, [offers]."""
        return self._end(self._view.after)

    def _end(self, neighbour: Offer | None) -> Vector:
        place = neighbour.coordinate if neighbour else self._view.client
        seconds = self._one_way(_matrix([place]), self._places)
        if neighbour is None:
            for index, offer in enumerate(self._offers):
                if (round_trip := self._view.measured.get(offer.peer)) is not None:
                    seconds[index] = round_trip / 2
        return seconds

    def _one_way(self, left: Vector, right: Vector) -> Vector:
        """Half of `swarm.coordinates.distance`, for many at once: [..., 4] and [..., 4] to [...]."""
        x, y, z = (left[..., axis] - right[..., axis] for axis in range(3))
        one_way = (np.sqrt(x * x + y * y + z * z) + left[..., 3] + right[..., 3]) / 2
        return np.where(np.isnan(one_way), self._usual, one_way)


def _matrix(places: Sequence[Coordinate | None]) -> Vector:
    """[places, 4]: vector and height; not a number where nothing is known."""
    rows = [(*place.vector, place.height) if place else (np.nan,) * 4 for place in places]
    return np.array(rows, dtype=np.float64).reshape(len(rows), 4)


# --- the search -------------------------------------------------------------------------------------------------------


def cheapest(offers: Sequence[Offer], span: Span, latencies: Latencies, work: Work) -> Route:
    """The shortest path over (block boundary, peer), where `offers` cover all of `span`.

    With costs linear in the number of blocks, the boundary between two hops can be moved, without loss, to where the
    second peer's span begins or the first one's ends (or until one hop is empty, which is no worse where latencies
    keep the triangle inequality, as coordinates do). So only these boundaries are looked at: O(n * h) latencies for
    n offers with h hosts per block, instead of the O(blocks * h^2) of all of them. A few milliseconds for 300 offers.

    A peer that the path would visit twice serves all between its visits too: a session can be at a peer only once.
    """
    search = _Search(offers, span, latencies, work)
    for block in span:
        search.arrive(block)
        search.run(block)
    return Route(tuple(_without_returns(search.hops())))


class _Search:
    """Dynamic programming along the blocks: what it costs at least to have reached this boundary in each offer."""

    def __init__(self, offers: Sequence[Offer], span: Span, latencies: Latencies, work: Work) -> None:
        self._offers, self._span, self._latencies, self._favour = offers, span, latencies, work.favour
        self._turn, self._block = work.turn * work.favour, work.block * work.favour
        self._start = np.array([max(offer.span.start, span.start) for offer in offers])
        self._end = np.array([min(offer.span.end, span.end) for offer in offers])
        self._cost = np.full(len(offers), np.inf)
        self._parents = np.full((len(span), len(offers)), _STAYED, dtype=np.intp)

    def arrive(self, block: int) -> None:
        """Enter every host of `block`, from where that is cheapest."""
        begins = np.flatnonzero(self._start == block)
        if block == self._span.start:
            self._enter(block, begins, self._latencies.first()[begins], np.full(len(begins), _BEGAN))
            return
        ends = np.flatnonzero(self._end == block)
        here = np.flatnonzero((self._start < block) & (block < self._end))
        arrivals = [(np.concatenate((here, ends)), begins), (ends, here)]
        found = [(receivers, *self._from(s, receivers)) for s, receivers in arrivals if len(s) and len(receivers)]
        for receivers, seconds, senders in found:
            self._enter(block, receivers, seconds, senders)

    def _from(self, senders: Indices, receivers: Indices) -> tuple[Vector, Indices]:
        """The cheapest way to each of `receivers`: at what cost before it is their turn, and whom from."""
        ways = self._latencies.between(senders, receivers) * self._favour[receivers]
        ways += self._cost[senders][:, None]
        best = ways.argmin(axis=0)
        return ways[best, np.arange(len(receivers))], senders[best]

    def _enter(self, block: int, receivers: Indices, seconds: Vector, parents: Indices) -> None:
        cost = seconds + self._turn[receivers]
        better = cost < self._cost[receivers]
        receivers = receivers[better]
        self._cost[receivers] = cost[better]
        self._parents[block - self._span.start, receivers] = parents[better]

    def run(self, block: int) -> None:
        """Run `block` at all of its hosts."""
        self._cost += np.where((self._start <= block) & (block < self._end), self._block, 0.0)

    def hops(self) -> list[Hop]:
        """The cheapest of all ways, from its end to its beginning and turned round."""
        ends = np.flatnonzero(self._end == self._span.end)
        offer = int(ends[(self._cost[ends] + self._latencies.last()[ends]).argmin()])
        hops, end = [], self._span.end
        for block in reversed(range(self._span.start, self._span.end)):
            parent = int(self._parents[block - self._span.start, offer])
            if parent != _STAYED:
                chosen = self._offers[offer]
                hops.append(Hop(chosen.peer, chosen.addresses, Span(block, end), chosen.quantize))
                offer, end = parent, block
        return hops[::-1]


def _without_returns(hops: Sequence[Hop]) -> list[Hop]:
    """Where a peer comes again, it serves what lies between as well: its span is contiguous, so it can."""
    result: list[Hop] = []
    for hop in hops:
        again = next((index for index, earlier in enumerate(result) if earlier.peer == hop.peer), None)
        if again is not None:
            hop = replace(hop, span=Span(result[again].span.start, hop.span.end))
            del result[again:]
        result.append(hop)
    return result
