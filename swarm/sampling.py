"""Which offers a client reads, where there are too many to read all of them. Pure.

The offers for a range of blocks lie in several tables, by where their peers are: one for the whole world, and one for
each cell of three grids over the space of network coordinates, coarse and fine. A table keeps a bounded number of
offers, chosen by `worth_keeping`, a function of what lies in it: so each peer, when it is about to renew its offer,
reads the table and finds out for itself whether it still belongs there. A client reads the four tables of its own
place for each range of blocks: however many peers there are, it reads about as many offers, and most are of peers
near it or fast ones.

Where a table is crowded, many peers are in none, and nobody would ask them for anything. So the world and the finest
cells are also cut into slices, by the lots of the peers, into as many as `slice_bits` finds necessary from what the
table itself keeps: each peer is in one of them, and a client reads one, by a ticket of its own.
"""

from __future__ import annotations

import hashlib
import math
import statistics
from collections.abc import Callable, Iterable
from heapq import nsmallest

from swarm.routing import seconds_per_block, turn_seconds
from swarm.types import Coordinate, Offer, PeerId, Span, State

CELLS = (0.1, 0.05, 0.025)  # edges of the grids' cells, in seconds of round trip
FASTEST = 5  # offers that a table keeps for each block because nobody serves it faster
DRAWN = 5  # and by lot, so that no client depends on a few peers that all others know too
WORLD = "world"
LOT_BITS = 64


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
    lots = {offer.peer: (lot(offer.peer), offer.peer) for offer in online}
    kept: dict[PeerId, Offer] = {}
    for block in blocks:
        hosts = [offer for offer in online if block in offer.span]
        chosen = nsmallest(FASTEST, hosts, key=lambda offer: pace[offer.peer])
        chosen += nsmallest(DRAWN, hosts, key=lambda offer: lots[offer.peer])
        kept.update((offer.peer, offer) for offer in chosen)
    return list(kept.values())


def lot(peer: PeerId) -> int:
    """A number of `LOT_BITS` bits drawn for a peer, that everybody knows and nobody chooses."""
    return int.from_bytes(hashlib.blake2b(peer.encode(), digest_size=LOT_BITS // 8).digest())


def slice_bits(kept: Iterable[Offer], blocks: Span) -> int:
    """Into how many slices a table's peers are to be cut, as a power of two; 0 where it is not crowded.

    The lowest few of the lots of all hosts of a block are in the table, and the more hosts there are, the lower they
    are: the k-th lowest, as a fraction, is about k over their number (Bar-Yossef et al., "Counting Distinct Elements
    in a Data Stream", 2002).
    """
    offers = list(kept)
    hosts = []
    for block in blocks:
        lots = nsmallest(DRAWN, (lot(offer.peer) for offer in offers if block in offer.span))
        hosts.append((DRAWN - 1) * 2.0**LOT_BITS / max(lots[-1], 1) if len(lots) == DRAWN else 0.0)
    return max(0, math.floor(math.log2(max(statistics.median(hosts), 1.0) / (FASTEST + DRAWN))))


def slices_of(place: Coordinate | None, bits: Callable[[str], int], ticket: int) -> list[str]:
    """The names of the slices of the world and of the finest cell there, for a peer's lot or a client's ticket.

    `bits` tells the `slice_bits` of a table. A table that is not crowded has none.
    """
    tables = tables_of(place)
    crowded = [(table, bits(table)) for table in dict.fromkeys((tables[0], tables[-1]))]
    return [f"{table}/{width}/{ticket >> (LOT_BITS - width)}" for table, width in crowded if width > 0]


def _token_seconds(offer: Offer) -> float:
    """What a token takes there per block, with the peer's last mile and its queue shared by the blocks of its span."""
    last_mile = offer.coordinate.height if offer.coordinate else 0.0
    return seconds_per_block(offer) + (turn_seconds(offer, 1) + last_mile) / len(offer.span)
