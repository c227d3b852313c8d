"""A script as a process of its own, which lives no longer than the bench that needs it."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

from processes import Failed


@contextlib.contextmanager
def running(script: str, *arguments: str) -> Iterator[tuple[subprocess.Popen[str], str]]:
    """The script of that name in this folder, once it has printed a line: its process and the line.

    It is to end when its stdin does, which happens at the latest when this process ends. Raises `Failed` where it
    ends without a word.
    """
    here = Path(__file__)
    command = [sys.executable, "-P", str(here.with_name(script)), *arguments]
    environment = {**os.environ, "PYTHONPATH": str(here.parent.parent)}  # for what scripts share
    pipe = subprocess.PIPE
    with subprocess.Popen(
        command, stdin=pipe, stdout=pipe, text=True, start_new_session=True, env=environment
    ) as process:
        try:
            assert process.stdout is not None
            if not (line := process.stdout.readline()):
                raise Failed(f"{script} ended with code {process.wait()}; what it says is above")
            yield process, line
        except BaseException:
            with contextlib.suppress(ProcessLookupError):  # what it has started, too
                os.killpg(process.pid, signal.SIGKILL)
            raise
