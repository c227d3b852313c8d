"""hivemind's libp2p daemon, p2pd, as a child in hand: it cannot outlive us, and its death is an event.

hivemind starts p2pd as an ordinary child, which stays behind when its parent is killed. Here a small launcher asks
the kernel for a SIGKILL at the parent's death and then becomes p2pd. That signal is bound to the *thread* that
started the child, which is the event loop's: a daemon lives no longer than the loop it belongs to.
"""

from __future__ import annotations

import asyncio
import contextlib
import errno
import fcntl
import importlib.util
import ipaddress
import logging
import os
import shutil
import signal
import socket
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

from swarm.errors import CannotJoin, PortInUse, UsageError
from swarm.identity import Identity

_START_SECONDS = 15.0  # p2pd takes 0.1 to 0.5
_STOP_SECONDS = 1.0
# hivemind's choice as well: the path of a Unix socket may have about a hundred bytes, and $TMPDIR can be long.
_FOLDERS = Path("/tmp")
_PREFIX = "shoal-p2pd-"

# PR_SET_PDEATHSIG is 1. The parent may have died before the call, hence the second look at it.
_BECOME = """
import ctypes, os, signal, sys
parent, *command = sys.argv[1:]
if ctypes.CDLL(None).prctl(1, signal.SIGKILL) or os.getppid() != int(parent):
    sys.exit("the parent is gone, or the kernel knows no PR_SET_PDEATHSIG")
os.execv(command[0], command)
"""

# Without prctl, the launcher stays: our end of the pipe at its stdin closes when we die, however we die.
_WATCH = """
import os, signal, subprocess, sys, threading
child = subprocess.Popen(sys.argv[2:], stdin=subprocess.DEVNULL)
signal.signal(signal.SIGTERM, lambda *_: child.kill())
threading.Thread(target=lambda: (sys.stdin.buffer.read(), child.kill()), daemon=True).start()
sys.exit(child.wait())
"""

logger = logging.getLogger(__name__)


def _binary() -> str:
    spec = importlib.util.find_spec("hivemind")
    if spec is None or spec.origin is None:
        raise UsageError("hivemind is not installed")
    return str(Path(spec.origin).parent / "hivemind_cli" / "p2pd")


def _free_port(host: str, port: int) -> int:
    """`port`, or a free one for 0. Raises `PortInUse` or `UsageError` where one cannot listen there.

    libp2p listens with SO_REUSEPORT: two daemons of one user share a port without a word, and get half the calls each.
    """
    try:
        family = socket.AF_INET6 if ipaddress.ip_address(host).version == 6 else socket.AF_INET
        with socket.socket(family) as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # a port in TIME_WAIT is free
            probe.bind((host, port))
            return int(probe.getsockname()[1])
    except OSError as error:
        if error.errno == errno.EADDRINUSE:
            raise PortInUse(f"port {port} of {host} is in use; choose another for the DHT") from None
        raise UsageError(f"cannot listen at {host} port {port}: {error.strerror}") from None
    except (ValueError, OverflowError):
        raise UsageError(
            f"cannot listen at {host} port {port}: an IP address and a port up to 65535 are needed"
        ) from None


class _Folder:
    """A private folder for a daemon's socket and key, locked while we live, so that others can tell when it is dead."""

    def __init__(self) -> None:
        _sweep()
        fresh = Path(tempfile.mkdtemp(prefix=f".{_PREFIX}", dir=_FOLDERS))  # mode 0700
        self._lock: int | None = os.open(fresh, os.O_RDONLY)
        fcntl.flock(self._lock, fcntl.LOCK_EX)
        self.path = fresh.rename(fresh.with_name(fresh.name[1:]))  # seen by others' sweeps only when locked

    def write_key(self, identity: Identity) -> Path:
        file = self.path / "identity"
        file.touch(mode=0o600)
        file.write_bytes(identity.to_bytes())
        return file

    def remove(self) -> None:
        if self._lock is not None:
            shutil.rmtree(self.path, ignore_errors=True)
            os.close(self._lock)
            self._lock = None


def _sweep() -> None:
    """Remove the folders of processes that were killed; a living one's is locked, another user's cannot be opened."""
    for path in _FOLDERS.glob(f"{_PREFIX}*"):
        with contextlib.suppress(OSError):
            descriptor = os.open(path, os.O_RDONLY | os.O_NOFOLLOW)
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
                shutil.rmtree(path, ignore_errors=True)
            finally:
                os.close(descriptor)


def _arguments(host: str, port: int, announce: Sequence[str], client_mode: bool) -> list[str]:
    """What p2pd is to do, beside its key and socket. Off is what a volunteer did not ask for: carrying others' traffic
    (`relayService`), searching for relays, opening ports in a router where only this machine is meant.
    """
    local = host in ("127.0.0.1", "::1")
    arguments = ["-relay=1", "-relayService=0", "-autoRelay=0", "-autonat=1", "-connManager=1", "-tls=1"]
    arguments.append(f"-natPortMap={int(not local and not client_mode)}")
    if client_mode:
        return [*arguments, "-dhtClient=1", "-noListenAddrs=1"]
    arguments += ["-dhtServer=1", f"-hostAddrs=/{'ip6' if ':' in host else 'ip4'}/{host}/tcp/{port}"]
    return [*arguments, f"-announceAddrs={','.join(announce)}"] if announce else arguments


class Daemon:
    """A running p2pd.

    Attributes:
        pid: its process.
        port: the TCP port that it listens at, 0 in client mode.
        control: multiaddr of the Unix socket that it takes orders at.
        gone: done when the process has ended, for whatever reason.
    """

    gone: asyncio.Task[int]

    def __init__(self, folder: _Folder, port: int, process: asyncio.subprocess.Process) -> None:
        self._folder, self._process = folder, process
        self.port, self.pid = port, process.pid
        self.control = f"/unix{folder.path}/control.sock"
        self.gone = asyncio.create_task(process.wait())
        self._listening: asyncio.Task[None] | None = None

    @classmethod
    async def start(
        cls,
        identity: Identity,
        *,
        host: str = "127.0.0.1",
        port: int = 0,
        announce: Sequence[str] = (),
        client_mode: bool = False,
        watchdog: bool = sys.platform != "linux",
    ) -> Daemon:
        """Start p2pd under `identity`, listening at the IP address `host` (nowhere in client mode).

        Args:
            port: TCP port, 0 for any.
            announce: multiaddrs to tell others instead of those that it listens at.
            watchdog: guard it with a process and a pipe, for kernels that cannot.

        Raises `PortInUse`; `UsageError` where the machine has no such address; `CannotJoin` where p2pd fails.
        """
        port = 0 if client_mode else _free_port(host, port)
        folder = _Folder()
        try:
            key = folder.write_key(identity)
            arguments = _arguments(host, port, announce, client_mode)
            command = [_binary(), f"-listen=/unix{folder.path}/control.sock", f"-id={key}", *arguments]
            self = cls(folder, port, await _launch(command, watchdog))
        except BaseException:
            folder.remove()
            raise
        try:
            await self._ready()
        except BaseException:
            await self.stop()
            raise
        key.unlink()  # it is in p2pd's memory now
        return self

    async def _ready(self) -> None:
        last = "it said nothing"
        try:
            async with asyncio.timeout(_START_SECONDS):
                async for line in self._output:
                    last = line.decode(errors="replace").strip()
                    if last.startswith("Peer ID:"):
                        self._listening = asyncio.create_task(self._listen())
                        return
        except TimeoutError:
            raise CannotJoin(f"p2pd did not start in {_START_SECONDS:.0f} s: {last}") from None
        if "address already in use" in last:
            raise PortInUse(f"p2pd cannot listen: {last}")
        raise CannotJoin(f"p2pd did not start: {last}")

    @property
    def _output(self) -> asyncio.StreamReader:
        assert self._process.stdout is not None
        return self._process.stdout

    async def _listen(self) -> None:
        """Keep p2pd's pipe empty: a full one would stop it."""
        while text := await self._output.read(4096):
            logger.debug("p2pd: %s", text.decode(errors="replace").rstrip())

    async def stop(self) -> None:
        """End the process, within about a second even if it is stopped, and remove its files. Safe to call twice."""
        self._signal(signal.SIGTERM)
        await asyncio.wait({self.gone}, timeout=_STOP_SECONDS)
        self._signal(signal.SIGKILL)
        await self.gone
        if self._process.stdin is not None:
            self._process.stdin.close()
        if self._listening is not None:
            await self._listening
        self._folder.remove()

    def _signal(self, number: signal.Signals) -> None:
        # Not `Process.terminate`: that one may reap a process that has just died, under the loop's own watcher.
        if self._process.returncode is None:
            with contextlib.suppress(ProcessLookupError):
                os.kill(self.pid, number)

    def __repr__(self) -> str:
        return f"<Daemon pid={self.pid} {'gone' if self.gone.done() else 'running'}>"


async def _launch(command: Sequence[str], watchdog: bool) -> asyncio.subprocess.Process:
    launcher = [sys.executable, "-I", "-S", "-c", _WATCH if watchdog else _BECOME, str(os.getpid())]
    return await asyncio.create_subprocess_exec(
        *launcher,
        *command,
        stdin=asyncio.subprocess.PIPE if watchdog else asyncio.subprocess.DEVNULL,
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.STDOUT,
        start_new_session=True,  # Ctrl-C in the terminal is for us: we drain, and p2pd is needed for that
        env={"GOLOG_LOG_LEVEL": "fatal", **os.environ},
    )
