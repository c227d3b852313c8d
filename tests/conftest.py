"""What several test modules share: both event loops, and a watch over what a test leaves behind."""

from __future__ import annotations

import asyncio
import os
import signal
import threading
from collections import Counter
from collections.abc import AsyncIterator, Callable

import psutil
import pytest
import uvloop
from hypothesis import settings

os.environ.setdefault("OMP_NUM_THREADS", "1")  # torch's threads wait for each other in circles where cores are few
os.environ.setdefault("SHOAL_NICE", "0")  # peers of one test are not to wait for what another computes

if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:  # as in a shell's background: commands would not hear Ctrl-C
    signal.signal(signal.SIGINT, signal.default_int_handler)

settings.register_profile("shoal", deadline=None)  # other work on the machine is no failure
settings.load_profile("shoal")

POOLS = ("asyncio_", "uvloop_")
LOOPS: dict[str, Callable[[], asyncio.AbstractEventLoop]] = {
    "asyncio": asyncio.SelectorEventLoop,
    "uvloop": uvloop.new_event_loop,
}


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line("markers", "both_loops: runs on asyncio's own event loop and on uvloop")


def pytest_asyncio_loop_factories(item: pytest.Item) -> dict[str, Callable[[], asyncio.AbstractEventLoop]]:
    """asyncio's own loop, and uvloop too where the test is marked with `both_loops`."""
    return LOOPS if item.get_closest_marker("both_loops") else {"asyncio": LOOPS["asyncio"]}


@pytest.fixture
async def nothing_left() -> AsyncIterator[None]:
    """Fails a test after which tasks, threads, processes or open files and sockets are left that were not before."""
    loop = asyncio.get_running_loop()
    warm = await loop.create_server(asyncio.Protocol, "127.0.0.1", 0)  # uvloop opens files of its own for its first
    warm.close()
    await warm.wait_closed()
    before = _held()
    yield
    left = _held() - before
    for _ in range(50):  # what was closed goes in the loop's next rounds, threads a moment after their last work
        if not left:
            return
        await asyncio.sleep(0.01)
        left = _held() - before
    pytest.fail(f"left behind: {dict(left)}")


def _held() -> Counter[str]:
    held = Counter(f"task {task.get_coro()}" for task in asyncio.all_tasks() if task is not asyncio.current_task())
    # A loop keeps its pool of threads until it ends, and that is no leak.
    held.update(f"thread {each.name}" for each in threading.enumerate() if not each.name.startswith(POOLS))
    held.update(f"process {child.pid}" for child in psutil.Process().children(recursive=True))
    for number in os.listdir("/proc/self/fd"):
        try:
            target = os.readlink(f"/proc/self/fd/{number}")
            held[target.partition(":[")[0]] += 1  # sockets and pipes by their kind: loops renew their own
        except FileNotFoundError:
            continue  # the listing's own
    return held
