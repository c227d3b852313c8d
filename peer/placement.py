"""Which span a peer should host. Pure."""

from __future__ import annotations

from collections.abc import Iterable

from swarm.types import Offer, Span, State


def choose_span(offers: Iterable[Offer], num_blocks: int, count: int) -> Span:
    """The `count` contiguous blocks that the swarm can use most: uncovered ones first, then those with least speed.

    Raises `ValueError` where the model has fewer blocks.
    """
    if not 0 < count <= num_blocks:
        raise ValueError(f"{count} blocks of a model that has {num_blocks}")
    strength = [0.0] * num_blocks
    for offer in offers:
        if offer.state is not State.DRAINING:
            for block in offer.span:
                strength[block] += max(offer.tokens_per_second, 1e-3)

    def weakness(start: int) -> tuple[int, float, int]:
        here = strength[start : start + count]
        return (-here.count(0.0), sum(here), start)

    start = min(range(num_blocks - count + 1), key=weakness)
    return Span(start, start + count)
