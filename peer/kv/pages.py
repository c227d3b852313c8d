"""Which slots of the KV pool hold which positions of which row: fixed-size pages, a table of them per row.

Cf. Kwon et al. 2023, "Efficient Memory Management for Large Language Model Serving with PagedAttention". Beams share
pages by reference and copy one only before writing into it. Beyond that, pages of a row are sought one after another,
so that on most days what a row holds is one run of slots and can be read without being gathered: a session claims as
many consecutive pages as it may grow to, and others stay off them while there is room elsewhere. Pure.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterable, Sequence

Run = tuple[int, int]
"""Consecutive slots: the first, and the one after the last."""

Copy = tuple[Run, int]
"""Slots, and the first of those that are to hold the same."""

_FREE, _CLAIMED, _USED = 0, 1, 2


class Pages:
    """All pages of one pool, and how many tables each is in.

    Args:
        count: how many.
        size: positions in a page.
    """

    def __init__(self, count: int, size: int) -> None:
        self.count = count
        self.size = size
        self.used = 0
        self.spare: Callable[[], bool] = lambda: False  # asked for a page when none is free: whether it gave some
        self._states = bytearray(count)
        self._references = [0] * count
        self._claims: dict[Hashable, list[Run]] = {}  # whose page numbers

    def claim(self, owner: Hashable, count: int) -> None:
        """Ask others to stay off `count` consecutive pages; nothing happens where there are not so many."""
        start = self._states.find(bytes(count)) if count else -1
        if start >= 0:
            self._states[start : start + count] = bytes([_CLAIMED]) * count
            self._claims.setdefault(owner, []).append((start, start + count))

    def unclaim(self, owner: Hashable) -> None:
        """Its pages go to whoever needs one."""
        for start, end in self._claims.pop(owner, []):
            for page in range(start, end):
                if self._states[page] == _CLAIMED:
                    self._states[page] = _FREE

    def take(self, owner: Hashable, after: int | None) -> int:
        """A page for `owner`: the one after page `after` if it can be had.

        Raises:
            MemoryError: none is left, which leases see to that it does not happen.
        """
        page = self._choose(owner, after)
        while page < 0:
            if not self.spare():
                raise MemoryError(f"all {self.count} pages are in use")
            page = self._choose(owner, after)
        self._states[page] = _USED
        self._references[page] = 1
        self.used += 1
        return page

    def _choose(self, owner: Hashable, after: int | None) -> int:
        claims = self._claims.get(owner, ())
        if after is not None and after + 1 < self.count:
            state = self._states[after + 1]
            mine = any(start <= after + 1 < end for start, end in claims)
            if state == _FREE or (state == _CLAIMED and mine):
                return after + 1
        for start, end in claims:
            if (page := self._states.find(_CLAIMED, start, end)) >= 0:
                return page
        page = self._states.find(_FREE)
        return page if page >= 0 else self._states.find(_CLAIMED)

    def share(self, page: int) -> None:
        """One more table has it."""
        self._references[page] += 1

    def is_shared(self, page: int) -> bool:
        """Whether more than one table has it."""
        return self._references[page] > 1

    def give(self, page: int) -> None:
        """A table has it no longer."""
        self._references[page] -= 1
        if self._references[page] == 0:
            self.used -= 1
            claimed = any(start <= page < end for runs in self._claims.values() for start, end in runs)
            self._states[page] = _CLAIMED if claimed else _FREE

    def __repr__(self) -> str:
        return f"<Pages used={self.used}/{self.count} of {self.size}>"


class Tables:
    """The pages of one session's rows. Every row has as many positions."""

    def __init__(self, pages: Pages, owner: Hashable, rows: int, length: int) -> None:
        self.length = 0
        self._pages = pages
        self._owners = [(owner, row) for row in range(rows)]
        self._tables: list[list[int]] = [[] for _ in range(rows)]
        for row in self._owners:
            pages.claim(row, -(-length // pages.size))

    def set_rows(self, rows: int) -> None:
        """So many rows, and nothing in them."""
        self.truncate(0)
        self._tables = [[] for _ in range(rows)]

    def truncate(self, length: int) -> None:
        """Only the first `length` positions are still needed."""
        keep = -(-length // self._pages.size)
        for table in self._tables:
            for page in table[keep:]:
                self._pages.give(page)
            del table[keep:]
        self.length = min(self.length, length)

    def reorder(self, rows: Sequence[int]) -> None:
        """Let row i be what row `rows[i]` was: by reference."""
        before = self._tables
        self._tables = [list(before[row]) for row in rows]
        for page in (page for table in self._tables for page in table):
            self._pages.share(page)
        for page in (page for table in before for page in table):
            self._pages.give(page)

    def adopt(self, pages: Iterable[int]) -> None:
        """The only row, which is at the end of a page, goes on with these, which others hold too."""
        assert len(self._tables) == 1
        assert self.length == len(self._tables[0]) * self._pages.size
        for page in pages:
            self._pages.share(page)
            self._tables[0].append(page)
        self.length = len(self._tables[0]) * self._pages.size

    def grow(self, start: int, end: int) -> list[Copy]:
        """Have room of their own for positions `start` to `end` in every row; returns what to copy before writing."""
        size, copies = self._pages.size, list[Copy]()
        for owner, table in zip(self._owners, self._tables, strict=False):
            for index in range(start // size, min(-(-end // size), len(table))):
                if self._pages.is_shared(page := table[index]):
                    table[index] = self._pages.take(owner, table[index - 1] if index else None)
                    self._pages.give(page)
                    if index * size < start:
                        copies.append(((page * size, page * size + start - index * size), table[index] * size))
            while len(table) * size < end:
                table.append(self._pages.take(owner, table[-1] if table else None))
        self.length = end
        return copies

    def pages(self, row: int) -> list[int]:
        """The numbers of a row's pages."""
        return self._tables[row]

    def runs(self, row: int, length: int) -> list[Run]:
        """The slots of the first `length` positions of a row, in order."""
        size, found, first, position = self._pages.size, list[Run](), 0, 0
        table = self._tables[row]
        while position < length:
            last = first
            while last + 1 < len(table) and table[last + 1] == table[last] + 1:
                last += 1
            count = min((last + 1 - first) * size, length - position)
            found.append((table[first] * size, table[first] * size + count))
            position += count
            first = last + 1
        return found

    def close(self) -> None:
        """Give all of them back."""
        self.truncate(0)
        for owner in self._owners:
            self._pages.unclaim(owner)

    def __repr__(self) -> str:
        return f"<Tables {self._tables} length={self.length}>"
