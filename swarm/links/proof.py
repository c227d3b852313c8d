"""How a dialler proves who it is: it signs the listener's name and nonce with the key of its PeerId.

Python's `ssl` cannot ask for a self-signed client certificate.
"""

from __future__ import annotations

from swarm import wire
from swarm.errors import Forged, ProtocolError, WrongKey
from swarm.identity import Identity, verify
from swarm.types import PeerId

_CONTEXT = b"shoal dial 1\0"


def greeting(ours: Identity, nonce: bytes) -> wire.Hello:
    """What the listener says first."""
    return wire.Hello(wire.PROTOCOL_VERSION, ours.peer, nonce)


def answer(hello: wire.Hello, ours: Identity, listener: PeerId) -> wire.Proof:
    """What the dialler says to `listener`. Raises `ProtocolError` where it speaks another version."""
    if hello.version != wire.PROTOCOL_VERSION:
        raise ProtocolError(f"protocol {hello.version} there, {wire.PROTOCOL_VERSION} here", listener)
    return wire.Proof(ours.peer, ours.sign(_signed(listener, hello.nonce)))


def proven(message: wire.Proof, ours: Identity, nonce: bytes) -> PeerId:
    """Who the dialler is. Raises `Malformed` or `WrongKey` unless it holds the key of the PeerId that it names."""
    try:
        verify(message.peer, _signed(ours.peer, nonce), message.signature)
    except Forged as error:
        raise WrongKey(f"the dialler cannot prove its key: {error}") from None
    return PeerId(message.peer)


def _signed(listener: str, nonce: bytes) -> bytes:
    return _CONTEXT + listener.encode() + b"\0" + nonce
