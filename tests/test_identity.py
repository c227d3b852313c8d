"""Keys and what follows from them: names, signatures, files, certificates."""

from __future__ import annotations

import os
import stat
from pathlib import Path

import base58
import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec

from swarm.errors import Forged, InUse, Malformed, UsageError, WrongKey
from swarm.identity import Identity, peer_id_of, peer_id_of_certificate, public_key_of, verify

# A key and the name that libp2p gives it: RFC 8032's first test vector, in go-libp2p's spelling.
SEED = bytes.fromhex("9d61b19deffd5a60ba844af492ec2cc44449c5697b326919703bac031cae7f60")
PUBLIC = bytes.fromhex("d75a980182b10ab7d54bfed3c964073a0ee172f3daa62325af021a68f707511a")
KEY_FILE = bytes.fromhex("08011240") + SEED + PUBLIC


def test_the_name_is_the_public_key_in_libp2ps_spelling() -> None:
    identity = Identity.from_bytes(KEY_FILE)
    assert base58.b58decode(identity.peer) == bytes.fromhex("002408011220") + PUBLIC
    assert identity.peer.startswith("12D3KooW")
    assert peer_id_of(public_key_of(identity.peer)) == identity.peer
    assert identity.to_bytes() == KEY_FILE


@pytest.mark.parametrize(
    "name",
    [
        "",
        "x",
        "0OIl",  # not in the alphabet
        "é" * 52,
        "1" * 52,
        "Q" * 5000,
        "QmYyQSo1c1Ym7orWxLYvCrM2EmxFTANf8wXmmE7DWjhx5N",  # an RSA key's
        Identity.from_bytes(KEY_FILE).peer + "\n",
        Identity.from_bytes(KEY_FILE).peer + " ",
        "1" + Identity.from_bytes(KEY_FILE).peer,
    ],
)
def test_what_is_no_name_is_refused(name: str) -> None:
    with pytest.raises(Malformed):
        public_key_of(name)


def test_a_signature_is_for_one_key_and_one_message() -> None:
    alice, bob = Identity.generate(), Identity.generate()
    signature = alice.sign(b"message")
    verify(alice.peer, b"message", signature)
    for peer, message, mark in (
        (bob.peer, b"message", signature),
        (alice.peer, b"massage", signature),
        (alice.peer, b"message", signature[:-1]),
        (alice.peer, b"message", b""),
    ):
        with pytest.raises(Forged):
            verify(peer, message, mark)


def test_the_file_is_made_once_and_for_its_owner_only(tmp_path: Path) -> None:
    file = tmp_path / "deep" / "identity"
    first = Identity.load_or_create(file)
    assert stat.S_IMODE(file.stat().st_mode) == 0o600
    assert Identity.load_or_create(file).peer == first.peer
    Identity.generate().save(file)
    assert file.read_bytes() == first.to_bytes()
    assert os.listdir(file.parent) == ["identity"]


def test_a_file_that_others_can_read_is_refused(tmp_path: Path) -> None:
    file = tmp_path / "identity"
    Identity.generate().save(file)
    file.chmod(0o640)
    with pytest.raises(UsageError, match="open to others; chmod 600"):
        Identity.load_or_create(file)


@pytest.mark.parametrize(
    "data",
    [b"", b"garbage", KEY_FILE[:-1], KEY_FILE + b"x", b"\x08\x00" + KEY_FILE[2:], KEY_FILE[:-1] + b"\x00"],
    ids=["empty", "garbage", "short", "long", "another type", "another public key"],
)
def test_a_file_that_holds_something_else_is_refused(tmp_path: Path, data: bytes) -> None:
    file = tmp_path / "identity"
    file.write_bytes(data)
    file.chmod(0o600)
    with pytest.raises(UsageError, match="move it away"):
        Identity.load_or_create(file)
    assert file.read_bytes() == data


def test_a_place_that_cannot_be_written_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(UsageError, match="cannot use the identity file"):
        Identity.load_or_create(tmp_path / "file" / "identity")


def test_one_process_has_it_at_a_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    opened: list[int] = []
    real = os.open

    def remember(*args: object, **options: object) -> int:
        opened.append(real(*args, **options))  # type: ignore[arg-type]
        return opened[-1]

    file = tmp_path / "identity"
    Identity.load_or_create(file)
    monkeypatch.setattr(os, "open", remember)
    Identity.claim(file)
    with pytest.raises(InUse, match="--identity"):
        Identity.claim(file)
    os.close(opened[0])  # as the end of the process does
    Identity.claim(file)
    os.close(opened[-1])


def test_the_certificate_carries_the_key() -> None:
    identity = Identity.generate()
    der = identity._certificate().public_bytes(serialization.Encoding.DER)
    assert peer_id_of_certificate(der) == identity.peer


def test_other_certificates_are_refused() -> None:
    key = ec.generate_private_key(ec.SECP256R1())
    ours = Identity.generate()._certificate()
    builder = x509.CertificateBuilder().subject_name(ours.subject).issuer_name(ours.subject).serial_number(1)
    builder = builder.not_valid_before(ours.not_valid_before_utc).not_valid_after(ours.not_valid_after_utc)
    other = builder.public_key(key.public_key()).sign(key, hashes.SHA256())
    for der in (b"", b"garbage", other.public_bytes(serialization.Encoding.DER)):
        with pytest.raises(WrongKey):
            peer_id_of_certificate(der)
