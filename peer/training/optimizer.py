"""The weights of a stage, their gradients and AdamW, each one flat vector; what a step is, and what the next one needs.

A step is the same on every replica: the same mean gradient, the same factor, the same arithmetic. So is the scale of a
float16 run's loss: it moves with the rounds that were committed or skipped, and those are agreed on.

Where rounds overlap, a round is computed with the weights and the scale that the round before it began with: so these
are kept, and there is a second sum for what is computed ahead. Numbers for each weight: 4 (weight, gradient, two
moments), or 6 with overlap.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping

import torch
from torch import nn

from swarm.errors import BadTensor
from swarm.runs.layout import Layout
from swarm.runs.run import Run
from swarm.runs.schedule import schedule_of
from swarm.runs.trainable import TrainableStage

MOMENTS = ("exp_avg", "exp_avg_sq")  # of AdamW, as torch calls them
EARLIER = "earlier"  # weights, of the beginning of the round before
PIECE = 1 << 22  # numbers of a vector in one tensor of the state: a dimension that travels has its limit
BLOCK = 1 << 18  # numbers of a vector that AdamW works on at once: what it needs besides is as large
_MAX_SCALE = 2.0**24


class Optimizer:
    """Takes gradients in and steps.

    Attributes:
        layout: where each weight lies in the vectors.
        gradient: [layout.size], float32: what `backward()` has added up in this round, times its `scale_of`.
        steps: how many steps were taken. scale: what losses are multiplied with, of this state.
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
        self._parameters = [weights[entry.name] for entry in self.layout.entries]
        self.earlier, self.ahead = self.weights, self.gradient  # the weights of the round before; the next round's sum
        self._overlaps = run.averaging.overlap
        if self._overlaps:
            self.earlier, self.ahead = self.weights.clone(), torch.zeros_like(self.gradient)
        self._earlier_scale = self.scale
        self._adam = self._begin()

    def _begin(self) -> torch.optim.AdamW:
        table, groups = self._run.optimizer, []
        for place, decays in self.layout.decaying:
            parts = [nn.Parameter(self.weights[block]) for block in _blocks(place)]
            for part, block in zip(parts, _blocks(place), strict=True):
                part.grad = self.gradient[block]
            groups.append({"params": parts, "weight_decay": table.weight_decay if decays else 0.0})
        adam = torch.optim.AdamW(groups, lr=table.learning_rate, betas=table.betas, eps=table.epsilon, foreach=False)
        for (place, _), group in zip(self.layout.decaying, adam.param_groups, strict=True):
            for part, block in zip(group["params"], _blocks(place), strict=True):
                moments = dict(zip(MOMENTS, (self._first[block], self._second[block]), strict=True))
                adam.state[part] = {"step": torch.tensor(0.0), **moments}
        return adam

    def scale_of(self, ahead: bool) -> float:
        """What the losses of this round, or of the next one, are multiplied with."""
        return self._earlier_scale if self._overlaps and not ahead else self.scale

    @contextlib.contextmanager
    def computing(self, ahead: bool) -> Iterator[None]:
        """Within it, the model has the weights that this round, or the next one, is computed with, and its sum."""
        if not self._overlaps:
            yield
            return
        self._point(*((self.weights, self.ahead) if ahead else (self.earlier, self.gradient)))
        try:
            yield
        finally:
            self._point(self.weights, self.gradient)

    def _point(self, weights: torch.Tensor, gradient: torch.Tensor) -> None:
        values, sums = self.layout.views(weights).values(), self.layout.views(gradient).values()
        for parameter, value, total in zip(self._parameters, values, sums, strict=True):
            parameter.grad = None  # torch looks whether the old one fits the new value
            parameter.data, parameter.grad = value, total

    @property
    def learning_rate(self) -> float:
        """Of the next step."""
        return self._run.optimizer.learning_rate * self._factor(self.steps)

    @torch.no_grad()
    def step(self, mean: Mapping[str, torch.Tensor], factor: float) -> None:
        """One step of AdamW with the mean gradient of every group, times `factor`; then on to the next sum."""
        self._keep()
        for group, place in self.layout.groups.items():
            self.gradient[place].copy_(mean[group])
        self.gradient.mul_(factor)
        for each in self._adam.param_groups:
            each["lr"] = self.learning_rate
        self._adam.step()
        self.steps += 1
        self._turn()
        self._unchanged += 1
        if self.scale > 1.0 and self._unchanged >= self._run.precision.growth_rounds:
            self.scale, self._unchanged = min(2 * self.scale, _MAX_SCALE), 0

    def skip(self) -> None:
        """No step: what was added up was not finite. A scaled loss was scaled too much."""
        self._keep()
        self._turn()
        if self.scale > 1.0:
            self.scale, self._unchanged = max(self.scale / 2, 1.0), 0

    def _keep(self) -> None:
        """What this round began with, for the next one."""
        self._earlier_scale = self.scale
        if self._overlaps:
            self.earlier.copy_(self.weights)

    def _turn(self) -> None:
        """The next round's sum is this one's from now on."""
        if self._overlaps:
            self.gradient.copy_(self.ahead)
        self.ahead.zero_()

    def vectors(self) -> dict[str, torch.Tensor]:
        """The weights and both moments, with overlap the earlier weights too; [layout.size] each: no copies."""
        earlier = {EARLIER: self.earlier} if self._overlaps else {}
        return {"weights": self.weights, **dict(zip(MOMENTS, (self._first, self._second), strict=True)), **earlier}

    def state(self) -> Iterator[tuple[str, torch.Tensor]]:
        """All that the next step depends on: views of the vectors, not copies of them."""
        for name, vector in self.vectors().items():
            yield from in_pieces(name, vector)
        yield "counters", torch.tensor([self.steps, self._unchanged])
        yield "scale", torch.tensor([self.scale, self.scale_of(ahead=False)])

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
        self.scale, self._earlier_scale = own["scale"].tolist()
        for part in self._adam.state.values():
            part["step"].fill_(self.steps)
        self.gradient.zero_()
        self.ahead.zero_()

    def begin_again(self, stage: TrainableStage) -> None:
        """Go back to before the first step, with the weights of `stage`."""
        fresh = Optimizer(self._run, stage)
        self.load(dict(fresh.state()))

    def __repr__(self) -> str:
        return f"<Optimizer {self.layout!r} steps={self.steps} lr={self.learning_rate:.2e} scale={self.scale:g}>"


def _blocks(place: slice) -> list[slice]:
    return [slice(start, min(start + BLOCK, place.stop)) for start in range(place.start, place.stop, BLOCK)]


def in_pieces(name: str, vector: torch.Tensor) -> Iterator[tuple[str, torch.Tensor]]:
    """Views of a vector, one after another, as `Optimizer.state` names them."""
    for start in range(0, len(vector), PIECE):
        yield f"{name}/{start}", vector[start : start + PIECE]
