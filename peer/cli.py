"""The `peer` command: host a span of a model, or a DHT node alone."""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, NoReturn

import typer

import swarm
from peer import console
from peer.config import BootstrapSettings, ServeSettings, TrainSettings, load
from swarm.console.terminal import (
    addresses_in,
    errors_told,
    run,
    run_app,
    set_up_logging,
    unless_stopped,
)
from swarm.runs.run import load as load_run

if TYPE_CHECKING:
    pass

app = typer.Typer(
    name="peer",
    help="Host a part of a model for everybody: a peer of a [bold]Shoal[/] swarm.",
    no_args_is_help=True,
    rich_markup_mode="rich",
    pretty_exceptions_enable=False,
    add_completion=False,
)

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
Nice = Annotated[
    int | None,
    typer.Option(
        metavar="0..19", help="How far computing lets other work on this machine go first, on Linux. Default 10."
    ),
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
        int | None,
        typer.Option(
            metavar="N", help="Compute threads. Default: as many as are fastest here, by measuring now and then."
        ),
    ] = None,
    nice: Nice = None,
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
        "nice": nice,
    }
    set_up_logging(verbose)
    with errors_told():
        settings = load(ServeSettings, config, given)
    run(lambda stop: console.serve(settings, stop))


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
        typer.Option(
            "--resume", metavar="", help="Go on from what was saved, where nobody is left of the run, or of a stage."
        ),
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
    nice: Nice = None,
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
        "nice": nice,
    }
    set_up_logging(verbose)
    with errors_told():
        settings = load(TrainSettings, config, given)
        run_described = load_run(run_file)
    command = f"peer train {shlex.quote(str(run_file.resolve()))}"
    run(lambda stop: console.train(settings, run_described, command, stop))


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
    run(lambda stop: unless_stopped(console.bootstrap(settings), stop))


def main() -> NoReturn:
    """Run what was typed."""
    run_app(app)
