"""The weights of a stage, their gradients and AdamW, each one flat vector; what a step is, and what the next one needs.

A step is the same on every replica: the same mean gradient, the same factor, the same arithmetic. So is the scale of a
float16 run's loss: it moves with the rounds that were committed or skipped, and those are agreed on.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import torch
from torch import nn

from swarm.errors import BadTensor
from swarm.runs.layout import Layout
from swarm.runs.run import Run
from swarm.runs.schedule import schedule_of
from swarm.runs.trainable import TrainableStage

MOMENTS = ("exp_avg", "exp_avg_sq")  # of AdamW, as torch calls them
PIECE = 1 << 22  # numbers of a vector in one tensor of the state: a dimension that travels has its limit
_MAX_SCALE = 2.0**24


class Optimizer:
    """Takes gradients in and steps.

    Attributes:
        layout: where each weight lies in the vectors.
        gradient: [layout.size], float32: what `backward()` has added up, times `scale`.
        steps: how many steps were taken. scale: what losses are multiplied with.
    """

    def __init__(self, run: Run, stage: TrainableStage) -> None:
        weights = stage.parameters()
        self.layout = Layout({name: weight.shape for name, weight in weights.items()}, stage.tied)
        self._run = run
        self._factor = schedule_of(run)
        self.scale = run.precision.initial_scale if run.precision.compute == "float16" else 1.0
        self.steps = 0
        self._unchanged = 0  # rounds since the scale last changed
        self.weights, self.gradient, self._first, self._second = (
            torch.zeros(self.layout.size, device=stage.device) for _ in range(4)
        )
        parts = zip(self.layout.views(self.weights).items(), self.layout.views(self.gradient).values(), strict=True)
        for (name, value), gradient in parts:
            value.copy_(weights[name].data)
            weights[name].data, weights[name].grad = value, gradient
        self._adam = self._begin()

    def _begin(self) -> torch.optim.AdamW:
        table, groups = self._run.optimizer, []
        for place, decays in self.layout.decaying:
            part = nn.Parameter(self.weights[place])
            part.grad = self.gradient[place]
            groups.append({"params": [part], "weight_decay": table.weight_decay if decays else 0.0})
        adam = torch.optim.AdamW(groups, lr=table.learning_rate, betas=table.betas, eps=table.epsilon, foreach=False)
        for (place, _), group in zip(self.layout.decaying, adam.param_groups, strict=True):
            moments = dict(zip(MOMENTS, (self._first[place], self._second[place]), strict=True))
            adam.state[group["params"][0]] = {"step": torch.tensor(0.0), **moments}
        return adam

    @property
    def learning_rate(self) -> float:
        """Of the next step."""
        return self._run.optimizer.learning_rate * self._factor(self.steps)

    @torch.no_grad()
    def step(self, mean: Mapping[str, torch.Tensor], factor: float) -> None:
        """One step of AdamW with the mean gradient of every group, times `factor`; forgets what was added up."""
        for group, place in self.layout.groups.items():
            self.gradient[place].copy_(mean[group])
        self.gradient.mul_(factor)
        for each in self._adam.param_groups:
            each["lr"] = self.learning_rate
        self._adam.step()
        self.steps += 1
        self.gradient.zero_()
        self._unchanged += 1
        if self.scale > 1.0 and self._unchanged >= self._run.precision.growth_rounds:
            self.scale, self._unchanged = min(2 * self.scale, _MAX_SCALE), 0

    def skip(self) -> None:
        """No step: what was added up was not finite. A scaled loss was scaled too much."""
        self.gradient.zero_()
        if self.scale > 1.0:
            self.scale, self._unchanged = max(self.scale / 2, 1.0), 0

    def vectors(self) -> dict[str, torch.Tensor]:
        """The weights and both moments, [layout.size] each: the vectors themselves."""
        return {"weights": self.weights, **dict(zip(MOMENTS, (self._first, self._second), strict=True))}

    def state(self) -> Iterator[tuple[str, torch.Tensor]]:
        """All that the next step depends on: views of the vectors, not copies of them."""
        for name, vector in self.vectors().items():
            yield from in_pieces(name, vector)
        yield "counters", torch.tensor([self.steps, self._unchanged])
        yield "scale", torch.tensor([self.scale])

    @torch.no_grad()
    def load(self, state: Mapping[str, torch.Tensor]) -> None:
        """Take over what `state()` of a replica gave. Raises `BadTensor`, and changes nothing then."""
        own = dict(self.state())
        for name, tensor in own.items():
            given = state.get(name)
            if given is None or given.shape != tensor.shape or given.dtype != tensor.dtype:
                raise BadTensor(f"a replica's {name} is missing, or not {tensor.dtype} of {list(tensor.shape)}")
            if not torch.isfinite(given).all():
                raise BadTensor(f"a replica's {name} has values that are not finite numbers")
        if state.keys() != own.keys():
            raise BadTensor(f"a replica's state has {sorted(state.keys() - own.keys())}, which is not known here")
        for name, tensor in own.items():
            tensor.copy_(state[name])
        self.steps, self._unchanged = own["counters"].tolist()
        self.scale = own["scale"].item()
        for group in self._adam.param_groups:
            self._adam.state[group["params"][0]]["step"].fill_(self.steps)
        self.gradient.zero_()

    def begin_again(self, stage: TrainableStage) -> None:
        """Go back to before the first step, with the weights of `stage`."""
        fresh = Optimizer(self._run, stage)
        self.load(dict(fresh.state()))

    def __repr__(self) -> str:
        return f"<Optimizer {self.layout!r} steps={self.steps} lr={self.learning_rate:.2e} scale={self.scale:g}>"


def in_pieces(name: str, vector: torch.Tensor) -> Iterator[tuple[str, torch.Tensor]]:
    """Views of a vector, one after another, as `Optimizer.state` names them."""
    for start in range(0, len(vector), PIECE):
        yield f"{name}/{start}", vector[start : start + PIECE]
