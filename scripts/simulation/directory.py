"""What lies in the simulated DHT for one model: the offers as they were published, and the tables clients read."""

from __future__ import annotations

from collections.abc import Iterable
from functools import partial

from peer.placement import Survey, survey
from swarm.offers import BUCKET
from swarm.sampling import LOT_BITS, lot, slice_bits, slices_of, tables_of, worth_keeping
from swarm.types import Coordinate, Offer, PeerId, Span

STALE = 30.0  # seconds; nobody sees newer offers than of the last multiple of this


class Directory:
    """Offers by peer. What is read is as old as the last refresh."""

    def __init__(self, num_blocks: int, keepers: int) -> None:
        self.num_blocks = num_blocks
        self.offers: dict[PeerId, Offer] = {}
        self._keepers = keepers
        self._age = -1
        self._survey: Survey | None = None
        self._cells: dict[tuple[int, str], list[Offer]] | None = None
        self._kept: dict[tuple[int, str], list[Offer]] = {}
        self._widths: dict[tuple[int, str], int] = {}
        self._sliced: dict[tuple[int, str], dict[int, list[Offer]]] = {}

    def refresh(self, now: float) -> None:
        """Forget what was read, where it is old."""
        if int(now // STALE) != self._age:
            self._age = int(now // STALE)
            self.forget()

    def forget(self) -> None:
        """Read anew the next time."""
        self._survey, self._cells = None, None
        for memory in (self._kept, self._widths, self._sliced):
            memory.clear()

    def survey(self) -> Survey:
        """All offers, counted: what a peer looks at that chooses its place."""
        if self._survey is None:
            self._survey = survey(self.offers.values(), self.num_blocks, self._keepers)
        return self._survey

    def read(self, place: Coordinate | None, ticket: int) -> list[Offer]:
        """What a client at `place` reads, one offer for each record: some come more than once."""
        found: list[Offer] = []
        for bucket in self.buckets(Span(0, self.num_blocks)):
            slices = slices_of(place, partial(self._bits, bucket), ticket)
            for table in (*tables_of(place), *slices):
                found += self._table(bucket, table)
        return found

    def _bits(self, bucket: int, table: str) -> int:
        if (bucket, table) not in self._widths:
            self._widths[bucket, table] = slice_bits(self._table(bucket, table), self._blocks(bucket))
        return self._widths[bucket, table]

    def _blocks(self, bucket: int) -> Span:
        return Span(bucket * BUCKET, min((bucket + 1) * BUCKET, self.num_blocks))

    def buckets(self, span: Span) -> Iterable[int]:
        """The ranges of blocks that a span touches."""
        return range(span.start // BUCKET, (span.end - 1) // BUCKET + 1)

    def _table(self, bucket: int, table: str) -> list[Offer]:
        if (bucket, table) not in self._kept:
            whole, _, part = table.partition("/")
            offers = self._sorted_out().get((bucket, whole), [])
            if part:
                width, number = map(int, part.split("/"))
                offers = self._slices(bucket, whole, width).get(number, [])
            self._kept[bucket, table] = worth_keeping(offers, self._blocks(bucket))
        return self._kept[bucket, table]

    def _slices(self, bucket: int, table: str, width: int) -> dict[int, list[Offer]]:
        if (bucket, table) not in self._sliced:
            slices: dict[int, list[Offer]] = {}
            for offer in self._sorted_out().get((bucket, table), ()):
                slices.setdefault(lot(offer.peer) >> (LOT_BITS - width), []).append(offer)
            self._sliced[bucket, table] = slices
        return self._sliced[bucket, table]

    def _sorted_out(self) -> dict[tuple[int, str], list[Offer]]:
        if self._cells is None:
            self._cells = {}
            for offer in self.offers.values():
                for table in tables_of(offer.coordinate):
                    for bucket in self.buckets(offer.span):
                        self._cells.setdefault((bucket, table), []).append(offer)
        return self._cells
