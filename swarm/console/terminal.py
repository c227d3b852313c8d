"""What the commands have in common on a terminal: errors without stack traces, progress bars, key=value logs."""

from __future__ import annotations

import asyncio
import json
import logging
import os
import re
import signal
import sys
import time
import warnings
from collections.abc import Callable, Coroutine, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NoReturn

import typer
from rich.console import Console
from rich.progress import BarColumn, Progress, ProgressColumn, Task, TaskID, TextColumn, TimeRemainingColumn
from rich.text import Text

from swarm.errors import ShoalError

console = Console(stderr=True, highlight=False)

EXIT_FAILED, EXIT_MISUSED, EXIT_INTERRUPTED = 1, 2, 130

_Misuse: Any = typer.BadParameter.__base__  # the UsageError of click, which newer versions of typer hide
_PEERS = "--initial-peers"
_ADDRESS = re.compile(r"/(ip4|ip6|dns[46]?)/|.*/p2p/")


# --- what was typed ---------------------------------------------------------------------------------------------------


def spread(arguments: Sequence[str]) -> list[str]:
    """`--initial-peers A B` as `--initial-peers A --initial-peers B`: what follows and is an address belongs to it."""
    result: list[str] = []
    taking = False
    for argument in arguments:
        address = _ADDRESS.match(argument) is not None
        first = bool(result) and result[-1] == _PEERS  # the option's own value, whatever it looks like
        if taking and address and not first:
            result.append(_PEERS)
        taking = first or argument == _PEERS or argument.startswith(f"{_PEERS}=") or (taking and address)
        result.append(argument)
    return result


def addresses_in(values: Sequence[str]) -> list[str]:
    """The addresses in `values`, each of which may hold several with commas or spaces between.

    Raises typer's `BadParameter` where there are values, and no address in them: a variable that was empty, say.
    """
    addresses = [address for value in values for address in value.replace(",", " ").split()]
    if values and not addresses:
        raise typer.BadParameter(f"no address after {_PEERS}")
    return addresses


def run_app(app: typer.Typer) -> NoReturn:
    """Run the command that was typed and exit; a mistake in it takes one line, as every other error does."""
    try:
        code = app(spread(sys.argv[1:]), standalone_mode=False)
    except _Misuse as error:
        if told := error.format_message().rstrip("."):  # none where the command alone has shown its help
            _tell(f"{told}; {error.ctx.command_path} --help tells more" if error.ctx else told)
        sys.exit(EXIT_MISUSED)
    except BrokenPipeError:  # `swarm status | head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # nor shall the exit flush into it
        sys.exit(EXIT_FAILED)
    sys.exit(code if isinstance(code, int) else 0)


# --- what went wrong --------------------------------------------------------------------------------------------------


@contextmanager
def errors_told() -> Iterator[None]:
    """Turn what goes wrong on purpose into a line and an exit code, and Ctrl-C into a quiet end."""
    try:
        yield
    except ShoalError as error:
        _tell(str(error))
        sys.exit(EXIT_FAILED)
    except KeyboardInterrupt:
        sys.exit(EXIT_INTERRUPTED)


def _tell(problem: str) -> None:
    console.print(error_line(problem), soft_wrap=True)


def error_line(problem: str) -> Text:
    """ "error: ..." on one line, whatever `problem` is made of."""
    return Text.assemble(("error:", "bold red"), " ", " ".join(problem.split()))


# --- logs -------------------------------------------------------------------------------------------------------------


class _KeyValues(logging.Formatter):
    """`time=... level=... at=... event="session opened" session=1f...`: what a line says, and then its values."""

    _VALUE = r"""[a-z_]+=('[^']*'|"[^"]*"|\S*)"""
    _MESSAGE = re.compile(rf"(?P<event>.*?)(?P<values>( {_VALUE})*)", re.DOTALL)

    def format(self, record: logging.LogRecord) -> str:
        parts = self._MESSAGE.fullmatch(record.getMessage())
        assert parts is not None
        moment = f"{time.strftime('%Y-%m-%dT%H:%M:%S', time.localtime(record.created))}.{int(record.msecs):03d}"
        event = json.dumps(parts["event"], ensure_ascii=False)
        values = parts["values"].replace("\n", "\\n")
        line = f"time={moment} level={record.levelname.lower()} at={record.name} event={event}{values}"
        if record.exc_info:
            line += f" trace={json.dumps(self.formatException(record.exc_info))}"
        return line


class _ConsoleHandler(logging.Handler):
    """Writes through the console, which knows how not to tear a live line apart."""

    def emit(self, record: logging.LogRecord) -> None:
        try:
            console.print(Text(self.format(record)), soft_wrap=True)
        except Exception:  # noqa: BLE001 (the standard way: logging reports it and goes on)
            self.handleError(record)


def _is_ours(record: logging.LogRecord) -> bool:
    return record.name.partition(".")[0] in ("swarm", "peer") or record.levelno >= logging.ERROR


def set_up_logging(verbose: bool) -> None:
    """Lines of key=value on stderr: warnings, or everything from INFO where `verbose`.

    What libraries tell is for developers, and is left out unless it is an error.
    """
    handler = _ConsoleHandler()
    handler.setFormatter(_KeyValues())
    handler.addFilter(_is_ours)
    logging.basicConfig(level=logging.INFO if verbose else logging.WARNING, handlers=[handler], force=True)
    if not sys.warnoptions and not verbose:
        warnings.simplefilter("ignore")
    for name, value in {
        "TRANSFORMERS_VERBOSITY": "error",
        "HF_HUB_DISABLE_PROGRESS_BARS": "1",
        "TOKENIZERS_PARALLELISM": "false",  # or it warns when p2pd is started after the tokenizer was used
    }.items():
        os.environ.setdefault(name, value)


# --- progress ---------------------------------------------------------------------------------------------------------


class _Share(ProgressColumn):
    """Per cent, where that is known."""

    def render(self, task: Task) -> Text:
        return Text("" if task.total is None else f"{task.percentage:>3.0f}%")


class ProgressBars:
    """One bar per kind of long work, shown while it goes on; nothing where nobody looks at a terminal."""

    def __init__(self) -> None:
        columns = (TextColumn("{task.description}"), BarColumn(), _Share())
        self._progress = Progress(*columns, TimeRemainingColumn(), console=console, transient=True)
        self._tasks: dict[str, TaskID] = {}

    def __call__(self, what: str, done: int, total: int, /) -> None:
        """`done` of `total` of `what`; a total of 0 is not known yet. May be called from any thread."""
        if not console.is_terminal:
            return
        self._progress.start()
        if what not in self._tasks:
            self._tasks[what] = self._progress.add_task(what, total=total or None)
        self._progress.update(self._tasks[what], completed=done, total=total or None)

    def stop(self) -> None:
        """Take the bars away."""
        if self._tasks:  # or rich would print an empty line where nothing was shown
            self._progress.stop()


# --- one loop, until Ctrl-C -------------------------------------------------------------------------------------------


def run(work: Callable[[asyncio.Event], Coroutine[Any, Any, object]]) -> NoReturn:
    """Run `work(stop)` in an event loop, and exit. Ctrl-C and SIGTERM set `stop`, and once more they end it at once."""
    try:
        import uvloop
    except ImportError:  # there is none for Windows
        asyncio.run(_to_the_end(work))
    else:
        uvloop.run(_to_the_end(work))
    raise AssertionError("it exits")


async def _to_the_end(work: Callable[[asyncio.Event], Coroutine[Any, Any, object]]) -> None:
    code: Any = 0
    try:
        with errors_told():
            await _until_stopped(work)
    except SystemExit as end:
        code = end.code
    sys.stdout.flush()
    sys.stderr.flush()
    # What was opened is closed. A thread may still import torch or hash a model for seconds; nobody waits for that.
    os._exit(code)


async def _until_stopped(work: Callable[[asyncio.Event], Coroutine[Any, Any, object]]) -> None:
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
