"""Who gets a lease, and when: at once, in the place of idle sessions, or in turn.

Where the pool is full, idle sessions are put out to host memory, the longest idle first; only when that is full too,
those that were idle for very long lose what they hold. Who still finds no room waits, if it wants to, in a queue that
is bounded in length and time, or is told at once how long it would have to.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

from peer.cache import Leases
from swarm.errors import NoRoom
from swarm.types import SessionId

IDLE_SECONDS = 2.0  # without a step, before a session is put out where others need the room
LOST_SECONDS = 60.0  # before one that is out loses its lease where others need even that room
MAX_QUEUE = 64  # sessions that may wait


class Sessions(Protocol):
    """What is to be done with sessions."""

    def is_busy(self, session: SessionId) -> bool:
        """Whether steps of it wait or run."""

    def put_out(self, session: SessionId) -> None:
        """Move what it holds to host memory, before anything that is run from now on."""

    def lose(self, session: SessionId) -> None:
        """Forget it."""


@dataclass(slots=True, eq=False)
class _Waiter:
    session: SessionId
    tokens: int
    future: asyncio.Future[None]


class Admission:
    """Leases, and the queue for them."""

    def __init__(self, leases: Leases, sessions: Sessions, clock: Callable[[], float]) -> None:
        self._leases = leases
        self._sessions = sessions
        self._clock = clock
        self._queue: deque[_Waiter] = deque()

    def __len__(self) -> int:
        return len(self._queue)

    async def lease(self, session: SessionId, tokens: int, wait: float = 0.0, first: bool = False) -> None:
        """Lease `tokens` of the pool to `session`, after at most `wait` seconds.

        `first` is for who was admitted before: it does not wait behind those who were not.

        Raises:
            NoRoom: there is none; the message says when some is expected.
        """
        full = self._try(session, tokens, first)
        if full is None:
            return
        if wait <= 0 or tokens > self._leases.capacity or len(self._queue) >= MAX_QUEUE:
            raise full
        waiter = _Waiter(session, tokens, asyncio.get_running_loop().create_future())
        if first:
            self._queue.appendleft(waiter)
        else:
            self._queue.append(waiter)
        try:
            async with asyncio.timeout(wait):
                await waiter.future
        except TimeoutError:
            raise NoRoom(f"no room for {tokens} tokens of cache after {wait:.1f} s in the queue") from None
        except asyncio.CancelledError:
            if not waiter.future.cancelled() and not first:  # granted at the very moment at which nobody wants it
                self._leases.release(session)
            raise
        finally:
            if waiter in self._queue:
                self._queue.remove(waiter)
            self.serve()

    def serve(self) -> None:
        """Give those who wait what has become free; to be called when something has, and now and then."""
        while self._queue:
            waiter = self._queue[0]
            if not waiter.future.done():
                if self._grant(waiter.session, waiter.tokens) is not None:
                    return
                waiter.future.set_result(None)
            self._queue.popleft()

    def _try(self, session: SessionId, tokens: int, first: bool) -> NoRoom | None:
        """Lease it at once, or say why not: nobody overtakes who waits, but for whom nothing has to be found."""
        if self._queue and not first and tokens > self._leases.held(session):
            return NoRoom(f"{len(self._queue)} sessions wait for room{self._hint(tokens)}")
        return self._grant(session, tokens)

    def _grant(self, session: SessionId, tokens: int) -> NoRoom | None:
        now = self._clock()
        if tokens <= self._leases.capacity:
            self._make_room(session, tokens - self._leases.held(session), now)
        try:
            self._leases.grant(session, tokens, now)
        except NoRoom as error:
            return NoRoom(f"{error}{self._hint(tokens)}")
        return None

    def _make_room(self, session: SessionId, tokens: int, now: float) -> None:
        """Put idle sessions out until `tokens` are free, as far as that goes."""
        for idle in self._leases.idle(now - IDLE_SECONDS):
            if self._leases.free >= tokens:
                return
            if idle != session and not self._sessions.is_busy(idle) and self._put_out(idle, session, now):
                self._sessions.put_out(idle)

    def _put_out(self, idle: SessionId, asking: SessionId, now: float) -> bool:
        for lost in self._leases.idle(now - LOST_SECONDS, out=True):
            if self._leases.put_out(idle):
                return True
            if lost != asking and not self._sessions.is_busy(lost):
                self._sessions.lose(lost)
        return self._leases.put_out(idle)

    def _hint(self, tokens: int) -> str:
        seconds = self._leases.expected_wait(tokens, self._clock())
        return f"; room is expected in {seconds:.0f} s" if seconds < 1e6 else ""

    def __repr__(self) -> str:
        return f"<Admission waiting={len(self._queue)} {self._leases!r}>"
