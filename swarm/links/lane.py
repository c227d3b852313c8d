"""What is under way from one end of a connection in memory to the other, in order, and when it arrives."""

from __future__ import annotations

import asyncio
import heapq
import itertools
from collections.abc import Callable
from dataclasses import dataclass

from swarm.errors import RemoteError

WINDOW = 1024 * 1024  # bytes that are under way before a sender has to wait
_TICK = 1e-9  # seconds


@dataclass(frozen=True, slots=True)
class Message:
    """What was sent."""

    header: bytes
    body: bytes
    end: RemoteError | None = None  # no message: the connection ends here, for this reason


class Lane:
    """Messages on their way.

    Args:
        bandwidth: bytes per second.
        deliver: takes what has arrived. False where it cannot: then `look` has to be called when that has changed.
    """

    def __init__(self, bandwidth: float, deliver: Callable[[Lane, Message], bool]) -> None:
        self._bandwidth = bandwidth
        self._deliver = deliver
        self._queue: list[tuple[float, int, Message]] = []  # a heap: when it arrives, and in which order
        self._count = itertools.count()
        self._free = 0.0  # when the last byte of the last message is on its way
        self._last = 0.0  # when the last message arrives
        self._bytes = 0  # under way
        self._timer: asyncio.TimerHandle | None = None
        self._drained = asyncio.Event()

    @property
    def is_full(self) -> bool:
        """Whether a sender has to wait."""
        return self._bytes > WINDOW

    async def drained(self) -> None:
        """Wait until something has arrived, or `wake`."""
        self._drained.clear()
        await self._drained.wait()

    def wake(self) -> None:
        """Let those who wait look again."""
        self._drained.set()

    def reserve(self, size: int) -> float:
        """Take a turn for so many bytes: seconds until the last of them is on its way."""
        now = asyncio.get_running_loop().time()
        self._free = max(self._free, now) + size / self._bandwidth
        return self._free - now

    def put(self, message: Message, seconds: float, late: float = 0.0) -> None:
        """It arrives in so many seconds, behind what is under way; or so much later, behind what comes after it."""
        due = max(self._last, asyncio.get_running_loop().time() + seconds)
        if not late:
            self._last = due
        heapq.heappush(self._queue, (due + late, next(self._count), message))
        self._bytes += len(message.body)
        self._schedule()

    def clear(self) -> None:
        """What is under way is lost."""
        self._queue.clear()
        self._bytes = 0
        self._schedule()

    def _schedule(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
        self._timer = asyncio.get_running_loop().call_at(self._queue[0][0], self.look) if self._queue else None

    def look(self) -> None:
        """Deliver what is due."""
        now = asyncio.get_running_loop().time()
        while self._queue and self._queue[0][0] <= now + _TICK:
            due, number, message = heapq.heappop(self._queue)
            if not self._deliver(self, message):
                heapq.heappush(self._queue, (due, number, message))
                return
            self._bytes -= len(message.body)
            self._drained.set()
        self._schedule()
