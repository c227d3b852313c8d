"""An offer to signed bytes and back, and where in the DHT it may lie: pure, checked, no clock of its own.

A record is MessagePack `[kind, peer, body, signature]`. The signature covers kind and body under a prefix of its own,
so it says nothing in any other protocol, and a record of one kind can never pass for another. A peer takes its offer
back with a later record of kind `withdrawal`: the DHT cannot delete, it only prefers what expires last.
"""

from __future__ import annotations

import enum
import hashlib
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Annotated, Literal, TypeVar

import msgpack
import msgspec

from swarm.directory.sampling import BUCKET, Table, buckets_of, tables_of
from swarm.errors import Forged, Malformed, Oversized, UsageError
from swarm.identity import Identity, verify
from swarm.types import Address, Coordinate, ModelId, Offer, PeerId, Span, State

LIFETIME = 60.0  # seconds from an offer's issue to its expiry
MAX_SKEW = 5.0  # seconds that clocks may differ; hivemind lets nobody in with more than 3
MAX_RECORD = 1024  # bytes of a signed record
MAX_BUCKETS = 256  # that one span may touch; bounds the work of checking where a record may lie
INDEX_KEY = b"shoal/1/models"  # the dictionary of all models: sub-keyed by model, so it grows with these alone

_CONTEXT = b"shoal/1/record\0"  # what the signature covers starts with this


class Kind(enum.StrEnum):
    """What a signed record says. New kinds (training runs, say) go here."""

    OFFER = "offer"
    WITHDRAWAL = "withdrawal"


@dataclass(frozen=True, slots=True)
class Record:
    """A record whose signature and values were checked; a withdrawal carries the offer that it takes back."""

    kind: Kind
    offer: Offer


_Block = Annotated[int, msgspec.Meta(ge=0, le=100_000)]
_Count = Annotated[int, msgspec.Meta(ge=0, le=1 << 40)]
_Time = Annotated[float, msgspec.Meta(ge=0, le=1e11)]  # seconds since the epoch
_Seconds = Annotated[float, msgspec.Meta(ge=0, le=1e6)]
_Axis = Annotated[float, msgspec.Meta(ge=-60, le=60)]  # seconds
_Height = Annotated[float, msgspec.Meta(ge=0, le=60)]  # seconds
_Error = Annotated[float, msgspec.Meta(ge=0, le=10)]
_Host = Annotated[str, msgspec.Meta(pattern=r"^[0-9A-Za-z.:%_-]{1,253}\Z")]
_Port = Annotated[int, msgspec.Meta(ge=1, le=65535)]


class _Envelope(msgspec.Struct, array_like=True, forbid_unknown_fields=True):
    kind: Annotated[str, msgspec.Meta(max_length=16)]
    peer: Annotated[str, msgspec.Meta(max_length=64)]
    body: bytes
    signature: Annotated[bytes, msgspec.Meta(min_length=64, max_length=64)]


class _Body(msgspec.Struct):
    """The values of an offer. A map, whose unknown keys are skipped: newer peers may say more than we understand."""

    model: Annotated[str, msgspec.Meta(pattern=r"^[0-9A-Za-z._:-]{1,128}\Z")]
    name: Annotated[str, msgspec.Meta(max_length=128)]
    num_blocks: Annotated[int, msgspec.Meta(ge=1, le=100_000)]
    span: tuple[_Block, _Block]
    addresses: Annotated[list[tuple[_Host, _Port]], msgspec.Meta(min_length=1, max_length=8)]
    state: State
    dtype: Literal["float32", "bfloat16", "float16"]
    tokens_per_second: Annotated[float, msgspec.Meta(ge=0, le=1e9)]
    cache_tokens: _Count
    cache_free: _Count
    sessions: _Count
    version: Annotated[str, msgspec.Meta(pattern=r"^[0-9A-Za-z.+-]{0,32}\Z")]
    issued: _Time
    expires: _Time
    seconds_per_block: _Seconds
    prefill_seconds_per_block: _Seconds
    queue: Annotated[float, msgspec.Meta(ge=0, le=1e9)]
    fixed: bool
    place: tuple[_Axis, _Axis, _Axis, _Height, _Error] | None  # the coordinate: its vector, height and error
    quantize: Literal["none", "int8", "int4"] = "none"
    batched: bool = True


_Shape = TypeVar("_Shape")


def plain(data: bytes, limit: int = MAX_RECORD) -> object:
    """What the MessagePack `data` of at most `limit` bytes says: plain values, no extension types, no deep nesting.

    Raises `Oversized` or `Malformed`.
    """
    if len(data) > limit:
        raise Oversized(f"{len(data)} bytes where {limit} are allowed")
    try:
        value: object = msgpack.unpackb(data, raw=False, strict_map_key=True, max_ext_len=0)
    except (ValueError, RecursionError) as error:  # msgpack's own errors are ValueErrors
        raise Malformed(f"not MessagePack: {error}") from None
    return value


def _shaped(value: object, shape: type[_Shape]) -> _Shape:
    try:
        return msgspec.convert(value, shape)
    except msgspec.ValidationError as error:
        raise Malformed(f"not a record: {error}") from None


def _body_of(offer: Offer) -> bytes:
    fields = {name: getattr(offer, name) for name in _Body.__struct_fields__ if name != "place"}
    fields["span"] = (offer.span.start, offer.span.end)
    fields["addresses"] = [(address.host, address.port) for address in offer.addresses]
    fields["state"] = str(offer.state)
    fields["place"] = (*place.vector, place.height, place.error) if (place := offer.coordinate) else None
    body: bytes = msgpack.packb(fields)
    return body


def _offer_of(peer: PeerId, body: bytes) -> Offer:
    value = _shaped(plain(body), _Body)
    start, end = value.span
    possible = (
        start < end <= value.num_blocks
        and end - start <= BUCKET * (MAX_BUCKETS - 1)
        and value.cache_free <= value.cache_tokens
        and value.issued < value.expires <= value.issued + LIFETIME
        and value.name.isprintable()  # it is shown in terminals
    )
    if not possible:
        raise Malformed("values of an offer that contradict each other")
    fields = msgspec.structs.asdict(value)
    place = fields.pop("place")
    fields |= {
        "model": ModelId(value.model),
        "span": Span(start, end),
        "addresses": tuple(Address(host, port) for host, port in value.addresses),
        "coordinate": Coordinate(place[:3], *place[3:]) if place else None,
    }
    return Offer(peer=peer, **fields)


def _signed_part(kind: str, body: bytes) -> bytes:
    return _CONTEXT + kind.encode() + b"\0" + body


def pack(offer: Offer, identity: Identity, kind: Kind = Kind.OFFER) -> bytes:
    """`offer`, signed. Raises `UsageError` where `read` would refuse the result or the offer is another peer's."""
    if offer.peer != identity.peer:
        raise UsageError(f"{identity.peer} cannot sign an offer of {offer.peer}")
    try:
        body = _body_of(offer)
        _offer_of(offer.peer, body)
    except (Malformed, Oversized, ValueError, OverflowError, TypeError) as error:
        raise UsageError(f"not an offer that can be published: {error}") from None
    data: bytes = msgpack.packb([kind.value, offer.peer, body, identity.sign(_signed_part(kind, body))])
    if len(data) > MAX_RECORD:
        raise UsageError(f"an offer of {len(data)} bytes, {MAX_RECORD} are allowed: too many or too long addresses")
    return data


def read(data: bytes) -> Record:
    """The record in `data`, its signature and values checked. Its expiry is for `check`, which knows the time.

    Raises `Oversized`, `Malformed` or `Forged`.
    """
    envelope = _shaped(plain(data), _Envelope)
    verify(envelope.peer, _signed_part(envelope.kind, envelope.body), envelope.signature)
    try:
        kind = Kind(envelope.kind)
    except ValueError:
        raise Malformed(f"a record of unknown kind {envelope.kind!r}") from None
    return Record(kind, _offer_of(PeerId(envelope.peer), envelope.body))


def unpack(data: bytes) -> Offer:
    """The offer in `data`. Raises like `read`, and `Malformed` for a record of another kind."""
    record = read(data)
    if record.kind is not Kind.OFFER:
        raise Malformed(f"a {record.kind}, not an offer")
    return record.offer


def table_key(model: ModelId, table: Table) -> bytes:
    """The key of a dictionary of offers."""
    return f"shoal/1/{model}/{table.bucket}{table.name and '@'}{table.name}".encode()


def bucket_keys(model: ModelId, span: Span) -> Iterator[bytes]:
    """The keys of the root dictionaries of the offers for these blocks."""
    return (table_key(model, Table(bucket)) for bucket in buckets_of(span))


def hashed(key: bytes) -> bytes:
    """What a DHT node sees of a key: hivemind's `DHTID`."""
    return hashlib.sha1(key, usedforsecurity=False).digest()


def _subkey_at(key_id: bytes, offer: Offer) -> str | None:
    if key_id == hashed(INDEX_KEY):
        return offer.model
    keys = (table_key(offer.model, table) for table in tables_of(offer))
    return offer.peer if key_id in map(hashed, keys) else None


def check(record: Record, key_id: bytes, subkey: object, expires: float, now: float) -> None:
    """Raise `Forged` or `Malformed` unless `record` may lie in the DHT right here, right now.

    Args:
        key_id: the hash of the key that it lies under.
        subkey: its name in that key's dictionary.
        expires: when the DHT will drop it, in seconds since the epoch, like `now`.
    """
    offer = record.offer
    if subkey is None or subkey != _subkey_at(key_id, offer):
        raise Forged("a record under a key that is not its own", offer.peer)
    if expires != offer.expires:
        raise Forged("a record kept for another time than was signed", offer.peer)
    if not now - MAX_SKEW <= offer.expires <= now + LIFETIME + MAX_SKEW:
        raise Malformed(f"a record that expires {offer.expires - now:+.0f} s from now", offer.peer)
