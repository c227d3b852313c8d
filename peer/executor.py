"""The one compute thread, and the only bridge between asyncio and torch."""

from __future__ import annotations

import asyncio
import os
import queue
import sys
import threading
import time
from collections.abc import Callable
from typing import Any, TypeVar

T = TypeVar("T")

Done = Callable[[Any, "BaseException | None"], None]


class Executor:
    """Runs work in one thread, in the order it was given, and tells the loop when it is done."""

    def __init__(self) -> None:
        self._loop = asyncio.get_running_loop()
        self._queue: queue.SimpleQueue[tuple[Callable[[], Any], Done] | None] = queue.SimpleQueue()
        self._thread = threading.Thread(target=self._work, name="compute", daemon=True)
        self._thread.start()
        self.busy = 0.0  # seconds of work done so far

    def submit(self, work: Callable[[], Any], done: Done) -> None:
        """Run `work()` after all that was given before, then `done(result, error)` in the loop."""
        self._queue.put((work, done))

    async def run(self, work: Callable[[], T]) -> T:
        """Run `work()` in the compute thread and wait for what it returns or raises."""
        future: asyncio.Future[T] = self._loop.create_future()

        def done(result: T, error: BaseException | None) -> None:
            if future.done():
                return
            if error is None:
                future.set_result(result)
            else:
                future.set_exception(error)

        self.submit(work, done)
        return await future

    async def give_way(self, niceness: int) -> None:
        """From now on let other work on the machine go first, as far as `nice` has it.

        The thread does, and those that torch starts for it. On Linux alone: elsewhere threads have no niceness.
        """
        if niceness and sys.platform == "linux":
            await self.run(lambda: os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), niceness))

    def _work(self) -> None:
        while (item := self._queue.get()) is not None:
            work, done = item
            result, failure = self._run(work)
            try:
                self._loop.call_soon_threadsafe(done, result, failure)
            except RuntimeError:  # the loop was closed: nobody is left to tell
                return
            del item, work, done, result, failure  # or the last step's tensors live until the next

    def _run(self, work: Callable[[], Any]) -> tuple[Any, BaseException | None]:
        started = time.perf_counter()
        try:
            return work(), None
        except Exception as error:  # noqa: BLE001 (whoever gave the work is told, whatever it is)
            return None, error
        finally:
            self.busy += time.perf_counter() - started

    async def close(self) -> None:
        """Let the work under way end, drop the rest, and wait for the thread; at most a second."""
        while not self._queue.empty():
            self._queue.get_nowait()
        self._queue.put(None)
        await asyncio.to_thread(self._thread.join, 1.0)
