"""What a peer with the whole model in fp32 takes once it has served an answer, and in how many processes.

A figure is the proportional set size of the peer's process and its children, in MB of 10^6 bytes: what is shared with
other processes (torch's code, the mapped weights) counts by its share. So the resident set, in which it counts in
full, is shown as well. The reference is a process with transformers alone that has generated as much.
"""

from __future__ import annotations

from pathlib import Path

import psutil
import torch
from processes import LocalSwarm

from benches.child import running
from benches.generation import NEW_TOKENS, generate, prompt
from benches.plan import Plan
from benches.rows import Must, Rounds, Row
from swarm.client import SwarmModelForCausalLM
from swarm.files.checkpoint import Checkpoint
from swarm.files.hub import DEFAULT_MODEL, resolve

MUST = Must("value", "<=", 920)
MUST_PROCESSES = Must("value", "==", 2)
ROUNDS = 3


def measure(plan: Plan) -> list[Row]:
    """A row for the memory, one for the resident set, and one for the number of processes."""
    folder = resolve(DEFAULT_MODEL)
    resident, processes, alone_resident = [], [], []

    def serving() -> float:
        proportional_size, resident_size, count = _after_serving(folder)
        resident.append(resident_size)
        processes.append(count)
        return proportional_size

    def alone() -> float:
        with running("alone.py", str(folder), str(NEW_TOKENS)) as (process, _):
            alone_resident.append(megabytes(process.pid, "Rss"))
            return megabytes(process.pid, "Pss")

    rounds = plan.alternate("memory: a peer with every block", plan.rounds(ROUNDS), serving, alone)
    return [
        rounds.row("memory: a peer with every block", "MB", MUST),
        Rounds(resident, alone_resident).row("memory: its resident set", "MB"),
        Row("memory: its processes", max(processes), "processes", must=MUST_PROCESSES),
    ]


def _after_serving(folder: Path) -> tuple[float, float, int]:
    """Proportional and resident megabytes of a peer and its children, and how many processes these are."""
    checkpoint = Checkpoint(folder)
    torch.set_num_threads(1)
    with LocalSwarm() as local:
        peer = local.serve(str(folder))
        local.wait_online(checkpoint.model_id, checkpoint.config().num_hidden_layers, 1)
        with SwarmModelForCausalLM.from_pretrained(folder, initial_peers=[local.address]) as model:
            generate(model, prompt(folder))
        tree = [peer.pid, *(child.pid for child in psutil.Process(peer.pid).children(recursive=True))]
        sizes = [(megabytes(pid, "Pss"), megabytes(pid, "Rss")) for pid in tree]
    proportional, resident = (sum(column) for column in zip(*sizes, strict=True))
    return proportional, resident, len(tree)


def megabytes(pid: int, kind: str) -> float:
    """What a process takes; `kind` is a line of Linux's `smaps_rollup`, in kibibytes there."""
    lines = Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 / 1e6 for line in lines if line.startswith(f"{kind}:"))
