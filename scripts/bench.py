"""Measures Shoal against a reference in the same minute, and says where a figure is not what it must be."""

from __future__ import annotations

import contextlib
import datetime
import importlib
import json
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Annotated, Any

import typer
from benches import BENCHES
from benches.plan import Plan, machine, versions
from benches.rows import Row, exit_code, table
from processes import Failed, terminated_like_interrupted
from rich.console import Console

from swarm.errors import ShoalError

ALL = "all"
INTERRUPTED = 130
WIDTH = 140  # of the table, where there is no terminal to fit it into

console = Console(highlight=False, width=None if sys.stdout.isatty() else WIDTH)
progress = Console(highlight=False, stderr=True)
app = typer.Typer(
    add_completion=False,
    rich_markup_mode="rich",
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)


def chosen(name: str) -> list[str]:
    """The benches that a name stands for. Raises `typer.BadParameter`."""
    if name == ALL:
        return list(BENCHES)
    if name not in BENCHES:
        raise typer.BadParameter(f"{name!r} is none of {', '.join([*BENCHES, ALL])}")
    return [name]


_LISTED = "\n\n".join(f"[bold]{name}[/]  {summary}" for name, summary in {**BENCHES, ALL: "one after another"}.items())
_METHOD = (
    "Every peer is a process of its own with one compute thread. A round measures Shoal and its reference one after "
    "the other, and the next round in the other order; what is shown are medians over the rounds, the ratio that of "
    "the pairs. Spread is the distance between the quartiles over the median. Exits with 1 where a figure is not "
    "what it must be, 130 where it is interrupted; what was measured until then is shown and written all the same."
)
_HELP = f"""Measure Shoal on this machine. NAME is one of

{_LISTED}

{_METHOD}
"""


@app.command(help=_HELP)
def main(
    name: Annotated[str, typer.Argument(metavar="NAME", help="What to measure.", show_default=False)],
    json_file: Annotated[
        Path | None, typer.Option("--json", metavar="FILE", help="Write the figures there too.", dir_okay=False)
    ] = None,
    quick: Annotated[bool, typer.Option("--quick", help="Few rounds: to see whether it works.")] = False,
) -> None:
    """The command; its help is above."""
    names = chosen(name)
    header = {"bench": name, "quick": quick, "started": _now(), "machine": machine(), "versions": versions()}
    _print_header(header)
    rows: list[Row] = []
    code = _run(names, quick, rows)
    header["ended"] = _now()
    if rows:
        console.print(table(rows))
    if json_file is not None:
        json_file.write_text(json.dumps(document(header, rows), indent=2) + "\n")
    raise typer.Exit(code)


def document(header: dict[str, Any], rows: list[Row]) -> dict[str, Any]:
    """What `--json` writes."""
    return {**header, "rows": [row.to_json() for row in rows]}


def _run(names: list[str], quick: bool, rows: list[Row]) -> int:
    """Add what is measured to `rows`; the exit code. What was measured before a failure stays."""
    try:
        with terminated_like_interrupted(), _telling() as tell:
            plan = Plan(quick, tell)
            for name in names:
                rows += importlib.import_module(f"benches.{name}").measure(plan)
    except (ShoalError, Failed) as error:
        progress.print("[bold red]error:[/]", str(error), soft_wrap=True)
        return 1
    except KeyboardInterrupt:
        return INTERRUPTED
    return exit_code(rows)


@contextlib.contextmanager
def _telling() -> Iterator[Callable[[str], None]]:
    """One changing line on a terminal; elsewhere a line each."""
    if not progress.is_terminal:
        yield lambda text: progress.print(text, style="dim")
        return
    with progress.status("starting") as status:
        yield status.update


def _print_header(header: dict[str, Any]) -> None:
    machine_, versions_ = header["machine"], header["versions"]
    console.print(
        f"{machine_['processor']}, {machine_['cores']} cores, {machine_['memory_gb']} GB, "
        f"load {machine_['load_average'][0]}, {machine_['platform']}"
    )
    console.print(", ".join(f"{name} {number}" for name, number in versions_.items()) + "\n", soft_wrap=True)


def _now() -> str:
    return datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")


if __name__ == "__main__":
    app(prog_name="scripts/bench")
