"""From launching two peers to a client's first token.

The bootstrap node is up, the weights are on the disk, and the client has imported what it needs. From the launch on,
everything counts: the peers start, join and load half of the model each, while the client joins, loads its ends,
waits until every block is online, opens a session and generates one token. The reference is a fresh process with
transformers alone, from its launch to its first token: no network, but the same imports and weights.
"""

from __future__ import annotations

import time
from pathlib import Path

import torch
from processes import START_SECONDS, LocalSwarm

from benches.child import running
from benches.generation import generate, prompt
from benches.plan import Plan
from benches.rows import Must, Row
from swarm.client import SwarmModelForCausalLM
from swarm.files.checkpoint import Checkpoint
from swarm.files.hub import DEFAULT_MODEL, resolve

MUST = Must("value", "<=", 7.0)
ROUNDS = 5


def measure(plan: Plan) -> list[Row]:
    """One row."""
    plan.tell("startup: starting the bootstrap node")
    checkpoint = Checkpoint(resolve(DEFAULT_MODEL))
    torch.set_num_threads(1)
    folder, ids = checkpoint.folder, prompt(checkpoint.folder)
    blocks: int = checkpoint.config().num_hidden_layers
    with LocalSwarm() as local:
        rounds = plan.alternate(
            "startup: two peers",
            plan.rounds(ROUNDS),
            lambda: _first_token(local, folder, blocks, ids),
            lambda: _first_token_alone(folder),
        )
    return [rounds.row("startup: two peers", "s", MUST)]


def _first_token(local: LocalSwarm, folder: Path, blocks: int, ids: torch.Tensor) -> float:
    half = blocks // 2
    started = time.perf_counter()
    peers = [local.serve(str(folder), "--blocks", span) for span in (f"0:{half}", f"{half}:{blocks}")]
    with SwarmModelForCausalLM.from_pretrained(folder, initial_peers=[local.address], wait=START_SECONDS) as model:
        generate(model, ids, new_tokens=1)
        seconds = time.perf_counter() - started
    for peer in peers:
        peer.stop()
    return seconds


def _first_token_alone(folder: Path) -> float:
    started = time.perf_counter()
    with running("alone.py", str(folder), "1"):
        return time.perf_counter() - started
