"""Who reads which tables, in which order, and where an offer belongs. Pure: a reading asks, and is told what was found.

Each reading is a generator that yields the tables it wants next and is sent their offers; so the same code runs over
the DHT (`swarm.discovery`) and over a simulated one. Where a model has few peers, every reading is one question.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Generator, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TypeVar

from swarm.directory.sampling import (
    DOUBT,
    ENOUGH,
    LOT_BITS,
    Table,
    blocks_of,
    buckets_of,
    cell_keeps,
    cell_slice_width,
    cells_of,
    is_crowded,
    population,
    root_keeps,
    slice_name,
    slice_names,
    slice_width,
)
from swarm.directory.sampling import lot as lot_of
from swarm.types import Coordinate, Offer, Span, State

Found = Mapping[Table, Collection[Offer]]
_Result = TypeVar("_Result")
Reading = Generator[Sequence[Table], Found, _Result]


@dataclass(frozen=True, slots=True)
class Part:
    """What is known of the hosts of some blocks.

    Attributes:
        certain: offers among which every block that has an online host has one.
        drawn: a sample by lot, of offers in any state.
        weight: how many offers each that was drawn stands for; 1 where all were.
    """

    blocks: Span
    certain: tuple[Offer, ...]
    drawn: tuple[Offer, ...]
    weight: float = 1.0


def answered(reading: Reading[_Result], read: Callable[[Sequence[Table]], Found]) -> _Result:
    """The result of a reading whose tables can be read at once."""
    try:
        wanted = next(reading)
        while True:
            wanted = reading.send(read(wanted))
    except StopIteration as end:
        result: _Result = end.value
        return result


def for_route(num_blocks: int, place: Coordinate | None, ticket: int) -> Reading[list[Offer]]:
    """What a client at `place` reads before it looks for a route, one offer for each record: some come more than once.

    `ticket` is a random number of `LOT_BITS` bits, another one for each route.
    """
    buckets, cells = buckets_of(Span(0, num_blocks)), cells_of(place)
    roots = yield list(map(Table, buckets))
    offers = [offer for found in roots.values() for offer in found]
    crowded = [bucket for bucket in buckets if is_crowded(roots[Table(bucket)])]
    if not crowded:
        return offers
    widths = {bucket: slice_width(population(roots[Table(bucket)])) for bucket in crowded}
    slices = [Table(bucket, slice_name(width, ticket)) for bucket, width in widths.items()]
    near = yield [*slices, *(Table(bucket, cell) for bucket in crowded for cell in cells)]
    offers += [offer for found in near.values() for offer in found]
    found = {**roots, **near}
    wanted = [
        table
        for bucket, width in widths.items()
        for table in _until_enough(bucket, width, found, cells, ticket, num_blocks)
    ]
    more = (yield wanted) if wanted else {}
    return offers + [offer for each in more.values() for offer in each]


def _until_enough(
    bucket: int, width: int, found: Found, cells: Sequence[str], ticket: int, num_blocks: int
) -> list[Table]:
    """More slices of a range of blocks, so that who reads has about `ENOUGH`: of those nearby, if they are many."""
    left = ENOUGH - sum(len(offers) for table, offers in found.items() if table.bucket == bucket)
    near = found[Table(bucket, cells[-1])] if cells else []
    if fine := cell_slice_width(near, blocks_of(bucket, num_blocks)):
        names = slice_names(fine, ticket, left / len(near), cells[-1])
    else:
        # A slice alone would mislead where its lots happen to be few. The root counts about as well, by other lots.
        first, counted = len(found[Table(bucket, slice_name(width, ticket))]), population(found[Table(bucket)])
        names = slice_names(width, ticket, 1 + left / ((first + counted / 2**width) / 2))[1:]
    return [Table(bucket, name) for name in names]


def for_survey(num_blocks: int, tickets: Sequence[int] | None) -> Reading[list[Part]]:
    """What a peer reads that looks for its place: as many slices as it has random `tickets`; all of them with None.

    With no ticket, it sees whether some block has nobody, and not how strong the others are.
    """
    buckets = buckets_of(Span(0, num_blocks))
    roots = yield list(map(Table, buckets))
    slices = {bucket: _slices(bucket, roots[Table(bucket)], tickets) for bucket in buckets}
    wanted = [table for tables, _ in slices.values() for table in tables]
    found = (yield wanted) if wanted else {}
    parts = []
    for bucket in buckets:
        tables, weight = slices[bucket]
        root = tuple(roots[Table(bucket)])
        drawn = tuple(offer for table in tables for offer in found[table]) if tables else root
        parts.append(Part(blocks_of(bucket, num_blocks), root, drawn, weight))
    return parts


def _slices(bucket: int, root: Collection[Offer], tickets: Sequence[int] | None) -> tuple[list[Table], float]:
    """The slices that `tickets` draw, and how many slices each stands for; none where the root has all."""
    if not is_crowded(root) or tickets == []:
        return [], 1.0
    width = slice_width(population(root))
    if tickets is None:  # however many others took them for when they chose their slices
        widths = {slice_width(population(root) * doubt) for doubt in (1 / DOUBT, 1.0, DOUBT)}
        every = [slice_name(each, number << (LOT_BITS - each)) for each in sorted(widths) for number in range(2**each)]
        return [Table(bucket, name) for name in every], 1.0
    if 2**width <= len(tickets):
        tickets = [number << (LOT_BITS - width) for number in range(2**width)]
    names = sorted({slice_name(width, ticket) for ticket in tickets})
    return [Table(bucket, name) for name in names], 2**width / len(names)


def for_offer(offer: Offer) -> Reading[list[Table]]:
    """The tables that `offer` is to be put into, as they are now."""
    buckets, cells = buckets_of(offer.span), cells_of(offer.coordinate)
    roots = yield list(map(Table, buckets))
    belongs, crowded = list[Table](), list[int]()
    for bucket in buckets:
        there = _with(roots[Table(bucket)], offer)
        root = root_keeps(there, blocks_of(bucket, offer.num_blocks))
        belongs += [Table(bucket)] if offer in root else []
        if is_crowded(root):
            crowded.append(bucket)
            belongs += [Table(bucket, name) for name in _slice_names(root, lot_of(offer.peer))]
    if offer.state is State.ONLINE and crowded and cells:
        near = yield [Table(bucket, cell) for bucket in crowded for cell in cells]
        belongs += _near(near, offer)
    return belongs


def _slice_names(root: Collection[Offer], number: int) -> Iterator[str]:
    """The slice that a lot is in: two where others may count so many more or less that they look into another."""
    count = population(root)
    for width in sorted({slice_width(count / DOUBT), slice_width(count * DOUBT)}):
        yield slice_name(width, number)


def _near(near: Found, offer: Offer) -> Iterator[Table]:
    """Where it belongs of the tables of its place, and of the slices of the finest of them."""
    finest = cells_of(offer.coordinate)[-1]
    for table, found in near.items():
        blocks = blocks_of(table.bucket, offer.num_blocks)
        kept = cell_keeps(_with(found, offer), blocks)
        if offer in kept:
            yield table
        if table.name == finest:
            for width in sorted({cell_slice_width(kept, blocks, doubt) for doubt in (1 / DOUBT, DOUBT)} - {0}):
                yield Table(table.bucket, slice_name(width, lot_of(offer.peer), finest))


def _with(found: Iterable[Offer], offer: Offer) -> list[Offer]:
    return [*(other for other in found if other.peer != offer.peer), offer]
