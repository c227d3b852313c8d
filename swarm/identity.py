"""One Ed25519 key per peer: its name, its signature, its TLS certificate and its libp2p identity.

The key file is libp2p's own protobuf `PrivateKey`, so the DHT's daemon reads the very same file and the PeerId of the
DHT is the PeerId of the data plane.
"""

from __future__ import annotations

import datetime
import fcntl
import os
import ssl
import tempfile
from pathlib import Path

import base58
from cryptography import x509
from cryptography.exceptions import InvalidSignature, UnsupportedAlgorithm
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey
from cryptography.x509.oid import NameOID

from swarm.errors import Forged, InUse, Malformed, UsageError, WrongKey
from swarm.types import PeerId

# libp2p-crypto's protobuf, written out: field 1 (the key's type) = 1 (Ed25519), field 2 (data) = so many bytes.
_PRIVATE_KEY_HEAD = bytes.fromhex("08011240")  # then 64 bytes: the seed and the public key
_PEER_ID_HEAD = bytes.fromhex("002408011220")  # identity multihash of 36 bytes: the protobuf of a 32-byte public key
_PEM = serialization.Encoding.PEM
_RAW = serialization.Encoding.Raw


def public_key_of(peer: str) -> Ed25519PublicKey:
    """The public key inside a PeerId. Raises `Malformed` where `peer` is not the PeerId of an Ed25519 key."""
    try:
        raw = base58.b58decode(peer) if len(peer) <= 64 else b""
    except ValueError:
        raw = b""
    # Spelled in one way only (the decoder overlooks white space), or a banned peer comes back under a second name.
    if len(raw) != 38 or not raw.startswith(_PEER_ID_HEAD) or base58.b58encode(raw).decode() != peer:
        raise Malformed(f"not the PeerId of an Ed25519 key: {peer[:64]!r}")
    return Ed25519PublicKey.from_public_bytes(raw[len(_PEER_ID_HEAD) :])


def peer_id_of(key: Ed25519PublicKey) -> PeerId:
    """The PeerId of a public key, in libp2p's spelling (`12D3KooW...`)."""
    raw = key.public_bytes(_RAW, serialization.PublicFormat.Raw)
    return PeerId(base58.b58encode(_PEER_ID_HEAD + raw).decode())


def verify(peer: str, message: bytes, signature: bytes) -> None:
    """Raise `Forged` unless `signature` over `message` is by the key of `peer`."""
    try:
        public_key_of(peer).verify(signature, message)
    except InvalidSignature:
        raise Forged(f"the signature is not by {peer}", peer) from None


def peer_id_of_certificate(der: bytes) -> PeerId:
    """The PeerId whose key a TLS certificate (DER) carries. Raises `WrongKey` where that is no Ed25519 key."""
    try:
        key = x509.load_der_x509_certificate(der).public_key()
    except (ValueError, UnsupportedAlgorithm):
        key = None
    if not isinstance(key, Ed25519PublicKey):
        raise WrongKey("the listener's certificate carries no Ed25519 key")
    return peer_id_of(key)


class Identity:
    """A private key and what follows from it."""

    def __init__(self, key: Ed25519PrivateKey) -> None:
        self._key = key
        self.peer: PeerId = peer_id_of(key.public_key())

    @classmethod
    def generate(cls) -> Identity:
        """A new identity, nowhere stored."""
        return cls(Ed25519PrivateKey.generate())

    @classmethod
    def from_bytes(cls, data: bytes) -> Identity:
        """Read libp2p's `PrivateKey` protobuf. Raises `UsageError` where it is anything else."""
        if len(data) != 68 or not data.startswith(_PRIVATE_KEY_HEAD):
            raise UsageError("not an Ed25519 identity (libp2p PrivateKey protobuf of 68 bytes)")
        identity = cls(Ed25519PrivateKey.from_private_bytes(data[4:36]))
        if identity.to_bytes() != data:
            raise UsageError("a damaged identity: its public key is not that of its private key")
        return identity

    @classmethod
    def load_or_create(cls, file: Path) -> Identity:
        """Read the identity in `file`, or make one there (mode 0600) if there is none.

        Raises `UsageError` where the file cannot be read or written, holds something else, or is open to others.
        """
        try:
            if not file.exists():
                cls.generate().save(file)
            mode, data = file.stat().st_mode, file.read_bytes()
        except OSError as error:
            raise UsageError(f"cannot use the identity file {file}: {error.strerror}") from None
        if mode & 0o077:
            raise UsageError(f"identity file {file} is open to others; chmod 600 it")
        try:
            return cls.from_bytes(data)
        except UsageError as error:
            raise UsageError(f"identity file {file}: {error}; move it away to have a new one made") from None

    @classmethod
    def claim(cls, file: Path) -> Identity:
        """`load_or_create`, and let no other process on this machine claim it while this one lives.

        Two peers with one name would take each other's place. Raises `InUse` where another has it.
        """
        identity = cls.load_or_create(file)
        descriptor = os.open(file, os.O_RDONLY)  # never closed: the lock ends with the process
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            os.close(descriptor)
            raise InUse(f"another peer on this machine uses {file}; give this one --identity FILE") from None
        return identity

    def save(self, file: Path) -> None:
        """Write the key to `file` (mode 0600) unless it exists; never leaves half a key."""
        file.parent.mkdir(parents=True, exist_ok=True)
        descriptor, temporary = tempfile.mkstemp(dir=file.parent, prefix=f".{file.name}.")  # mkstemp's mode is 0600
        try:
            with os.fdopen(descriptor, "wb") as handle:
                handle.write(self.to_bytes())
                handle.flush()
                os.fsync(handle.fileno())  # or a power cut leaves an empty file under the name
            os.link(temporary, file)  # unlike a rename, a link fails if somebody was faster
        except FileExistsError:
            return
        finally:
            os.unlink(temporary)

    def to_bytes(self) -> bytes:
        """The key as libp2p's `PrivateKey` protobuf."""
        seed = self._key.private_bytes(_RAW, serialization.PrivateFormat.Raw, serialization.NoEncryption())
        return _PRIVATE_KEY_HEAD + seed + self._key.public_key().public_bytes(_RAW, serialization.PublicFormat.Raw)

    def sign(self, message: bytes) -> bytes:
        """Sixty-four bytes that `verify` accepts for this peer and this message alone."""
        return self._key.sign(message)

    def server_context(self) -> ssl.SSLContext:
        """TLS 1.3 as the listener: a self-signed certificate of this very key."""
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.minimum_version = ssl.TLSVersion.TLSv1_3
        context.num_tickets = 0  # no resumption: every connection proves the key anew
        with tempfile.TemporaryDirectory(prefix="shoal-") as folder:  # mode 0700; ssl reads files only
            file = Path(folder) / "certificate.pem"
            file.touch(mode=0o600)
            file.write_bytes(self._private_pem() + self._certificate().public_bytes(_PEM))
            context.load_cert_chain(file)
        return context

    def _private_pem(self) -> bytes:
        return self._key.private_bytes(_PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption())

    def _certificate(self) -> x509.Certificate:
        name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, self.peer)])
        # Nobody looks at the dates: the key is what is checked, and a wrong clock must not matter here.
        start = datetime.datetime(2020, 1, 1, tzinfo=datetime.UTC)
        builder = x509.CertificateBuilder().subject_name(name).issuer_name(name).public_key(self._key.public_key())
        builder = builder.serial_number(x509.random_serial_number())
        builder = builder.not_valid_before(start).not_valid_after(start + datetime.timedelta(days=36500))
        return builder.sign(self._key, None)

    def __repr__(self) -> str:
        return f"<Identity {self.peer}>"


def client_context() -> ssl.SSLContext:
    """TLS 1.3 as the dialler. It checks no chain: the dialler compares the certificate's key with the PeerId."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.minimum_version = ssl.TLSVersion.TLSv1_3
    context.check_hostname = False
    context.verify_mode = ssl.CERT_NONE
    return context
