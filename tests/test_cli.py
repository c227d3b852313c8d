"""What is typed and what comes of it: help that fits, errors of one line, logs that programs can read."""

from __future__ import annotations

import importlib
import logging
import re
import subprocess
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from typer.testing import CliRunner

import peer.cli
import swarm.cli
from peer.console import Meter
from swarm.console.terminal import _KeyValues, addresses_in, error_line, spread

NOBODY = "/ip4/127.0.0.1/tcp/9/p2p/12D3KooWBzPTxnLRtQrUsYkzxnBQBGkjjRnCNZB2UYbBbGnqjnF5"


@pytest.mark.parametrize("width", [80, 120])
@pytest.mark.parametrize(
    ("app", "command"),
    [
        (peer.cli.app, []),
        (peer.cli.app, ["serve"]),
        (peer.cli.app, ["bootstrap"]),
        (swarm.cli.app, []),
        (swarm.cli.app, ["generate"]),
        (swarm.cli.app, ["chat"]),
        (swarm.cli.app, ["status"]),
        (swarm.cli.app, ["train"]),
        (swarm.cli.app, ["gather"]),
        (peer.cli.app, ["train"]),
    ],
    ids=lambda value: " ".join(value) or "alone" if isinstance(value, list) else "",
)
def test_help_fits(app: Any, command: list[str], width: int) -> None:
    shown = CliRunner(env={"COLUMNS": str(width)}).invoke(app, [*command, "--help"])
    assert shown.exit_code == 0
    lines = shown.output.splitlines()
    assert max(map(len, lines)) <= width
    assert "…" not in shown.output  # nothing is cut off
    assert "Usage:" in shown.output


def test_help_needs_none_of_what_takes_seconds_to_import() -> None:
    code = (
        "import peer.cli, swarm.cli, sys; print([n for n in ('torch', 'transformers', 'hivemind') if n in sys.modules])"
    )
    ended = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=30, check=True)
    assert ended.stdout == "[]\n"


def test_a_node_can_join_the_swarm_while_torch_is_imported() -> None:
    """It is in another thread that it is, which helps only where the modules of the first do not want it."""
    code = "import peer.node, peer.training.node, sys; print('torch' in sys.modules, 'transformers' in sys.modules)"
    ended = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=30, check=True)
    assert ended.stdout == "False False\n"


@pytest.mark.parametrize(
    ("typed", "meant"),
    [
        ("serve -v", "serve -v"),
        ("serve --initial-peers A", "serve --initial-peers A"),
        (f"serve --initial-peers {NOBODY} {NOBODY} m", f"serve --initial-peers {NOBODY} --initial-peers {NOBODY} m"),
        (f"serve --initial-peers={NOBODY} {NOBODY}", f"serve --initial-peers={NOBODY} --initial-peers {NOBODY}"),
        (f"x --initial-peers a {NOBODY} -v", f"x --initial-peers a --initial-peers {NOBODY} -v"),
        (f"x --initial-peers {NOBODY} /my/model", f"x --initial-peers {NOBODY} /my/model"),
        (f"x {NOBODY}", f"x {NOBODY}"),
    ],
)
def test_several_addresses_after_one_option(typed: str, meant: str) -> None:
    assert spread(typed.split()) == meant.split()


@pytest.mark.parametrize(
    ("command", "complaint"),
    [
        ("swarm status --initial-peers=", "no address after --initial-peers"),
        ("peer serve --initial-peers=", "no address after --initial-peers"),
        ("swarm train {file} --initial-peers x --output {file}", "'--output': .* is a file"),
        ("swarm train {file} --initial-peers x --metrics {folder}", "'--metrics': .* is a directory"),
        ("swarm train {file} --initial-peers x --plot {folder}", "'--plot': .* is a directory"),
        ("swarm gather {file} {file} --initial-peers x", "'FOLDER': .* is a file"),
        ("peer train {file} --checkpoints {file}", "--checkpoints: .* is no folder"),
        ("peer serve --memory lots", "--memory: 'lots' is no size; write one as in 8GB"),
    ],
)
def test_what_could_not_be_used_is_told_before_anything_begins(
    command: str, complaint: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "file").touch()
    arguments = command.format(file=tmp_path / "file", folder=tmp_path).split()
    monkeypatch.setattr(sys, "argv", arguments)
    module: Any = peer.cli if arguments[0] == "peer" else swarm.cli
    monkeypatch.setattr(module, "set_up_logging", lambda verbose: None)
    with pytest.raises(SystemExit) as ended:
        module.main()
    assert ended.value.code in (1, 2)
    (line,) = capsys.readouterr().err.splitlines()
    assert re.search(complaint, line)


@pytest.mark.parametrize("name", ["peer", "swarm"])
def test_ctrl_c_is_quiet_while_a_command_is_imported(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    class Interrupted(ModuleType):
        def __getattr__(self, name: str) -> Any:
            raise KeyboardInterrupt

    command = importlib.import_module(f"{name}.__main__")
    monkeypatch.setitem(sys.modules, f"{name}.cli", Interrupted(f"{name}.cli"))
    with pytest.raises(SystemExit) as ended:
        command.main()
    assert ended.value.code == 130


def test_several_addresses_in_one_value() -> None:
    assert addresses_in(["a,b", "c d, e", ""]) == ["a", "b", "c", "d", "e"]


def test_an_error_takes_one_line_whatever_is_in_it() -> None:
    assert error_line("no [bold]room[/]\n  at all\n").plain == "error: no [bold]room[/] at all"


@pytest.mark.parametrize(
    ("message", "told"),
    [
        ("session opened session=1f span=0:3", 'event="session opened" session=1f span=0:3'),
        ("failed error='no room' peer=x", "event=\"failed\" error='no room' peer=x"),
        ('said "a=b" and more', r'event="said \"a=b\" and more"'),
        ("two\nlines", r'event="two\nlines"'),
        ("plain", 'event="plain"'),
    ],
)
def test_logs_are_keys_and_values(message: str, told: str) -> None:
    record = logging.LogRecord("peer.node", logging.WARNING, "", 0, message, None, None)
    line = _KeyValues().format(record)
    assert line.endswith(f" level=warning at=peer.node {told}")
    assert line.startswith("time=20")
    assert "\n" not in line


def test_a_trace_in_the_log_is_one_value() -> None:
    try:
        raise ValueError("x")
    except ValueError:
        record = logging.LogRecord("peer.node", logging.ERROR, "", 0, "oh", None, sys.exc_info())
    line = _KeyValues().format(record)
    assert "\n" not in line
    assert 'event="oh" trace="Traceback' in line


def test_the_meter_shows_what_happened_of_late() -> None:
    meter = Meter(looks=3)
    assert meter.speed(100, 10.0) == 0.0
    assert meter.speed(110, 11.0) == 10.0
    assert meter.speed(130, 12.0) == 15.0
    assert meter.speed(130, 13.0) == 10.0
    assert meter.speed(130, 14.0) == 0.0
