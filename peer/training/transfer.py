"""State to a newcomer, streamed while training goes on: a copy of the beginning of a round, and every step after it.

The donor copies its state once, lets the newcomer pull it piece by piece, and keeps the mean gradients of the rounds
that end meanwhile until these are pulled too, in the bytes in which replicas sent them to each other: a newcomer takes
as much of the donor's link as one more replica would. So it catches up without anyone waiting for it.
"""

from __future__ import annotations

import asyncio
import hashlib
import logging
import os
from collections.abc import AsyncIterator, Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import TypeVar

import msgspec
import torch

from peer.training.codecs import CODECS, Chunk, Coded, size_of, vectors_of
from swarm import tensors
from swarm.agreement.messages import (
    MAX_STATE_TENSORS,
    CloseState,
    CodedChunk,
    Decision,
    Entry,
    NextStep,
    OpenState,
    ReadState,
    StateOpened,
    StateRead,
    StepMade,
)
from swarm.errors import BadTensor, Busy, DeadlineExceeded, Forgotten, Malformed, StaleRound
from swarm.rpc import Link, Reply, Rpc
from swarm.wire import Key

log = logging.getLogger(__name__)

PIECE = 1 << 21  # bytes that are pulled at once
WINDOW = 3  # pulls under way
MAX_TRANSFERS = 2  # that one donor serves at once
MAX_BEHIND = 4  # rounds that a newcomer may be behind, and more while their mean gradients are less than the state
MAX_LIST = 1 << 23  # bytes of a list of tensors
IDLE = 30.0  # seconds without a word, after which a transfer is forgotten
OPEN_TIMEOUT = 120.0  # seconds for the donor to copy its state
READ_TIMEOUT = 60.0  # seconds for one piece
NEXT_TIMEOUT = 20.0  # seconds for a round to end, before it is asked for again

Named = list[tuple[str, torch.Tensor]]
T = TypeVar("T")


def digest_of_state(round_: int, state: Iterable[tuple[str, torch.Tensor]]) -> bytes:
    """SHA-256 of names, dtypes, shapes and bytes: equal for replicas that will make equal steps."""
    found = hashlib.sha256(str(round_).encode())
    for name, tensor in state:
        found.update(f"\0{name}\0{tensor.dtype}\0{list(tensor.shape)}\0".encode())
        found.update(tensors.to_bytes(tensor))
    return found.digest()


# --- the donor's side ------------------------------------------------------------------------------------------------


@dataclass(slots=True)
class _Transfer:
    used: float  # when the newcomer was last heard
    state: list[memoryview] = field(default_factory=list)
    length: int = 0
    steps: dict[int, tuple[Decision, Coded]] = field(default_factory=dict)

    def hold(self, state: Iterable[memoryview]) -> None:
        self.state = list(state)
        self.length = sum(map(len, self.state))

    @property
    def is_too_slow(self) -> bool:
        """Whether it would have been quicker to begin anew."""
        return len(self.steps) > MAX_BEHIND and sum(size_of(mean) for _, mean in self.steps.values()) > self.length


class Donor:
    """Gives this member's state to newcomers.

    Args:
        copy: the round that is collected, a copy of the state at its beginning, and its digest.
        line: the line of the run, None while there is none.
    """

    def __init__(
        self,
        rpc: Rpc,
        copy: Callable[[], asyncio.Future[tuple[int, Named, bytes]]],
        line: Callable[[], bytes | None],
    ) -> None:
        self._copy = copy
        self._line = line
        self._transfers: dict[bytes, _Transfer] = {}
        self._stepped = asyncio.Condition()
        self._loop = asyncio.get_running_loop()
        rpc.answer(OpenState, self._open)
        rpc.answer(ReadState, self._read)
        rpc.answer(NextStep, self._next)
        rpc.listen(CloseState, self._close)

    @property
    def followed(self) -> bool:
        """Whether the next step will be asked for."""
        self._forget_idle()
        return bool(self._transfers)

    async def stepped(self, decision: Decision, mean: Coded) -> None:
        """A round has ended; `mean` is the gradient of its step, which this keeps. Newcomers are told."""
        for key, transfer in list(self._transfers.items()):
            transfer.steps[decision.round] = decision, mean
            if transfer.is_too_slow:
                log.info("a newcomer is too slow transfer=%s", key.hex()[:8])
                del self._transfers[key]
        async with self._stepped:
            self._stepped.notify_all()

    async def _open(self, link: Link, message: OpenState, body: memoryview) -> Reply:
        self._forget_idle()
        if message.line != self._line():
            raise StaleRound("this member holds no state of that run")
        if len(self._transfers) >= MAX_TRANSFERS:
            raise Busy(f"{MAX_TRANSFERS} newcomers are served already")
        key = os.urandom(16)
        transfer = self._transfers[key] = _Transfer(self._loop.time())  # from now on, it is told of every step
        try:
            round_, state, digest = await self._copy()
        except BaseException:
            del self._transfers[key]
            raise
        transfer.hold(tensors.to_bytes(tensor) for _, tensor in state)
        listed = msgspec.msgpack.encode([Entry(name, tensors.spec_of(tensor)) for name, tensor in state])
        return StateOpened(key, round_, transfer.length, digest), [listed]

    async def _read(self, link: Link, message: ReadState, body: memoryview) -> Reply:
        transfer = self._of(message.transfer)
        if message.step < 0:
            return StateRead(), _slice(transfer.state, message.start, message.count)
        step = transfer.steps.get(message.step)
        if step is None:
            raise Forgotten(f"the step of round {message.step} is not kept")
        views = [chunk.body for chunks in step[1].values() for chunk in chunks]
        return StateRead(), _slice(views, message.start, message.count)

    async def _next(self, link: Link, message: NextStep, body: memoryview) -> Reply:
        transfer = self._of(message.transfer)
        for earlier in [each for each in transfer.steps if each < message.round]:
            del transfer.steps[earlier]
        async with self._stepped:
            await self._stepped.wait_for(
                lambda: message.round in transfer.steps or message.transfer not in self._transfers
            )
        self._of(message.transfer)
        decision, mean = transfer.steps[message.round]
        chunks = [(group, chunk) for group, chunks in mean.items() for chunk in chunks]
        listed = [CodedChunk(group, chunk.dtype, chunk.count, len(chunk.body)) for group, chunk in chunks]
        return StepMade(decision), [msgspec.msgpack.encode(listed)]

    def _of(self, key: bytes) -> _Transfer:
        transfer = self._transfers.get(key)
        if transfer is None:
            raise Forgotten("no such transfer: it took too long, or ended")
        transfer.used = self._loop.time()
        return transfer

    def _close(self, link: Link, message: CloseState, body: memoryview) -> None:
        self._transfers.pop(message.transfer, None)

    def _forget_idle(self) -> None:
        for key, transfer in list(self._transfers.items()):
            if transfer.steps and self._loop.time() - transfer.used > IDLE:
                del self._transfers[key]


def _slice(views: list[memoryview], start: int, count: int) -> list[memoryview]:
    """Bytes [start, start + count) of views laid one after another."""
    pieces, begin = [], 0
    for view in views:
        low, high = max(start - begin, 0), min(start + count - begin, len(view))
        if low < high:
            pieces.append(view[low:high])
        begin += len(view)
    return pieces


# --- the newcomer's side ---------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Step:
    """How a round ended at the donor, and the mean gradient where it ended in a step: as it came, and its values."""

    decision: Decision
    coded: Coded
    mean: dict[str, torch.Tensor]


class Fetched:
    """A state that came from a donor, and what follows it. Raises what `Link.call` raises."""

    def __init__(self, link: Link, opened: StateOpened, state: Named) -> None:
        self._link = link
        self.peer = link.peer
        self._transfer: Key = opened.transfer
        self.round = opened.round
        self.state = state
        self.digest = opened.digest
        self._length = opened.length

    @classmethod
    async def open(cls, link: Link, line: bytes, like: Named) -> Fetched:
        """Pull the state of the member at the other end.

        Raises `BadTensor` where its tensors are not such as those that are held here, `like`, before any is pulled; and
        where the state is not what its digest says.
        """
        opened, listed = await link.call(OpenState(line), timeout=OPEN_TIMEOUT)
        if not isinstance(opened, StateOpened):
            raise Malformed("a state that is none", link.peer)
        entries = _entries(listed, opened.length, link)
        if [(entry.name, entry.spec) for entry in entries] != [(name, tensors.spec_of(held)) for name, held in like]:
            raise BadTensor("the state of another stage: it has other tensors", link.peer)
        state = [
            (entry.name, torch.empty(entry.spec.shape, dtype=tensors.dtype_of(entry.spec.dtype))) for entry in entries
        ]
        await _pull(link, opened.transfer, -1, [tensor for _, tensor in state])
        if await asyncio.to_thread(digest_of_state, opened.round, state) != opened.digest:
            raise BadTensor("a state that is not what its digest says", link.peer)
        return cls(link, opened, state)

    async def steps(self, is_over: Callable[[int], bool]) -> AsyncIterator[Step]:
        """Every step after it, as it is made; `is_over`: whether a round is known to have ended elsewhere."""
        round_ = self.round
        while True:
            late = is_over(round_)
            try:
                made, listed = await self._link.call(NextStep(self._transfer, round_), timeout=NEXT_TIMEOUT)
            except DeadlineExceeded:
                if late:
                    raise
                continue
            if not isinstance(made, StepMade) or made.decision.round != round_:
                raise Malformed("a step that is none", self._link.peer)
            chunks = _chunks(listed, self._link)
            if sum(chunk.size for chunk in chunks) > self._length:
                raise Malformed("a mean gradient that is larger than the state", self._link.peer)
            coded = await self._mean(round_, chunks)
            yield Step(made.decision, coded, await asyncio.to_thread(vectors_of, coded))
            round_ += 1

    async def _mean(self, round_: int, chunks: list[CodedChunk]) -> Coded:
        bodies = [torch.empty(chunk.size, dtype=torch.uint8) for chunk in chunks]
        await _pull(self._link, self._transfer, round_, bodies)
        coded: dict[str, list[Chunk]] = {}
        for chunk, body in zip(chunks, bodies, strict=True):
            coded.setdefault(chunk.group, []).append(Chunk(chunk.dtype, chunk.count, tensors.to_bytes(body)))
        return coded

    def close(self) -> None:
        """It is needed no longer."""
        self._link.tell(CloseState(self._transfer))


def _list_of(kind: type[T], listed: memoryview, link: Link) -> list[T]:
    if len(listed) > MAX_LIST:
        raise Malformed(f"a list of tensors of {len(listed)} bytes", link.peer)
    try:
        return msgspec.msgpack.decode(listed, type=list[kind])  # type: ignore[valid-type]
    except msgspec.MsgspecError as error:
        raise Malformed(f"not a list of tensors: {error}", link.peer) from None


def _chunks(listed: memoryview, link: Link) -> list[CodedChunk]:
    chunks = _list_of(CodedChunk, listed, link)
    if any(chunk.dtype not in CODECS or chunk.count > chunk.size for chunk in chunks):
        raise Malformed("a mean gradient in a code that there is not", link.peer)
    return chunks


def _entries(listed: memoryview, length: int, link: Link) -> list[Entry]:
    entries = _list_of(Entry, listed, link)
    if len(entries) > MAX_STATE_TENSORS or sum(entry.spec.nbytes() for entry in entries) != length:
        raise Malformed("a list of tensors that does not fit its state", link.peer)
    return entries


async def _pull(link: Link, transfer: bytes, step: int, into: Sequence[torch.Tensor]) -> None:
    """Fill `into`, whose bytes lie one after another at the other end, a few pieces at a time."""
    pieces = _pieces(into)

    async def some() -> None:
        for start, piece in pieces:
            _, body = await link.call(ReadState(transfer, step, start, len(piece)), timeout=READ_TIMEOUT)
            if len(body) != len(piece):
                raise Malformed(f"{len(body)} bytes of a state where {len(piece)} were asked for", link.peer)
            piece[:] = body

    await asyncio.gather(*(some() for _ in range(WINDOW)))


def _pieces(into: Sequence[torch.Tensor]) -> Iterator[tuple[int, memoryview]]:
    """The memory of tensors, at most `PIECE` bytes at a time, and where these bytes lie among all."""
    before = 0
    for view in map(tensors.to_bytes, into):
        for start in range(0, len(view), PIECE):
            piece = view[start : start + PIECE]
            yield before + start, piece
        before += len(view)
