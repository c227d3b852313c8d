"""Machines of their own on one Linux: network namespaces behind one switch; links are cut and packets are lost.

It takes root, iproute2 and iptables, and a kernel that lets us.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager

PORT = 4000  # of the data plane on every machine; the DHT's is the next


class Unavailable(Exception):
    """There can be no namespaces here; the message says why."""


class Machine:
    """A namespace with one interface, `eth0`."""

    def __init__(self, name: str, address: str) -> None:
        self.name = name
        self.address = address
        self.within = ("ip", "netns", "exec", name)  # runs a command there

    def cut(self) -> None:
        """Take the link down. Nobody is told: what is sent is lost, both ways."""
        _run(*self.within, "ip", "link", "set", "eth0", "down")

    def lose(self, *packets: str) -> None:
        """Let these packets be lost, told in iptables' terms, without a word to anybody."""
        _run(*self.within, "iptables", "-w", "-A", *packets, "-j", "DROP")

    def mend(self) -> None:
        """Undo all of that."""
        _run(*self.within, "iptables", "-w", "-F")
        _run(*self.within, "ip", "link", "set", "eth0", "up")


class Lan:
    """A switch, with this process's machine at one of its ports.

    Attributes:
        address: ours.
    """

    def __init__(self) -> None:
        self._mark = f"shoal{os.getpid()}"
        self._net = f"198.18.{os.getpid() % 256}"  # a range for tests of networks, RFC 2544
        self._hub = f"{self._mark}-hub"
        self._machines = 0
        self.address = f"{self._net}.1"
        _run("ip", "netns", "add", self._hub)
        self._in_hub("ip", "link", "add", "switch", "type", "bridge")
        self._in_hub("ip", "link", "set", "switch", "up")
        _run("ip", "link", "add", self._mark, "type", "veth", "peer", "name", "port1", "netns", self._hub)
        self._plug("port1")
        _run("ip", "address", "add", f"{self.address}/24", "dev", self._mark)
        _run("ip", "link", "set", self._mark, "up")

    def _in_hub(self, *command: str) -> None:
        _run("ip", "netns", "exec", self._hub, *command)

    def _plug(self, port: str) -> None:
        self._in_hub("ip", "link", "set", port, "master", "switch", "up")

    def machine(self) -> Machine:
        """One more."""
        self._machines += 1
        number = self._machines + 1
        machine = Machine(f"{self._mark}-{number}", f"{self._net}.{number}")
        port = f"port{number}"
        _run("ip", "netns", "add", machine.name)
        _run(
            "ip", "link", "add", port, "netns", self._hub, "type", "veth", "peer", "name", "eth0", "netns", machine.name
        )
        self._plug(port)
        for command in (
            ("ip", "link", "set", "lo", "up"),
            ("ip", "address", "add", f"{machine.address}/24", "dev", "eth0"),
            ("ip", "link", "set", "eth0", "up"),
        ):
            _run(*machine.within, *command)
        return machine

    def close(self) -> None:
        """Remove it all. Deleting a namespace deletes the interfaces in it, and the other ends of their pairs."""
        for name in self.namespaces():
            _run("ip", "netns", "delete", name)

    def namespaces(self) -> list[str]:
        """What there is of it."""
        return [name for name in _run("ip", "netns", "list").split() if name.startswith(f"{self._mark}-")]


@contextmanager
def lan() -> Iterator[Lan]:
    """A `Lan` for the time of a `with`. Raises `Unavailable`."""
    if sys.platform != "linux" or os.geteuid() != 0:
        raise Unavailable("network namespaces take root on Linux")
    if missing := [name for name in ("ip", "iptables") if shutil.which(name) is None]:
        raise Unavailable(f"not installed: {', '.join(missing)} (Debian's iproute2 and iptables)")
    try:
        network = Lan()
    except subprocess.CalledProcessError as error:
        raise Unavailable(f"{' '.join(error.cmd)}: {error.stderr.strip()}") from None
    try:
        yield network
    finally:
        network.close()


def _run(*command: str) -> str:
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout
