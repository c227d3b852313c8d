"""Beginnings that a stage still holds, to be used again by sessions of the same client that begin alike.

Every full page of a session is known by a digest of all hidden states that came in up to its end, and of who sent
them: what is compared is what arrives, so that a client has to send a beginning to have its pages, and none can have
another's. With a page goes what the stage made of it, which the next hop is to be told. Entries outlive their session
until their pages are needed. Cf. Zheng et al. 2024, "SGLang" (RadixAttention), with a chain of hashes for the tree.
"""

from __future__ import annotations

import hashlib
from collections import OrderedDict
from dataclasses import dataclass, field

import torch

from peer.kv.pages import Pages


@dataclass(slots=True)
class Trail:
    """What came in a session of one row up to now. It ends where that is not known to the byte any more.

    Attributes:
        digests: of all up to the end of each full page; the first is of who it is.
        heads, tails: since the last full page: what came in and what came out, [1, n, H] each.
    """

    digests: list[bytes]
    heads: list[torch.Tensor] = field(default_factory=list)
    tails: list[torch.Tensor] = field(default_factory=list)

    @classmethod
    def of(cls, *owner: object) -> Trail:
        """An empty one."""
        return cls([hashlib.blake2b(repr(owner).encode(), digest_size=32).digest()])

    def rest(self) -> int:
        """Positions since the last full page."""
        return sum(head.shape[1] for head in self.heads)

    def truncate(self, length: int, page: int) -> bool:
        """Only `length` positions still count; False where the pages do not end there and it cannot go on."""
        full = len(self.digests) - 1
        if length >= full * page:
            keep = length - full * page
            if keep == self.rest():
                return True
            self.heads, self.tails = _cut(self.heads, keep), _cut(self.tails, keep)
            return self.rest() == keep
        del self.digests[length // page + 1 :]
        self.heads, self.tails = [], []
        return length % page == 0

    def next(self, hidden: torch.Tensor) -> bytes:
        """The digest after one more page with these hidden states, [1, page, H]."""
        data = memoryview(hidden.contiguous().view(torch.uint8).numpy())  # type: ignore[arg-type]
        return hashlib.blake2b(data, key=self.digests[-1], digest_size=32).digest()


class Prefixes:
    """The pages that can be used again, the one that was not used for longest first."""

    def __init__(self, pages: Pages) -> None:
        self._pages = pages
        self._known: OrderedDict[bytes, tuple[int, torch.Tensor]] = (
            OrderedDict()
        )  # page, and [1, page, H] that came out
        pages.spare = self.release

    def __len__(self) -> int:
        return len(self._known)

    def find(self, trail: Trail, hidden: torch.Tensor) -> tuple[list[int], list[torch.Tensor]]:
        """The pages that continue `trail` with the beginning of `hidden` [1, N, H], and what came out of them.

        The trail is then at the end of the last. It has to be at the end of a page.
        """
        pages, outputs, size = list[int](), list[torch.Tensor](), self._pages.size
        for start in range(0, hidden.shape[1] - size + 1, size):
            digest = trail.next(hidden[:, start : start + size])
            if digest not in self._known:
                break
            self._known.move_to_end(digest)
            page, output = self._known[digest]
            pages.append(page)
            outputs.append(output)
            trail.digests.append(digest)
        return pages, outputs

    def add(self, trail: Trail, table: list[int], hidden: torch.Tensor, output: torch.Tensor) -> None:
        """Positions were run: `hidden` [1, N, H] came in and `output` [1, N, H] out; `table` has the row's pages."""
        trail.heads.append(hidden)
        trail.tails.append(output)
        size = self._pages.size
        if trail.rest() < size:
            return
        head, tail = torch.cat(trail.heads, 1), torch.cat(trail.tails, 1)
        full = head.shape[1] // size * size
        for start in range(0, full, size):
            digest = trail.next(head[:, start : start + size])
            page = table[len(trail.digests) - 1]
            trail.digests.append(digest)
            if digest not in self._known:
                self._pages.share(page)
                self._known[digest] = page, tail[:, start : start + size].clone()
            self._known.move_to_end(digest)
        trail.heads, trail.tails = _rest(head, full), _rest(tail, full)

    def release(self) -> bool:
        """Forget the entry that was not used for longest; False where there is none."""
        if not self._known:
            return False
        page, _ = self._known.popitem(last=False)[1]
        self._pages.give(page)
        return True

    def __repr__(self) -> str:
        return f"<Prefixes pages={len(self)}>"


def _rest(joined: torch.Tensor, start: int) -> list[torch.Tensor]:
    return [joined[:, start:].clone()] if start < joined.shape[1] else []


def _cut(pieces: list[torch.Tensor], length: int) -> list[torch.Tensor]:
    """The first `length` positions of them."""
    kept = []
    for piece in pieces:
        if length > 0:
            kept.append(piece[:, :length])
            length -= piece.shape[1]
    return kept
