"""Leases on a bounded number of tokens: who may hold how much of the KV cache, and until when.

Pure: the clock is passed in. A session leases `batch * max_length` tokens when it opens and can always grow to that;
full means no, at once, to whoever asks next, and never an out-of-memory death. What an idle session holds can be put
out of the pool to host memory, within a bound of its own: its lease goes with it, and comes back with its next step.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from swarm.errors import NoRoom
from swarm.types import SessionId


@dataclass(slots=True)
class Lease:
    """A session's right to so many tokens."""

    session: SessionId
    tokens: int
    expires: float  # seconds on the caller's clock
    opened: float
    active: float  # when its last step came
    out: bool = False  # whether what it holds is in host memory


class Leases:
    """All leases of one stage.

    Args:
        capacity: tokens, of the pool.
        duration: seconds that a lease lasts after its session's last sign of life.
        page: tokens of one row that are given out together.
        host: tokens of idle sessions that may be in host memory; as many as in the pool where it is not said.
    """

    def __init__(self, capacity: int, duration: float = 30.0, page: int = 1, host: int | None = None) -> None:
        self.capacity = capacity
        self.duration = duration
        self.page = page
        self.host = host
        self._leases: dict[SessionId, Lease] = {}
        self._used = 0
        self._out = 0
        self._lasted: float | None = None  # seconds, on average, from a session's beginning to its end

    @property
    def used(self) -> int:
        """Tokens of the pool that are leased now."""
        return self._used

    @property
    def free(self) -> int:
        """Tokens of the pool that are not."""
        return self.capacity - self._used

    @property
    def out(self) -> int:
        """Tokens that are in host memory."""
        return self._out

    def __len__(self) -> int:
        return len(self._leases)

    def room(self, rows: int, length: int) -> int:
        """What so many rows of so many positions take, in tokens."""
        return rows * -(-length // self.page) * self.page

    def held(self, session: SessionId) -> int:
        """Tokens of the pool that the session has leased."""
        lease = self._leases.get(session)
        return 0 if lease is None or lease.out else lease.tokens

    def is_out(self, session: SessionId) -> bool:
        """Whether what the session holds is in host memory."""
        return (lease := self._leases.get(session)) is not None and lease.out

    def grant(self, session: SessionId, tokens: int, now: float) -> Lease:
        """Lease `tokens` to `session`, or change its lease to that, in the pool. Raises `NoRoom`; all then stays."""
        more = tokens - self.held(session)
        if more > self.free:
            raise NoRoom(f"the session asks for {tokens} tokens of cache, {self.free} of {self.capacity} are free")
        lease = self._leases.get(session)
        if lease is None:
            lease = self._leases[session] = Lease(session, 0, 0.0, now, now)
        if lease.out:
            self._out -= lease.tokens
            lease.out = False
        lease.tokens = tokens
        lease.expires = now + self.duration
        self._used += more
        return lease

    def put_out(self, session: SessionId) -> bool:
        """What the session holds goes to host memory; False where there is no room."""
        lease = self._leases[session]
        if lease.out or self._out + lease.tokens > (self.capacity if self.host is None else self.host):
            return False
        lease.out = True
        self._used -= lease.tokens
        self._out += lease.tokens
        return True

    def idle(self, before: float, out: bool = False) -> list[SessionId]:
        """The sessions in the pool, or those out of it, without a step since `before`: the longest idle first."""
        found = [lease for lease in self._leases.values() if lease.out == out and lease.active <= before]
        return [lease.session for lease in sorted(found, key=lambda lease: lease.active)]

    def stepped(self, session: SessionId, now: float) -> None:
        """A step came: the session is alive and not idle."""
        self.renew(session, now)
        self._leases[session].active = now

    def expected_wait(self, tokens: int, now: float) -> float:
        """Seconds until so many tokens are likely to be free, going by how long sessions lasted; else by the leases."""
        usual = self.duration if self._lasted is None else self._lasted
        left = sorted((max(lease.opened + usual - now, 0.0), lease.tokens) for lease in self._leases.values())
        free = self.free
        for seconds, given_back in left:
            free += given_back
            if free >= tokens:
                return seconds
        return math.inf

    def renew(self, session: SessionId, now: float) -> None:
        """The session showed a sign of life."""
        self._leases[session].expires = now + self.duration

    def release(self, session: SessionId, now: float | None = None) -> None:
        """The session is over; nothing happens where it holds no lease."""
        if (lease := self._leases.pop(session, None)) is None:
            return
        if lease.out:
            self._out -= lease.tokens
        else:
            self._used -= lease.tokens
        if now is not None:
            lasted = now - lease.opened
            self._lasted = lasted if self._lasted is None else 0.8 * self._lasted + 0.2 * lasted

    def expired(self, now: float) -> list[SessionId]:
        """The sessions whose lease has ended. They hold it until `release`."""
        return [lease.session for lease in self._leases.values() if lease.expires <= now]

    def __repr__(self) -> str:
        return f"<Leases sessions={len(self)} used={self._used}/{self.capacity}>"
