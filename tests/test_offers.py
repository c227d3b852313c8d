"""Offers as bytes: what is signed comes back, and nothing else does."""

from __future__ import annotations

import dataclasses
from typing import Any

import msgpack
import pytest
from hypothesis import given
from hypothesis import strategies as st

from swarm.directory import offers
from swarm.directory.offers import Kind
from swarm.errors import Forged, Malformed, Oversized, ProtocolError, UsageError
from swarm.identity import Identity
from swarm.types import Address, ModelId, Offer, Span, State

NOW = 1_800_000_000.0
ME, OTHER = Identity.generate(), Identity.generate()
OFFER = Offer(
    peer=ME.peer,
    model=ModelId("ab" * 32),
    name="Llama 3.1 70B",
    num_blocks=80,
    span=Span(8, 40),
    addresses=(Address("203.0.113.7", 31338), Address("2001:db8::1", 31338)),
    state=State.ONLINE,
    dtype="bfloat16",
    tokens_per_second=12.5,
    cache_tokens=65536,
    cache_free=1024,
    sessions=3,
    version="0.1.0",
    issued=NOW,
    expires=NOW + 60,
)

spans = st.tuples(st.integers(0, 99_999), st.integers(1, 4000)).map(lambda s: Span(s[0], min(s[0] + s[1], 100_000)))
hosts = st.one_of(st.ip_addresses().map(str), st.from_regex(r"[a-z]{1,20}(\.[a-z]{1,20}){0,2}", fullmatch=True))
counts = st.integers(0, 1 << 40)
valid_offers = st.builds(
    Offer,
    peer=st.just(ME.peer),
    model=st.from_regex(r"[0-9a-f]{64}", fullmatch=True).map(ModelId),
    name=st.text(st.characters(codec="ascii", min_codepoint=32, max_codepoint=126), max_size=64),
    num_blocks=st.just(100_000),
    span=spans,
    addresses=st.lists(st.builds(Address, hosts, st.integers(1, 65535)), min_size=1, max_size=4).map(tuple),
    state=st.sampled_from(State),
    dtype=st.sampled_from(["float32", "bfloat16", "float16"]),
    quantize=st.sampled_from(["none", "int8", "int4"]),
    batched=st.booleans(),
    tokens_per_second=st.floats(0, 1e9),
    cache_tokens=st.just(1 << 40),
    cache_free=counts,
    sessions=counts,
    version=st.from_regex(r"[0-9.]{0,8}", fullmatch=True),
    issued=st.just(NOW),
    expires=st.floats(NOW + 0.001, NOW + 60),
)


def changed(**values: Any) -> Offer:
    return dataclasses.replace(OFFER, **values)


def signed_by(identity: Identity, fields: object, kind: str = "offer") -> bytes:
    """What a peer sends that signs properly and says what it likes."""
    body = msgpack.packb(fields)
    signature = identity.sign(b"shoal/1/record\0" + kind.encode() + b"\0" + body)
    return bytes(msgpack.packb([kind, identity.peer, body, signature]))


def fields(**values: Any) -> dict[str, Any]:
    honest: dict[str, Any] = msgpack.unpackb(msgpack.unpackb(offers.pack(OFFER, ME))[2])
    return honest | values


@given(valid_offers)
def test_what_is_packed_is_unpacked(offer: Offer) -> None:
    assert offers.unpack(offers.pack(offer, ME)) == offer


def test_an_offer_is_small() -> None:
    assert len(offers.pack(OFFER, ME)) < 600


def test_an_unknown_field_of_a_newer_peer_is_skipped() -> None:
    assert offers.unpack(signed_by(ME, fields(favourite_colour=[1.0, 2.0]))) == OFFER


def test_a_withdrawal_is_not_an_offer() -> None:
    data = offers.pack(OFFER, ME, Kind.WITHDRAWAL)
    assert offers.read(data) == offers.Record(Kind.WITHDRAWAL, OFFER)
    with pytest.raises(Malformed, match="withdrawal"):
        offers.unpack(data)


@given(st.binary(max_size=2048))
def test_garbage_is_refused_by_name(data: bytes) -> None:
    with pytest.raises(ProtocolError):
        offers.unpack(data)


garbage = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(2**63), 2**64 - 1)
    | st.floats()
    | st.text(max_size=8)
    | st.binary(max_size=8),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=8), inner, max_size=4),
    max_leaves=8,
)


@given(garbage, st.text(max_size=8))
def test_signed_garbage_is_refused_by_name(value: object, kind: str) -> None:
    for data in (msgpack.packb(value), signed_by(ME, value), signed_by(ME, value, kind)):
        with pytest.raises(ProtocolError):
            offers.unpack(data)


@given(st.integers(0, len(offers.pack(OFFER, ME)) - 1), st.integers(1, 255))
def test_every_changed_byte_is_noticed(place: int, flip: int) -> None:
    data = bytearray(offers.pack(OFFER, ME))
    data[place] ^= flip
    with pytest.raises(ProtocolError):
        offers.unpack(bytes(data))


@given(st.sampled_from(sorted(fields())), garbage)
def test_every_field_is_checked(field: str, value: object) -> None:
    try:
        offer = offers.unpack(signed_by(ME, fields(**{field: value})))
    except ProtocolError:
        return
    assert offers.unpack(offers.pack(offer, ME)) == offer  # a value that is as good as the honest one


BAD = [
    {"span": [5, 5]},
    {"span": [7, 5]},
    {"span": [-1, 5]},
    {"span": [0, 81]},
    {"span": [0, 5, 6]},
    {"span": [0, 100_001], "num_blocks": 100_001},
    {"span": [0, 100_000], "num_blocks": 100_000},
    {"num_blocks": 0},
    {"addresses": []},
    {"addresses": [["h", 0]]},
    {"addresses": [["h", 65536]]},
    {"addresses": [["", 1]]},
    {"addresses": [["h" * 254, 1]]},
    {"addresses": [["h\n", 1]]},
    {"addresses": [["h", 1]] * 9},
    {"state": "asleep"},
    {"dtype": "int4"},
    {"quantize": "int2"},
    {"tokens_per_second": float("nan")},
    {"tokens_per_second": float("inf")},
    {"tokens_per_second": -1.0},
    {"cache_free": 65537},
    {"cache_free": -1},
    {"sessions": True},
    {"version": "v" * 33},
    {"name": "n" * 129},
    {"name": "red\x1b[31m"},
    {"model": ""},
    {"model": "a/b"},
    {"issued": float("nan")},
    {"expires": NOW},
    {"expires": NOW + 61},
]


@pytest.mark.parametrize("values", BAD, ids=str)
def test_values_out_of_range_are_refused(values: dict[str, Any]) -> None:
    with pytest.raises(Malformed):
        offers.unpack(signed_by(ME, fields(**values)))


OPTIONAL = {field.name for field in dataclasses.fields(OFFER) if field.default is not dataclasses.MISSING}


@pytest.mark.parametrize("field", sorted(set(fields()) - OPTIONAL))
def test_no_field_may_be_left_out(field: str) -> None:
    some = fields()
    del some[field]
    with pytest.raises(Malformed):
        offers.unpack(signed_by(ME, some))


def test_another_key_cannot_sign() -> None:
    kind, _, body, signature = msgpack.unpackb(offers.pack(OFFER, ME))
    with pytest.raises(Forged):
        offers.unpack(msgpack.packb([kind, OTHER.peer, body, signature]))
    with pytest.raises(Forged):  # nor can a record of one kind pass for another
        offers.read(msgpack.packb(["withdrawal", ME.peer, body, signature]))


def test_oversized_is_told_before_anything_is_decoded() -> None:
    with pytest.raises(Oversized):
        offers.unpack(signed_by(ME, fields(addresses=[["h" * 250, 1]] * 5)))


@pytest.mark.parametrize("data", [b"\x91" * 1000, b"\xdd\xff\xff\xff\xff", b"\xdf\xff\xff\xff\xff", b"\xc7\x01\x05a"])
def test_bombs_of_nesting_and_length(data: bytes) -> None:
    with pytest.raises(ProtocolError):
        offers.unpack(data)


@pytest.mark.parametrize(
    "offer",
    [
        changed(peer=OTHER.peer),
        changed(addresses=()),
        changed(addresses=(Address("h" * 250, 1),) * 5),
        changed(tokens_per_second=float("nan")),
        changed(span=Span(0, 81)),
        changed(sessions=2**80),
        changed(name="\ud800"),
    ],
)
def test_our_own_mistakes_are_usage_errors(offer: Offer) -> None:
    with pytest.raises(UsageError):
        offers.pack(offer, ME)


def check(key: bytes, subkey: object, *, now: float = NOW, expires: float = OFFER.expires) -> None:
    offers.check(offers.read(offers.pack(OFFER, ME)), offers.hashed(key), subkey, expires, now)


def test_an_offer_lies_in_every_bucket_that_it_touches_and_in_the_index() -> None:
    keys = list(offers.bucket_keys(OFFER.model, OFFER.span))
    assert [key.rsplit(b"/")[-1] for key in keys] == [b"0", b"1", b"2"]
    for key in keys:
        check(key, ME.peer)
    check(offers.INDEX_KEY, OFFER.model)


@pytest.mark.parametrize(
    ("key", "subkey"),
    [
        (next(offers.bucket_keys(OFFER.model, Span(48, 64))), ME.peer),
        (next(offers.bucket_keys(ModelId("cd" * 32), OFFER.span)), ME.peer),
        (next(offers.bucket_keys(OFFER.model, OFFER.span)), OTHER.peer),
        (next(offers.bucket_keys(OFFER.model, OFFER.span)), None),
        (next(offers.bucket_keys(OFFER.model, OFFER.span)), ME.peer.encode()),
        (offers.INDEX_KEY, ME.peer),
        (offers.INDEX_KEY, "cd" * 32),
        (b"elsewhere", ME.peer),
        (b"elsewhere", None),
    ],
    ids=[f"case{number}" for number in range(9)],  # the keys are other ones in every process
)
def test_a_record_under_a_foreign_key_is_forged(key: bytes, subkey: object) -> None:
    with pytest.raises(Forged):
        check(key, subkey)


def test_the_time_that_the_dht_keeps_it_is_the_time_that_was_signed() -> None:
    with pytest.raises(Forged):
        check(offers.INDEX_KEY, OFFER.model, expires=OFFER.expires + 1)


@pytest.mark.parametrize("now", [NOW + 66, NOW - 6, NOW + 1e6])
def test_expired_or_too_far_ahead(now: float) -> None:
    with pytest.raises(Malformed, match="expires"):
        check(offers.INDEX_KEY, OFFER.model, now=now)


def test_keys_hash_as_hivemind_does() -> None:
    from swarm.directory.hive import DHTID

    assert DHTID.generate(source=offers.INDEX_KEY).to_bytes() == offers.hashed(offers.INDEX_KEY)
