"""The benches' own workings: rows, rounds, exit codes, what is written. No test looks at how fast anything is."""

from __future__ import annotations

import io
import json
import math
import random
import subprocess
import sys
import types
from pathlib import Path
from typing import Any

import bench
import pytest
import typer
from benches import BENCHES
from benches.plan import Plan, machine, versions
from benches.rows import Must, Rounds, Row, exit_code, spread, table
from benches.soak import slope_of
from processes import Failed
from rich.console import Console
from typer.testing import CliRunner

SCRIPTS = Path(bench.__file__).parent
COLUMNS = ["case", "value", "unit", "reference", "ratio", "spread", "must", "ok"]


def quiet_plan(quick: bool = False) -> Plan:
    return Plan(quick, lambda text: None)


@pytest.mark.parametrize(
    ("row", "ok"),
    [
        (Row("a", 1.0, "s"), True),
        (Row("a", 1.0, "s", must=Must("value", "<=", 1.0)), True),
        (Row("a", 1.1, "s", must=Must("value", "<=", 1.0)), False),
        (Row("a", 1.1, "s", must=Must("value", ">=", 1.0)), True),
        (Row("a", 2.0, "", must=Must("value", "==", 2.0)), True),
        (Row("a", 3.0, "", must=Must("value", "==", 2.0)), False),
        (Row("a", 1.0, "s", 2.0, 0.5, must=Must("ratio", ">=", 0.4)), True),
        (Row("a", 1.0, "s", 2.0, 0.5, must=Must("ratio", ">=", 0.6)), False),
        (Row("a", 1.0, "s", must=Must("ratio", ">=", 0.0)), False),  # nothing to compare with
        (Row("a", math.nan, "s", must=Must("value", "<=", 1.0)), False),
    ],
)
def test_a_row_is_what_it_must_be_or_not(row: Row, ok: bool) -> None:
    assert row.ok is ok
    assert exit_code([Row("good", 1.0, "s"), row]) == (0 if ok else 1)


def test_no_figures_are_a_failure() -> None:
    assert exit_code([]) == 1


def test_the_ratio_is_that_of_the_pairs() -> None:
    """The machine was three times as slow in the second round; the pairs do not mind, the medians would."""
    row = Rounds([10.0, 30.0, 11.0], [20.0, 60.0, 22.0]).row("a", "s", Must("ratio", "<=", 0.5))
    assert (row.value, row.reference, row.ratio, row.spread) == (11.0, 22.0, 0.5, 0.0)
    assert row.ok


def test_rounds_without_a_reference() -> None:
    row = Rounds([1.0, 2.0, 3.0]).row("a", "s")
    assert (row.value, row.reference, row.ratio, row.spread) == (2.0, None, None, 0.5)


@pytest.mark.parametrize(
    ("figures", "expected"), [([1.0], None), ([0.0, 0.0], None), ([1, 2, 3, 4, 5], 2 / 3), ([-1, -2, -3], 0.5)]
)
def test_spread(figures: list[float], expected: float | None) -> None:
    assert spread(figures) == expected


def test_rounds_alternate_in_both_orders() -> None:
    order: list[str] = []

    def noted(who: str, figure: float) -> float:
        order.append(who)
        return figure

    rounds = quiet_plan().alternate("a", 3, lambda: noted("ours", 1.0), lambda: noted("theirs", 2.0))
    assert order == ["theirs", "ours", "ours", "theirs", "theirs", "ours"]
    assert rounds == Rounds([1.0] * 3, [2.0] * 3)
    assert quiet_plan().repeat("a", 2, lambda: 1.0) == Rounds([1.0] * 2)


def test_quick_means_fewer_rounds() -> None:
    assert quiet_plan().rounds(9) == 9
    assert quiet_plan(quick=True).rounds(9) == 2
    assert quiet_plan(quick=True).rounds(1) == 1


def test_the_slope_of_memory_does_not_mind_single_samples_and_says_how_sure_it_is() -> None:
    chance = random.Random(0)
    minutes = [second / 60 for second in range(400)]
    growing = [300 + 3.0 * minute + chance.gauss(0, 1) for minute in minutes]
    growing[50], growing[60] = 900.0, 0.0
    slope, highest = slope_of(minutes, growing)
    assert slope == pytest.approx(3.0, abs=0.3)
    assert slope < highest < 3.6
    slope, highest = slope_of(minutes, [300 + chance.gauss(0, 1) for _ in minutes])
    assert slope == pytest.approx(0.0, abs=0.3)
    assert 0.0 < highest < 0.5


def test_a_row_as_json() -> None:
    written = Row("a", 1.0, "s", 2.0, 0.5, 0.1, Must("ratio", "<=", 0.92)).to_json()
    assert list(written) == COLUMNS
    assert (written["must"], written["ok"]) == ("ratio <= 0.92", True)
    assert Row("a", 1.0, "s").to_json()["must"] is None


def test_the_table_marks_what_falls_short() -> None:
    console = Console(width=120, file=io.StringIO(), record=True)
    console.print(table([Row("slow", 1234.5, "ms", must=Must("value", "<=", 1)), Row("fine", 0.1234, "ms", 1.0, 0.1)]))
    slow, fine = console.export_text().splitlines()[1:3]
    assert slow.split() == ["slow", "1234", "ms", "value", "<=", "1", "short"]
    assert fine.split() == ["fine", "0.123", "ms", "1", "0.1"]


def test_machine_and_versions_can_be_written() -> None:
    assert json.loads(json.dumps(machine()))["cores"] > 0
    assert {"shoal", "python", "torch", "transformers"} <= versions().keys()


# --- the command ------------------------------------------------------------------------------------------------------


def test_names() -> None:
    assert bench.chosen("wire") == ["wire"]
    assert bench.chosen("all") == list(BENCHES)
    with pytest.raises(typer.BadParameter, match="'wires' is none of single, hop"):
        bench.chosen("wires")


def test_every_bench_is_a_module() -> None:
    assert all((SCRIPTS / "benches" / f"{name}.py").exists() for name in BENCHES)


def invoke(monkeypatch: pytest.MonkeyPatch, measure: Any, *arguments: str) -> int:
    fake = types.ModuleType("benches.wire")
    fake.measure = measure  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "benches.wire", fake)
    return CliRunner().invoke(bench.app, ["wire", *arguments]).exit_code


def interrupted(plan: Plan) -> list[Row]:
    raise KeyboardInterrupt


def failing(plan: Plan) -> list[Row]:
    raise Failed("no peer came")


@pytest.mark.parametrize(
    ("measure", "code"),
    [
        (lambda plan: [Row("a", 1.0, "s")], 0),
        (lambda plan: [Row("a", 1.0, "s", must=Must("value", "<=", 0.5))], 1),
        (failing, 1),
        (interrupted, bench.INTERRUPTED),
    ],
)
def test_exit_codes(monkeypatch: pytest.MonkeyPatch, measure: Any, code: int) -> None:
    assert invoke(monkeypatch, measure) == code


def test_what_is_written(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    file = tmp_path / "figures.json"
    assert invoke(monkeypatch, lambda plan: [Row("a", 1.0, "s")], "--quick", "--json", str(file)) == 0
    written = json.loads(file.read_text())
    assert list(written) == ["bench", "quick", "started", "machine", "versions", "ended", "rows"]
    assert written["rows"] == [Row("a", 1.0, "s").to_json()]


def test_the_help_names_every_bench() -> None:
    result = CliRunner().invoke(bench.app, ["--help"], env={"COLUMNS": "120"})
    assert result.exit_code == 0
    assert all(f"{name}  {summary}" in result.stdout for name, summary in BENCHES.items())


@pytest.mark.slow
def test_the_wire_bench_from_beginning_to_end(tmp_path: Path) -> None:
    file = tmp_path / "wire.json"
    command = [sys.executable, str(SCRIPTS / "bench.py"), "wire", "--quick", "--json", str(file)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=50, check=False)
    assert done.returncode in (0, 1), done.stderr  # how fast it is, is not for a test to say
    written = json.loads(file.read_text())
    assert (written["bench"], written["quick"]) == ("wire", True)
    assert [row["case"] for row in written["rows"]] == [
        f"wire: echo of {size}" for size in ("1.2 KB", "16 KB", "1 MiB", "8 MiB")
    ]
    for row in written["rows"]:
        assert list(row) == COLUMNS
        assert all(row[figure] > 0 for figure in ("value", "reference", "ratio"))
    assert "round 2 of 2" in done.stderr
