"""Documents to samples: tokenised, packed to one length, in an order that follows from the run's seed alone.

Every sample has a position in one global order, so that whoever reads the same data finds the same sample there: a
micro-batch means the same wherever it is done, and done again it is the same.
"""

from __future__ import annotations

import hashlib
import itertools
from collections import OrderedDict
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
import torch

from swarm.errors import UsageError
from swarm.runs.corpus import documents, is_stream
from swarm.runs.run import IGNORED, Run

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_BATCH = 64  # documents that are tokenised together
_KEPT_ROUNDS = 4  # of a stream's samples, so many rounds are kept to be asked for again


@dataclass(frozen=True, slots=True)
class Batch:
    """Some samples. B samples, N positions."""

    ids: torch.Tensor  # [B, N] of int64
    labels: torch.Tensor  # [B, N] of int64
    position_ids: torch.Tensor | None  # [B, N] of int64, beginning anew at each document; None where texts are joined


class Packed(Protocol):
    """Samples by their number, before any shuffling: each an array [N] of tokens and one [N] of positions."""

    def __getitem__(self, number: int) -> tuple[np.ndarray, np.ndarray]: ...


class Samples:
    """The samples of a run, by round and micro-batch.

    Attributes:
        size: how many samples an epoch has; None for a stream, whose end nobody knows.
    """

    def __init__(self, run: Run, tokenizer: PreTrainedTokenizerBase) -> None:
        """Reads all there is, unless it is a stream. Raises `UsageError` where that is not enough."""
        self._run = run
        self._held_out = run.data.held_out
        self._order: tuple[int, np.ndarray] | None = None
        self.size: int | None = None
        self._packed: Packed
        if is_stream(run.data):
            self._packed = _Streamed(run, tokenizer)
            return
        finite = _Finite(run, tokenizer)
        self._packed, self.size = finite, len(finite) - self._held_out
        if self.size < 1:
            raise UsageError(
                f"data.source: {run.data.source} makes {len(finite)} samples of {run.batch.sequence_length} tokens, "
                f"of which {self._held_out} are held out: too little to learn from"
            )

    def micro_batch(self, round: int, index: int) -> Batch:
        """What micro-batch `index` of a round holds; the same for everybody who asks."""
        start = round * self._run.batch.target
        return self._batch([self._number(start + place) for place in self._run.samples_of(index)])

    def held_out(self) -> Iterator[Batch]:
        """The samples that are kept for evaluation, a micro-batch at a time."""
        count, size = self._run.evaluation.samples, self._run.batch.micro
        first = 0 if self.size is None else self.size
        for start in range(0, count, size):
            yield self._batch([first + number for number in range(start, min(start + size, count))])

    def epoch(self, round: int) -> float:
        """How often all samples have been used when a round begins; 0 for a stream."""
        return round * self._run.batch.target / self.size if self.size else 0.0

    def _number(self, position: int) -> int:
        """Which sample comes at a position of the global order."""
        if self.size is None:
            return self._held_out + position
        epoch, place = divmod(position, self.size)
        if self._order is None or self._order[0] != epoch:
            self._order = epoch, permutation(self.size, self._run.seed, epoch)
        return int(self._order[1][place])

    def _batch(self, numbers: list[int]) -> Batch:
        pairs = [self._packed[number] for number in numbers]
        ids = torch.from_numpy(np.stack([tokens for tokens, _ in pairs]).astype(np.int64))
        if self._run.data.documents == "join":
            return Batch(ids, ids.clone(), None)
        positions = torch.from_numpy(np.stack([places for _, places in pairs]).astype(np.int64))
        return Batch(ids, ids.masked_fill(positions == 0, IGNORED), positions)


def permutation(size: int, seed: int, epoch: int) -> np.ndarray:
    """The order of an epoch. numpy's legacy generator: its streams are frozen, whatever release is installed."""
    digest = hashlib.sha256(f"{seed}\0{epoch}".encode()).digest()
    return np.random.RandomState(np.frombuffer(digest, np.uint32)).permutation(size)


class _Finite:
    """All tokens of a source in memory, four bytes each."""

    def __init__(self, run: Run, tokenizer: PreTrainedTokenizerBase) -> None:
        self._length = run.batch.sequence_length
        texts = list(_tokenised(run, tokenizer))
        if not texts:
            raise UsageError(f"data.source: there is no text in {run.data.source}")
        self._tokens = np.concatenate(texts)
        self._starts = np.cumsum([0, *map(len, texts[:-1])])

    def __len__(self) -> int:
        return len(self._tokens) // self._length

    def __getitem__(self, number: int) -> tuple[np.ndarray, np.ndarray]:
        start = number * self._length
        places = np.arange(start, start + self._length)
        begun = self._starts[np.searchsorted(self._starts, places, side="right") - 1]
        return self._tokens[start : start + self._length], places - np.maximum(begun, start)


class _Streamed:
    """Samples of a stream: they come in order, and the last few are kept. Going further back reads it all again."""

    def __init__(self, run: Run, tokenizer: PreTrainedTokenizerBase) -> None:
        self._run, self._tokenizer = run, tokenizer
        self._kept: OrderedDict[int, tuple[np.ndarray, np.ndarray]] = OrderedDict()
        self._coming = self._begin()
        self._next = 0

    def _begin(self) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        """The samples of epoch after epoch."""
        for epoch in itertools.count():
            found = False
            texts = _tokenised(self._run, self._tokenizer, epoch)
            for sample in _in_pieces(texts, self._run.batch.sequence_length):
                found = True
                yield sample
            if not found:
                raise UsageError(f"data.source: {self._run.data.source} does not make a single sample")

    def __getitem__(self, number: int) -> tuple[np.ndarray, np.ndarray]:
        held_out = self._run.data.held_out
        if number < self._next and number not in self._kept:
            self._coming, self._next = self._begin(), 0
        while number >= self._next:
            self._kept[self._next] = next(self._coming)
            self._next += 1
            if len(self._kept) > held_out + _KEPT_ROUNDS * self._run.batch.target:
                old = next(kept for kept in self._kept if kept >= held_out)
                del self._kept[old]
        return self._kept[number]


def _in_pieces(texts: Iterator[np.ndarray], length: int) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Samples of `length` tokens and their positions, cut from texts one after another."""
    tokens, places = np.empty(0, np.uint32), np.empty(0, np.int64)
    for text in texts:
        tokens, places = np.concatenate([tokens, text]), np.concatenate([places, np.arange(len(text))])
        while len(tokens) >= length:
            yield tokens[:length], _since_start(places[:length])
            tokens, places = tokens[length:], places[length:]


def _since_start(places: np.ndarray) -> np.ndarray:
    """Positions of a sample that counts the rest of a document it begins with from 0, as if that were a document."""
    (starts,) = np.nonzero(places == 0)
    rest = starts[0] if len(starts) else len(places)
    return np.concatenate([np.arange(rest), places[rest:]])


def _tokenised(run: Run, tokenizer: PreTrainedTokenizerBase, epoch: int = 0) -> Iterator[np.ndarray]:
    """The tokens of each document, with the token that ends a text after it."""
    end: Any = tokenizer.eos_token_id
    ending = [] if end is None else [end]
    texts = documents(run.data, run.seed, epoch)
    while some := list(itertools.islice(texts, _BATCH)):
        for ids in tokenizer(some, add_special_tokens=False, verbose=False)["input_ids"]:
            yield np.array([*ids, *ending], np.uint32)
