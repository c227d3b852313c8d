"""What this machine can do, measured."""

from __future__ import annotations

import statistics
import time

import torch

from peer.stage import Stage, StepInput

_RUNS = 5


def decode_speed(stage: Stage) -> float:
    """Tokens per second of one session's decode through the whole stage: the median of a few runs."""
    state = stage.open(stage.span, batch=1, max_length=_RUNS + 1)
    hidden = torch.zeros(1, 1, stage.model.hidden_size)
    seconds = []
    for position in range(_RUNS):
        started = time.perf_counter()
        stage.run(state, StepInput(number=position + 1, position=position, hidden=hidden))
        seconds.append(time.perf_counter() - started)
    return 1.0 / max(statistics.median(seconds), 1e-6)
