"""Simulates a swarm of thousands of peers with the real placement, routing and coordinates, and judges what it sees."""

from __future__ import annotations

import contextlib
import json
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Annotated

import typer
from benches.rows import exit_code, table
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from simulation.engine import Simulation
from simulation.machines import MODELS, Model, Settings
from simulation.report import SETTLED, document, plot, rows_of

INTERRUPTED = 130
WIDTH = 140  # of the table, where there is no terminal to fit it into

console = Console(highlight=False, width=None if sys.stdout.isatty() else WIDTH)
errors = Console(highlight=False, stderr=True)
app = typer.Typer(
    add_completion=False,
    rich_markup_mode="rich",
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)

_HELP = "\n\n".join(
    (
        "Simulate a swarm: peers of unequal speed, memory and place come, choose blocks, move and die; clients "
        "look for routes. Placement, routing, coordinates and the sampling of offers are the code that real peers "
        "and clients run.",
        "[bold]The world[/]  Machines stand around 42 cities; a round trip is the great circle at 1.5 times its "
        "length and 200,000 km/s, times a factor of each pair (log-normal, sigma 0.1), plus both ends' last mile "
        "(0.7 to 12 ms, median by kind). A block takes 2 ms (median; log-normal, sigma 0.6); 4 to 32 blocks fit a "
        "peer. Half of those who leave, die without a word; their offers stay for 50 s. Offers are read up to 30 "
        "s old.",
        "[bold]The figures[/]  The share of the time in which every block has a peer online; what clients that "
        "crowd the swarm get of the maximum flow through its peers, and that of what any placement of them "
        "allows; the time per token, with nobody else there, against the best route over all peers by true "
        "latencies; moves for each peer and hour; offers that a client reads. All after the warm-up, in which the "
        "first peers come.",
        "[bold]The crowd[/]  Five times as many sessions as would fill the swarm if none had to wait share its peers' "
        "time fairly; offers are renewed forty times while a session lasts. Fewer sessions, or offers renewed less "
        "often, get less of the maximum flow. Beyond 6000 sessions, each stands for several.",
        "Exits with 1 where a figure is not what it must be, 130 where it is interrupted. Throughput and time per "
        f"token are judged for up to {SETTLED} peers: a client reads as much of many more, and so knows less of what "
        "there is. The same seed gives the same run.",
    )
)


def parse_model(text: str) -> Model:
    """`NAME:BLOCKS:SHARE`. Raises `typer.BadParameter`."""
    try:
        name, blocks, share = text.split(":")
        model = Model(name, int(blocks), float(share))
    except ValueError:
        raise typer.BadParameter(f"{text!r} is not like large:64:0.7") from None
    if not name or model.num_blocks < 1 or not 0 < model.share <= 1:
        raise typer.BadParameter(f"{text!r}: at least one block, and a share of the peers in (0, 1]")
    return model


@app.command(help=_HELP)
def main(
    peers: Annotated[int, typer.Option(min=1, metavar="N", help="Peers at a time, of all models together.")] = 1000,
    hours: Annotated[float, typer.Option(min=0.01, help="Simulated hours that count, after the warm-up.")] = 3.0,
    warm_up: Annotated[
        float, typer.Option(min=0.01, help="Simulated hours before; the peers come in half of it.")
    ] = 1.0,
    churn: Annotated[
        float, typer.Option(min=0.0, max=10.0, help="Share of the peers that comes and goes an hour.")
    ] = 0.1,
    model: Annotated[
        list[str] | None,
        typer.Option(metavar="NAME:BLOCKS:SHARE", help="A model and its share of the peers; may be repeated."),
    ] = None,
    clients: Annotated[int, typer.Option(min=0, help="Clients of each model that look for a route.")] = 200,
    loads: Annotated[int, typer.Option(min=0, help="How often each model is crowded; takes most of the time.")] = 1,
    seed: Annotated[int, typer.Option(help="Of everything that is left to chance.")] = 0,
    json_file: Annotated[
        Path | None, typer.Option("--json", metavar="FILE", help="Write the figures there too.", dir_okay=False)
    ] = None,
    plot_file: Annotated[
        Path | None, typer.Option("--plot", metavar="FILE.png", help="Draw them there.", dir_okay=False)
    ] = None,
) -> None:
    """The command; its help is above."""
    models = tuple(map(parse_model, model)) if model else MODELS
    if len({m.name for m in models}) < len(models) or sum(m.share for m in models) > 1.0 + 1e-9:
        raise typer.BadParameter("models need different names, and shares that make no more than 1 together")
    settings = Settings(
        peers=peers,
        models=models,
        churn=churn,
        warm_up=3600 * warm_up,
        measured=3600 * hours,
        clients=clients,
        loads=loads,
        seed=seed,
    )
    raise typer.Exit(_run(settings, json_file, plot_file))


def _run(settings: Settings, json_file: Path | None, plot_file: Path | None) -> int:
    simulation = Simulation(settings)
    try:
        with _progress(settings) as tell:
            simulation.run(tell)
    except KeyboardInterrupt:
        errors.print("interrupted: there is nothing to show before the end")
        return INTERRUPTED
    rows = rows_of(simulation)
    console.print(table(rows))
    if json_file is not None:
        json_file.write_text(json.dumps(document(simulation, rows), indent=2) + "\n")
    if plot_file is not None:
        plot(simulation, plot_file)
    return exit_code(rows)


@contextlib.contextmanager
def _progress(settings: Settings) -> Iterator[Callable[[float, str], None]]:
    columns = (TextColumn("simulating"), BarColumn(), TextColumn("{task.description}"))
    with Progress(*columns, TimeElapsedColumn(), TimeRemainingColumn(), console=errors, transient=True) as progress:
        task = progress.add_task("", total=settings.end)

        def tell(seconds: float, text: str) -> None:
            progress.update(task, completed=seconds, description=f"{seconds / 3600:.2f} h, {text}")

        yield tell


if __name__ == "__main__":
    app(prog_name="scripts/simulate")
