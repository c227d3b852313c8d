"""Frames there and back, however they are cut; and whatever is none refused by name."""

from __future__ import annotations

import itertools
import random
import struct
from collections.abc import Iterator, Sequence

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from swarm.errors import Malformed, Oversized, ProtocolError
from swarm.links import frames
from swarm.links.frames import CHUNK, MAX_STREAMS, WHOLE_LIMIT, FrameKind, FrameReader, Received, StreamBudget
from swarm.wire import MAX_HEADER


def head(kind: int, stream: int = 0, header: int = 0, body: int = 0) -> bytes:
    """A frame's head, right or wrong."""
    return struct.pack(">B3xIII", kind, stream, header, body)


def proven(max_body: int = 1 << 24) -> FrameReader:
    """A reader after the handshake."""
    reader = FrameReader(max_body)
    assert len(read(reader, frames.whole(FrameKind.HANDSHAKE, b"hello"))) == 1
    return reader


def read(reader: FrameReader, data: bytes, cuts: Iterator[int] | None = None) -> list[Received]:
    """Feed `data` in pieces of the sizes that `cuts` says, as large as the reader takes them without it."""
    messages: list[Received] = []
    left = memoryview(data)
    while left:
        buffer = reader.buffer()
        assert len(buffer) > 0
        count = min(len(buffer), len(left), next(cuts) if cuts else len(left))
        buffer[:count], left = left[:count], left[count:]
        messages += reader.advance(count)
    reader.buffer()  # raises what is wrong with the rest
    return messages


def large(stream: int, header: bytes, body: Sequence[bytes]) -> list[bytes]:
    """The frames of a large message."""
    parts = [frames.begin(stream, header, sum(map(len, body)))]
    return parts + [first + bytes(part) for first, part in frames.chunks(stream, body)]


def simple(messages: list[Received]) -> list[tuple[FrameKind, bytes, bytes]]:
    """Comparable."""
    return [(message.kind, message.header, bytes(message.body)) for message in messages]


smalls = st.tuples(st.binary(max_size=60), st.binary(max_size=300))
cuts = st.lists(st.integers(1, 70_000), min_size=1, max_size=20).map(itertools.cycle)


@given(st.lists(smalls, max_size=12), st.integers(0, 3 * CHUNK), cuts)
@settings(max_examples=60)
def test_any_split_of_the_bytes_gives_the_same_messages(
    messages: list[tuple[bytes, bytes]], size: int, cuts: Iterator[int]
) -> None:
    body = random.Random(size).randbytes(size + 1)
    data = b"".join(frames.whole(FrameKind.WHOLE, header, [part]) for header, part in messages)
    data += b"".join(large(1, b"large", [body])) + data
    reader = proven()
    small = [(FrameKind.WHOLE, header, part) for header, part in messages]
    assert simple(read(reader, data, cuts)) == [*small, (FrameKind.WHOLE, b"large", body), *small]
    assert not reader.waiting


@given(st.data())
@settings(max_examples=30)
def test_large_messages_and_small_ones_go_between_each_other(data: st.DataObject) -> None:
    sizes = data.draw(st.lists(st.integers(1, 3 * CHUNK), min_size=1, max_size=5))
    bodies = [random.Random(size).randbytes(size) for size in sizes]
    queues = [large(number, b"%d" % number, [body]) for number, body in enumerate(bodies)]
    queues += [[frames.whole(FrameKind.WHOLE, b"small", [b"%d" % number])] for number in range(6)]
    stream = b""
    while any(queues):
        stream += data.draw(st.sampled_from([queue for queue in queues if queue])).pop(0)
    came = simple(read(proven(), stream, data.draw(cuts)))
    assert sorted(came) == sorted(
        [(FrameKind.WHOLE, b"%d" % number, body) for number, body in enumerate(bodies)]
        + [(FrameKind.WHOLE, b"small", b"%d" % number) for number in range(6)]
    )


def test_a_body_in_pieces_is_one() -> None:
    pieces = [b"a" * (CHUNK + 1), b"", b"b" * 3, bytearray(b"c" * CHUNK), memoryview(b"d")]
    came = read(proven(), b"".join(large(1, b"", pieces)))  # type: ignore[arg-type]
    assert bytes(came[0].body) == b"".join(pieces)


def test_a_chunk_goes_straight_to_where_it_belongs() -> None:
    reader = proven()
    frame, *parts = large(1, b"", [bytes(CHUNK)])
    assert read(reader, frame + parts[0][:20]) == []
    assert reader.in_chunk
    assert len(reader.buffer()) == CHUNK - 4
    assert len(read(reader, parts[0][20:])) == 1
    assert not reader.in_chunk


def test_messages_do_not_share_memory_with_what_comes_later() -> None:
    reader = proven()
    first = read(reader, frames.whole(FrameKind.WHOLE, b"h", [b"first"]))[0]
    first.body[0:1] = b"F"  # and may be written to
    read(reader, frames.whole(FrameKind.WHOLE, b"h", [b"other"]))
    assert bytes(first.body) == b"First"


@pytest.mark.parametrize(
    ("data", "error"),
    [
        (head(0), Malformed),
        (head(7), Malformed),
        (head(255), Malformed),
        (b"GET / HTTP/1.1\r\n", Malformed),
        (head(FrameKind.WHOLE, header=MAX_HEADER + 1), Oversized),
        (head(FrameKind.WHOLE, header=1, body=WHOLE_LIMIT), Oversized),
        (head(FrameKind.WHOLE, body=0xFFFFFFFF), Oversized),
        (head(FrameKind.BEGIN, 1, 0, (1 << 24) + 1), Oversized),
        (head(FrameKind.BEGIN, 1, MAX_HEADER + 1, 8), Oversized),
        (head(FrameKind.BEGIN, 1, 0, 0), Malformed),
        (head(FrameKind.CHUNK, 1, 0, CHUNK + 1), Oversized),
        (head(FrameKind.CHUNK, 1, 0, 1), Malformed),
        (head(FrameKind.RESET, 1), Malformed),
        (head(FrameKind.RESET, 1, 0, 1), Oversized),
        (head(FrameKind.GOODBYE, 0, 5000), Oversized),
        (head(FrameKind.GOODBYE, 0, 5, 1), Oversized),
        (frames.begin(1, b"", 8) + frames.begin(1, b"", 8), Malformed),
        (frames.begin(1, b"", 8) + head(FrameKind.CHUNK, 1, 0, 9), Malformed),
        (frames.begin(1, b"", 8) + head(FrameKind.CHUNK, 1, 0, 0), Malformed),
        (frames.begin(1, b"", 8) + head(FrameKind.CHUNK, 2, 0, 8), Malformed),
        (frames.begin(1, b"", 1 << 23) + frames.begin(2, b"", (1 << 23) + 1), Oversized),
        (frames.begin(1, b"", 8) + frames.reset(1) + frames.reset(1), Malformed),
        (b"".join(frames.begin(stream, b"", 8) for stream in range(MAX_STREAMS + 1)), Oversized),
    ],
)
def test_what_no_peer_sends_is_refused_by_name(data: bytes, error: type[ProtocolError]) -> None:
    with pytest.raises(error):
        read(proven(), data)


@pytest.mark.parametrize("kind", [FrameKind.WHOLE, FrameKind.BEGIN, FrameKind.CHUNK, FrameKind.RESET])
def test_before_the_handshake_nothing_else_is_taken(kind: FrameKind) -> None:
    with pytest.raises(Malformed, match="before the handshake"):
        read(FrameReader(), head(kind, 1, 0, 1 if kind is not FrameKind.RESET else 0))


def test_what_came_well_before_the_error_is_told_first() -> None:
    reader = proven()
    data = frames.whole(FrameKind.WHOLE, b"good") + b"bad" * 9
    reader.buffer()[: len(data)] = data
    assert [message.header for message in reader.advance(len(data))] == [b"good"]
    with pytest.raises(Malformed):
        reader.buffer()


def test_a_greeting_is_short() -> None:
    with pytest.raises(Oversized):
        read(FrameReader(), head(FrameKind.HANDSHAKE, 0, 4097))


def test_a_reset_stream_makes_room() -> None:
    reader = proven(1000)
    for stream in range(1, 200):
        assert read(reader, frames.begin(stream, b"", 1000) + head(FrameKind.CHUNK, stream, 0, 400) + bytes(400)) == []
        assert reader.waiting
        read(reader, frames.reset(stream))
        assert not reader.waiting
    assert len(read(reader, b"".join(large(200, b"", [bytes(1000)])))) == 1


@given(st.binary(max_size=400), st.booleans(), cuts)
def test_garbage_raises_named_errors_only(data: bytes, after: bool, cuts: Iterator[int]) -> None:
    reader = proven() if after else FrameReader()
    try:
        read(reader, data, cuts)
    except ProtocolError:
        return


heads = st.builds(
    head, st.integers(0, 8), st.integers(0, 3), st.integers(0, 40), st.integers(0, 60) | st.integers(0, 0xFFFFFFFF)
)


@given(st.lists(st.tuples(heads, st.binary(max_size=80)), max_size=12), cuts)
def test_frames_of_any_kind_and_length_raise_named_errors_only(
    parts: list[tuple[bytes, bytes]], cuts: Iterator[int]
) -> None:
    try:
        read(proven(), b"".join(first + rest for first, rest in parts), cuts)
    except ProtocolError:
        return


def test_frames_are_counted_as_they_begin() -> None:
    reader = proven()
    count = reader.frames
    data = frames.whole(FrameKind.WHOLE, b"header", [b"body"])
    for byte in data[:-1]:
        read(reader, bytes([byte]))
        assert reader.waiting
        assert reader.frames == count
    read(reader, data[-1:])
    assert (reader.waiting, reader.frames) == (False, count + 1)


@given(st.lists(st.tuples(st.integers(1, 500), st.booleans()), max_size=200))
def test_a_sender_within_its_budget_is_never_refused(steps: list[tuple[int, bool]]) -> None:
    budget, reader, running = StreamBudget(1000), proven(1000), []
    for size, finish in steps:
        if finish and running:
            stream = running.pop(0)
            read(reader, frames.reset(stream))
            budget.leave(stream)
        elif budget.has_room(size):
            running.append(budget.enter(size))
            read(reader, frames.begin(running[-1], b"", size))
    assert len(running) <= MAX_STREAMS
