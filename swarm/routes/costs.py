"""What a token costs at a peer, by its offer. Pure."""

from __future__ import annotations

from swarm.types import Offer

HOP_SECONDS = 0.002  # what one more hop costs a token, beside the way and the blocks' own time
FULL_SECONDS = 10.0  # what no room for the session is taken to cost, so that it is chosen only where it must be


def seconds_per_block(offer: Offer) -> float:
    """One token through one block: as measured, else from what the whole span does, shared by the sessions there."""
    if offer.seconds_per_block > 0:
        return offer.seconds_per_block
    return (1.0 + offer.sessions) / (max(offer.tokens_per_second, 1e-3) * len(offer.span))


def turn_seconds(offer: Offer, tokens_needed: int, hearsay: float = 1.0) -> float:
    """Until the first block is run: the steps that wait there run their span first, one after another at worst.

    `hearsay` is what the queue is multiplied by: it was so long when the offer was made.
    """
    room = 0.0 if offer.cache_free >= tokens_needed else FULL_SECONDS
    return HOP_SECONDS + room + hearsay * offer.queue * seconds_per_block(offer) * len(offer.span)
