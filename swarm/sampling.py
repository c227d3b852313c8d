"""Which offers a client reads, where there are too many to read all of them. Pure.

The offers for a range of blocks lie in several tables, by where their peers are: one for the whole world, and one for
each cell of three grids over the space of network coordinates, coarse and fine. A table keeps a bounded number
of offers, chosen by `worth_keeping`, a function of what lies in it: so each peer, when it is about to renew its offer,
reads the table and finds out for itself whether it still belongs there. A client reads the four tables of its own
place for each range of blocks: however many peers there are, it reads about as many offers, and most are of peers
near it or fast ones.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterable
from heapq import nsmallest

from swarm.routing import seconds_per_block, turn_seconds
from swarm.types import Coordinate, Offer, PeerId, Span, State

CELLS = (0.1, 0.05, 0.025)  # edges of the grids' cells, in seconds of round trip
FASTEST = 5  # offers that a table keeps for each block because nobody serves it faster
DRAWN = 5  # and by lot, so that no client depends on a few peers that all others know too
WORLD = "world"


def tables_of(place: Coordinate | None) -> tuple[str, ...]:
    """The names of the tables that an offer from there belongs to, and that a client there reads."""
    if place is None:
        return (WORLD,)
    cells = (":".join(str(math.floor(axis / edge)) for axis in place.vector) for edge in CELLS)
    return (WORLD, *(f"{level}:{cell}" for level, cell in enumerate(cells)))


def worth_keeping(offers: Iterable[Offer], blocks: Span) -> list[Offer]:
    """Those of `offers` that a table for `blocks` keeps: for each block a few fast hosts and a few drawn by lot.

    At most `(FASTEST + DRAWN) * len(blocks)`, and every block that has an online host among `offers` has one among
    them. Everybody who looks at the same offers comes to the same answer.
    """
    online = [offer for offer in offers if offer.state is State.ONLINE]
    pace = {offer.peer: (_token_seconds(offer), offer.peer) for offer in online}
    lots = {offer.peer: lot(offer.peer) for offer in online}
    kept: dict[PeerId, Offer] = {}
    for block in blocks:
        hosts = [offer for offer in online if block in offer.span]
        chosen = nsmallest(FASTEST, hosts, key=lambda offer: pace[offer.peer])
        chosen += nsmallest(DRAWN, hosts, key=lambda offer: lots[offer.peer])
        kept.update((offer.peer, offer) for offer in chosen)
    return list(kept.values())


def lot(peer: PeerId) -> bytes:
    """A number drawn for a peer, that everybody knows and nobody chooses."""
    return hashlib.blake2b(peer.encode(), digest_size=8).digest()


def _token_seconds(offer: Offer) -> float:
    """What a token takes there per block, with the peer's last mile and its queue shared by the blocks of its span."""
    last_mile = offer.coordinate.height if offer.coordinate else 0.0
    return seconds_per_block(offer) + (turn_seconds(offer, 1) + last_mile) / len(offer.span)
