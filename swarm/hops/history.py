"""What was passed on in a session: enough to bring another peer to the same place (upstream backup).

Cf. Hwang et al. 2005, "High-Availability Algorithms for Distributed Stream Processing": the operator upstream keeps
what it sent, and replays it to a replacement of the one that died. Here the client keeps what it sent to the first
hop, and every hop what it sent to the next.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import NamedTuple

import torch

_CHANGES = 1024  # steps of which it is remembered what they changed: who is further behind begins anew


class Mark(NamedTuple):
    """How far a peer is in a session: what it holds is known by it."""

    number: int = 0  # of the last step that it has run
    length: int = 0  # positions that it held then


@dataclass(slots=True)
class Piece:
    """Some positions of a session, as they were passed on. B rows, N positions, H hidden size."""

    position: int
    hidden: torch.Tensor  # [B, N, H]
    position_ids: torch.Tensor | None = None  # [B, N]
    mask: torch.Tensor | None = None  # [B, N]
    rows: list[int] | None = None  # [B], which rows of the step it builds on its rows continue; None for the same
    index: torch.Tensor | None = None  # [B'], which of `hidden`'s rows are now which; None while nobody moved them
    since: int = 0  # the step that it builds on, where it is sent again

    @property
    def end(self) -> int:
        """The position after the last."""
        return self.position + self.hidden.shape[1]


class _Change(NamedTuple):
    """What a step did to those before it."""

    since: int  # the step before
    number: int
    position: int  # from here on, it is the content
    rows: torch.Tensor | None  # and before, these rows of what was


class History:
    """The content of a session up to now, through rollbacks and reordered rows.

    Attributes:
        number: of the last step that was recorded.
        length: positions held, from 0 on.
        nbytes: what the hidden states take.
    """

    def __init__(self) -> None:
        self._pieces: list[Piece] = []
        self._changes: deque[_Change] = deque(maxlen=_CHANGES)
        self.number = 0
        self.length = 0
        self.nbytes = 0

    @property
    def mark(self) -> Mark:
        """How far it is itself."""
        return Mark(self.number, self.length)

    def record(self, number: int, piece: Piece, since: int | None = None) -> None:
        """Take a step as the session's content from its position on. Twice the same step is as once.

        `since` is the step that it builds on, None for the one before. Raises `ValueError` where that is not the last.
        """
        base = number - 1 if since is None else since
        if piece.position and self.number not in (base, number):
            raise ValueError(f"step {number} builds on step {base}, and {self.number} was the last")
        self.truncate(piece.position)
        if number != self.number:
            rows = torch.tensor(piece.rows) if piece.rows is not None and piece.position else None
            if rows is not None:
                self._reorder(rows)
            self._changes.append(_Change(base, number, piece.position, rows))
        self._pieces.append(replace(piece, rows=None))
        self.number, self.length = number, piece.end
        self.nbytes += piece.hidden.nbytes

    def truncate(self, length: int) -> None:
        """Forget what lies after `length` positions. Raises `ValueError` for a gap."""
        if length > self.length:
            raise ValueError(f"a history of {self.length} positions cannot go on at {length}")
        while self._pieces and self._pieces[-1].end > length:
            piece = self._pieces.pop()
            self.nbytes -= piece.hidden.nbytes
            if piece.position < length:
                kept = _cut(piece, piece.position, length)
                self._pieces.append(kept)
                self.nbytes += kept.hidden.nbytes
        self.length = length

    def _reorder(self, rows: torch.Tensor) -> None:
        for piece in self._pieces:
            piece.index = rows if piece.index is None else piece.index[rows]

    def update(self, mark: Mark, end: int, most: int) -> Iterator[Piece]:
        """What brings a peer from `mark` to position `end`, in pieces of `most` at most: to be sent as `self.number`.

        Steps in which each position came alone are put together: a replay runs at the speed of a prefill. What lies
        before them stays; where rows have moved since, the first piece says how. It builds on the step at `mark`, and
        each of the others on the one before it, which has the same number.
        """
        start, rows = self._kept_since(mark.number)
        start = min(start, mark.length, end)
        if start == end and mark.number != self.number:
            start = max(0, start - 1)  # there is nothing new but the number
        moved = rows.tolist() if rows is not None and start else None
        since = mark.number
        for piece in self.pieces(start, end, most):
            yield replace(piece, rows=moved, since=since)
            moved, since = None, self.number

    def _kept_since(self, number: int) -> tuple[int, torch.Tensor | None]:
        """How many positions of step `number` are still content, and which of its rows are now which."""
        start, rows, expected = self.length, None, self.number
        for change in reversed(self._changes):
            if expected <= number:
                break
            start = min(start, change.position)
            if change.rows is not None:
                rows = change.rows if rows is None else change.rows[rows]
            expected = change.since
        return (start, rows) if expected == number else (0, None)

    def pieces(self, start: int, end: int, most: int) -> Iterator[Piece]:
        """The content from `start` to `end`, in pieces of `most` positions at most."""
        held = [
            _cut(piece, max(piece.position, start), min(piece.end, end))
            for piece in self._pieces
            if piece.end > start and piece.position < end
        ]
        if not held:
            return
        whole = _joined(held)
        for first in range(start, end, most):
            yield _cut(whole, first, min(first + most, end))

    def __repr__(self) -> str:
        return f"<History step={self.number} length={self.length} bytes={self.nbytes}>"


def _cut(piece: Piece, start: int, end: int) -> Piece:
    here = slice(start - piece.position, end - piece.position)
    return replace(
        piece,
        position=start,
        hidden=piece.hidden[:, here],
        position_ids=None if piece.position_ids is None else piece.position_ids[:, here],
        mask=None if piece.mask is None else piece.mask[:, here],
    )


def _joined(pieces: list[Piece]) -> Piece:
    settled = [_settled(piece) for piece in pieces]
    hidden = torch.cat([piece.hidden for piece in settled], dim=1)
    ids: torch.Tensor | None = None
    mask: torch.Tensor | None = None
    if any(piece.position_ids is not None for piece in settled):
        ids = torch.cat([_ids(piece) for piece in settled], dim=1)
    if any(piece.mask is not None for piece in settled):
        mask = torch.cat([_mask(piece) for piece in settled], dim=1)
    return Piece(pieces[0].position, hidden, ids, mask)


def _settled(piece: Piece) -> Piece:
    if (index := piece.index) is None:
        return piece
    ids = None if piece.position_ids is None else piece.position_ids[index]
    mask = None if piece.mask is None else piece.mask[index]
    return Piece(piece.position, piece.hidden[index.to(piece.hidden.device)], ids, mask)


def _ids(piece: Piece) -> torch.Tensor:
    if piece.position_ids is not None:
        return piece.position_ids
    return torch.arange(piece.position, piece.end).expand(piece.hidden.shape[0], -1)


def _mask(piece: Piece) -> torch.Tensor:
    if piece.mask is not None:
        return piece.mask
    return torch.ones(piece.hidden.shape[0], piece.hidden.shape[1], dtype=torch.uint8)
