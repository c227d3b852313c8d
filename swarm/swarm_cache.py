"""The client's side of a session: what `generate()` takes for the model's cache."""

from __future__ import annotations

import weakref
from typing import Any

import torch

from swarm.background import BackgroundLoop
from swarm.cutting.caches import LengthCache
from swarm.errors import UsageError
from swarm.session import Session
from swarm.speculation.tuning import Tuner
from swarm.types import Route


class SwarmCache(LengthCache):
    """The client's side of one session: made by `generate()`, or by hand to go on where the last call ended.

    Attributes:
        max_length: positions to lease when the session opens; it grows where that is not enough.
        session: None until the first forward.
        tuner: what the session's trips cost and what drafts were worth, and how many tokens they brought.
    """

    is_compileable = False

    def __init__(self, max_length: int = 0) -> None:
        super().__init__()
        self.max_length = max_length
        self.session: Session | None = None
        self.tuner = Tuner()
        self.rows: list[int] | None = None  # which earlier rows the next step's rows continue
        self.padded = False  # whether some position was masked out
        self._inputs: list[torch.Tensor] = []  # the token ids that were run, [B, N] each
        self._finalizer: weakref.finalize[..., Any] | None = None

    @property
    def route(self) -> Route | None:
        """The peers that hold the session."""
        return self.session.route if self.session else None

    def reorder_cache(self, beam_idx: torch.Tensor) -> None:
        """Row i continues what was row `beam_idx[i]`."""
        rows: list[int] = beam_idx.tolist()
        self.rows = rows if self.rows is None else [self.rows[row] for row in rows]
        if (tokens := self.tokens) is not None:
            self._inputs = [tokens[beam_idx.to(tokens.device)]]

    def batch_select_indices(self, indices: torch.Tensor) -> None:
        self.reorder_cache(indices)

    def batch_repeat_interleave(self, repeats: int) -> None:
        if self.length:
            raise UsageError("the rows of a session that has begun cannot be multiplied")

    def crop(self, max_length: int) -> None:
        """Forget all but `max_length` positions or, where it is negative, so many of the last."""
        self.length = min(self.length, max_length) if max_length > 0 else max(0, self.length + max_length)
        if (tokens := self.tokens) is not None:
            self._inputs = [tokens[:, : self.length]]

    def keep_beginning(self, input_ids: torch.Tensor, rewindable: bool) -> None:
        """Forget what is not how the text `input_ids` [B, N] begins; its last token has to be run in any case.

        Where positions cannot be taken back, all of it is forgotten then.
        """
        if (tokens := self.tokens) is None:
            return  # it was given embeddings: whoever did that knows what for
        common, most = 0, min(self.length, input_ids.shape[1] - 1)
        if len(tokens) == len(input_ids):
            same = (tokens[:, :most] == input_ids[:, :most].to(tokens.device)).all(dim=0)
            common = int(same.to(torch.int64).cumprod(dim=0).sum())
        if common < self.length:
            self.crop(common - self.length if rewindable else -self.length)

    def reset(self) -> None:
        self.crop(-self.length)

    def __deepcopy__(self, memo: object) -> SwarmCache:
        raise UsageError("a session cannot be copied; give generate() the whole text, and a SwarmCache() or none")

    def close(self) -> None:
        """Give the leases back. What was cached is gone; garbage collection does the same."""
        if self._finalizer is not None:
            self._finalizer()

    def restart(self) -> torch.Tensor | None:
        """Begin a new session; returns the token ids that the old one was given, which are to be run again."""
        tokens = self.tokens
        self.close()
        self.session, self.length, self.rows, self.padded, self._inputs = None, 0, None, False, []
        return tokens

    def note(self, input_ids: torch.Tensor | None) -> None:
        """Keep the token ids of a forward, so that an error can carry what was generated before it."""
        if input_ids is not None:
            self._inputs.append(input_ids)

    @property
    def tokens(self) -> torch.Tensor | None:
        """The token ids that this session was given, [B, N]: None where it was given embeddings, or rows have moved."""
        if not self._inputs or len({len(ids) for ids in self._inputs}) > 1:
            return None
        return torch.cat(self._inputs, dim=1)

    def bind(self, session: Session, background: BackgroundLoop) -> None:
        """From now on `session` is this cache's, and ends with it."""
        self.session = session
        self._finalizer = weakref.finalize(self, _close_session, session, background)

    def __repr__(self) -> str:
        return f"<SwarmCache at {self.length} session={self.session}>"


def _close_session(session: Session, background: BackgroundLoop) -> None:
    background.post(session.close())
