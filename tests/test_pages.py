"""Which slots are whose: nobody's content is ever in somebody else's, and what is given back is free again."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from peer.kv.pages import Pages, Tables

SIZE = 4


def slots(tables: Tables, row: int) -> list[int]:
    return [slot for run in tables.runs(row, tables.length) for slot in range(*run)]


def test_rows_grow_into_one_run_each_though_they_grow_by_turns() -> None:
    pages = Pages(16, SIZE)
    both = [Tables(pages, name, 1, 20) for name in "ab"]
    for end in range(1, 21):
        for tables in both:
            tables.grow(end - 1, end)
    assert [tables.runs(0, 20) for tables in both] == [[(0, 20)], [(20, 40)]]
    assert pages.used == 10


def test_where_no_room_is_left_in_one_piece_a_row_is_in_several() -> None:
    pages = Pages(4, SIZE)
    first, second, third = (Tables(pages, name, 1, SIZE) for name in "abc")
    for tables in (first, second, third):
        tables.grow(0, SIZE)
    second.close()
    long = Tables(pages, "d", 1, 2 * SIZE)
    long.grow(0, 2 * SIZE)
    assert sorted(slots(long, 0)) == [4, 5, 6, 7, 12, 13, 14, 15]
    with pytest.raises(MemoryError):
        long.grow(2 * SIZE, 3 * SIZE)


def test_beams_share_pages_until_one_of_them_writes() -> None:
    pages = Pages(16, SIZE)
    tables = Tables(pages, "a", 3, 32)
    tables.set_rows(1)
    tables.grow(0, 6)
    tables.reorder([0, 0, 0])
    assert pages.used == 2
    before = tables.runs(0, 6)
    assert [tables.runs(row, 6) for row in range(3)] == [before] * 3
    copies = tables.grow(6, 7)
    assert pages.used == 4  # the full page is everybody's, the last one each row's own
    assert [(end - start) for (start, end), _ in copies] == [2, 2]  # the row that was left alone with it copies nothing
    assert len({tables.pages(row)[0] for row in range(3)}) == 1
    assert len({tables.pages(row)[1] for row in range(3)}) == 3


def test_a_rollback_gives_pages_back() -> None:
    pages = Pages(8, SIZE)
    tables = Tables(pages, "a", 1, 32)
    tables.grow(0, 30)
    tables.truncate(9)
    assert (pages.used, tables.length) == (3, 9)
    tables.close()
    assert pages.used == 0


def test_who_is_asked_for_spare_pages_is_asked_only_when_none_is_free() -> None:
    pages = Pages(2, SIZE)
    cached = Tables(pages, "cache", 1, SIZE)
    cached.grow(0, SIZE)
    asked = list[int]()

    def spare() -> bool:
        asked.append(pages.used)
        cached.close()
        return len(asked) == 1

    pages.spare = spare
    tables = Tables(pages, "a", 1, 3 * SIZE)
    tables.grow(0, SIZE)
    assert asked == []
    tables.grow(SIZE, 2 * SIZE)
    assert asked == [2]
    with pytest.raises(MemoryError):
        tables.grow(2 * SIZE, 3 * SIZE)


actions = st.lists(
    st.one_of(
        st.tuples(st.just("grow"), st.integers(0, 2), st.integers(1, 9)),
        st.tuples(st.just("back"), st.integers(0, 2), st.integers(0, 30)),
        st.tuples(st.just("beams"), st.integers(0, 2), st.integers(0, 26)),
        st.tuples(st.just("end"), st.integers(0, 2), st.just(0)),
    ),
    max_size=40,
)


@given(actions)
def test_what_was_written_stays_until_its_row_overwrites_it(steps: list[tuple[str, int, int]]) -> None:
    """A model of the pool's memory, written as a stage would write it."""
    rows, pages = 3, Pages(64, SIZE)
    memory: dict[int, object] = {}
    sessions = [Tables(pages, name, rows, 20) for name in range(3)]
    contents: list[list[list[object]]] = [[[] for _ in range(rows)] for _ in range(3)]
    for tables in sessions:
        tables.set_rows(rows)
    for action, which, amount in steps:
        tables, content = sessions[which], contents[which]
        if action == "grow":
            start, end = tables.length, min(tables.length + amount, 28)
            for (first, last), target in tables.grow(start, end):
                memory.update({target + index: memory[first + index] for index in range(last - first)})
            for row in range(rows):
                content[row] = [*content[row][:start], *(object() for _ in range(end - start))]
                for position, slot in enumerate(slots(tables, row)):
                    if position >= start:
                        memory[slot] = content[row][position]
        elif action == "back":
            tables.truncate(amount)
            content[:] = [row[:amount] for row in content]
        elif action == "beams":
            picks = [amount % 3, amount // 3 % 3, amount // 9 % 3]
            tables.reorder(picks)
            content[:] = [list(content[pick]) for pick in picks]
        else:
            tables.close()
            sessions[which] = Tables(pages, object(), rows, 20)
            sessions[which].set_rows(rows)
            content[:] = [[] for _ in range(rows)]
        for each, held in zip(sessions, contents, strict=True):
            for row in range(rows):
                assert [memory[slot] for slot in slots(each, row)] == held[row]
    for tables in sessions:
        tables.close()
    assert pages.used == 0
