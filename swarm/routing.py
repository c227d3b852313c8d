"""Offers in, a route out. Pure: no clock, no network; chance comes from the caller."""

from __future__ import annotations

import random
from collections.abc import Collection, Iterable, Sequence

from swarm.errors import NoRoute
from swarm.types import Hop, Offer, PeerId, Route, Span, State

HOP_SECONDS = 0.002  # what one more hop costs a token, beside the blocks' own time
_FULL_PENALTY = 10.0  # how much longer a peer without free cache is taken to need


def uncovered(offers: Iterable[Offer], num_blocks: int) -> tuple[Span, ...]:
    """The ranges of blocks that no online peer hosts."""
    covered = {block for offer in offers if offer.state is State.ONLINE for block in offer.span}
    missing = [block for block in range(num_blocks) if block not in covered]
    starts = [block for block in missing if block - 1 in covered or block == 0]
    ends = [block + 1 for block in missing if block + 1 in covered or block + 1 == num_blocks]
    return tuple(Span(start, end) for start, end in zip(starts, ends, strict=True))


def find_route(
    offers: Sequence[Offer],
    num_blocks: int,
    *,
    avoid: Collection[PeerId] = (),
    chance: random.Random | None = None,
) -> Route:
    """The route of least expected time per token; any part of a peer's span may serve.

    A shortest path over block boundaries. `chance` spreads clients over peers that are about equally good.

    Raises:
        NoRoute: some blocks have no online peer that is not to be avoided; it names them.
    """
    usable = [offer for offer in offers if offer.state is State.ONLINE and offer.peer not in avoid]
    if missing := uncovered(usable, num_blocks):
        names = ", ".join(map(str, missing))
        raise NoRoute(f"no online peer for blocks {names} of {num_blocks}", tuple((s.start, s.end) for s in missing))
    seconds = {offer.peer: _seconds_per_block(offer, chance) for offer in usable}
    nowhere: tuple[float, Offer | None, int] = (float("inf"), None, 0)
    best = [(0.0, None, 0), *[nowhere] * num_blocks]
    for end in range(1, num_blocks + 1):
        for offer in usable:
            if offer.span.start < end <= offer.span.end:
                for start in range(offer.span.start, end):
                    cost = best[start][0] + HOP_SECONDS + (end - start) * seconds[offer.peer]
                    if cost < best[end][0]:
                        best[end] = (cost, offer, start)
    return _walk_back(best, num_blocks)


def _seconds_per_block(offer: Offer, chance: random.Random | None) -> float:
    seconds = 1.0 / (max(offer.tokens_per_second, 1e-3) * len(offer.span))
    if offer.cache_free <= 0:
        seconds *= _FULL_PENALTY
    return seconds * (1.0 + offer.sessions) * (chance.uniform(0.9, 1.1) if chance else 1.0)


def _walk_back(best: list[tuple[float, Offer | None, int]], num_blocks: int) -> Route:
    hops: list[Hop] = []
    end = num_blocks
    while end > 0:
        _, offer, start = best[end]
        assert offer is not None  # every block is covered
        hops.append(Hop(offer.peer, offer.addresses, Span(start, end)))
        end = start
    return Route(tuple(reversed(hops)))
