"""The reference of whatever trains together: one process, torch and transformers alone, the whole batch at once."""

from __future__ import annotations

from typing import Any

import torch
from transformers import AutoModelForCausalLM, get_scheduler

from swarm.runs.origin import config_of, stage_of, tokenizer_of
from swarm.runs.run import Run
from swarm.runs.samples import Samples


def whole_model(run: Run) -> Any:
    """The run's model uncut, with the weights that its stages begin with."""
    config = config_of(run, tokenizer_of(run))
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    model.train(False)
    weights = dict(model.named_parameters())
    with torch.no_grad():
        for index in range(len(run.stages)):
            stage = stage_of(run, config, index)
            for name, value in stage.parameters().items():
                weights[stage.tied.get(name, name)].copy_(value)
    return model


def optimizer_of(run: Run, model: Any) -> torch.optim.AdamW:
    """AdamW as the run wants it: weight decay acts on matrices alone."""
    table = run.optimizer
    decaying = [weight for weight in model.parameters() if weight.ndim > 1]
    others = [weight for weight in model.parameters() if weight.ndim < 2]
    groups = [{"params": decaying, "weight_decay": table.weight_decay}, {"params": others, "weight_decay": 0.0}]
    return torch.optim.AdamW(groups, lr=table.learning_rate, betas=table.betas, eps=table.epsilon)


def loss_curve(run: Run) -> list[float]:
    """The loss of every round."""
    model = whole_model(run)
    optimizer = optimizer_of(run, model)
    schedule: Any = get_scheduler(run.schedule.name, optimizer, run.schedule.warmup_rounds, run.rounds)
    samples = Samples(run, tokenizer_of(run))
    losses = []
    for round_ in range(run.rounds):
        ids = torch.cat([samples.micro_batch(round_, index).ids for index in range(run.micro_batches)])
        loss = model(input_ids=ids, labels=ids).loss
        loss.backward()
        if run.optimizer.clip_norm:
            torch.nn.utils.clip_grad_norm_(model.parameters(), run.optimizer.clip_norm)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses
