"""What can go wrong, in two kinds: ours (raise it) and theirs (reroute, avoid the peer).

Every error that may cross the wire has a `code`; `to_wire` and `from_wire` are the only place that maps between a
code and a class. A message says what was wrong and, for a user's mistake, what to do about it.
"""

from __future__ import annotations

from typing import Any, ClassVar


class ShoalError(Exception):
    """The root of everything that Shoal raises on purpose.

    Attributes:
        generated: where `generate()` could not go on: the tokens so far, the prompt included, [B, N].
    """

    generated: Any = None


class LocalError(ShoalError):
    """Ours: a mistake of the user, of this machine or of this program. Raised to the caller."""


class UsageError(LocalError):
    """An argument, option or configuration value that cannot be used as it is."""


class ModelNotFound(LocalError):
    """No model has this name, or it cannot be fetched from here."""


class ModelCorrupt(LocalError):
    """A file of the model is missing, damaged or not what its hash says."""


class CannotCut(LocalError):
    """This model cannot be cut into stages without changing what it computes."""


class DiskFull(LocalError):
    """There is no room for what has to be written."""


class PortInUse(LocalError):
    """Somebody else listens on the port."""


class InUse(LocalError):
    """Another process on this machine uses it."""


class CannotJoin(LocalError):
    """None of the initial peers can be reached, or the DHT refuses us (a wrong clock, say)."""


class NoRoute(LocalError):
    """Some blocks have no online peer."""

    def __init__(self, message: str, missing: tuple[tuple[int, int], ...] = ()) -> None:
        super().__init__(message)
        self.missing = missing


class SessionLost(LocalError):
    """A step failed again and again, whoever was asked."""


class ModelDiverged(LocalError):
    """A run was stopped: round after round, its loss or gradient was no finite number."""


class Closed(LocalError):
    """The object was closed and cannot be used any more."""


class RemoteError(ShoalError):
    """Theirs: what another peer did or failed to do. Reroute, and avoid the peer for a while.

    Attributes:
        peer: the PeerId that it is about, empty where nobody is known to be at fault.
        teller: the PeerId of who says so, empty where that is ourselves.
    """

    code: ClassVar[str] = "remote"
    teller = ""

    def __init__(self, message: str, peer: str = "") -> None:
        super().__init__(message)
        self.peer = peer


class Internal(RemoteError):
    """The other side failed in a way that it has no better name for."""

    code = "internal"


class Unreachable(RemoteError):
    """Nobody answers at any of the peer's addresses, or the connection broke."""

    code = "unreachable"


class WrongKey(RemoteError):
    """Who listens there does not hold the key of the PeerId that was dialled, or cannot prove its own."""

    code = "wrong-key"


class DeadlineExceeded(RemoteError):
    """No answer in time."""

    code = "deadline"


class ProtocolError(RemoteError):
    """Bytes that no correct peer sends. The stream or the connection they came on is closed."""

    code = "protocol"


class Oversized(ProtocolError):
    """A length, count or shape beyond its limit."""

    code = "oversized"


class Malformed(ProtocolError):
    """Bytes that do not decode to the message they claim to be."""

    code = "malformed"


class UnknownMessage(ProtocolError):
    """A message type that this version does not know."""

    code = "unknown-message"


class BadTensor(ProtocolError):
    """A tensor of the wrong dtype, shape or size, or with values that are not finite."""

    code = "bad-tensor"


class Forged(ProtocolError):
    """A signature that does not fit the key, or a record under another's name."""

    code = "forged"


class Refused(RemoteError):
    """The peer is well and says no. Another peer may say yes."""

    code = "refused"


class Busy(Refused):
    """Too many calls are already waiting there."""

    code = "busy"


class NoRoom(Refused):
    """The peer's cache has no room for the session."""

    code = "no-room"


class Draining(Refused):
    """The peer is leaving and takes no new sessions."""

    code = "draining"


class WrongModel(Refused):
    """The peer does not host this model or these blocks."""

    code = "wrong-model"


class UnknownSession(Refused):
    """The peer holds no such session: it never did, or its lease ended."""

    code = "unknown-session"


class Forgotten(Refused):
    """The peer no longer has what it passed on in the session; who is before it may."""

    code = "forgotten"


class StaleRound(Refused):
    """The round is over, or its micro-batches are counted: what still comes for it is not wanted."""

    code = "stale-round"


class NotReady(Refused):
    """The peer has not come to that round yet."""

    code = "not-ready"


class SumLost(Refused):
    """What the peer had counted in a round is gone: it failed in the middle of adding to it."""

    code = "sum-lost"


class WeightsChanged(Refused):
    """The peer's weights are others than when the session began: it has to begin anew."""

    code = "weights-changed"


class BeyondCache(Refused):
    """A step that does not fit into what the session leased, or leaves a gap before it."""

    code = "beyond-cache"


def _subclasses(root: type[RemoteError]) -> dict[str, type[RemoteError]]:
    found = {root.code: root}
    for child in root.__subclasses__():
        found |= _subclasses(child)
    return found


_BY_CODE = _subclasses(RemoteError)


def to_wire(error: BaseException) -> tuple[str, str]:
    """The code and message that tell another peer of `error`; what is not meant for others is only named."""
    if isinstance(error, RemoteError):
        return error.code, str(error)
    return Internal.code, type(error).__name__


def from_wire(code: str, message: str, peer: str) -> RemoteError:
    """The error that `peer` told us of. A code from a newer version becomes a plain `RemoteError`."""
    return _BY_CODE.get(code, RemoteError)(message, peer)
