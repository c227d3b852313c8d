"""The compute thread: in order, one at a time, and never in the loop's way."""

from __future__ import annotations

import asyncio
import gc
import os
import sys
import threading
import weakref
from collections.abc import AsyncIterator
from typing import Any

import pytest

from peer.executor import Executor

pytestmark = [pytest.mark.both_loops, pytest.mark.usefixtures("nothing_left")]


@pytest.fixture
async def executor(nothing_left: None) -> AsyncIterator[Executor]:
    executor = Executor()
    yield executor
    await executor.close()


@pytest.mark.skipif(sys.platform != "linux", reason="threads have no niceness of their own")
async def test_its_thread_can_let_others_go_first(nothing_left: None) -> None:
    executor = Executor()
    await executor.give_way(7)
    mine = os.getpriority(os.PRIO_PROCESS, threading.get_native_id())
    found = await executor.run(lambda: os.getpriority(os.PRIO_PROCESS, threading.get_native_id()))
    await executor.close()
    assert found == 7
    assert os.getpriority(os.PRIO_PROCESS, threading.get_native_id()) == mine


async def test_it_runs_in_one_thread_in_the_order_given(executor: Executor) -> None:
    seen: list[int] = []
    threads = set(
        await asyncio.gather(
            *(
                executor.run(lambda n=n: (seen.append(n), threading.get_ident())[1])  # type: ignore[misc]
                for n in range(50)
            )
        )
    )
    assert seen == list(range(50))
    assert len(threads) == 1
    assert threading.get_ident() not in threads


async def test_what_work_raises_the_caller_is_told(executor: Executor) -> None:
    with pytest.raises(ZeroDivisionError):
        await executor.run(lambda: 1 // 0)
    assert await executor.run(lambda: 7) == 7


async def test_the_loop_goes_on_meanwhile(executor: Executor) -> None:
    gate = threading.Event()
    work = asyncio.create_task(executor.run(gate.wait))
    await asyncio.sleep(0)
    assert not work.done()
    gate.set()
    assert await work


async def test_done_is_called_in_the_loop(executor: Executor) -> None:
    told: asyncio.Future[tuple[Any, Any, int]] = asyncio.get_running_loop().create_future()
    executor.submit(lambda: "result", lambda result, error: told.set_result((result, error, threading.get_ident())))
    assert await told == ("result", None, threading.get_ident())


async def test_a_caller_that_gives_up_hurts_no_other(executor: Executor) -> None:
    gate = threading.Event()
    given_up = asyncio.create_task(executor.run(gate.wait))
    await asyncio.sleep(0)
    given_up.cancel()
    await asyncio.wait([given_up])
    gate.set()
    assert await executor.run(lambda: "next") == "next"


async def test_it_holds_nothing_of_what_it_ran(executor: Executor) -> None:
    class Tensor:
        pass

    result = await executor.run(Tensor)
    gone = weakref.ref(result)
    await executor.run(lambda: None)
    del result
    gc.collect()
    assert gone() is None


async def test_closing_ends_the_work_under_way_and_drops_the_rest() -> None:
    executor, ran = Executor(), list[str]()
    gate, started = threading.Event(), threading.Event()

    def first() -> None:
        started.set()
        gate.wait()
        ran.append("first")

    executor.submit(first, lambda result, error: None)
    await asyncio.to_thread(started.wait)
    executor.submit(lambda: ran.append("second"), lambda result, error: None)
    closing = asyncio.create_task(executor.close())
    await asyncio.sleep(0)
    gate.set()
    await closing
    assert ran == ["first"]
    assert not executor._thread.is_alive()
