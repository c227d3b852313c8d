"""What the commands have in common on a terminal: errors without stack traces, progress bars, key=value logs."""

from __future__ import annotations

import asyncio
import logging
import signal
import sys
from collections.abc import Callable, Coroutine, Iterator
from contextlib import contextmanager
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskID, TextColumn, TimeRemainingColumn

from swarm.errors import ShoalError

console = Console(stderr=True, highlight=False)

_EXIT_INTERRUPTED = 130


def spread(arguments: list[str]) -> list[str]:
    """`--initial-peers A B` as `--initial-peers A --initial-peers B`: what follows and is an address belongs to it."""
    result: list[str] = []
    taking = False
    for argument in arguments:
        address = argument.startswith(("/ip4/", "/ip6/", "/dns"))
        if taking and address and result[-1] != "--initial-peers":
            result.append("--initial-peers")
        taking = argument == "--initial-peers" or (taking and address)
        result.append(argument)
    return result


@contextmanager
def errors_told() -> Iterator[None]:
    """Turn what goes wrong on purpose into a line and an exit code, and Ctrl-C into a quiet end."""
    try:
        yield
    except ShoalError as error:
        console.print(f"[bold red]error:[/] {_escaped(str(error))}", soft_wrap=True)
        sys.exit(1)
    except KeyboardInterrupt:
        sys.exit(_EXIT_INTERRUPTED)


def _escaped(text: str) -> str:
    return text.replace("[", "\\[")


def set_up_logging(verbose: bool) -> None:
    """Lines of key=value on stderr: warnings, or everything from INFO where `verbose`."""
    handler = logging.StreamHandler()
    handler.setFormatter(logging.Formatter('time=%(asctime)s level=%(levelname)s at=%(name)s msg="%(message)s"'))
    handler.addFilter(lambda record: record.name.partition(".")[0] in ("swarm", "peer") or record.levelno >= 40)
    logging.basicConfig(level=logging.INFO if verbose else logging.WARNING, handlers=[handler], force=True)


class ProgressBars:
    """One bar per kind of long work, shown while it goes on; nothing where nobody looks at a terminal."""

    def __init__(self) -> None:
        columns = (TextColumn("{task.description}"), BarColumn(), TextColumn("{task.percentage:>3.0f}%"))
        self._progress = Progress(*columns, TimeRemainingColumn(), console=console, transient=True)
        self._tasks: dict[str, TaskID] = {}

    def __call__(self, what: str, done: int, total: int, /) -> None:
        """`done` of `total` of `what`. May be called from any thread."""
        if not console.is_terminal:
            return
        if what not in self._tasks:
            self._progress.start()
            self._tasks[what] = self._progress.add_task(what, total=total or None)
        self._progress.update(self._tasks[what], completed=done, total=total or None)
        if total and done >= total and all(task.finished for task in self._progress.tasks):
            self.stop()

    def stop(self) -> None:
        """Take the bars away."""
        self._progress.stop()


def run(work: Callable[[asyncio.Event], Coroutine[Any, Any, None]]) -> None:
    """Run `work(stop)` in an event loop; Ctrl-C and SIGTERM set `stop`, and once more they end it at once."""
    with errors_told():
        try:
            import uvloop
        except ImportError:
            asyncio.run(_until_stopped(work))
        else:
            uvloop.run(_until_stopped(work))


async def _until_stopped(work: Callable[[asyncio.Event], Coroutine[Any, Any, None]]) -> None:
    stop = asyncio.Event()
    loop = asyncio.get_running_loop()
    task = asyncio.ensure_future(work(stop))

    def ask() -> None:
        if stop.is_set():
            task.cancel()
        stop.set()

    for number in (signal.SIGINT, signal.SIGTERM):
        loop.add_signal_handler(number, ask)
    try:
        await task
    except asyncio.CancelledError:
        raise KeyboardInterrupt from None


async def unless_stopped(work: Coroutine[Any, Any, None], stop: asyncio.Event) -> bool:
    """Run `work` until it ends (True; raises what it raises) or `stop` is set (False, and it is cancelled)."""
    task, stopped = asyncio.ensure_future(work), asyncio.ensure_future(stop.wait())
    try:
        await asyncio.wait({task, stopped}, return_when=asyncio.FIRST_COMPLETED)
        if task.done():
            task.result()
            return True
        return False
    finally:
        for each in (task, stopped):
            each.cancel()
        await asyncio.wait({task, stopped})
