"""Processes forked from one that has imported what they need: the start of a command costs milliseconds, not seconds.

They are processes like any others: with an id, sockets, signals, streams and an end of their own. `Forked` stands in
the place of `subprocess.Popen` where tests start many. What is read at import, such as `HF_ENDPOINT`, is what it was
for the first: a test of that starts its command the long way.
"""

from __future__ import annotations

import atexit
import contextlib
import functools
import gc
import importlib
import json
import os
import runpy
import select
import signal
import socket
import struct
import subprocess
import sys
import threading
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from swarm.console.terminal import set_up_logging
from swarm.imports import import_lightly

PRELOADED = (
    "swarm.cli",
    "swarm.client",
    "swarm.runmodel",
    "swarm.trainer",
    "swarm.console.conversation",
    "peer.cli",
    "peer.node",
    "peer.server",
    "peer.capacity",
    "peer.training.node",
    "transformers.models.llama.modeling_llama",
)
_STATUS = struct.Struct("i")


class Forked(subprocess.Popen):  # type: ignore[type-arg]
    """A `subprocess.Popen` of a Python program, one of our commands or a file of the tests, that the nursery starts."""

    def _execute_child(
        self,
        args: Sequence[str],
        executable: None,
        preexec_fn: None,
        close_fds: bool,
        pass_fds: Sequence[int],
        cwd: str | None,
        env: Mapping[str, str] | None,
        *others: Any,
    ) -> None:
        """Part of `subprocess.Popen`: where it forks."""
        p2cread, p2cwrite, c2pread, c2pwrite, errread, errwrite = others[3:9]
        start_new_session = others[-2]
        environment = dict(os.environ if env is None else env)
        self._told, status = socket.socketpair()
        streams = [number if given == -1 else given for number, given in enumerate((p2cread, c2pwrite, errwrite))]
        with status:
            handles = [*streams, status.fileno()]
            self.pid = _nursery().fork(list(args), environment, cwd or os.getcwd(), start_new_session, handles)
        self._child_created = True
        self._close_pipe_fds(p2cread, p2cwrite, c2pread, c2pwrite, errread, errwrite)

    def _reaped(self, pid: int, flags: int) -> tuple[int, int]:
        """As `os.waitpid`, which is for the nursery alone to call: it tells us."""
        if self._told.fileno() < 0 or not select.select([self._told], [], [], 0 if flags & os.WNOHANG else None)[0]:
            return 0, 0
        told = self._told.recv(_STATUS.size)
        self._told.close()
        return pid, _STATUS.unpack(told)[0] if told else signal.SIGKILL

    def _try_wait(self, wait_flags: int) -> tuple[int, int]:
        return self._reaped(self.pid, wait_flags)

    def _internal_poll(self, _deadstate: int | None = None, **_: Any) -> int | None:
        return super()._internal_poll(_deadstate, _waitpid=self._reaped)


class Nursery:
    """The process that has imported everything."""

    def __init__(self) -> None:
        self._wishes, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self._turn = threading.Lock()  # answers are not to cross
        with theirs:
            self._process = subprocess.Popen(
                [sys.executable, __file__, str(theirs.fileno())],
                pass_fds=[theirs.fileno()],
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
            )

    def fork(
        self, command: list[str], environment: dict[str, str], folder: str, session: bool, handles: list[int]
    ) -> int:
        """A new process with three of these handles as its streams; at the last, it is told how it ends. Its id."""
        wish = json.dumps([command, environment, folder, session]).encode()
        with self._turn:
            socket.send_fds(self._wishes, [wish], handles)
            return int(self._wishes.recv(64))

    def close(self) -> None:
        self._wishes.close()
        self._process.wait()


@functools.cache
def _nursery() -> Nursery:
    made = Nursery()
    atexit.register(made.close)
    return made


# --- in the nursery ---------------------------------------------------------------------------------------------------


def nurse(wishes: socket.socket) -> list[str]:
    """Fork a process for each wish and tell its parent how it ends. Returns in each, with what it is to run.

    Ends when the other side does.
    """
    watched: dict[int, int] = {}  # where to tell of whose end
    ended, ends = socket.socketpair()  # a handler alone would not end a wait that begins at the same moment
    ends.setblocking(False)
    signal.signal(signal.SIGCHLD, lambda *_: None)
    signal.set_wakeup_fd(ends.fileno(), warn_on_full_buffer=False)
    while True:
        ready, _, _ = select.select([wishes, ended], [], [])
        if ended in ready:
            ended.recv(4096)
            _reap(watched)
        if wishes not in ready:
            continue
        wish, handles, _, _ = socket.recv_fds(wishes, 1 << 18, 16)
        if not wish:
            sys.exit()
        *streams, status = handles
        if (child := os.fork()) == 0:
            signal.set_wakeup_fd(-1)
            signal.signal(signal.SIGCHLD, signal.SIG_DFL)
            for each in (wishes, ended, ends):
                each.close()
            for handle in (*watched.values(), status):
                os.close(handle)
            return _become(streams, *json.loads(wish))
        watched[child] = status
        for each in streams:
            os.close(each)
        wishes.send(str(child).encode())


def _reap(watched: dict[int, int]) -> None:
    while watched:
        pid, status = os.waitpid(-1, os.WNOHANG)
        if not pid:
            return
        with socket.socket(fileno=watched.pop(pid)) as told, contextlib.suppress(BrokenPipeError):
            told.send(_STATUS.pack(status))  # or nobody wants to know


def _become(
    streams: list[int], command: list[str], environment: dict[str, str], folder: str, session: bool
) -> list[str]:
    """Take on what a process is started with."""
    for number, handle in enumerate(streams):
        os.dup2(handle, number)
        os.close(handle)
    if session:
        os.setsid()
    os.environ.clear()
    os.environ.update(environment)
    os.chdir(folder)
    return command


def _start(command: list[str]) -> None:
    """Run a command or a file, which ends as it would if it had been started by itself."""
    name = Path(command[0]).name
    if name in ("peer", "swarm"):
        sys.argv = command
        importlib.import_module(f"{name}.__main__").main()
    sys.argv = command[1:]
    sys.path[0] = str(Path(command[1]).parent)
    runpy.run_path(command[1], run_name="__main__")


if __name__ == "__main__":
    set_up_logging(verbose=False)  # as every command begins: libraries read at import how much they may say
    import_lightly(*PRELOADED)
    assert len(os.listdir("/proc/self/task")) == 1, "a fork has no other threads"
    gc.freeze()
    _start(nurse(socket.socket(fileno=int(sys.argv[1]))))
