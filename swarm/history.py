"""What was passed on in a session: enough to bring another peer to the same place (upstream backup).

Cf. Hwang et al. 2005, "High-Availability Algorithms for Distributed Stream Processing": the operator upstream keeps
what it sent, and replays it to a replacement of the one that died. Here the client keeps what it sent to the first
hop, and every hop what it sent to the next.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

import torch


@dataclass(slots=True)
class Piece:
    """Some positions of a session, as they were passed on. B rows, N positions, H hidden size."""

    position: int
    hidden: torch.Tensor  # [B, N, H]
    position_ids: torch.Tensor | None = None  # [B, N]
    mask: torch.Tensor | None = None  # [B, N]
    index: torch.Tensor | None = None  # [B'], which of the rows are now which; None while nobody moved them

    @property
    def end(self) -> int:
        """The position after the last."""
        return self.position + self.hidden.shape[1]


class History:
    """The content of a session up to now, through rollbacks and reordered rows.

    Attributes:
        number: of the last step that was recorded.
        length: positions held, from 0 on.
        nbytes: what the hidden states take.
    """

    def __init__(self) -> None:
        self._pieces: list[Piece] = []
        self.number = 0
        self.length = 0
        self.nbytes = 0
        self._followers: dict[str, int] = {}  # how many positions each was given

    def record(
        self,
        number: int,
        position: int,
        hidden: torch.Tensor,
        rows: list[int] | None = None,
        position_ids: torch.Tensor | None = None,
        mask: torch.Tensor | None = None,
    ) -> None:
        """Take a step as the session's content from `position` on. Twice the same step is as once."""
        self.truncate(position)
        if rows is not None and position and number == self.number + 1:
            self._reorder(torch.tensor(rows))
        self._pieces.append(Piece(position, hidden, position_ids, mask))
        self.number, self.length = number, position + hidden.shape[1]
        self.nbytes += hidden.nbytes

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
        self._followers = {name: min(given, length) for name, given in self._followers.items()}

    def _reorder(self, rows: torch.Tensor) -> None:
        self._followers = dict.fromkeys(self._followers, 0)
        for piece in self._pieces:
            piece.index = rows if piece.index is None else piece.index[rows]

    def follow(self, name: str) -> None:
        """From now on, remember what `name` was given."""
        self._followers.setdefault(name, 0)

    def given(self, name: str) -> int:
        """How many positions `name` was given and still are as they were then; 0 for a stranger."""
        return self._followers.get(name, 0)

    def news(self, name: str, most: int) -> Iterator[Piece]:
        """What `name` was not given yet; it counts as given from now on."""
        start, self._followers[name] = self.given(name), self.length
        return self.pieces(start, self.length, most)

    def pieces(self, start: int, end: int, most: int) -> Iterator[Piece]:
        """What brings a peer that holds `start` positions to `end`, in steps of `most` positions at most.

        Steps in which each position came alone are put together: a replay runs at the speed of a prefill.
        """
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
