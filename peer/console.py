"""What the `peer` command does and shows: a node started, watched on a live line, and taken down."""

from __future__ import annotations

import asyncio
import shlex
import time
from collections import deque
from contextlib import nullcontext
from pathlib import Path
from typing import TYPE_CHECKING

import typer
from rich.live import Live
from rich.text import Text

from peer.config import BootstrapSettings, ServeSettings, TrainSettings
from swarm.console.terminal import ProgressBars, console, error_line, unless_stopped
from swarm.errors import ModelDiverged, UsageError
from swarm.runs.run import Run

if TYPE_CHECKING:
    from peer.node import Node, Status
    from peer.training.node import TrainNode

STATUS_SECONDS = 0.5  # between two looks for the live line
LOG_SECONDS = 30.0  # and where there is no terminal


async def serve(settings: ServeSettings, stop: asyncio.Event) -> None:
    from peer.joining import identity_of
    from peer.node import Node

    bars = ProgressBars()
    bars("starting", 0, 0)
    node = Node(settings, identity_of(settings), bars)
    try:
        if not await _start(node, _command_of(settings.model), bars, stop):
            return
        for remark in node.remarks:
            console.print(remark, soft_wrap=True)
        await unless_stopped(_until_broken(node), stop)
        if node.leases.used:
            await _leave(node, settings.drain_timeout)
    finally:
        bars.stop()
        await node.close()


async def _start(node: Node | TrainNode, command: str, bars: ProgressBars, stop: asyncio.Event) -> bool:
    """Start it and tell how others join with `command`; False where it was stopped before."""
    _check_device(node.settings.device)
    if not await unless_stopped(node.start(), stop):
        return False
    bars.stop()
    assert node.discovery is not None
    _print_invitation(node.discovery.addresses, command, bool(node.settings.initial_peers))
    return True


async def _leave(node: Node, timeout: float) -> None:
    """Have others take over the live sessions, and say what is going on meanwhile and what came of it."""
    span = node.status().span
    console.print(
        f"leaving: {_sessions(node)} to hand over to other hosts of blocks {span}, for up to {timeout:g} s; "
        "Ctrl-C once more to go at once",
        soft_wrap=True,
    )
    if await node.drain(timeout):
        console.print("every session was handed over or had ended")
    else:
        console.print(f"{_sessions(node)} left behind: nobody took over within {timeout:g} s")


def _sessions(node: Node) -> str:
    count = node.status().sessions
    return f"{count} session{'' if count == 1 else 's'}"


async def train(settings: TrainSettings, described: Run, command: str, stop: asyncio.Event) -> None:
    from peer.joining import identity_of
    from peer.training.node import TrainNode

    bars = ProgressBars()
    bars("starting", 0, 0)
    node = TrainNode(settings, described, identity_of(settings), bars)
    try:
        if not await _start(node, command, bars, stop):
            return
        showing = asyncio.create_task(_show_training(node))
        try:
            try:
                if not await unless_stopped(node.ended(), stop):
                    return
            except ModelDiverged as error:
                if settings.leave:
                    raise
                console.print(error_line(str(error)), soft_wrap=True)
                await unless_stopped(node.failing(), stop)  # others may still have to be told
                return
            console.print(f"the run is over; digest={(await node.digest()).hex()}", soft_wrap=True)
            if not settings.leave:
                console.print("going on to serve it; Ctrl-C leaves")
                await unless_stopped(node.failing(), stop)
        finally:
            showing.cancel()
            await asyncio.wait({showing})
    finally:
        bars.stop()
        await node.close()


async def _show_training(node: TrainNode) -> None:
    """One live line on a terminal; where there is none, a log line now and then."""
    meter = Meter()
    with Live(console=console, auto_refresh=False, transient=True) if console.is_terminal else nullcontext() as live:
        while True:
            status = node.status()
            line = (
                f"stage={status.stage} round={max(status.round, 0)}/{status.rounds} "
                f"tokens/s={meter.speed(status.tokens, time.monotonic()):.0f} "
                f"peers={'+'.join(map(str, status.peers))} sessions={status.sessions}"
            )
            if live is None:
                console.print(line, soft_wrap=True)
            else:
                live.update(Text(line, style="cyan", no_wrap=True, overflow="ellipsis"), refresh=True)
            await asyncio.sleep(LOG_SECONDS if live is None else STATUS_SECONDS)


def _check_device(name: str) -> None:
    """Raise `UsageError` where this machine has no such device."""
    if name == "cpu":
        return
    import torch

    if not (torch.cuda if name == "cuda" else torch.backends.mps).is_available():
        raise UsageError(f"--device {name}: torch finds none on this machine; use cpu")


def _command_of(model: str) -> str:
    """What another machine would run. A folder of this one is spelled out: it is wanted there as well."""
    return f"peer serve {shlex.quote(str(Path(model).resolve()) if Path(model).is_dir() else model)}"


async def _until_broken(node: Node) -> None:
    """Show how the node is. Raises what it breaks of."""
    await asyncio.gather(_show_status(node), node.broken)


async def _show_status(node: Node) -> None:
    """One live line on a terminal; where there is none, a log line now and then."""
    meter = Meter()
    with Live(console=console, auto_refresh=False, transient=True) if console.is_terminal else nullcontext() as live:
        while True:
            line = _status_line(node.status(), meter)
            if live is None:
                console.print(line, soft_wrap=True)
            else:
                live.update(Text(line, style="cyan", no_wrap=True, overflow="ellipsis"), refresh=True)
            await asyncio.sleep(LOG_SECONDS if live is None else STATUS_SECONDS)


def _status_line(status: Status, meter: Meter) -> str:
    return (
        f"blocks={status.span} state={status.state} sessions={status.sessions} "
        f"tokens/s={meter.speed(status.tokens, time.monotonic()):.1f} queue={status.queue:.1f} "
        f"cache={status.cache_used}/{status.cache_tokens} peers={status.peers} {status.note}"
    ).rstrip()


class Meter:
    """A count that grows to how fast it did of late: over a few looks, or it flickers."""

    def __init__(self, looks: int = 5) -> None:
        self._looks: deque[tuple[int, float]] = deque(maxlen=looks)

    def speed(self, count: int, now: float) -> float:
        """Per second, when the count is `count` at `now`."""
        self._looks.append((count, now))
        before, then = self._looks[0]
        return (count - before) / (now - then) if now > then else 0.0


async def bootstrap(settings: BootstrapSettings) -> None:
    from peer.config import parse_address
    from peer.joining import identity_of, start_discovery

    async with await start_discovery(settings, identity_of(settings), parse_address(settings.listen).port) as discovery:
        _print_invitation(discovery.addresses, "peer serve", bool(settings.initial_peers))
        await asyncio.Event().wait()  # until it is cancelled


def _print_invitation(addresses: list[str], command: str, joined: bool) -> None:
    """What to paste on the next machine; on stdout, so that a script can read it."""
    console.print("Joined the swarm." if joined else "A new swarm begins.", "Others join with:")
    for address in addresses[:1]:
        typer.echo(f"  {command} --initial-peers {address}")
        if address.startswith(("/ip4/127.", "/ip6/::1/")):
            console.print("on this machine; for others to reach it, start it with --listen 0.0.0.0:31330, say")
