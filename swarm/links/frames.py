"""Messages to frames and back: no sockets, no clock, no loop (in the manner of h11).

A frame is a head of 16 bytes (kind, stream, header length, body length) and what it announces. A small message is one
WHOLE frame. A large one is a BEGIN frame, which carries the header and says how long the body will be, and CHUNK
frames, between which other messages may go: so a large transfer does not hold up a small step. A RESET frame ends a
stream whose sender gave up.
"""

from __future__ import annotations

import enum
import struct
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple, TypeAlias

from swarm.errors import Malformed, Oversized, ProtocolError
from swarm.links.bodies import body_of
from swarm.wire import MAX_BODY, MAX_HEADER

Buffer: TypeAlias = bytes | bytearray | memoryview

WHOLE_LIMIT = 128 * 1024  # bytes of header and body that still go as one frame
CHUNK = 128 * 1024  # bytes of body in a CHUNK frame, at most
MAX_STREAMS = 64  # large messages on their way at once on one connection

_HEAD = struct.Struct(">B3xIII")


class FrameKind(enum.IntEnum):
    """What a frame carries."""

    WHOLE = 1
    BEGIN = 2
    CHUNK = 3
    HANDSHAKE = 4  # Hello or Proof
    GOODBYE = 5
    RESET = 6


_KINDS = {int(kind): kind for kind in FrameKind}
_GREETINGS = frozenset({FrameKind.HANDSHAKE, FrameKind.GOODBYE})
_MAX_GREETING = 4096  # bytes


class Received(NamedTuple):
    """A message that has come in completely."""

    kind: FrameKind  # WHOLE for every call, however it travelled; else HANDSHAKE or GOODBYE
    header: bytes
    body: memoryview


def whole(kind: FrameKind, header: bytes, body: Sequence[Buffer] = ()) -> bytes:
    """One frame, joined: one write, one TLS record."""
    return b"".join((_HEAD.pack(kind, 0, len(header), sum(map(len, body))), header, *body))


def begin(stream: int, header: bytes, length: int) -> bytes:
    """The frame before the chunks of a body of `length` bytes."""
    return _HEAD.pack(FrameKind.BEGIN, stream, len(header), length) + header


def chunks(stream: int, body: Sequence[Buffer]) -> Iterator[tuple[bytes, memoryview]]:
    """The CHUNK frames of a body, each as its head and a view of the body: nothing is copied."""
    for piece in body:
        view = memoryview(piece).cast("B")
        for start in range(0, len(view), CHUNK):
            part = view[start : start + CHUNK]
            yield _HEAD.pack(FrameKind.CHUNK, stream, 0, len(part)), part


def reset(stream: int) -> bytes:
    """The frame that ends a stream before its body is complete."""
    return _HEAD.pack(FrameKind.RESET, stream, 0, 0)


def is_small(header: bytes, body: Sequence[Buffer]) -> bool:
    """Whether a message goes as one WHOLE frame."""
    return len(header) <= MAX_HEADER and len(header) + sum(map(len, body)) <= WHOLE_LIMIT


class StreamBudget:
    """The sender's side of the limits on large messages: what it keeps to, `FrameReader` never refuses."""

    def __init__(self, max_body: int = MAX_BODY) -> None:
        self._max_body = max_body
        self._last = 0
        self._open: dict[int, int] = {}  # stream: bytes of its body

    def has_room(self, size: int) -> bool:
        """Whether a body of `size` bytes may begin now."""
        return len(self._open) < MAX_STREAMS and sum(self._open.values()) + size <= self._max_body

    def enter(self, size: int) -> int:
        """Count it in: the number of its stream."""
        self._last = self._last % 0xFFFFFFFF + 1
        self._open[self._last] = size
        return self._last

    def leave(self, stream: int) -> None:
        """Its last byte, or its reset, was sent."""
        del self._open[stream]


class _Partial:
    """A large message of which some has come."""

    __slots__ = ("body", "header", "length", "used")

    def __init__(self, header: bytes, length: int) -> None:
        self.header = header
        self.length = length
        self.used = 0
        self.body = body_of(length)


class FrameReader:
    """Bytes in, whole messages out.

    `buffer()` says where the next bytes go: straight into the body they belong to while a large chunk arrives.
    `advance(n)` tells that `n` bytes were written there, and returns the messages that are complete by it.
    """

    def __init__(self, max_body: int = MAX_BODY) -> None:
        self.handshaking = True  # until the other side is known, only short handshake frames are taken
        self._max_body = max_body
        self._scratch = bytearray(_HEAD.size + WHOLE_LIMIT)
        self._view = memoryview(self._scratch)
        self._filled = 0
        self._partials: dict[int, _Partial] = {}
        self._target: tuple[int, int] | None = None  # the stream whose chunk is arriving, and its bytes to come
        self._broken: ProtocolError | None = None  # found behind messages that were well
        self.frames = 0  # heads read so far: the caller's clock for slow senders

    @property
    def waiting(self) -> bool:
        """Whether something was begun that is not complete."""
        return bool(self._filled or self._partials or self._target)

    @property
    def in_chunk(self) -> bool:
        """Whether `buffer()` is the place in a body where what comes next belongs."""
        return self._target is not None

    def buffer(self) -> memoryview:
        """Where the next bytes are to be written; never empty. Raises what `advance` found behind good messages."""
        if self._broken is not None:
            raise self._broken
        if self._target is None:
            return self._view[self._filled :]
        partial, left = self._partials[self._target[0]], self._target[1]
        return partial.body[partial.used : partial.used + left]

    def advance(self, count: int) -> list[Received]:
        """Take `count` bytes that are now in `buffer()`. Raises `Malformed` or `Oversized`."""
        messages: list[Received] = []
        if self._target is not None:
            self._extend(self._target[0], count, self._target[1] - count, messages.append)
            return messages
        self._filled += count
        try:
            self._take(messages.append)
        except ProtocolError as error:
            if not messages:
                raise
            self._broken = error
        return messages

    def _take(self, deliver: Callable[[Received], None]) -> None:
        start = 0
        while (used := self._frame(start, deliver)) > 0:
            start += used
        if start:
            self._scratch[: self._filled - start] = self._view[start : self._filled]
            self._filled -= start

    def _frame(self, start: int, deliver: Callable[[Received], None]) -> int:
        """Read one frame at `start`; how many bytes of the scratch it used, 0 where it is not there yet."""
        if self._filled - start < _HEAD.size:
            return 0
        number, stream, header_length, body_length = _HEAD.unpack_from(self._scratch, start)
        kind = self._checked(number, header_length, body_length)
        inner = start + _HEAD.size
        if kind is FrameKind.CHUNK:
            return _HEAD.size + self._chunk(stream, inner, body_length, deliver)
        needed: int = header_length if kind is FrameKind.BEGIN else header_length + body_length
        if self._filled - inner < needed:
            return 0
        self.frames += 1
        header = bytes(self._view[inner : inner + header_length])
        if kind is FrameKind.HANDSHAKE:
            self.handshaking = False  # each side says one; what comes right behind it may be in the same read
        if kind is FrameKind.BEGIN:
            self._begin(stream, header, body_length)
        elif kind is FrameKind.RESET:
            self._reset(stream)
        else:
            body = memoryview(self._scratch[inner + header_length : inner + needed])  # a slice of a bytearray is a copy
            deliver(Received(kind, header, body))
        return _HEAD.size + needed

    def _checked(self, number: int, header_length: int, body_length: int) -> FrameKind:
        kind = _KINDS.get(number)
        if kind is None:
            raise Malformed(f"no frame begins with {number}")
        if header_length > MAX_HEADER:
            raise Oversized(f"a header of {header_length} bytes; at most {MAX_HEADER} are taken")
        limit = self._limit(kind, header_length)
        if body_length > limit:
            raise Oversized(f"a frame of {body_length} bytes; at most {limit} go in a {kind.name}")
        if kind in _GREETINGS and header_length > _MAX_GREETING:
            raise Oversized(f"a {kind.name} of {header_length} bytes; at most {_MAX_GREETING} are taken")
        if self.handshaking and kind not in _GREETINGS:
            raise Malformed(f"{kind.name} before the handshake")
        return kind

    def _limit(self, kind: FrameKind, header_length: int) -> int:
        if kind is FrameKind.WHOLE:
            return WHOLE_LIMIT - header_length
        if kind is FrameKind.CHUNK:
            return CHUNK
        return self._max_body if kind is FrameKind.BEGIN else 0

    def _begin(self, stream: int, header: bytes, length: int) -> None:
        if stream in self._partials:
            raise Malformed(f"stream {stream} is begun twice")
        if length == 0:
            raise Malformed("an empty body needs no chunks")
        if len(self._partials) >= MAX_STREAMS:
            raise Oversized(f"more than {MAX_STREAMS} large messages at once")
        if length + sum(partial.length for partial in self._partials.values()) > self._max_body:
            raise Oversized(f"more than {self._max_body} bytes of large messages at once")
        self._partials[stream] = _Partial(header, length)

    def _reset(self, stream: int) -> None:
        if self._partials.pop(stream, None) is None:
            raise Malformed(f"stream {stream} is reset, where none is")

    def _chunk(self, stream: int, inner: int, length: int, deliver: Callable[[Received], None]) -> int:
        partial = self._partials.get(stream)
        if partial is None or not 0 < length <= partial.length - partial.used:
            raise Malformed(f"a chunk of {length} bytes for stream {stream}, where it does not belong")
        self.frames += 1
        here = min(length, self._filled - inner)
        partial.body[partial.used : partial.used + here] = self._view[inner : inner + here]
        self._extend(stream, here, length - here, deliver)
        return here

    def _extend(self, stream: int, count: int, left: int, deliver: Callable[[Received], None]) -> None:
        partial = self._partials[stream]
        partial.used += count
        self._target = (stream, left) if left else None
        if partial.used == partial.length:
            del self._partials[stream]
            deliver(Received(FrameKind.WHOLE, partial.header, partial.body))
