"""A swarm of real processes on this machine: for the demo, the benches and the tests."""

from __future__ import annotations

import contextlib
import os
import queue
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

from relay import HOST, RelayProcess

from swarm.background import BackgroundLoop
from swarm.discovery import Discovery
from swarm.identity import Identity
from swarm.routing import uncovered
from swarm.types import ModelId, Offer

START_SECONDS = 60.0
STOP_SECONDS = 30.0  # it takes two, but for a machine that has much else to do


class Failed(Exception):
    """A process did not do what it was started for; the message holds what it said."""


class PeerProcess:
    """One `peer` command in a process of its own.

    Args:
        within: a command that runs another, such as `ip netns exec NAME`.
        popen: starts it.
    """

    def __init__(
        self,
        arguments: Sequence[str],
        log: Path,
        identity: Path,
        within: Sequence[str] = (),
        popen: Callable[..., subprocess.Popen[str]] = subprocess.Popen,
    ) -> None:
        self.log = log
        self.identity = identity
        self.within = within
        self.arguments = arguments
        self._address: str | None = None
        self._asked = False
        peer = str(Path(sys.executable).with_name("peer"))
        self._command = [*within, peer, *arguments, "--identity", str(identity)]
        self._log_handle = log.open("ab")
        self._lines: queue.SimpleQueue[str | None] = queue.SimpleQueue()
        self.process = popen(
            self._command,
            stdout=subprocess.PIPE,
            stderr=self._log_handle,
            stdin=subprocess.DEVNULL,
            start_new_session=True,
            text=True,
        )
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()

    def _read(self) -> None:
        assert self.process.stdout is not None
        for line in self.process.stdout:
            self._lines.put(line)
        self._lines.put(None)

    @property
    def pid(self) -> int:
        """Of the peer itself, not of its p2pd."""
        return self.process.pid

    @property
    def peer(self) -> str:
        """Its PeerId, once it has started."""
        return Identity.from_bytes(self.identity.read_bytes()).peer

    def address(self, timeout: float = START_SECONDS) -> str:
        """The address that it prints for others to join by, once it is online.

        Raises `Failed` where it ends or says nothing.
        """
        if self._address is None:
            self._address = self._read_address(timeout)
        return self._address

    def _read_address(self, timeout: float) -> str:
        deadline = time.monotonic() + timeout
        while (left := deadline - time.monotonic()) > 0:
            try:
                line = self._lines.get(timeout=left)
            except queue.Empty:
                break
            if line is None:
                raise Failed(f"{' '.join(self._command)} ended:\n{self.output()}")
            if "--initial-peers " in line:
                return line.split("--initial-peers ")[1].strip()
        raise Failed(f"{' '.join(self._command)} printed no address within {timeout} s:\n{self.output()}")

    def output(self) -> str:
        """What it wrote to stderr so far."""
        return self.log.read_text(errors="replace")

    @property
    def wanted(self) -> bool:
        """Whether nobody has ended it on purpose."""
        return not self._asked

    def ask_to_end(self, number: signal.Signals = signal.SIGTERM) -> None:
        """Send the signal, once: a second one would make it drop everything at once."""
        if not self._asked and self.process.poll() is None:
            self._asked = True
            self.process.send_signal(signal.SIGCONT)
            self.process.send_signal(number)

    def kill(self) -> None:
        """End it with SIGKILL, as a power cut would, and wait until it is gone."""
        self._asked = True
        self.process.kill()
        self.process.wait()

    def stop(self, number: signal.Signals = signal.SIGTERM) -> int:
        """End it and everything it started; its exit code. A second call does nothing."""
        if self._log_handle.closed:
            return int(self.process.returncode)
        self.ask_to_end(number)
        try:
            code = self.process.wait(STOP_SECONDS)
        except subprocess.TimeoutExpired:
            code = -signal.SIGKILL
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.pid, signal.SIGKILL)
        self.process.wait()
        self._reader.join()
        assert self.process.stdout is not None
        self.process.stdout.close()
        self._log_handle.close()
        return code


class LocalSwarm:
    """A bootstrap node and peers, each a process; a context manager that leaves nothing behind.

    Args:
        listen: where the bootstrap node does.
        one_way: seconds by which each link of the data plane is slower than this machine's loopback.
        popen: starts what runs on this machine alone.

    Attributes:
        address: by which others join; of the bootstrap node, as long as nobody says otherwise.
    """

    def __init__(
        self,
        listen: str = "127.0.0.1:0",
        one_way: float = 0.0,
        popen: Callable[..., subprocess.Popen[str]] = subprocess.Popen,
    ) -> None:
        self._popen = popen
        self._folder = tempfile.TemporaryDirectory(prefix="shoal-local-")
        self.folder = Path(self._folder.name)
        self.peers: list[PeerProcess] = []
        self._relay = RelayProcess(one_way) if one_way else None
        self.bootstrap_process = self._start(["bootstrap", "--listen", listen])
        self._background = BackgroundLoop()
        self._discovery: Discovery | None = None
        try:
            self.address = self.bootstrap_process.address()
        except BaseException:
            self.close()
            raise

    def _start(self, arguments: Sequence[str], within: Sequence[str] = (), key: Path | None = None) -> PeerProcess:
        number = len(self.peers)
        log = self.folder / f"peer-{number}.log"
        popen = subprocess.Popen if within else self._popen
        process = PeerProcess(arguments, log, key or self.folder / f"peer-{number}.key", within, popen)
        self.peers.append(process)
        return process

    def serve(self, model: str, *options: str, threads: int = 1, within: Sequence[str] = ()) -> PeerProcess:
        """Start a peer for `model`; `options` as on the command line. Does not wait for it."""
        joining = ["--initial-peers", self.address, "--threads", str(threads)]
        if self._relay is None:
            return self._start(["serve", model, *joining, *options], within)
        port = self._relay.open()
        process = self._start(["serve", model, *joining, *options, "--announce", f"{HOST}:{port}"], within)
        self._relay.lead(port, process.pid)
        return process

    def again(self, peer: PeerProcess) -> PeerProcess:
        """Start a peer that has ended once more, under its identity."""
        return self._start(peer.arguments, peer.within, peer.identity)

    def train(self, run_file: Path, *options: str, threads: int = 1) -> PeerProcess:
        """Start a peer that holds a stage of a run; `options` as on the command line. Does not wait for it."""
        joining = ["--initial-peers", self.address, "--threads", str(threads)]
        return self._start(["train", str(run_file), *joining, *options])

    def offers(self, model: ModelId, num_blocks: int) -> list[Offer]:
        """What the swarm offers of the model now."""
        if self._discovery is None:
            start = Discovery.start(Identity.generate(), [self.address], client_mode=True)
            self._discovery = self._background.run(start)
            self._background.at_close(self._discovery.close)
        return self._background.run(self._discovery.everything(model, num_blocks))

    def wait_online(self, model: ModelId, num_blocks: int, peers: int, timeout: float = START_SECONDS) -> list[Offer]:
        """Wait until every block and so many peers are online. Raises `Failed` with what the peers said."""
        deadline = time.monotonic() + timeout
        while time.monotonic() < deadline:
            offers = [offer for offer in self.offers(model, num_blocks) if offer.state == "online"]
            if not uncovered(offers, num_blocks) and len(offers) >= peers:
                return offers
            for process in self.peers:
                if process.wanted and process.process.poll() is not None:
                    raise Failed(f"a peer ended:\n{process.output()}")
            time.sleep(0.1)
        logs = "\n".join(process.output() for process in self.peers)
        raise Failed(f"not every block was online within {timeout:.0f} s:\n{logs}")

    def close(self) -> None:
        """End all processes."""
        for process in self.peers:
            process.ask_to_end()
        for process in self.peers:
            process.stop()
        self._background.close()
        if self._relay is not None:
            self._relay.close()
        self._folder.cleanup()

    def __enter__(self) -> LocalSwarm:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


@contextlib.contextmanager
def terminated_like_interrupted() -> Iterator[None]:
    """SIGTERM ends this process as Ctrl-C does, so that what it started is taken down."""

    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    before = signal.signal(signal.SIGTERM, interrupt)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)
