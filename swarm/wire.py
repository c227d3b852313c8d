"""Every message that crosses the wire, with its limits: bytes in, checked values out.

A message is a header (MessagePack) and a body (the raw bytes of its tensors, one after another, each padded to
`ALIGNMENT`). The header is an array `[kind, call, timeout, tag, field, ...]`. Decoding happens in two bounded stages:
`msgpack` unpacks with limits on every length, `msgspec` checks types, ranges and counts. No torch here.
"""

from __future__ import annotations

import enum
import math
from collections.abc import Sequence
from typing import Annotated, Any, Literal, NamedTuple, TypeAlias, get_args

import msgpack
import msgspec

from swarm.errors import BadTensor, Malformed, Oversized, UnknownMessage

PROTOCOL_VERSION = 2
MAX_HEADER = 128 * 1024  # bytes of a message's header: of a run's largest, `swarm.agreement.messages`
MAX_BODY = 256 * 1024 * 1024  # bytes of a message's body
MAX_BATCH = 1024  # rows of a session
MAX_POSITIONS = 1 << 24  # positions of a session
MAX_TIMEOUT = 3600.0  # seconds
ALIGNMENT = 8  # bytes; every dtype below divides it

BLOCKWISE = "int8x64"  # how hidden states of 8 bits are called: a scale (bfloat16) for each 64 along the last dimension
BLOCK_VALUES = 64
Rounding = Literal["auto", "float32", "bfloat16", "int8"]  # of hidden states on their way

Priority = Literal["low", "normal"]  # of a session's steps; nobody can ask for more than others have

ITEM_SIZES = {"float32": 4, "bfloat16": 2, "float16": 2, "int64": 8, "int32": 4, "uint8": 1, "bool": 1}

Count = Annotated[int, msgspec.Meta(ge=0, le=1 << 40)]
Position = Annotated[int, msgspec.Meta(ge=0, le=MAX_POSITIONS)]
Batch = Annotated[int, msgspec.Meta(ge=1, le=MAX_BATCH)]
Block = Annotated[int, msgspec.Meta(ge=0, le=100_000)]
Key = Annotated[bytes, msgspec.Meta(min_length=16, max_length=16)]
Name = Annotated[str, msgspec.Meta(max_length=128)]
Text = Annotated[str, msgspec.Meta(max_length=2048)]
Lease = Annotated[float, msgspec.Meta(gt=0, le=86_400)]  # seconds


class Message(msgspec.Struct, array_like=True, gc=False):
    """The root of all messages. Arrays on the wire, so a newer version may append fields with defaults."""


class TensorSpec(Message):
    """How the bytes of one tensor in the body are to be read."""

    dtype: Annotated[str, msgspec.Meta(max_length=16)]
    shape: Annotated[list[Annotated[int, msgspec.Meta(ge=0, le=MAX_POSITIONS)]], msgspec.Meta(max_length=4)]

    def nbytes(self) -> int:
        """Bytes in the body, without padding. Raises `BadTensor` for a dtype that does not travel."""
        if self.dtype == BLOCKWISE:
            if not self.shape:
                raise BadTensor(f"a single value does not travel as {BLOCKWISE}")
            *outer, size = self.shape
            return math.prod(outer) * (size + 2 * -(-size // BLOCK_VALUES))
        if self.dtype not in ITEM_SIZES:
            raise BadTensor(f"tensors of dtype {self.dtype!r} do not travel")
        return ITEM_SIZES[self.dtype] * math.prod(self.shape)


class Endpoint(Message):
    """A peer and where it listens."""

    peer: Name
    addresses: Annotated[
        list[tuple[Annotated[str, msgspec.Meta(max_length=255)], Annotated[int, msgspec.Meta(ge=1, le=65535)]]],
        msgspec.Meta(min_length=1, max_length=8),
    ]


# --- the handshake, before any call --------------------------------------------------------------------------------


class Hello(Message, tag="hello"):
    """The listener's first words."""

    version: int
    peer: Name
    nonce: Annotated[bytes, msgspec.Meta(min_length=32, max_length=32)]


class Proof(Message, tag="proof"):
    """The dialler's answer: who it is, signed over the listener's PeerId and nonce."""

    peer: Name
    signature: Annotated[bytes, msgspec.Meta(min_length=64, max_length=64)]


class Goodbye(Message, tag="goodbye"):
    """Why the connection is being closed, when there is a reason."""

    code: Name
    message: Text


# --- what peers and clients say ------------------------------------------------------------------------------------


class Echo(Message, tag="echo"):
    """Send the body back. Measures latency and bandwidth."""


class Done(Message, tag="done"):
    """The reply that has nothing to add."""


class OpenSession(Message, tag="open"):
    """Lease a KV cache of `batch * max_length` tokens for these blocks, or change an open session's terms.

    Sent by the client to every hop of its route. Asked again with the same `session`, it may grow `max_length` or
    name another `next` or `priority`; what it holds stays, unless it is for other blocks. What is left over from an
    earlier `epoch` is refused. Where there is no room, it may `wait` for some in a queue.
    """

    session: Key
    model: Name
    start: Block
    end: Block
    batch: Batch
    max_length: Position
    next: Endpoint | None  # who runs the following blocks; None for the last hop, which answers the client
    epoch: Count = 0
    wait: Annotated[float, msgspec.Meta(ge=0, le=MAX_TIMEOUT)] = 0.0  # seconds
    rounding: Rounding = "float32"  # what may be done to the hidden states that the peer passes on
    priority: Priority = "normal"  # low where nobody waits for it: it then runs where others leave room


class SessionOpened(Message, tag="opened"):
    """The lease is granted, for `lease` seconds after the last sign of life."""

    lease: Lease
    number: Count  # of the last step that the peer has run in this session, 0 where it is new to it
    length: Position  # positions that it holds
    rounding: Rounding = "float32"  # of what it passes on, to the end of the session


class KeepAlive(Message, tag="alive"):
    """The client still needs the session, and asks how far it is. Renews the lease."""

    session: Key


class Alive(Message, tag="progress"):
    """How far the peer is in the session."""

    number: Count  # of the last step that it has run
    epoch: Count  # of the last step that came, replayed ones not counted
    waiting: Count  # steps that came and are not yet run


class CloseSession(Message, tag="close"):
    """The client needs the session no longer."""

    session: Key


class Step(Message, tag="step"):
    """From `position` on, this is the session's content: forget what lay after, run it, pass it on.

    `number` counts the steps of a session from 1 without gaps; a step sent again keeps its number, so `rows` (which
    earlier rows the present ones continue, for beams) is applied once. `epoch` grows with every retry: what is left
    over from an earlier one is dropped. `keep` is how many trailing positions the client wants answered, 0 for all.

    A replayed step brings a hop to where the others are: it goes through `replay` hops and is not answered. It stands
    for all steps after `since`, and is refused by whoever was not brought just there.

    A long step may be passed on in pieces, so that the hops work at the same time: they have its number, follow one
    another in position, and only the last of them does not say that there is `more`.
    """

    session: Key
    epoch: Count
    number: Count
    position: Position
    keep: Position
    hidden: TensorSpec  # [batch, positions, hidden size]
    rows: Annotated[list[Annotated[int, msgspec.Meta(ge=0, lt=MAX_BATCH)]], msgspec.Meta(max_length=MAX_BATCH)] | None
    position_ids: TensorSpec | None  # [batch, positions], None for position, position + 1, ...
    mask: TensorSpec | None  # [batch, positions], 1 for a token and 0 for padding; None for no padding
    replay: Annotated[int, msgspec.Meta(ge=0, le=1024)] = 0
    more: bool = False
    since: Count = 0  # where it is replayed
    block: Block = 0  # the first that is to be run: whoever has another part of the session refuses

    def specs(self) -> list[TensorSpec]:
        """The tensors of the body, in their order."""
        return [spec for spec in (self.hidden, self.position_ids, self.mask) if spec is not None]


class Replay(Message, tag="replay"):
    """Bring the hops after this one to `end` positions, from what was passed on to them before.

    Its reply says that the steps are on their way, ahead of any later ones: the next hop need not be asked.
    """

    session: Key
    epoch: Count
    number: Count  # of the last step that the next hop has run
    length: Position  # positions that it holds, as of then
    end: Position
    hops: Annotated[int, msgspec.Meta(ge=1, le=1024)]  # how many hops it is for; the last of them passes nothing on


class Feed(Message, tag="feed"):
    """From now on, also tell these hops what is passed on to the next: late, in bulk, until they take its place."""

    session: Key
    spare: Endpoint  # the first of them
    hops: Annotated[int, msgspec.Meta(ge=1, le=1024)]


class Leaving(Message, tag="leaving"):
    """The peer is about to leave: let another take its place in the session."""

    session: Key


class Output(Message, tag="output"):
    """The last hop's answer to a step: hidden states [batch, kept positions, hidden size]."""

    session: Key
    epoch: Count
    number: Count
    hidden: TensorSpec


class StepFailed(Message, tag="failed"):
    """A hop's answer to a step that it could not run or pass on. `peer` is who is to be avoided for it."""

    session: Key
    epoch: Count
    number: Count
    peer: Name
    code: Name
    message: Text


Body: TypeAlias = (
    Echo
    | Done
    | OpenSession
    | SessionOpened
    | KeepAlive
    | Alive
    | CloseSession
    | Step
    | Replay
    | Feed
    | Leaving
    | Output
    | StepFailed
)
Handshake: TypeAlias = Hello | Proof | Goodbye
_BODIES: dict[str, type[Message]] = {kind.__struct_config__.tag: kind for kind in get_args(Body)}
_HANDSHAKES: dict[str, type[Message]] = {kind.__struct_config__.tag: kind for kind in get_args(Handshake)}


def carry(*kinds: type[Message]) -> None:
    """Let these messages travel too: a room with a vocabulary of its own adds it when it is imported."""
    for kind in kinds:
        tag = str(kind.__struct_config__.tag)
        known = _BODIES.setdefault(tag, kind)
        assert known is kind, f"two messages are tagged {tag!r}"


class Kind(enum.IntEnum):
    """What an envelope is to the call it names."""

    REQUEST = 0
    REPLY = 1
    ERROR = 2
    CANCEL = 3
    NOTIFY = 4


_KINDS = {int(kind): kind for kind in Kind}


class Failure(Message):
    """The body of an `ERROR`."""

    code: Name
    message: Text
    peer: Name = ""  # who it is about, where that is not who says it


class Envelope(NamedTuple):
    """A header half read: whose call it belongs to is known, what it says is still to be checked by `read_body`.

    `call` is 0 for a notification. `timeout` is in seconds; in a reply it is how long the answer took there.
    """

    kind: Kind
    call: int
    timeout: float
    fields: list[Any]


def pack(message: Message) -> bytes:
    """A handshake message as bytes."""
    data: bytes = msgpack.packb(msgspec.to_builtins(message, builtin_types=(bytes,)))
    return data


def unpack(data: bytes | memoryview) -> Hello | Proof | Goodbye:
    """A handshake message. Raises `Malformed`, `Oversized` or `UnknownMessage`."""
    message: Hello | Proof | Goodbye = _convert(_unpack(data), _HANDSHAKES)
    return message


def pack_envelope(kind: Kind, call: int = 0, timeout: float = 0.0, body: Message | None = None) -> bytes:
    """A header as bytes."""
    fields = () if body is None else msgspec.to_builtins(body, builtin_types=(bytes,))
    data: bytes = msgpack.packb((int(kind), call, timeout, *fields))
    return data


def unpack_envelope(data: bytes | memoryview) -> Envelope:
    """The fixed part of a header. Raises `Malformed`, `Oversized` or `UnknownMessage`."""
    parts = _unpack(data)
    if not isinstance(parts, list) or len(parts) < 3:
        raise Malformed("a header is an array of kind, call, timeout and a message")
    (number, call, timeout), fields = parts[:3], parts[3:]
    if type(number) is not int or number not in _KINDS:
        raise UnknownMessage(f"unknown kind of message {_brief(number)}")
    if type(call) is not int or not 0 <= call < 1 << 62:
        raise Malformed("a call's number is out of range")
    if type(timeout) not in (int, float) or not 0 <= timeout <= MAX_TIMEOUT:  # NaN fails both
        raise Malformed(f"a timeout is between 0 and {MAX_TIMEOUT:.0f} seconds")
    return Envelope(_KINDS[number], call, timeout, fields)


def read_body(envelope: Envelope) -> Any:
    """What an envelope says: a `Failure` for ERROR, None for CANCEL, else a `Body`.

    Raises `Malformed` or `UnknownMessage`; the call that it belongs to is known by then and can be told.
    """
    if envelope.kind is Kind.CANCEL:
        return None
    return _as(Failure, envelope.fields) if envelope.kind is Kind.ERROR else _convert(envelope.fields, _BODIES)


def _unpack(data: bytes | memoryview) -> Any:
    if len(data) > MAX_HEADER:
        raise Oversized(f"a header of {len(data)} bytes; at most {MAX_HEADER} are taken")
    try:
        return msgpack.unpackb(
            data, max_array_len=4096, max_map_len=0, max_ext_len=0, strict_map_key=True, use_list=True, raw=False
        )
    except (ValueError, msgpack.exceptions.UnpackException, TypeError, OverflowError) as error:
        raise Malformed(f"not MessagePack within its limits: {error or type(error).__name__}") from None


def _convert(parts: Any, kinds: dict[str, type[Message]]) -> Any:
    tag = parts[0] if isinstance(parts, list) and parts else None
    if not isinstance(tag, str) or (kind := kinds.get(tag)) is None:
        raise UnknownMessage(f"unknown message {_brief(tag)}")
    return _as(kind, parts)


def _as(kind: type[Message], parts: Any) -> Any:
    """To one struct, not to their union: for that, msgspec works out the type anew at every call."""
    try:
        return msgspec.convert(parts, kind)
    except msgspec.ValidationError as error:
        name = kind.__struct_config__.tag or kind.__name__
        raise Malformed(f"message {name!r}: {error}") from None


def _brief(value: Any) -> str:
    """A foreign value for an error's text: only what is flat, since `repr` of what is deeply nested never returns."""
    return f"{value!r:.64}" if isinstance(value, str | int | float) else f"of type {type(value).__name__}"


def padded(nbytes: int) -> int:
    """`nbytes` rounded up to `ALIGNMENT`."""
    return -(-nbytes // ALIGNMENT) * ALIGNMENT


def split_body(body: memoryview, specs: Sequence[TensorSpec]) -> list[memoryview]:
    """The bytes of each tensor. Raises `BadTensor` unless the body is exactly as long as `specs` say."""
    lengths = [spec.nbytes() for spec in specs]
    if (expected := sum(map(padded, lengths))) != len(body):
        raise BadTensor(f"tensors of {expected} bytes announced, {len(body)} came")
    views, offset = [], 0
    for length in lengths:
        views.append(body[offset : offset + length])
        offset += padded(length)
    return views
