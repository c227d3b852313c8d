"""What lies in the simulated DHT for one model: the offers as they were published, and the tables that are read."""

from __future__ import annotations

import random
from collections.abc import Sequence

from peer.placement import Survey, survey_parts
from swarm.directory.reading import answered, for_route, for_survey
from swarm.directory.sampling import LOT_BITS, Table, blocks_of, buckets_of, cell_keeps, cells_of, lot, root_keeps
from swarm.types import Coordinate, Offer, PeerId

STALE = 30.0  # seconds; nobody sees newer offers than of the last multiple of this
SLICES = 16  # that a peer reads which looks for its place


class Directory:
    """Offers by peer. What is read is as old as the last refresh."""

    def __init__(self, num_blocks: int, keepers: int) -> None:
        self.num_blocks = num_blocks
        self.offers: dict[PeerId, Offer] = {}
        self.read_by_peers = 0  # records, by the last that looked for its place
        self._keepers = keepers
        self._age = -1
        self._survey: Survey | None = None
        self._whole: dict[Table, list[Offer]] | None = None
        self._kept: dict[Table, list[Offer]] = {}
        self._sliced: dict[tuple[Table, int], dict[int, list[Offer]]] = {}

    def refresh(self, now: float) -> None:
        """Forget what was read, where it is old."""
        if int(now // STALE) != self._age:
            self._age = int(now // STALE)
            self.forget()

    def forget(self) -> None:
        """Read anew the next time."""
        self._survey, self._whole = None, None
        self._kept.clear()
        self._sliced.clear()

    def survey(self, chance: random.Random) -> Survey:
        """What a peer reads that chooses its place; those who look at the same time see the same."""
        if self._survey is None:
            tickets = [chance.getrandbits(LOT_BITS) for _ in range(SLICES)]
            parts = answered(for_survey(self.num_blocks, tickets), self._found)
            self.read_by_peers = sum(len(part.certain) + len(part.drawn) for part in parts)
            self._survey = survey_parts(parts, self._keepers)
        return self._survey

    def read(self, place: Coordinate | None, ticket: int) -> list[Offer]:
        """What a client at `place` reads, one offer for each record: some come more than once."""
        return answered(for_route(self.num_blocks, place, ticket), self._found)

    def _found(self, tables: Sequence[Table]) -> dict[Table, list[Offer]]:
        return {table: self._table(table) for table in tables}

    def _table(self, table: Table) -> list[Offer]:
        """What its peers leave in a table, each by what the others do."""
        if table not in self._kept:
            cell, _, part = table.name.partition("/")
            if part:
                width, number = map(int, part.split("/"))
                self._kept[table] = self._slices(Table(table.bucket, cell), width).get(number, [])
            else:
                keeps = cell_keeps if cell else root_keeps
                self._kept[table] = keeps(self._all().get(table, []), blocks_of(table.bucket, self.num_blocks))
        return self._kept[table]

    def _slices(self, table: Table, width: int) -> dict[int, list[Offer]]:
        if (table, width) not in self._sliced:
            slices: dict[int, list[Offer]] = {}
            for offer in self._all().get(table, ()):
                slices.setdefault(lot(offer.peer) >> (LOT_BITS - width), []).append(offer)
            self._sliced[table, width] = slices
        return self._sliced[table, width]

    def _all(self) -> dict[Table, list[Offer]]:
        """All offers that would like to be in each table."""
        if self._whole is None:
            self._whole = {}
            for offer in self.offers.values():
                for name in ("", *cells_of(offer.coordinate)):
                    for bucket in buckets_of(offer.span):
                        self._whole.setdefault(Table(bucket, name), []).append(offer)
        return self._whole
