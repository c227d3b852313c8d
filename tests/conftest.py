"""What several test modules share: both event loops, and a watch over what a test leaves behind."""

from __future__ import annotations

import asyncio
import gc
import os
import threading
from collections import Counter
from collections.abc import AsyncIterator
from typing import Any

import psutil
import pytest
import uvloop

LOOPS = {"asyncio": asyncio.DefaultEventLoopPolicy, "uvloop": uvloop.EventLoopPolicy}


@pytest.fixture
def event_loop_policy(request: pytest.FixtureRequest) -> Any:
    """asyncio's own loop, or the one that `both_loops` asks for."""
    return LOOPS[getattr(request, "param", "asyncio")]()


both_loops = pytest.mark.parametrize("event_loop_policy", list(LOOPS), indirect=True)
"""For a module's `pytestmark`: every test runs on asyncio's own loop and on uvloop."""


@pytest.fixture
async def nothing_left() -> AsyncIterator[None]:
    """Fails a test after which tasks, threads, processes or open files and sockets are left that were not before."""
    before = _held()
    yield
    left = _held() - before
    for _ in range(20):  # what was closed goes in the loop's next rounds, threads a moment after their last work
        if not left:
            return
        gc.collect()
        await asyncio.sleep(0.01)
        left = _held() - before
    pytest.fail(f"left behind: {dict(left)}")


def _held() -> Counter[str]:
    held = Counter(f"task {task.get_coro()}" for task in asyncio.all_tasks() if task is not asyncio.current_task())
    # asyncio keeps its pool of threads until the loop ends, and that is no leak
    held.update(f"thread {each.name}" for each in threading.enumerate() if not each.name.startswith("asyncio_"))
    held.update(f"process {child.pid}" for child in psutil.Process().children(recursive=True))
    for number in os.listdir("/proc/self/fd"):
        try:
            held[f"file {number} {os.readlink(f'/proc/self/fd/{number}')}"] += 1
        except FileNotFoundError:
            continue  # the listing's own
    return held
