"""What a training peer takes beyond its libraries, against what its weights are said to need.

For each weight of the stage: itself, its gradient, two moments of AdamW and one averaging buffer, 4 bytes each; where
rounds overlap, two more. The figure is the peak of the proportional set size (MB of 10^6 bytes) of one of two replicas
while some rounds are averaged and a checkpoint is saved, less what the same peer takes that holds a tiny stage; the
reference is the weights' part. What is left between them are activations (a micro-batch of 64 tokens), gradients on
their way, and what the allocator keeps. While a newcomer takes its state, a donor has a copy of that (12 bytes a
weight, 16 with overlap) besides; that is not measured here.
"""

from __future__ import annotations

import threading
import time
from pathlib import Path

from processes import LocalSwarm

from benches.memory import megabytes
from benches.plan import Plan
from benches.rows import Must, Rounds, Row
from benches.trainees import training, write_run

MUST = Must("ratio", "<=", 1.25)
ROUNDS = 3
SETTLED = 25.0  # seconds after which a donor has given back the copy that the later one of the two has taken
WATCHED = 15.0  # seconds: some rounds and checkpoints
CONFIG = """\
hidden_size = {hidden}
intermediate_size = {inner}
num_hidden_layers = 8
num_attention_heads = 8
num_key_value_heads = 8
max_position_embeddings = 64"""
SIZES = {"hidden": 768, "inner": 2048}
TINY = {"hidden": 16, "inner": 32}
WEIGHTS = 8 * (4 * 768 * 768 + 3 * 768 * 2048 + 2 * 768) + 2 * 259 * 768 + 768


def measure(plan: Plan) -> list[Row]:
    """A row for rounds in turn, one for rounds that overlap."""
    return [_row(plan, "in turn", 5, ""), _row(plan, "overlapping", 7, "overlap = true\n")]


def _row(plan: Plan, name: str, numbers: int, more: str) -> Row:
    title = f"trainmemory: {WEIGHTS / 1e6:.0f}M weights, rounds {name}"
    needed = numbers * 4 * WEIGHTS / 1e6
    taken = []
    for turn in range(plan.rounds(ROUNDS)):
        plan.tell(f"{title}, {turn + 1}")
        taken.append(_peak(SIZES, more) - _peak(TINY, more))
    return Rounds(taken, [needed] * len(taken)).row(title, "MB", MUST)


def _peak(sizes: dict[str, int], more: str) -> float:
    """The most megabytes that one of two replicas takes while it trains."""
    with LocalSwarm() as local:
        saving = f"{more}\n[checkpoint]\nevery = 2\nkeep = 1\nfolder = '{local.folder / 'saved'}'\n"
        file = write_run(local.folder, "bench-trainmemory", '["0:8"]', 1, 4, 64, CONFIG.format(**sizes), saving)
        peers = [local.train(file, "--stage", "0") for _ in range(2)]
        with training(file, local) as trainees:
            while trainees.next_round().peers != [2]:
                continue
            time.sleep(SETTLED)
            with _Watch(peers[0].pid) as watch:
                time.sleep(WATCHED)  # the trainer goes on meanwhile
                return watch.most


class _Watch:
    """Looks at a process again and again, in a thread."""

    def __init__(self, pid: int) -> None:
        self.most = 0.0
        self._pid = pid
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._look, daemon=True)

    def _look(self) -> None:
        while not self._over.wait(0.05):
            if Path(f"/proc/{self._pid}").exists():
                self.most = max(self.most, megabytes(self._pid, "Pss"))

    def __enter__(self) -> _Watch:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._over.set()
        self._thread.join()
