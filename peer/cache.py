"""Leases on a bounded number of tokens: who may hold how much of the KV cache, and until when.

Pure: the clock is passed in. A session leases `batch * max_length` tokens when it opens and can always grow to that;
full means no, at once, to whoever asks next, and never an out-of-memory death.
"""

from __future__ import annotations

from dataclasses import dataclass

from swarm.errors import NoRoom
from swarm.types import SessionId


@dataclass(slots=True)
class Lease:
    """A session's right to so many tokens."""

    session: SessionId
    tokens: int
    expires: float  # seconds on the caller's clock


class Leases:
    """All leases of one stage."""

    def __init__(self, capacity: int, duration: float = 30.0, page: int = 1) -> None:
        self.capacity = capacity  # tokens
        self.page = page  # tokens of one row that are given out together
        self.duration = duration  # seconds that a lease lasts after its session's last sign of life
        self._leases: dict[SessionId, Lease] = {}
        self._used = 0

    @property
    def used(self) -> int:
        """Tokens that are leased now."""
        return self._used

    @property
    def free(self) -> int:
        """Tokens that are not."""
        return self.capacity - self._used

    def __len__(self) -> int:
        return len(self._leases)

    def room(self, rows: int, length: int) -> int:
        """What so many rows of so many positions take, in tokens."""
        return rows * -(-length // self.page) * self.page

    def grant(self, session: SessionId, tokens: int, now: float) -> Lease:
        """Lease `tokens` to `session`, or change its lease to that. Raises `NoRoom`; an older lease then stays."""
        lease = self._leases.get(session)
        more = tokens - (lease.tokens if lease else 0)
        if more > self.free:
            raise NoRoom(f"the session asks for {tokens} tokens of cache, {self.free} of {self.capacity} are free")
        if lease is None:
            lease = self._leases[session] = Lease(session, 0, 0.0)
        lease.tokens = tokens
        lease.expires = now + self.duration
        self._used += more
        return lease

    def renew(self, session: SessionId, now: float) -> None:
        """The session showed a sign of life."""
        self._leases[session].expires = now + self.duration

    def release(self, session: SessionId) -> None:
        """The session is over; nothing happens where it holds no lease."""
        if (lease := self._leases.pop(session, None)) is not None:
            self._used -= lease.tokens

    def expired(self, now: float) -> list[SessionId]:
        """The sessions whose lease has ended. They hold it until `release`."""
        return [lease.session for lease in self._leases.values() if lease.expires <= now]

    def __repr__(self) -> str:
        return f"<Leases sessions={len(self)} used={self._used}/{self.capacity}>"
