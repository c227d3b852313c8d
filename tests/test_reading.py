"""Which offers are read, and where they are put: bounded, complete where they are few, nobody left out."""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st
from test_routing_model import FAR, HERE, an_offer

from peer.placement import survey, survey_parts
from swarm.directory.reading import Found, answered, for_offer, for_route, for_survey
from swarm.directory.sampling import (
    CELLS,
    DRAWN,
    FASTEST,
    LOT_BITS,
    ROOT,
    SLICE,
    Table,
    blocks_of,
    cell_keeps,
    cell_slice_width,
    cells_of,
    is_crowded,
    lot,
    population,
    root_keeps,
    slice_width,
    tables_of,
)
from swarm.routing import uncovered
from swarm.types import Coordinate, Offer, PeerId, Span, State

BLOCKS = 32


def crowd(count: int, seed: int) -> list[Offer]:
    """Hosts of four blocks each, of 32, around three places."""
    chance, result = random.Random(seed), []
    for number in range(count):
        start = chance.randrange(BLOCKS - 3)
        middle = chance.choice([(0.0, 0.0), (0.21, 0.02), (0.02, 0.31)])
        place = Coordinate((middle[0] + chance.uniform(0, 0.01), middle[1], 0.0), 0.001, 0.1)
        offer = an_offer(f"p{seed}-{number}", start, start + 4, coordinate=place)
        result.append(replace(offer, num_blocks=BLOCKS, seconds_per_block=chance.uniform(0.001, 0.01)))
    return result


class Dht:
    """Tables in memory; peers put their offers in and take them out as real ones do."""

    def __init__(self) -> None:
        self.tables: dict[Table, dict[PeerId, Offer]] = {}
        self.questions = 0

    def read(self, tables: Sequence[Table]) -> Found:
        self.questions += 1
        return {table: list(self.tables.get(table, {}).values()) for table in tables}

    def publish(self, offer: Offer) -> list[Table]:
        for table in self.tables.values():
            table.pop(offer.peer, None)
        belongs = answered(for_offer(offer), self.read)
        for table in belongs:
            self.tables.setdefault(table, {})[offer.peer] = offer
        return belongs

    def settle(self, offers: Sequence[Offer]) -> None:
        """As it is when everybody has renewed its offer often enough."""
        wanted: dict[Table, list[Offer]] = {}
        for offer in offers:
            for table in tables_of(offer):
                wanted.setdefault(table, []).append(offer)
        for table, there in wanted.items():
            cell, _, part = table.name.partition("/")
            keeps = cell_keeps if cell else root_keeps
            kept = there if part else keeps(there, blocks_of(table.bucket, BLOCKS))
            self.tables[table] = {offer.peer: offer for offer in kept}


# --- tables -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("count", [10, 100, 2000])
@pytest.mark.parametrize("keeps", [root_keeps, cell_keeps])
def test_a_table_is_bounded_and_covers_what_is_covered(count: int, keeps: object) -> None:
    offers, blocks = crowd(count, 0), Span(0, 16)
    kept = keeps(offers, blocks)  # type: ignore[operator]
    assert len(kept) <= max(ROOT + 1 + FASTEST * 16, (FASTEST + DRAWN) * 16)
    assert len({offer.peer for offer in kept}) == len(kept)
    assert uncovered(kept, blocks) == uncovered(offers, blocks)
    shuffled = random.Random(1).sample(offers, len(offers))
    assert {o.peer for o in keeps(shuffled, blocks)} == {o.peer for o in kept}  # type: ignore[operator]
    assert {o.peer for o in keeps(kept, blocks)} == {o.peer for o in kept}  # type: ignore[operator]  # none in a second look


def test_a_table_of_a_place_keeps_the_fastest_and_passes_by_who_does_not_serve() -> None:
    offers = crowd(500, 2)
    fastest = min((offer for offer in offers if offer.span.start < 16), key=lambda offer: offer.seconds_per_block)
    assert fastest in cell_keeps(offers, Span(0, 16))
    assert fastest in root_keeps(offers, Span(0, 16))
    assert cell_keeps([replace(offer, state=State.DRAINING) for offer in offers], Span(0, 16)) == []


def test_neighbours_share_cells_and_strangers_do_not() -> None:
    a, b = Coordinate((0.001, 0.001, 0.001), 0.01, 0.1), Coordinate((0.002, 0.003, 0.001), 0.002, 0.9)
    assert cells_of(a) == cells_of(b)
    assert not set(cells_of(a)) & set(cells_of(FAR))
    assert len(set(cells_of(a))) == len(CELLS)
    assert cells_of(None) == ()


@pytest.mark.parametrize("count", [ROOT, ROOT + 1, 300, 8000])
def test_the_root_shows_how_many_there_are(count: int) -> None:
    offers = crowd(count, 3)
    root = root_keeps(offers, Span(0, BLOCKS))
    assert is_crowded(root) is (count > ROOT)
    assert population(root) == count if count <= ROOT else 0.5 * count < population(root) < 2 * count


@pytest.mark.parametrize("count", [100, 1000, 8000])
def test_a_slice_is_of_bounded_size(count: int) -> None:
    offers = crowd(count, 4)
    width = slice_width(population(root_keeps(offers, Span(0, BLOCKS))))
    sizes = Counter(lot(offer.peer) >> (LOT_BITS - width) for offer in offers)
    assert SLICE / 4 < sum(sizes.values()) / 2**width <= 2 * SLICE
    assert max(sizes.values()) <= 4 * SLICE


@pytest.mark.parametrize(("count", "bits"), [(6, range(1)), (1000, range(6, 10)), (8000, range(9, 13))])
def test_a_crowded_place_is_cut_into_slices_too(count: int, bits: range) -> None:
    offers = [an_offer(f"p{number}", 0, 4) for number in range(count)]
    assert cell_slice_width(cell_keeps(offers, Span(0, 4)), Span(0, 4)) in bits


# --- who reads and writes what ----------------------------------------------------------------------------------------


def test_where_peers_are_few_everything_is_read_with_one_question() -> None:
    dht, offers = Dht(), crowd(ROOT, 5)
    dht.settle(offers)
    assert {table.name for offer in offers for table in dht.publish(offer)} == {""}
    dht.questions = 0
    assert {o.peer for o in answered(for_route(BLOCKS, HERE, 0), dht.read)} == {o.peer for o in offers}
    assert dht.questions == 1
    parts = answered(for_survey(BLOCKS, [0]), dht.read)
    assert dht.questions == 2
    seen, true = survey_parts(parts), survey(offers, BLOCKS)
    assert (seen.strength, seen.keepers, seen.spans) == (true.strength, true.keepers, true.spans)
    assert all(seen.without(offer.peer).strength == true.without(offer.peer).strength for offer in offers)


@pytest.mark.parametrize("count", [ROOT + 8, 120])
def test_everybody_puts_itself_where_some_ticket_reads(count: int) -> None:
    dht, offers = Dht(), crowd(count, 1)
    for offer in offers * 2:  # the second time, all are there
        dht.publish(offer)
    parts = answered(for_survey(BLOCKS, None), dht.read)
    assert {o.peer for part in parts for o in (*part.certain, *part.drawn)} == {o.peer for o in offers}
    tickets = [number << (LOT_BITS - 4) for number in range(16)]
    read = {o.peer for ticket in tickets for o in answered(for_route(BLOCKS, HERE, ticket), dht.read)}
    assert read == {o.peer for o in offers}


def test_what_is_read_does_not_grow_with_the_number_of_peers() -> None:
    sizes, written = [], []
    for count in (400, 3000):
        dht, offers = Dht(), crowd(count, 6)
        dht.settle(offers)
        written.append(max(len(dht.publish(offer)) for offer in offers[:20]))
        sizes.append(len(answered(for_route(BLOCKS, offers[0].coordinate, lot(offers[0].peer)), dht.read)))
    assert sizes[1] < 1.2 * sizes[0]
    assert max(sizes) < 600
    assert max(written) <= 2 * (1 + 2 + len(CELLS) + 2)


def test_near_peers_are_read_by_those_who_are_near() -> None:
    dht, offers = Dht(), crowd(1000, 7)
    dht.settle(offers)
    place = offers[0].coordinate
    near = {o.peer for o in offers if cells_of(o.coordinate)[-1] == cells_of(place)[-1]}
    read = answered(for_route(BLOCKS, place, 0), dht.read)
    assert sum(o.peer in near for o in read) > len(read) / 2
    assert not uncovered(read, BLOCKS)


@pytest.mark.parametrize("state", [State.JOINING, State.DRAINING])
def test_who_does_not_serve_is_not_read_by_those_who_are_near_but_by_those_who_count(state: State) -> None:
    dht, offers = Dht(), crowd(300, 8)
    offers[0] = replace(offers[0], state=state)
    dht.settle(offers[1:])
    dht.publish(offers[0])
    assert not [t for t, found in dht.tables.items() if offers[0].peer in found and t.name.partition("/")[0]]
    parts = answered(for_survey(BLOCKS, None), dht.read)
    assert offers[0].peer in {o.peer for part in parts for o in part.drawn}


def test_a_sample_tells_about_the_strength_of_all() -> None:
    dht, offers = Dht(), crowd(3000, 9)
    dht.settle(offers)
    chance = random.Random(0)
    parts = answered(for_survey(BLOCKS, [chance.getrandbits(LOT_BITS) for _ in range(16)]), dht.read)
    assert sum(len(part.drawn) for part in parts) < 0.7 * len(offers)
    seen, true = survey_parts(parts), survey(offers, BLOCKS)
    for block in range(2, BLOCKS - 2):
        assert seen.strength[block] == pytest.approx(true.strength[block], rel=0.4)
    mine = next(offer for part in parts for offer in part.drawn if 10 in offer.span)
    assert seen.without(mine.peer).strength[10] < seen.strength[10]


def test_a_glance_shows_holes_and_reads_little() -> None:
    offers = [offer for offer in crowd(600, 11) if 20 not in offer.span]
    dht = Dht()
    dht.settle(offers)
    parts = answered(for_survey(BLOCKS, []), dht.read)
    assert dht.questions == 1
    seen = survey_parts(parts)
    assert seen.has_hole
    assert [block for block in range(BLOCKS) if seen.strength[block] == 0] == [
        block for block in range(BLOCKS) if survey(offers, BLOCKS).strength[block] == 0
    ]


def test_a_block_whose_hosts_were_not_drawn_still_has_them() -> None:
    lonely = replace(an_offer("lonely", 28, 32), num_blocks=BLOCKS)
    others = [replace(offer, span=Span(16, 20)) for offer in crowd(500, 10)]
    dht = Dht()
    dht.settle([lonely, *others])
    tickets = [(~lot(lonely.peer)) % 2**LOT_BITS]  # the slice that is farthest from its own
    seen = survey_parts(answered(for_survey(BLOCKS, tickets), dht.read))
    assert seen.strength[30] == lonely.tokens_per_second
    assert seen.keepers[30] == (lonely.peer,)
    assert seen.is_needed(lonely.peer, lonely.span)
    assert seen.has_hole


@given(st.sampled_from(State), st.booleans(), st.integers(0, 999))
def test_an_offer_is_put_only_where_it_may_lie(state: State, located: bool, seed: int) -> None:
    chance = random.Random(seed)
    offer = replace(crowd(1, seed)[0], state=state)
    offer = offer if located else replace(offer, coordinate=None)
    others = crowd(chance.choice([3, 60]), seed + 1000)
    allowed = set(tables_of(offer))
    assert set(answered(for_offer(offer), lambda tables: dict.fromkeys(tables, others))) <= allowed
    assert next(iter(tables_of(offer))).name == ""
