"""Two stages of a 12-block Llama, one peer each with one thread, against one process with one thread.

A round is 8 micro-batches of 4 x 128 tokens and a step of AdamW. The figure is tokens a second over whole rounds, the
step included. The reference does the same with transformers and torch alone: forward, backward, once a micro-batch,
then the step; it neither sends anything nor runs a forward twice. The first stage recomputes and the last does not, so
the first holds five blocks and the last seven.
"""

from __future__ import annotations

import time
from typing import Any

import torch
from alone_training import optimizer_of, whole_model
from processes import LocalSwarm

from benches.plan import Plan
from benches.rows import Must, Row
from benches.trainees import training, write_run
from swarm.runs.origin import byte_tokenizer
from swarm.runs.run import Run, load
from swarm.runs.samples import Samples

MUST = Must("ratio", ">=", 1.5)
ROUNDS = 5
EACH = 2  # rounds of the run in one measurement
CONFIG = """\
hidden_size = 512
intermediate_size = 1376
num_hidden_layers = 12
num_attention_heads = 8
num_key_value_heads = 8
max_position_embeddings = 128"""


def measure(plan: Plan) -> list[Row]:
    """One row."""
    plan.tell("train: starting two stages")
    with LocalSwarm() as local:
        file = write_run(local.folder, "bench-train", '["0:5", "5:12"]', 4, 32, 128, CONFIG)
        run = load(file)
        tokens = run.batch.target * run.batch.sequence_length
        for stage in range(2):
            local.train(file, "--stage", str(stage))
        alone = _Alone(run)
        with training(file, local) as trainees:
            trainees.wait_for(2)
            trainees.next_round()  # the first of either warms up
            trainees.go(False)
            alone.seconds_of_round()
            rounds = plan.alternate(
                "train: 2 stages",
                plan.rounds(ROUNDS),
                lambda: tokens / trainees.seconds_of(1 if plan.quick else EACH),
                lambda: tokens / alone.seconds_of_round(),
            )
    return [rounds.row("train: 2 stages x 1, 38M weights", "tokens/s", MUST)]


class _Alone:
    """The same model in this process, with one thread."""

    def __init__(self, run: Run) -> None:
        torch.set_num_threads(1)
        self.run = run
        self.model: Any = whole_model(run)
        self.optimizer = optimizer_of(run, self.model)
        self.samples = Samples(run, byte_tokenizer())

    def seconds_of_round(self) -> float:
        """One round: 8 micro-batches and a step."""
        started = time.perf_counter()
        for index in range(self.run.micro_batches):
            ids = self.samples.micro_batch(0, index).ids
            loss = self.model(input_ids=ids, labels=ids).loss / self.run.micro_batches
            loss.backward()
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), self.run.optimizer.clip_norm)
        self.optimizer.step()
        self.optimizer.zero_grad()
        return time.perf_counter() - started
