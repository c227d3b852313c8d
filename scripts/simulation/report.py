"""What a run showed: figures, what they must be, and a plot."""

from __future__ import annotations

import dataclasses
import statistics
from pathlib import Path
from typing import Any

from benches.rows import Must, Row

from simulation.clients import Answer
from simulation.engine import Simulation
from simulation.hosting import Hosting
from simulation.load import Load

COVERED = Must("value", ">=", 0.999)
THROUGHPUT = Must("ratio", ">=", 0.80)
TOKEN = Must("ratio", "<=", 1.25)
MOVES = Must("value", "<=", 0.5)
SETTLED = 2000  # peers: what clients get of the best that all could have is judged up to here, and beyond only told
READ = Must("value", "<=", 600.0)  # records, however many peers there are
LOOKED_AT = Must("value", "<=", 3000.0)  # by a peer that looks for its place


def rows_of(run: Simulation) -> list[Row]:
    """Every figure of every model."""
    return [row for hosting in run.hostings for row in _rows(run, hosting)]


def _rows(run: Simulation, hosting: Hosting) -> list[Row]:
    name = hosting.model.name
    rows = [
        Row(f"{name}: peers", float(len(hosting.peers)), ""),
        Row(f"{name}: time covered", hosting.covered_seconds / max(hosting.seconds, 1e-9), "of all", must=COVERED),
        Row(f"{name}: moves", hosting.moves / max(hosting.peer_seconds / 3600, 1e-9), "/peer-hour", must=MOVES),
    ]
    looked_at = float(hosting.directory.read_by_peers)
    rows.append(Row(f"{name}: offers read for a place", looked_at, "/look", must=LOOKED_AT))
    judged = run.settings.peers <= SETTLED
    if loads := run.loads[name]:
        rows += _load_rows(name, loads, THROUGHPUT if judged else None)
    if answers := run.answers[name]:
        rows += _client_rows(name, answers, run.settings.clients, TOKEN if judged else None)
    return rows


def _load_rows(name: str, loads: list[Load], must: Must | None) -> list[Row]:
    achieved = statistics.mean(load.achieved for load in loads)
    placed = statistics.mean(load.placed for load in loads)
    possible = statistics.mean(load.possible for load in loads)
    return [
        Row(f"{name}: throughput of max-flow", achieved, "tokens/s", placed, achieved / placed, must=must),
        Row(f"{name}: max-flow of any placement's", placed, "tokens/s", possible, placed / possible),
    ]


def _client_rows(name: str, answers: list[Answer], clients: int, must: Must | None) -> list[Row]:
    seconds = statistics.mean(answer.seconds for answer in answers)
    oracle = statistics.mean(answer.oracle for answer in answers)
    return [
        Row(f"{name}: time per token of oracle's", 1000 * seconds, "ms", 1000 * oracle, seconds / oracle, must=must),
        Row(f"{name}: hops", statistics.mean(answer.hops for answer in answers), ""),
        Row(f"{name}: offers read, at most", float(max(answer.read for answer in answers)), "/client", must=READ),
        Row(f"{name}: dead peers chosen first", sum(answer.dead for answer in answers) / len(answers), "/client"),
        Row(f"{name}: clients with a route", len(answers) / clients, "of all", must=COVERED),
    ]


def document(run: Simulation, rows: list[Row]) -> dict[str, Any]:
    """What `--json` writes: the settings, the rows, and what the plot shows."""
    return {
        "settings": dataclasses.asdict(run.settings),
        "rows": [row.to_json() for row in rows],
        "samples": {h.model.name: [dataclasses.asdict(sample) for sample in h.samples] for h in run.hostings},
        "answers": {name: [dataclasses.asdict(answer) for answer in run.answers[name]] for name in run.answers},
        "loads": {name: [dataclasses.asdict(load) for load in run.loads[name]] for name in run.loads},
    }


def plot(run: Simulation, file: Path) -> None:
    """Draw each model's peers and weakest block over time, and its clients' times per token against the oracle's."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(15, 3.6 * len(run.hostings)), layout="constrained")
    panels = figure.subplots(len(run.hostings), 3, squeeze=False)
    for (peers, weakest, tokens), hosting in zip(panels, run.hostings, strict=True):
        hours = [sample.hours for sample in hosting.samples]
        peers.plot(hours, [sample.online for sample in hosting.samples])
        peers.set(title=f"{hosting.model.name}: peers online", xlabel="hours", ylim=(0, None))
        weakest.plot(hours, [sample.weakest / max(sample.average, 1e-9) for sample in hosting.samples])
        weakest.set(title="weakest block / average block", xlabel="hours", ylim=(0, 1))
        answers = run.answers[hosting.model.name]
        oracle, seconds = [1000 * a.oracle for a in answers], [1000 * a.seconds for a in answers]
        tokens.scatter(oracle, seconds, s=8)
        longest = max([*seconds, 1.0])
        tokens.plot([0, longest], [0, longest], color="grey", linewidth=0.8)
        tokens.set(title="ms per token, against the oracle's", xlabel="oracle", ylabel="client")
        for panel in (peers, weakest):
            panel.axvline(run.settings.warm_up / 3600, color="grey", linewidth=0.8, linestyle=":")
    figure.savefig(file, format="png", dpi=100)
