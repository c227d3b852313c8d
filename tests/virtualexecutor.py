"""The compute thread of one peer, in virtual time."""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Callable
from typing import Any

from swarm.loopback import LoopbackNetwork
from swarm.types import PeerId


class VirtualExecutor:
    """One piece of work after another, slow or stopped as its peer.

    Args:
        seconds: that a piece of work takes, by what came of it.
        timed: what came of it, with the seconds in it where its own clock would have said them.
    """

    def __init__(
        self,
        network: LoopbackNetwork,
        peer: PeerId,
        seconds: Callable[[Any], float],
        timed: Callable[[Any, float], Any] = lambda result, seconds: result,
    ) -> None:
        self._network = network
        self._peer = peer
        self._seconds = seconds
        self._timed = timed
        self._queue: deque[tuple[Callable[[], Any], Callable[[Any, BaseException | None], None]]] = deque()
        self._task: asyncio.Task[None] | None = None
        self.busy = 0.0

    def submit(self, work: Callable[[], Any], done: Callable[..., None]) -> None:
        self._queue.append((work, done))
        if self._task is None:
            self._task = asyncio.get_running_loop().create_task(self._work())

    async def run(self, work: Callable[[], Any]) -> Any:
        future: asyncio.Future[Any] = asyncio.get_running_loop().create_future()

        def done(result: Any, error: BaseException | None) -> None:
            if not future.done():
                future.set_result(result) if error is None else future.set_exception(error)

        self.submit(work, done)
        return await future

    async def _work(self) -> None:
        while self._queue:
            work, done = self._queue.popleft()
            await self._network.running(self._peer)
            result, error = None, None
            try:
                result = work()
            except Exception as failure:  # noqa: BLE001 (as the real one)
                error = failure
            seconds = self._seconds(result) * self._network.slowness(self._peer)
            await asyncio.sleep(seconds)
            result = self._timed(result, seconds)
            await self._network.running(self._peer)
            done(result, error)
        self._task = None

    @property
    def busy_now(self) -> bool:
        """Whether something is still to be done."""
        return self._task is not None

    def end(self) -> None:
        """As the process ends."""
        self._queue.clear()
        if self._task is not None:
            self._task.cancel()

    async def close(self) -> None:
        """As `end`."""
        self.end()
