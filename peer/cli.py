"""The `peer` command: host a span of a model, or a DHT node alone."""

from __future__ import annotations

import asyncio
import sys
import time
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.live import Live
from rich.text import Text

import swarm
from peer.config import BootstrapSettings, ServeSettings, load
from swarm.terminal import ProgressBars, console, errors_told, run, set_up_logging, spread, unless_stopped

app = typer.Typer(
    name="peer",
    help="Host a part of a model for everybody: a peer of a [bold]Shoal[/] swarm.",
    no_args_is_help=True,
    rich_markup_mode="rich",
    pretty_exceptions_enable=False,
    add_completion=False,
)

STATUS_SECONDS = 0.5

InitialPeers = Annotated[
    list[str] | None,
    typer.Option(
        "--initial-peers",
        metavar="ADDR...",
        help="Addresses of any peers of the swarm to join, as they were printed there. "
        "Without one, a new swarm begins.",
        show_default=False,
    ),
]
Listen = Annotated[
    str | None,
    typer.Option(
        metavar="HOST:PORT",
        help="Where to take connections (the DHT takes PORT + 1). Port 0 is any free one. "
        "Default 127.0.0.1:0, this machine alone; 0.0.0.0:PORT for others.",
        show_default=False,
    ),
]
Announce = Annotated[
    str | None,
    typer.Option(metavar="HOST:PORT", help="Where others reach this machine, if not where it listens."),
]
IdentityFile = Annotated[
    Path | None,
    typer.Option(metavar="FILE", help="The peer's key; made on first start. Default ~/.local/share/shoal/identity.key"),
]
ConfigFile = Annotated[
    Path | None, typer.Option("--config", metavar="FILE", help="TOML with any of these options (see configs/).")
]
Verbose = Annotated[bool, typer.Option("--verbose", "-v", help="Log what happens, not warnings alone.")]


def _version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"shoal {swarm.__version__}")
        raise typer.Exit


@app.callback()
def _root(
    version: Annotated[bool, typer.Option("--version", callback=_version, is_eager=True, help="Show it.")] = False,
) -> None:
    """Options are taken from the command line, else from SHOAL_... variables, else from --config FILE."""


@app.command()
def serve(
    model: Annotated[
        str | None,
        typer.Argument(metavar="[MODEL]", help="A folder, a short name or a hub id. Default smollm2-135m-instruct."),
    ] = None,
    blocks: Annotated[
        str | None, typer.Option(metavar="A:B", help="The blocks to host: from A up to, not including, B.")
    ] = None,
    num_blocks: Annotated[
        int | None, typer.Option(help="How many blocks to host; which, the swarm's need decides. Default: all.")
    ] = None,
    initial_peers: InitialPeers = None,
    listen: Listen = None,
    announce: Announce = None,
    identity: IdentityFile = None,
    device: Annotated[str | None, typer.Option(metavar="cpu|cuda|mps", help="Where to compute. Default cpu.")] = None,
    dtype: Annotated[
        str | None, typer.Option(metavar="float32|bfloat16|float16", help="What to compute in. Default float32.")
    ] = None,
    cache_tokens: Annotated[
        int | None, typer.Option(help="Tokens that all sessions together may hold in the KV cache. Default 16384.")
    ] = None,
    threads: Annotated[int | None, typer.Option(help="Compute threads. Default: as many as there are cores.")] = None,
    config: ConfigFile = None,
    verbose: Verbose = False,
) -> None:
    """Host a span of a model's blocks and serve it to the swarm. Ctrl-C leaves."""
    given: dict[str, Any] = {
        "model": model,
        "blocks": blocks,
        "num_blocks": num_blocks,
        "initial_peers": initial_peers or None,
        "listen": listen,
        "announce": announce,
        "identity": identity,
        "device": device,
        "dtype": dtype,
        "cache_tokens": cache_tokens,
        "threads": threads,
    }
    set_up_logging(verbose)
    with errors_told():
        settings: ServeSettings = load(ServeSettings, config, given)
    run(lambda stop: _serve(settings, stop))


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
        "initial_peers": initial_peers or None,
        "listen": listen,
        "announce": announce,
        "identity": identity,
    }
    set_up_logging(verbose)
    with errors_told():
        settings: BootstrapSettings = load(BootstrapSettings, config, given)
    run(lambda stop: _bootstrap(settings, stop))


async def _serve(settings: ServeSettings, stop: asyncio.Event) -> None:
    from peer.node import Node, identity_of

    bars = ProgressBars()
    node = Node(settings, identity_of(settings), bars)
    try:
        if not await unless_stopped(node.start(), stop):
            return
        bars.stop()
        assert node.discovery is not None
        _print_invitation(node.discovery.addresses, f"peer serve {settings.model}", bool(settings.initial_peers))
        await unless_stopped(_show_status(node), stop)
    finally:
        bars.stop()
        await node.close()


async def _show_status(node: Any) -> None:
    """One live line on a terminal; where there is none, a log line now and then."""
    before, looked = 0, time.monotonic()
    interval = STATUS_SECONDS if console.is_terminal else 30.0
    with Live(console=console, auto_refresh=False, transient=True) as live:
        while True:
            status = await node.status()
            now = time.monotonic()
            speed = (status.tokens - before) / max(now - looked, 1e-3)
            before, looked = status.tokens, now
            line = (
                f"blocks={status.span} state={status.state} sessions={status.sessions} tokens/s={speed:.1f} "
                f"cache={status.cache_used}/{status.cache_tokens} peers={status.peers}"
            )
            if console.is_terminal:
                live.update(Text(line, style="cyan"), refresh=True)
            else:
                console.print(line)
            await asyncio.sleep(interval)


async def _bootstrap(settings: BootstrapSettings, stop: asyncio.Event) -> None:
    from peer.config import parse_address
    from peer.node import identity_of, start_discovery

    discovery = await start_discovery(settings, identity_of(settings), parse_address(settings.listen).port)
    try:
        _print_invitation(discovery.addresses, "peer serve", bool(settings.initial_peers))
        await stop.wait()
    finally:
        await discovery.close()


def _print_invitation(addresses: list[str], command: str, joined: bool) -> None:
    """What to paste on the next machine; on stdout, so that a script can read it."""
    console.print("Joined the swarm." if joined else "A new swarm begins.", "Others join with:")
    for address in addresses[:1]:
        typer.echo(f"  {command} --initial-peers {address}")


def main() -> None:
    """The console script."""
    app(spread(sys.argv[1:]))
