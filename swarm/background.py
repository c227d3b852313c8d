"""An event loop in a thread of its own, so that plain scripts, notebooks and many threads can use what is async."""

from __future__ import annotations

import asyncio
import atexit
import logging
import threading
from collections.abc import Callable, Coroutine
from typing import Any, TypeVar

from swarm.errors import Closed, ShoalError

log = logging.getLogger(__name__)

T = TypeVar("T")


class BackgroundLoop:
    """Runs coroutines for callers who have no event loop, or have one that must not wait."""

    def __init__(self, name: str = "swarm") -> None:
        self._loop = _new_loop()
        self._thread = threading.Thread(target=self._run, name=name, daemon=True)
        self._closers: list[Callable[[], Coroutine[Any, Any, None]]] = []
        self._thread.start()
        atexit.register(self.close)

    @property
    def loop(self) -> asyncio.AbstractEventLoop:
        """The loop itself, for `call_soon_threadsafe`."""
        return self._loop

    def _run(self) -> None:
        asyncio.set_event_loop(self._loop)
        try:
            self._loop.run_forever()
        finally:
            self._loop.close()

    def run(self, work: Coroutine[Any, Any, T]) -> T:
        """Run `work` in the loop and wait for it. Ctrl-C cancels it there. Raises `Closed` after `close`."""
        if self._loop.is_closed() or not self._thread.is_alive():
            work.close()
            raise Closed("the connection to the swarm was closed")
        # What `run_coroutine_threadsafe` does, without its two chained futures: this is once per token.
        finished = threading.Lock()
        finished.acquire()
        tasks: list[asyncio.Task[T]] = []

        def begin() -> None:
            task = self._loop.create_task(work)
            tasks.append(task)
            task.add_done_callback(lambda _: finished.release())

        self._loop.call_soon_threadsafe(begin)
        try:
            finished.acquire()
        except BaseException:
            self._loop.call_soon_threadsafe(lambda: tasks and tasks[0].cancel())
            raise
        return _result(tasks[0])

    def post(self, work: Coroutine[Any, Any, Any]) -> None:
        """Run `work` in the loop some time soon; nobody waits for it. After `close`, nothing happens."""
        if self._loop.is_closed() or not self._thread.is_alive():
            work.close()
            return
        self._loop.call_soon_threadsafe(self._loop.create_task, work)

    def at_close(self, closer: Callable[[], Coroutine[Any, Any, None]]) -> None:
        """Run `closer()` when the loop is closed or the interpreter exits."""
        self._closers.append(closer)

    def close(self) -> None:
        """Run what `at_close` was given, cancel what still runs, end the thread. A second call does nothing."""
        atexit.unregister(self.close)
        if self._loop.is_closed() or not self._thread.is_alive():
            return
        closers, self._closers = self._closers, []
        try:
            asyncio.run_coroutine_threadsafe(_finish(closers), self._loop).result(timeout=5.0)
        except TimeoutError:
            log.warning("not closed in time")
        finally:
            self._loop.call_soon_threadsafe(self._loop.stop)
            self._thread.join(timeout=5.0)


def _result(task: asyncio.Task[T]) -> T:
    try:
        return task.result()
    except asyncio.CancelledError:
        raise Closed("the connection to the swarm was closed") from None


async def _finish(closers: list[Callable[[], Coroutine[Any, Any, None]]]) -> None:
    for closer in closers:
        try:
            async with asyncio.timeout(2.0):
                await closer()
        except (TimeoutError, ShoalError) as error:  # one that hangs shall not keep the others from closing
            log.warning("not closed cleanly error=%r", error)
    await _cancel_all()


async def _cancel_all() -> None:
    tasks = asyncio.all_tasks() - {asyncio.current_task()}
    for task in tasks:
        task.cancel()
    if tasks:
        await asyncio.wait(tasks, timeout=2.0)
    await asyncio.get_running_loop().shutdown_asyncgens()


def _new_loop() -> asyncio.AbstractEventLoop:
    try:
        import uvloop
    except ImportError:  # there is none for Windows
        return asyncio.new_event_loop()
    loop: asyncio.AbstractEventLoop = uvloop.new_event_loop()
    return loop
