"""Messages there and back, and every field beyond its limit refused by name."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any, get_args

import msgpack
import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from swarm import wire
from swarm.agreement import messages
from swarm.errors import BadTensor, Malformed, Oversized, ProtocolError, UnknownMessage
from swarm.wire import Kind

KEY = b"k" * 16

specs = st.builds(wire.TensorSpec, st.sampled_from(list(wire.ITEM_SIZES)), st.lists(st.integers(0, 4096), max_size=4))
TRAINING: list[type[wire.Message]] = [
    kind for kind in vars(messages).values() if isinstance(kind, type) and kind.__module__ == "swarm.agreement.messages"
]
BODIES: list[type[wire.Message]] = [
    *get_args(wire.Body),
    *(kind for kind in TRAINING if kind.__struct_config__.tag is not None),
]


def _strategy(annotation: Any) -> st.SearchStrategy[Any]:
    """Values of a field, from its type and limits alone: a message that is added is tested without a line here."""
    info = msgspec.inspect.type_info(annotation)
    return _of(info)


def _of(info: Any) -> st.SearchStrategy[Any]:
    match info:
        case msgspec.inspect.IntType():
            return st.integers(info.ge or 0, info.le if info.le is not None else (info.lt or 1 << 31) - 1)
        case msgspec.inspect.FloatType():
            lowest = 1e-3 if info.gt is not None else (info.ge or 0)
            return st.floats(lowest, info.le or 1e6, allow_nan=False)
        case msgspec.inspect.BytesType():
            return st.binary(min_size=info.min_length or 0, max_size=info.max_length or 64)
        case msgspec.inspect.BoolType():
            return st.booleans()
        case msgspec.inspect.StrType(pattern=str(pattern)):
            return st.from_regex(pattern, fullmatch=True)
        case msgspec.inspect.StrType():
            return st.text(min_size=info.min_length or 0, max_size=min(info.max_length or 16, 16))
        case msgspec.inspect.NoneType():
            return st.none()
        case msgspec.inspect.ListType():
            return st.lists(_of(info.item_type), min_size=info.min_length or 0, max_size=min(info.max_length or 4, 6))
        case msgspec.inspect.TupleType():
            return st.tuples(*map(_of, info.item_types))
        case msgspec.inspect.UnionType():
            return st.one_of(*map(_of, info.types))
        case msgspec.inspect.StructType():
            return st.builds(info.cls, *(_of(field.type) for field in info.fields))
        case msgspec.inspect.LiteralType(values=values):
            return st.sampled_from(values)
    raise AssertionError(f"no values for {info}")


def messages(kinds: list[type[wire.Message]]) -> st.SearchStrategy[wire.Message]:
    """Any message of these kinds."""
    return st.sampled_from(kinds).flatmap(_strategy)


@given(messages(BODIES), st.integers(0, (1 << 62) - 1), st.floats(0, wire.MAX_TIMEOUT))
def test_every_message_comes_back_as_it_went(message: wire.Message, call: int, timeout: float) -> None:
    data = wire.pack_envelope(Kind.REQUEST, call, timeout, message)
    envelope = wire.unpack_envelope(memoryview(data))
    assert (envelope.kind, envelope.call, envelope.timeout) == (Kind.REQUEST, call, timeout)
    assert wire.read_body(envelope) == message


@given(messages(list(get_args(wire.Handshake))))
def test_every_greeting_comes_back_as_it_went(message: wire.Message) -> None:
    assert wire.unpack(wire.pack(message)) == message


def test_a_failure_and_a_cancellation_come_back() -> None:
    failure = wire.Failure("busy", "later", "p")
    assert wire.read_body(wire.unpack_envelope(wire.pack_envelope(Kind.ERROR, 7, body=failure))) == failure
    assert wire.read_body(wire.unpack_envelope(wire.pack_envelope(Kind.CANCEL, 7))) is None


def test_a_newer_version_may_append_fields() -> None:
    data = msgpack.packb([0, 1, 1.0, "alive", KEY, "what this version does not know"])
    assert wire.read_body(wire.unpack_envelope(data)) == wire.KeepAlive(KEY)


def _sample(info: Any) -> Any:
    """The least value of a type, as it goes over the wire."""
    match info:
        case msgspec.inspect.IntType():
            return info.ge or 0
        case msgspec.inspect.FloatType():
            return 1.0
        case msgspec.inspect.BytesType():
            return b"k" * (info.min_length or 0)
        case msgspec.inspect.BoolType():
            return False
        case msgspec.inspect.StrType(pattern=str(pattern)):
            return st.from_regex(pattern, fullmatch=True)
        case msgspec.inspect.StrType():
            return ""
        case msgspec.inspect.UnionType(types=types):
            return None if any(isinstance(each, msgspec.inspect.NoneType) for each in types) else _sample(types[0])
        case msgspec.inspect.ListType():
            return [_sample(info.item_type)] * (info.min_length or 0)
        case msgspec.inspect.TupleType():
            return [_sample(item) for item in info.item_types]
        case msgspec.inspect.StructType():
            tag = [] if info.tag is None else [info.tag]
            return [*tag, *(_sample(field.type) for field in info.fields)]
        case msgspec.inspect.LiteralType(values=values):
            return values[0]
    raise AssertionError(f"no value for {info}")


@pytest.mark.parametrize(
    ("kind", "field", "value"),
    [
        (wire.KeepAlive, "session", b"k" * 15),
        (wire.KeepAlive, "session", b"k" * 17),
        (wire.KeepAlive, "session", "k" * 16),
        (wire.KeepAlive, "session", None),
        (wire.OpenSession, "model", "m" * 129),
        (wire.OpenSession, "start", -1),
        (wire.OpenSession, "start", 100_001),
        (wire.OpenSession, "end", "4"),
        (wire.OpenSession, "batch", 0),
        (wire.OpenSession, "batch", wire.MAX_BATCH + 1),
        (wire.OpenSession, "batch", 1.5),
        (wire.OpenSession, "batch", True),
        (wire.OpenSession, "max_length", -1),
        (wire.OpenSession, "max_length", wire.MAX_POSITIONS + 1),
        (wire.OpenSession, "max_length", 1 << 63),
        (wire.OpenSession, "next", ["peer", []]),
        (wire.OpenSession, "next", ["peer", [["host", 1]] * 9]),
        (wire.OpenSession, "next", ["peer", [["host", 0]]]),
        (wire.OpenSession, "next", ["peer", [["host", 65536]]]),
        (wire.OpenSession, "next", ["peer", [["h" * 256, 1]]]),
        (wire.OpenSession, "next", ["peer", [["host", 1, 2]]]),
        (wire.OpenSession, "next", ["p" * 129, [["host", 1]]]),
        (wire.SessionOpened, "lease", math.nan),
        (wire.SessionOpened, "lease", math.inf),
        (wire.SessionOpened, "lease", 0.0),
        (wire.SessionOpened, "lease", -1.0),
        (wire.Step, "epoch", -1),
        (wire.Step, "epoch", (1 << 40) + 1),
        (wire.Step, "position", wire.MAX_POSITIONS + 1),
        (wire.Step, "hidden", ["float32", [1, 1, 1, 1, 1]]),
        (wire.Step, "hidden", ["float32", [-1]]),
        (wire.Step, "hidden", ["float32", [wire.MAX_POSITIONS + 1]]),
        (wire.Step, "hidden", ["f" * 17, [1]]),
        (wire.Step, "hidden", None),
        (wire.Step, "rows", [0] * (wire.MAX_BATCH + 1)),
        (wire.Step, "rows", [-1]),
        (wire.Step, "rows", [wire.MAX_BATCH]),
        (wire.StepFailed, "message", "m" * 2049),
        (wire.StepFailed, "code", "c" * 129),
    ],
)
def test_a_field_beyond_its_limit_is_refused_by_name(kind: type[wire.Message], field: str, value: Any) -> None:
    fields = _sample(msgspec.inspect.type_info(kind))
    wire.read_body(wire.Envelope(Kind.REQUEST, 1, 1.0, fields))  # well as it stands
    index = 1 + kind.__struct_fields__.index(field)
    fields[index] = value
    with pytest.raises(Malformed, match=rf"message '{fields[0]}': .*\$\[{index}\]"):
        wire.read_body(wire.unpack_envelope(msgpack.packb([0, 1, 1.0, *fields])))


@pytest.mark.parametrize("kind", BODIES)
def test_a_message_without_all_its_fields_is_refused(kind: type[wire.Message]) -> None:
    fields = _sample(msgspec.inspect.type_info(kind))
    required = [name for name in kind.__struct_fields__ if name not in dict(_defaults(kind))]
    for length in range(1, 1 + len(required)):
        with pytest.raises(Malformed):
            wire.read_body(wire.Envelope(Kind.REQUEST, 1, 1.0, fields[:length]))


def _defaults(kind: type[wire.Message]) -> Iterator[tuple[str, Any]]:
    names = kind.__struct_fields__
    return zip(names[len(names) - len(kind.__struct_defaults__) :], kind.__struct_defaults__, strict=True)


@pytest.mark.parametrize("tag", ["", "nonsense", None, 7, b"step", ["step"], {}])
def test_an_unknown_message_is_refused_by_name(tag: Any) -> None:
    with pytest.raises(UnknownMessage):
        wire.read_body(wire.Envelope(Kind.REQUEST, 1, 1.0, [tag, KEY]))
    with pytest.raises(UnknownMessage):
        wire.read_body(wire.Envelope(Kind.REQUEST, 1, 1.0, []))


@pytest.mark.parametrize(
    "header",
    [
        [],
        [0, 1],
        7,
        "text",
        None,
        [0, -1, 1.0],
        [0, 1 << 62, 1.0],
        [0, 1.5, 1.0],
        [0, True, 1.0],
        [0, 1, math.nan],
        [0, 1, math.inf],
        [0, 1, -1.0],
        [0, 1, wire.MAX_TIMEOUT + 1],
        [0, 1, "1"],
        [0, 1, True],
        [0, 1, None],
        [5, 1, 1.0],
        [-1, 1, 1.0],
        ["0", 1, 1.0],
        [True, 1, 1.0],
        [0.0, 1, 1.0],
    ],
)
def test_a_header_that_is_none_is_refused_by_name(header: Any) -> None:
    with pytest.raises((Malformed, UnknownMessage)):
        wire.unpack_envelope(msgpack.packb(header))


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"\xc1",  # never used
        b"\x91",  # an array that ends before its first item
        b"\x90\x00",  # something after the end
        b"\xdd\xff\xff\xff\xff",  # four thousand million items
        b"\xdc\x20\x00" + b"\x00" * 8192,  # more items than are taken
        b"\x81\x00\x00",  # a map
        b"\xc6\xff\xff\xff\xff",  # four thousand million bytes
        b"\x94\x00\x01\x01\xa2\xff\xfe",  # no UTF-8
        b"\xd6\xff\x00\x00\x00\x00",  # a timestamp
        b"\x94\x00\x01\x01\xd6\xff\x00\x00\x00\x00",
        b"\x94\x00\x01\x01\xc7\x01\x05\x00",  # an extension
        b"\x91" * 60_000,
        b"\x94\x00\x01\x01" + b"\x91" * 60_000 + b"\x00",
    ],
)
def test_bytes_that_are_no_message_are_refused_by_name(data: bytes) -> None:
    with pytest.raises(ProtocolError):
        wire.read_body(wire.unpack_envelope(data))
    with pytest.raises(ProtocolError):
        wire.unpack(data)


@pytest.mark.parametrize("depth", [10, 100, 500, 900, 1000, 1022, 1100])
@pytest.mark.parametrize("before", [b"\x91", b"\x94\x00\x01\x01", b"\x95\x00\x01\x01\xa5alive", b"\x93\x00\x01"])
def test_deep_nesting_is_refused_by_name(before: bytes, depth: int) -> None:
    data = before + b"\x91" * depth + b"\x00"
    with pytest.raises(ProtocolError):
        wire.read_body(wire.unpack_envelope(data))


def test_a_header_that_is_too_long_is_refused_unread() -> None:
    with pytest.raises(Oversized):
        wire.unpack_envelope(b"\x00" * (wire.MAX_HEADER + 1))


@given(st.binary(max_size=200))
def test_garbage_raises_named_errors_only(data: bytes) -> None:
    for read in (wire.unpack, lambda data: wire.read_body(wire.unpack_envelope(data))):
        try:
            read(data)
        except ProtocolError:
            continue


@given(
    st.recursive(
        st.none() | st.booleans() | st.integers(-5, 5) | st.floats() | st.text(max_size=6) | st.binary(max_size=20),
        lambda inner: st.lists(inner, max_size=8),
        max_leaves=30,
    ),
    st.sampled_from([m.__struct_config__.tag for m in BODIES]),
)
def test_other_values_raise_named_errors_only(value: Any, tag: str) -> None:
    for header in (value, [0, 1, 1.0, tag, value], [0, 1, 1.0, tag, *(value if isinstance(value, list) else [])]):
        try:
            wire.read_body(wire.unpack_envelope(msgpack.packb(header)))
        except ProtocolError:
            continue


@given(st.lists(specs.filter(lambda spec: spec.nbytes() < 10_000), max_size=4))
def test_a_body_is_split_at_the_tensors(specs: list[wire.TensorSpec]) -> None:
    size = sum(wire.padded(spec.nbytes()) for spec in specs)
    body = memoryview(bytes(index % 251 for index in range(size)))
    views = wire.split_body(body, specs)
    assert [len(view) for view in views] == [spec.nbytes() for spec in specs]
    offset = 0
    for view in views:
        assert view == body[offset : offset + len(view)]
        offset += wire.padded(len(view))
    for wrong in (bytes(size + 1), bytes(size + 8), bytes(max(size - 8, 0))):
        if len(wrong) != size:
            with pytest.raises(BadTensor):
                wire.split_body(memoryview(wrong), specs)


def test_a_tensor_of_another_dtype_does_not_travel() -> None:
    for dtype in ("complex64", "object", ""):
        with pytest.raises(BadTensor, match="do not travel"):
            wire.split_body(memoryview(b""), [wire.TensorSpec(dtype, [0])])


def test_the_largest_shape_is_only_a_number() -> None:
    spec = wire.TensorSpec("float32", [wire.MAX_POSITIONS] * 4)
    with pytest.raises(BadTensor, match="announced"):
        wire.split_body(memoryview(b""), [spec])


def test_the_header_of_a_decode_step_and_of_its_answer_are_small() -> None:
    hidden = wire.TensorSpec("float32", [1, 1, 8192])
    step = wire.Step(KEY, 1 << 20, 1 << 20, 1 << 20, 1, hidden, None, None, None)
    answer = wire.Output(KEY, 1 << 20, 1 << 20, hidden)
    assert len(wire.pack_envelope(Kind.NOTIFY, body=step)) < 100
    assert len(wire.pack_envelope(Kind.NOTIFY, body=answer)) < 100
