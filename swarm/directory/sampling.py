"""Which offers lie in which table of the DHT, so that nobody reads more of them where there are more. Pure.

The offers for a range of `BUCKET` blocks lie in its root table as long as they are few: who reads that, reads all.
Where they are many, the root keeps a bounded number of them, chosen by `root_keeps`, a function of what lies in it: so
each peer, when it is about to renew its offer, reads the table and finds out for itself whether it still belongs there.
All of them are then found in slices, by the lots of the peers, of which there are as many as the root itself shows to
be necessary (`population`); and the best of those in one place, in tables of that place, one for each cell of two
grids over the space of network coordinates. A client reads the root, the tables around it, and slices by a ticket of
its own until it has read enough: however many peers there are, it reads as many offers, those of fast peers and of
near ones among them, and nobody is in none that somebody reads. `swarm.directory.reading` says who reads and writes
what, in which order.
"""

from __future__ import annotations

import functools
import hashlib
import math
import statistics
from collections.abc import Collection, Iterable
from heapq import nsmallest
from typing import NamedTuple

from swarm.routes.costs import seconds_per_block, turn_seconds
from swarm.types import Coordinate, Offer, PeerId, Span, State

BUCKET = 16  # blocks that share tables
ROOT = 24  # offers that a root table may hold whatever they are
SLICE = 28  # offers in a slice, about, at most
MAX_WIDTH = 16  # bits of a slice's number
CELLS = (0.1, 0.025)  # edges of the grids' cells, in seconds of round trip
FASTEST = 5  # offers that a table keeps for each block because nobody serves it faster
DRAWN = 3  # and, in a table of a place, by lot, so that no client depends on a few peers that all others know too
DOUBT = 1.25  # how much more or less than we somebody else may count, who reads the table a moment later
ENOUGH = 115  # records that a client reads for a range of blocks, about, where there are so many
LOT_BITS = 64


class Table(NamedTuple):
    """One dictionary in the DHT with offers for the blocks of a bucket."""

    bucket: int
    name: str = ""  # the root has none


def buckets_of(span: Span) -> range:
    """The ranges of blocks that a span touches, by number."""
    return range(span.start // BUCKET, (span.end - 1) // BUCKET + 1)


def blocks_of(bucket: int, num_blocks: int) -> Span:
    """The blocks of a bucket, of a model that has so many."""
    return Span(bucket * BUCKET, min((bucket + 1) * BUCKET, num_blocks))


@functools.lru_cache(maxsize=1 << 16)
def lot(peer: PeerId) -> int:
    """A number of `LOT_BITS` bits drawn for a peer, that everybody knows and nobody chooses."""
    return int.from_bytes(hashlib.blake2b(peer.encode(), digest_size=LOT_BITS // 8).digest())


def _rank(offer: Offer) -> tuple[int, PeerId]:
    return lot(offer.peer), offer.peer


# --- the root, and all in slices --------------------------------------------------------------------------------------


def root_keeps(offers: Collection[Offer], blocks: Span) -> list[Offer]:
    """Those of `offers` that the root table for `blocks` keeps: all if they are few.

    Else the lowest lots, and for each block a few fast hosts: every block that has an online host among `offers` has
    one among them. Everybody who looks at the same offers comes to the same answer.
    """
    if len(offers) <= ROOT:
        return list(offers)
    kept = {offer.peer: offer for offer in nsmallest(ROOT + 1, offers, key=_rank)}
    online = [offer for offer in offers if offer.state is State.ONLINE]
    pace = {offer.peer: (_token_seconds(offer), offer.peer) for offer in online}
    for block in blocks:
        hosts = (offer for offer in online if block in offer.span)
        kept.update((offer.peer, offer) for offer in nsmallest(FASTEST, hosts, key=lambda offer: pace[offer.peer]))
    return list(kept.values())


def is_crowded(root: Collection[Offer]) -> bool:
    """Whether there are offers that the root table does not hold."""
    return len(root) > ROOT


def population(root: Collection[Offer]) -> float:
    """How many offers there are for the blocks of a root table, about.

    The lowest lots of all are in the table, and the more offers there are, the lower they are: the k-th lowest, as a
    fraction, is about k over their number (Bar-Yossef et al., "Counting Distinct Elements in a Data Stream", 2002).
    """
    if not is_crowded(root):
        return len(root)
    highest = nsmallest(ROOT + 1, (lot(offer.peer) for offer in root))[-1]
    return ROOT * 2.0**LOT_BITS / max(highest, 1)


def slice_width(count: float) -> int:
    """Bits of a slice's number where there are so many offers and the root cannot hold all."""
    return min(max(1, math.ceil(math.log2(max(count, 1.0) / SLICE))), MAX_WIDTH)


def slice_name(width: int, number: int, cell: str = "") -> str:
    """The slice that a lot or a ticket is in, of all offers or of those in a cell."""
    return f"{cell}/{width}/{number >> (LOT_BITS - width)}"


def slice_names(width: int, ticket: int, count: float, cell: str = "") -> list[str]:
    """So many slices, or as many as there are, from that of a ticket on; none where `count` is less than one."""
    first, all_of_them = ticket >> (LOT_BITS - width), 1 << width
    numbers = [(first + place) % all_of_them for place in range(min(int(count), all_of_them))]
    return [slice_name(width, number << (LOT_BITS - width), cell) for number in numbers]


# --- what is near -----------------------------------------------------------------------------------------------------


def cells_of(place: Coordinate | None) -> tuple[str, ...]:
    """The tables of a place, coarse to fine, that an offer from there belongs to and that a client there reads."""
    if place is None:
        return ()
    cells = (":".join(str(math.floor(axis / edge)) for axis in place.vector) for edge in CELLS)
    return tuple(f"{level}:{cell}" for level, cell in enumerate(cells))


def cell_keeps(offers: Iterable[Offer], blocks: Span) -> list[Offer]:
    """Those of `offers` that a table of a place keeps: for each block a few fast hosts and a few drawn by lot.

    At most `(FASTEST + DRAWN) * len(blocks)`, and every block that has an online host among `offers` has one among
    them.
    """
    online = [offer for offer in offers if offer.state is State.ONLINE]
    pace = {offer.peer: (_token_seconds(offer), offer.peer) for offer in online}
    kept: dict[PeerId, Offer] = {}
    for block in blocks:
        hosts = [offer for offer in online if block in offer.span]
        chosen = nsmallest(FASTEST, hosts, key=lambda offer: pace[offer.peer])
        chosen += nsmallest(DRAWN, hosts, key=_rank)
        kept.update((offer.peer, offer) for offer in chosen)
    return list(kept.values())


def cell_slice_width(kept: Collection[Offer], blocks: Span, doubt: float = 1.0) -> int:
    """Bits of the number of a cell's slices, 0 where the cell's own table holds enough of those who are there.

    `doubt` is what is multiplied by how many hosts a block seems to have there: see `population`.
    """
    hosts = []
    for block in blocks:
        lots = nsmallest(DRAWN, (lot(offer.peer) for offer in kept if block in offer.span))
        hosts.append((DRAWN - 1) * 2.0**LOT_BITS / max(lots[-1], 1) if len(lots) == DRAWN else 0.0)
    count = doubt * statistics.median(hosts)
    return min(max(0, math.floor(math.log2(max(2 * count, 1.0) / (FASTEST + DRAWN)))), MAX_WIDTH)


def _token_seconds(offer: Offer) -> float:
    """What a token takes there per block, with the peer's last mile and its queue shared by the blocks of its span."""
    last_mile = offer.coordinate.height if offer.coordinate else 0.0
    return seconds_per_block(offer) + (turn_seconds(offer, 1) + last_mile) / len(offer.span)


# --- where an offer may lie -------------------------------------------------------------------------------------------


def tables_of(offer: Offer) -> Iterable[Table]:
    """Every table that an offer could ever rightly be in, the likeliest first."""
    buckets, cells, number = buckets_of(offer.span), cells_of(offer.coordinate), lot(offer.peer)
    yield from map(Table, buckets)
    yield from (Table(bucket, cell) for bucket in buckets for cell in cells)
    for cell in ("", *cells[-1:]):
        names = [slice_name(width, number, cell) for width in range(1, MAX_WIDTH + 1)]
        yield from (Table(bucket, name) for name in names for bucket in buckets)
