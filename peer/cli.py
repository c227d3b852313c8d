"""The `peer` command: host a span of a model, or a DHT node alone."""

from __future__ import annotations

import asyncio
import shlex
import time
from collections import deque
from contextlib import nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, NoReturn

import typer
from rich.live import Live
from rich.text import Text

import swarm
from peer.config import BootstrapSettings, ServeSettings, TrainSettings, load
from swarm.errors import UsageError
from swarm.run import Run
from swarm.run import load as load_run
from swarm.terminal import (
    ProgressBars,
    addresses_in,
    console,
    errors_told,
    run,
    run_app,
    set_up_logging,
    unless_stopped,
)

if TYPE_CHECKING:
    from peer.node import Node, Status
    from peer.trainnode import TrainNode

app = typer.Typer(
    name="peer",
    help="Host a part of a model for everybody: a peer of a [bold]Shoal[/] swarm.",
    no_args_is_help=True,
    rich_markup_mode="rich",
    pretty_exceptions_enable=False,
    add_completion=False,
)

STATUS_SECONDS = 0.5  # between two looks for the live line
LOG_SECONDS = 30.0  # and where there is no terminal

InitialPeers = Annotated[
    list[str] | None,
    typer.Option(
        "--initial-peers",
        metavar="ADDR...",
        help="Any peers of the swarm to join, by the addresses that they printed. Without one, a new swarm begins.",
        show_default=False,
    ),
]
Listen = Annotated[
    str | None,
    typer.Option(
        metavar="HOST:PORT",
        help="Where to take connections; the DHT takes PORT + 1. Port 0 is any free one. "
        "Default 127.0.0.1:0, for this machine alone; 0.0.0.0:31330, say, is for all.",
        show_default=False,
    ),
]
Announce = Annotated[
    str | None,
    typer.Option(metavar="HOST:PORT", help="Where others reach this machine, if not where it listens."),
]
IdentityFile = Annotated[
    Path | None,
    typer.Option(
        metavar="FILE",
        help="The peer's key, made on first start. Default identity.key in ~/.local/share/shoal.",
    ),
]
ConfigFile = Annotated[
    Path | None, typer.Option("--config", metavar="FILE", help="TOML with any of these options; see configs/.")
]
Verbose = Annotated[bool, typer.Option("--verbose", "-v", metavar="", help="Log what happens, not warnings alone.")]


def _version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"shoal {swarm.__version__}")
        raise typer.Exit


@app.callback()
def _root(
    version: Annotated[
        bool, typer.Option("--version", metavar="", callback=_version, is_eager=True, help="Show it.")
    ] = False,
) -> None:
    """Options are taken from the command line, else from SHOAL_... variables, else from --config FILE."""


@app.command()
def serve(
    model: Annotated[
        str | None,
        typer.Argument(metavar="MODEL", help="A folder, a short name or a hub id. Default smollm2-135m-instruct."),
    ] = None,
    blocks: Annotated[
        str | None, typer.Option(metavar="A:B", help="The blocks to host: from A up to, not including, B.")
    ] = None,
    num_blocks: Annotated[
        int | None,
        typer.Option(metavar="N", help="How many blocks to host; which, the swarm's need decides. Default: what fits."),
    ] = None,
    memory: Annotated[
        str | None,
        typer.Option(metavar="SIZE", help="What blocks and cache may take, as in 8GB. Default: 80 % of what is free."),
    ] = None,
    initial_peers: InitialPeers = None,
    listen: Listen = None,
    announce: Announce = None,
    identity: IdentityFile = None,
    device: Annotated[str | None, typer.Option(metavar="NAME", help="cpu (default), cuda or mps.")] = None,
    dtype: Annotated[
        str | None, typer.Option(metavar="NAME", help="float32 (default), bfloat16 or float16: what to compute in.")
    ] = None,
    wire_dtype: Annotated[
        str | None,
        typer.Option(
            metavar="NAME",
            help="float32, bfloat16, int8 or auto (default): how to send hidden states on, where clients leave it to "
            "you. auto rounds them only on slow links to other networks.",
        ),
    ] = None,
    quantize: Annotated[
        str | None,
        typer.Option(
            metavar="KIND",
            help="none (default), int8 or int4: how to keep the blocks' weights. Smaller and faster, and less exact; "
            "the offer says so.",
        ),
    ] = None,
    cache_tokens: Annotated[
        int | None,
        typer.Option(
            metavar="N",
            help="Tokens that all sessions together may hold in the KV cache. Default 16384, or what memory allows.",
        ),
    ] = None,
    cache_dtype: Annotated[
        str | None,
        typer.Option(metavar="DTYPE", help="What the KV cache keeps: bfloat16 halves fp32's. Default: as the blocks."),
    ] = None,
    lease_seconds: Annotated[
        float | None,
        typer.Option(metavar="S", help="How long to keep the cache of a client that is not heard of. Default 30."),
    ] = None,
    look_seconds: Annotated[
        float | None,
        typer.Option(
            metavar="S", help="How often to look for blocks that need the peer more, without --blocks. 0: never move."
        ),
    ] = None,
    stay_seconds: Annotated[
        float | None,
        typer.Option(metavar="S", help="How long to stay at least, unless blocks have nobody. Default 3600."),
    ] = None,
    drain_timeout: Annotated[
        float | None,
        typer.Option(metavar="SECONDS", help="How long to wait, when leaving, for others to take over. Default 30."),
    ] = None,
    threads: Annotated[
        int | None, typer.Option(metavar="N", help="Compute threads. Default: as many as there are cores.")
    ] = None,
    config: ConfigFile = None,
    verbose: Verbose = False,
) -> None:
    """Host a span of a model's blocks and serve it to the swarm. Ctrl-C leaves."""
    given: dict[str, Any] = {
        "model": model,
        "blocks": blocks,
        "num_blocks": num_blocks,
        "memory": memory,
        "initial_peers": addresses_in(initial_peers or []) or None,
        "listen": listen,
        "announce": announce,
        "identity": identity,
        "device": device,
        "dtype": dtype,
        "quantize": quantize,
        "wire_dtype": wire_dtype,
        "cache_tokens": cache_tokens,
        "cache_dtype": cache_dtype,
        "lease_seconds": lease_seconds,
        "look_seconds": look_seconds,
        "stay_seconds": stay_seconds,
        "drain_timeout": drain_timeout,
        "threads": threads,
    }
    set_up_logging(verbose)
    with errors_told():
        settings = load(ServeSettings, config, given)
    run(lambda stop: _serve(settings, stop))


@app.command()
def train(
    run_file: Annotated[Path, typer.Argument(metavar="RUN.toml", help="The run: see configs/train-demo.toml.")],
    stage: Annotated[
        int | None,
        typer.Option(
            min=0, metavar="I", help="The stage to hold. Default: one that the fewest hold.", show_default=False
        ),
    ] = None,
    resume: Annotated[
        bool | None,
        typer.Option("--resume", metavar="", help="Go on from what was saved, where nobody else is left of the run."),
    ] = None,
    checkpoints: Annotated[
        Path | None,
        typer.Option(metavar="FOLDER", help="Where to save. Default: as the file says, else checkpoints/NAME."),
    ] = None,
    leave: Annotated[
        bool | None,
        typer.Option("--leave", metavar="", help="End with the run, rather than go on to serve what was trained."),
    ] = None,
    initial_peers: InitialPeers = None,
    listen: Listen = None,
    announce: Announce = None,
    identity: IdentityFile = None,
    device: Annotated[str | None, typer.Option(metavar="NAME", help="cpu (default), cuda or mps.")] = None,
    threads: Annotated[
        int | None, typer.Option(metavar="N", help="Compute threads. Default: as many as there are cores.")
    ] = None,
    config: ConfigFile = None,
    verbose: Verbose = False,
) -> None:
    """Hold a stage of a training run, together with others. Ctrl-C leaves."""
    given: dict[str, Any] = {
        "stage": stage,
        "resume": resume,
        "checkpoints": checkpoints,
        "leave": leave,
        "initial_peers": addresses_in(initial_peers or []) or None,
        "listen": listen,
        "announce": announce,
        "identity": identity,
        "device": device,
        "threads": threads,
    }
    set_up_logging(verbose)
    with errors_told():
        settings = load(TrainSettings, config, given)
        run_described = load_run(run_file)
    command = f"peer train {shlex.quote(str(run_file.resolve()))}"
    run(lambda stop: _train(settings, run_described, command, stop))


@app.command()
def bootstrap(
    initial_peers: InitialPeers = None,
    listen: Listen = None,
    announce: Announce = None,
    identity: IdentityFile = None,
    config: ConfigFile = None,
    verbose: Verbose = False,
) -> None:
    """Run a DHT node alone: a fixed address by which others join. It hosts no blocks."""
    given: dict[str, Any] = {
        "initial_peers": addresses_in(initial_peers or []) or None,
        "listen": listen,
        "announce": announce,
        "identity": identity,
    }
    set_up_logging(verbose)
    with errors_told():
        settings = load(BootstrapSettings, config, given)
    run(lambda stop: unless_stopped(_bootstrap(settings), stop))


async def _serve(settings: ServeSettings, stop: asyncio.Event) -> None:
    from peer.node import Node, identity_of

    bars = ProgressBars()
    bars("starting", 0, 0)
    node = Node(settings, identity_of(settings), bars)
    try:
        _check_device(settings.device)
        if not await unless_stopped(node.start(), stop):
            return
        bars.stop()
        assert node.discovery is not None
        _print_invitation(node.discovery.addresses, _command_of(settings.model), bool(settings.initial_peers))
        await unless_stopped(_until_broken(node), stop)
        if node.leases.used:
            await _leave(node, settings.drain_timeout)
    finally:
        bars.stop()
        await node.close()


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


async def _train(settings: TrainSettings, described: Run, command: str, stop: asyncio.Event) -> None:
    from peer.node import identity_of
    from peer.trainnode import TrainNode

    bars = ProgressBars()
    bars("starting", 0, 0)
    node = TrainNode(settings, described, identity_of(settings), bars)
    try:
        _check_device(settings.device)
        if not await unless_stopped(node.start(), stop):
            return
        bars.stop()
        assert node.discovery is not None
        _print_invitation(node.discovery.addresses, command, bool(settings.initial_peers))
        showing = asyncio.create_task(_show_training(node))
        try:
            if not await unless_stopped(node.ended(), stop):
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
    meter = _Meter()
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
    meter = _Meter()
    with Live(console=console, auto_refresh=False, transient=True) if console.is_terminal else nullcontext() as live:
        while True:
            line = _status_line(node.status(), meter)
            if live is None:
                console.print(line, soft_wrap=True)
            else:
                live.update(Text(line, style="cyan", no_wrap=True, overflow="ellipsis"), refresh=True)
            await asyncio.sleep(LOG_SECONDS if live is None else STATUS_SECONDS)


def _status_line(status: Status, meter: _Meter) -> str:
    return (
        f"blocks={status.span} state={status.state} sessions={status.sessions} "
        f"tokens/s={meter.speed(status.tokens, time.monotonic()):.1f} queue={status.queue:.1f} "
        f"cache={status.cache_used}/{status.cache_tokens} peers={status.peers} {status.note}"
    ).rstrip()


class _Meter:
    """A count that grows to how fast it did of late: over a few looks, or it flickers."""

    def __init__(self, looks: int = 5) -> None:
        self._looks: deque[tuple[int, float]] = deque(maxlen=looks)

    def speed(self, count: int, now: float) -> float:
        """Per second, when the count is `count` at `now`."""
        self._looks.append((count, now))
        before, then = self._looks[0]
        return (count - before) / (now - then) if now > then else 0.0


async def _bootstrap(settings: BootstrapSettings) -> None:
    from peer.config import parse_address
    from peer.node import identity_of, start_discovery

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


def main() -> NoReturn:
    """The console script."""
    run_app(app)
