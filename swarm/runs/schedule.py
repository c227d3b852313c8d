"""The learning rate of every step, by transformers' own schedules."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from swarm.errors import UsageError
from swarm.runs.run import Run

_UNSUITABLE = ("reduce_lr_on_plateau", "greedy")  # they look at the loss, which a stage does not know


def schedule_of(run: Run) -> Callable[[int], float]:
    """What the learning rate is multiplied with at each step, by transformers' own schedule.

    Raises `UsageError` for a schedule that there is not, or that refuses its options.
    """
    from transformers import get_scheduler

    table = run.schedule
    if table.name in _UNSUITABLE:
        raise UsageError(f"schedule.name: {table.name} follows the loss, which no stage knows; take another")
    unused = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=1.0)
    try:
        scheduler: Any = get_scheduler(table.name, unused, table.warmup_rounds, run.rounds, dict(table.options))
    except (ValueError, TypeError) as error:
        raise UsageError(f"schedule: {table.name} cannot be used like this: {error}") from None
    factor: Callable[[int], float] = scheduler.lr_lambdas[0]
    return factor
