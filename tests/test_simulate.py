"""scripts/simulate: a small run has the shape of a large one, keeps what never may break, and is the same again."""

from __future__ import annotations

import json
import random
from pathlib import Path

import numpy as np
import pytest
import typer
from simulate import app, parse_model
from simulation import clients, load
from simulation.engine import Simulation
from simulation.geography import TrueLatencies, draw_place, round_trip
from simulation.hosting import Hosting, Peer, first_offer
from simulation.machines import Machine, Model, Settings, draw_machine
from simulation.report import document, rows_of
from typer.testing import CliRunner

from swarm.types import PeerId, Span, State

SMALL = Settings(
    peers=60,
    models=(Model("a", 12, 0.6), Model("b", 6, 0.4)),
    churn=1.0,
    warm_up=900.0,
    measured=900.0,
    clients=10,
    loads=0,
    seed=1,
)


@pytest.fixture(scope="module")
def run() -> Simulation:
    simulation = Simulation(SMALL)
    simulation.run()
    return simulation


def test_it_has_every_figure_of_every_model(run: Simulation) -> None:
    cases = [row.case for row in rows_of(run)]
    for model in ("a", "b"):
        for figure in ("peers", "time covered", "moves", "time per token of oracle's", "offers read, at most"):
            assert f"{model}: {figure}" in cases
    assert json.loads(json.dumps(document(run, rows_of(run))))["settings"]["peers"] == 60


def test_what_it_counts_is_what_is_there(run: Simulation) -> None:
    for hosting in run.hostings:
        assert hosting.seconds == pytest.approx(SMALL.measured)
        assert 0 < hosting.covered_seconds <= hosting.seconds
        online = [[block in peer.offer.span for peer in hosting.online] for block in range(hosting.model.num_blocks)]
        assert hosting._hosts == [sum(row) for row in online]
        assert all(len(p.offer.span) <= p.machine.blocks for p in hosting.peers.values())


def test_nobody_beats_the_oracle(run: Simulation) -> None:
    answers = [answer for of_model in run.answers.values() for answer in of_model]
    assert len(answers) > 10
    for answer in answers:  # it may itself lose a little where its shortest path would visit a peer twice
        assert answer.seconds >= 0.97 * answer.oracle


def test_the_same_seed_is_the_same_run(run: Simulation) -> None:
    again, other = Simulation(SMALL), Simulation(Settings(**{**settings_of(SMALL), "seed": 2}))
    again.run()
    other.run()
    assert rows_of(again) == rows_of(run)
    assert rows_of(other) != rows_of(run)


def settings_of(settings: Settings) -> dict[str, object]:
    return {name: getattr(settings, name) for name in settings.__dataclass_fields__}


def hosting_of(*machines: tuple[float, int, int]) -> Hosting:
    """A swarm of four blocks: (seconds per block, start, end) each."""
    hosting, chance = Hosting(Model("m", 4, 1.0), 2), random.Random(0)
    for number, (pace, start, end) in enumerate(machines):
        machine = Machine(PeerId(f"p{number}"), draw_place(chance), pace, end - start)
        peer = Peer(machine, first_offer(machine, hosting.model, Span(start, end)), 0.0)
        hosting.peers[machine.peer] = peer
        hosting.become(peer, State.ONLINE, peer.offer.span)
    return hosting


@pytest.mark.parametrize(
    ("machines", "flow"),
    [
        ([(0.01, 0, 4)], 25.0),
        ([(0.01, 0, 2), (0.01, 2, 4)], 50.0),
        ([(0.01, 0, 2), (0.02, 2, 4)], 25.0),
        ([(0.01, 0, 4), (0.02, 2, 4)], 37.5),  # the first does more of the blocks that it alone has
        ([(0.01, 0, 2)], 0.0),
    ],
)
def test_the_bound_is_the_maximum_flow(machines: list[tuple[float, int, int]], flow: float) -> None:
    assert load.max_flow(hosting_of(*machines).online, 4) == pytest.approx(flow, rel=2e-3, abs=0.05)


def test_a_crowd_gets_no_more_than_the_bound_and_most_of_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(load, "CLIENTS", 10)
    monkeypatch.setattr(load, "MOST", 400)
    hosting = hosting_of(*[(0.01, 0, 2)] * 4, *[(0.01, 2, 4)] * 4, *[(0.02, 0, 4)] * 2)
    before = dict(hosting.directory.offers)
    found = load.saturate(hosting, random.Random(0))
    assert 0.6 * found.placed < found.achieved <= found.placed * 1.01
    assert found.placed <= found.possible * 1.001
    assert hosting.directory.offers == before


def test_the_oracle_knows_the_true_latencies() -> None:
    chance = random.Random(0)
    places, client = [draw_place(chance) for _ in range(5)], draw_place(chance)
    every = np.arange(5)
    true = TrueLatencies(places, client)
    assert true.between(every, every)[1, 3] == pytest.approx(round_trip(places[1], places[3]) / 2)
    assert true.first()[2] == pytest.approx(round_trip(client, places[2]) / 2)


def test_a_client_measures_before_it_asks() -> None:
    hosting = hosting_of((0.01, 0, 4), (0.01, 0, 4))
    client = clients.settle(hosting, random.Random(0))
    assert set(client.measured) <= set(hosting.peers)
    assert client.coordinate.error < 1.0


def test_machines_fit_their_model() -> None:
    chance = random.Random(0)
    assert max(draw_machine(n, Model("m", 6, 1.0), chance).blocks for n in range(50)) == 6


@pytest.mark.parametrize("text", ["", "a:b", "a:0:0.5", "a:4:0", "a:4:1.5", ":4:1", "a:4:x"])
def test_a_model_that_cannot_be_is_refused(text: str) -> None:
    with pytest.raises(typer.BadParameter):
        parse_model(text)


WORLD = ["--hours", "0.1", "--warm-up", "0.3", "--loads", "0"]
ARGUMENTS = [*WORLD, "--peers", "40", "--churn", "0", "--clients", "5", "--model", "m:8:1"]


def test_the_command_writes_what_it_found(tmp_path: Path) -> None:
    file = tmp_path / "figures.json"
    result = CliRunner().invoke(app, [*ARGUMENTS, "--json", str(file)])
    assert result.exit_code == 0, result.output
    assert all(row["ok"] for row in json.loads(file.read_text())["rows"])
    assert "time covered" in result.output


def test_the_plot_is_drawn(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    file = tmp_path / "figures.png"
    assert CliRunner().invoke(app, [*ARGUMENTS, "--plot", str(file)]).exit_code == 0
    assert file.read_bytes().startswith(b"\x89PNG")


def test_a_figure_that_falls_short_is_a_failure() -> None:
    result = CliRunner().invoke(app, [*WORLD, "--peers", "2", "--clients", "0", "--model", "m:64:1"])
    assert result.exit_code == 1
    assert "short" in result.output


def test_help_and_bad_models() -> None:
    result = CliRunner().invoke(app, ["--help"])
    assert result.exit_code == 0
    assert "200,000 km/s" in result.output
    assert CliRunner().invoke(app, ["--model", "a:4:0.7", "--model", "b:4:0.7"]).exit_code == 2
