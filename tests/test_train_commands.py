"""`peer train`, `swarm train` and what goes with them, as users run them; and what they say to what cannot be."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from commands import refused, run
from nursery import Forked
from processes import LocalSwarm
from runs import run_text, save_run
from transformers import AutoModelForCausalLM

from swarm.console.trainshow import gather_saved
from swarm.errors import UsageError
from swarm.runs.run import load

pytestmark = [pytest.mark.slow, pytest.mark.timeout(240)]  # it starts seven processes, one after another

NOBODY = "/ip4/127.0.0.1/tcp/9/p2p/12D3KooWBzPTxnLRtQrUsYkzxnBQBGkjjRnCNZB2UYbBbGnqjnF5"


def test_a_run_is_trained_asked_and_gathered(tmp_path: Path) -> None:
    file = save_run(tmp_path, ("0:2", "2:4"), rounds=4, more="\n[checkpoint]\nevery = 2\n")
    metrics, plot, model = tmp_path / "run.jsonl", tmp_path / "run.png", tmp_path / "model"
    with LocalSwarm(popen=Forked) as local:
        saved = ("--checkpoints", str(tmp_path / "saved"))
        for peer in [local.train(file, "--stage", stage, *saved) for stage in ("0", "1")]:
            peer.address()
        common = ("--initial-peers", local.address)
        files = ("--metrics", metrics, "--plot", plot, "--output", model)
        trained = run("swarm", "train", file, *common, *files)
        assert trained.returncode == 0, trained.stderr
        assert "round 4/4" in trained.stderr
        terms = ("--priority", "low", "--wire-dtype", "bfloat16", "--speculate", "lookup")
        asked = run("swarm", "generate", "--run", file, "--raw", "--max-new-tokens", 5, "The ", *common, *terms)
        assert asked.returncode == 0, asked.stderr
        assert "5 tokens" in asked.stderr
    lines = [json.loads(line) for line in metrics.read_text().splitlines()]
    assert [line["round"] for line in lines] == [0, 1, 2, 3]
    assert all(line["outcome"] == "commit" and line["peers"] == [1, 1] for line in lines)
    assert plot.read_bytes().startswith(b"\x89PNG")
    assert AutoModelForCausalLM.from_pretrained(model).config.num_hidden_layers == 4
    again = run("swarm", "gather", file, tmp_path / "again", "--checkpoints", tmp_path / "saved")
    assert again.returncode == 0, again.stderr
    assert (tmp_path / "again" / "model.safetensors").read_bytes() == (model / "model.safetensors").read_bytes()


def test_what_cannot_be_is_told_in_one_line(tmp_path: Path) -> None:
    file = save_run(tmp_path)
    assert "there is no run file" in refused("peer", "train", tmp_path / "nowhere.toml")
    assert "--stage 3: the run has stages 0 to 0" in refused("peer", "train", file, "--stage", 3)
    assert "gather from a swarm" in refused("swarm", "gather", file, tmp_path / "out")
    with pytest.raises(UsageError, match="there is no folder"):
        gather_saved(load(file), tmp_path / "no", tmp_path / "out")
    file.write_text(run_text(more='\n[data]\nsource = "nowhere.txt"\n'))
    assert "there is no file or folder nowhere.txt" in refused("swarm", "train", file, "--initial-peers", NOBODY)
    before, _, rest = run_text().partition("[model.config]")
    before = before.replace('architecture = "llama"', 'pretrained = "./no-such-model"')
    file.write_text(f"{before}[batch]{rest.partition('[batch]')[2]}")
    assert "no-such-model" in refused("peer", "train", file)
