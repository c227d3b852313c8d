"""An event loop whose time is virtual: nothing waits, and the same program takes the same course every time.

Where nothing is ready, time jumps to the next timer. There are no sockets, signals or threads in such a world: what
goes on between its peers goes through `swarm.loopback`.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine
from concurrent.futures import Executor
from typing import Any, NoReturn, TypeVar, TypeVarTuple

T = TypeVar("T")
Ts = TypeVarTuple("Ts")


class Deadlock(RuntimeError):
    """Everybody waits, and no timer is left that could change it: in real time, the program would hang."""


class VirtualLoop(asyncio.BaseEventLoop):
    """asyncio's own loop, with a clock in the place of its selector."""

    def __init__(self) -> None:
        super().__init__()
        self._now = 0.0
        self._selector = self

    def time(self) -> float:
        """Virtual seconds since the loop was made."""
        return self._now

    def select(self, timeout: float | None) -> list[NoReturn]:
        """Let `timeout` seconds pass at once: called where the loop would wait for its sockets."""
        if timeout is None:
            raise Deadlock(f"at {self._now:.3f} s nothing will ever happen again: {asyncio.all_tasks(self)}")
        self._now += timeout
        return []

    def _process_events(self, event_list: list[NoReturn]) -> None:
        """There are no sockets of which anything could be told."""

    def _write_to_self(self) -> None:
        """Nothing sleeps that would have to be woken."""

    def run_in_executor(self, executor: Executor | None, func: Callable[[*Ts], T], *args: *Ts) -> asyncio.Future[T]:
        """Raises `RuntimeError`: how long a thread takes is not ours to say."""
        raise RuntimeError("there are no threads in virtual time")


def run_virtually(main: Coroutine[Any, Any, T]) -> T:
    """`asyncio.run` in virtual time. Raises `Deadlock` instead of hanging."""
    with asyncio.Runner(loop_factory=VirtualLoop) as runner:
        return runner.run(main)
