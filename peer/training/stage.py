"""A stage of a run and the gradient of its present round: micro-batches are counted, and rounds come to an end.

Forwards keep nothing but what they were given; a backward runs the forward again. The gradient is the sum over samples.
Which micro-batches are in it is known to `swarm.agreement.member`; here they are added, or only answered.
"""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass

import torch

from peer.training.checkpoints import Checkpoints
from peer.training.optimizer import Optimizer
from swarm.errors import BadTensor, DiskFull, StaleRound, SumLost
from swarm.runs.run import Run
from swarm.runs.trainable import TrainableStage

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class MicroBatch:
    """What a stage is given of a micro-batch. B samples, N positions, H hidden size."""

    inputs: torch.Tensor  # token ids [B, N] at the first stage, hidden states [B, N, H] at the others
    labels: torch.Tensor | None = None  # [B, N], at the last stage
    position_ids: torch.Tensor | None = None  # [B, N]
    round: int | None = None  # None for the one that is collected


class TrainingStage:
    """One stage, here. Not for two threads at a time: `peer.executor` sees to that.

    Attributes:
        round: whose gradient is being summed, -1 as long as nothing was restored or loaded.
        version: grows whenever the weights change.
        on_change: called then, in the compute thread.
    """

    def __init__(self, run: Run, begin: Callable[[], TrainableStage], checkpoints: Checkpoints) -> None:
        """`begin` makes the stage as it is before the first round."""
        self.run = run
        self.model = begin()
        self.optimizer = Optimizer(run, self.model)
        self.round = -1
        self.version = 0
        self.on_change: Callable[[], None] = lambda: None
        self._begin = begin
        self._checkpoints = checkpoints
        self._unscaled = False

    # --- micro-batches ---------------------------------------------------------------------------------------------

    @torch.no_grad()
    def forward(self, batch: MicroBatch) -> torch.Tensor:
        """The hidden states [B, N, H] that go to the next stage. Raises `BadTensor`, or `StaleRound`."""
        batch = self._checked(batch)
        with self.optimizer.computing(self._is_ahead(batch)), self._precision():
            return self.model.forward(batch.inputs, batch.position_ids)

    def backward(self, batch: MicroBatch, gradient: torch.Tensor, add: bool) -> torch.Tensor | None:
        """Run the forward again, and backward.

        Args:
            gradient: of the loss with respect to what `forward` gave, [B, N, H].
            add: whether the gradient of the weights is added to the sum.

        Returns:
            The gradient with respect to the input, [B, N, H]; None at the first stage.

        Raises:
            BadTensor: a wrong shape. StaleRound: nothing is summed of that round.
            SumLost: it failed halfway, and the whole sum is forgotten.
        """
        batch = self._checked(batch)
        shape = [*batch.inputs.shape[:2], self.model.hidden_size]
        if list(gradient.shape) != shape or not gradient.is_floating_point():
            raise BadTensor(f"a gradient of shape {list(gradient.shape)}; {shape} is taken")
        inputs, ahead = self._leaf(batch), self._is_ahead(batch)
        with self.optimizer.computing(ahead):
            with self._precision():
                output = self.model.forward(inputs, batch.position_ids)
            return self._back(inputs, output, gradient.to(output.device, output.dtype), add, ahead)

    def finish(self, batch: MicroBatch, add: bool) -> tuple[float, torch.Tensor | None]:
        """At the last stage, forward and backward in one.

        Returns:
            The sum of the samples' losses, in nats; the gradient with respect to the input as from `backward`.

        Raises as `backward`.
        """
        batch = self._checked(batch)
        inputs, ahead = self._leaf(batch), self._is_ahead(batch)
        with self.optimizer.computing(ahead):
            loss = self._loss(batch, inputs)
            scaled = loss * self.optimizer.scale_of(ahead)
            return loss.item(), self._back(inputs, scaled, torch.ones_like(scaled), add, ahead)

    @torch.no_grad()
    def evaluate(self, batch: MicroBatch) -> float:
        """The sum of the samples' losses at the last stage, without a gradient."""
        batch = self._checked(batch)
        return self._loss(batch, batch.inputs).item()

    def _loss(self, batch: MicroBatch, inputs: torch.Tensor) -> torch.Tensor:
        assert batch.labels is not None
        with self._precision():
            logits = self.model.forward(inputs, batch.position_ids)
        return self.model.loss(logits, batch.labels)

    def _leaf(self, batch: MicroBatch) -> torch.Tensor:
        return batch.inputs if self.model.first else batch.inputs.detach().clone().requires_grad_()

    def _back(
        self, inputs: torch.Tensor, output: torch.Tensor, gradient: torch.Tensor, add: bool, ahead: bool
    ) -> torch.Tensor | None:
        if not add:
            return None if self.model.first else torch.autograd.grad(output, inputs, gradient)[0]
        if not ahead:
            self._scale_again()
        try:
            torch.autograd.backward(output, gradient)
        except (RuntimeError, MemoryError) as error:  # some weights have it and some do not
            self.void(self.round + ahead)
            raise SumLost(f"a backward failed halfway: {error}") from error
        return None if self.model.first else inputs.grad

    def _is_ahead(self, batch: MicroBatch) -> bool:
        """Whether it is of the next round, which is computed with the weights of now."""
        ahead = 0 if batch.round is None else batch.round - self.round
        if ahead not in (0, int(self.run.averaging.overlap)):
            raise StaleRound(f"micro-batches of round {self.round} are taken, not of {batch.round}")
        return ahead > 0

    def _checked(self, batch: MicroBatch) -> MicroBatch:
        """`batch` on the stage's device."""
        self._check(batch)
        device = self.model.device
        labels, ids = batch.labels, batch.position_ids
        return MicroBatch(
            batch.inputs.to(device),
            None if labels is None else labels.to(device),
            None if ids is None else ids.to(device),
            batch.round,
        )

    def _check(self, batch: MicroBatch) -> None:
        inputs, length = batch.inputs, self.run.batch.sequence_length
        if len(inputs) > self.run.batch.micro:
            raise BadTensor(f"{len(inputs)} samples; a micro-batch has {self.run.batch.micro}")
        shape = [len(inputs), length] if self.model.first else [len(inputs), length, self.model.hidden_size]
        if list(inputs.shape) != shape or inputs.is_floating_point() == self.model.first:
            raise BadTensor(f"inputs of shape {list(inputs.shape)} and {inputs.dtype}; {shape} is taken")
        if self.model.first and not ((inputs >= 0) & (inputs < self.model.vocabulary)).all():
            raise BadTensor(f"tokens beyond the vocabulary of {self.model.vocabulary}")
        for name, extra in (("labels", batch.labels), ("positions", batch.position_ids)):
            if extra is not None and (extra.dtype != torch.int64 or list(extra.shape) != shape[:2]):
                raise BadTensor(f"{name} of shape {list(extra.shape)} and {extra.dtype}; int64 {shape[:2]} are taken")
        if batch.position_ids is not None and not ((batch.position_ids >= 0) & (batch.position_ids < length)).all():
            raise BadTensor(f"positions beyond the {length} of a sample")
        if self.model.last:
            self._check_labels(batch.labels)

    def _check_labels(self, labels: torch.Tensor | None) -> None:
        if labels is None or not ((labels >= -100) & (labels < self.model.vocabulary)).all():
            raise BadTensor("labels are missing, or beyond the vocabulary")

    def _precision(self) -> contextlib.AbstractContextManager[object]:
        compute = self.run.precision.compute
        if compute == "float32":
            return contextlib.nullcontext()
        return torch.autocast(self.model.device.type, getattr(torch, compute))

    # --- rounds ----------------------------------------------------------------------------------------------------

    @property
    def steps(self) -> int:
        """Of the optimizer, that were taken to come to this state."""
        return self.optimizer.steps

    def saved(self) -> list[int]:
        """The rounds at whose beginning it can start: those of its checkpoints; else 0, where nothing is lost by it."""
        return self._checkpoints.rounds() or ([0] if self.round <= 0 else [])

    def restore(self, round_: int) -> None:
        """Start at the beginning of one of the `saved` rounds. Raises `ModelCorrupt`."""
        if round_ > 0:
            self.optimizer.load(self._checkpoints.load(round_, self.optimizer))
        elif self.version:
            self.optimizer.begin_again(self._begin())
        self._entered(round_)

    def sums(self) -> dict[str, torch.Tensor]:
        """The sum over samples of the gradient, per group: float32 vectors on the CPU, the sums themselves there."""
        if not self._unscaled and (scale := self.optimizer.scale_of(ahead=False)) != 1.0:
            self.optimizer.gradient.div_(scale)
        self._unscaled = True
        return {group: self.optimizer.gradient[place].cpu() for group, place in self.optimizer.layout.groups.items()}

    def _scale_again(self) -> None:
        """After an attempt that failed, more is counted: scaled, as all that comes from autograd."""
        if self._unscaled and (scale := self.optimizer.scale_of(ahead=False)) != 1.0:
            self.optimizer.gradient.mul_(scale)
        self._unscaled = False

    def void(self, round_: int) -> None:
        """Forget what was added up of a round, this one or the next."""
        if round_ == self.round:
            self.optimizer.gradient.zero_()
            self._unscaled = False
        elif round_ == self.round + 1 and self.run.averaging.overlap:
            self.optimizer.ahead.zero_()

    def commit(self, mean: Mapping[str, torch.Tensor], factor: float) -> None:
        """End the round with one step: the mean gradient of every group, times `factor`."""
        self._checkpoints.proven()
        self.optimizer.step(mean, factor)
        self._entered(self.round + 1)
        self._save()

    def skip(self) -> None:
        """End the round without a step; what comes before the first one ends like this, too."""
        if self.round < 0:
            self._entered(0)
            return
        scaled = self.optimizer.scale > 1.0
        self.optimizer.skip()
        self.round += 1
        self._unscaled = False
        if scaled:  # it was the scale; else it may be the weights, and these were saved before
            self._save()

    def forsake(self) -> int | None:
        """The run was stopped because the model has diverged: of its checkpoints, only good ones are to be left.

        The round of the last good one; None where there is none.
        """
        return self._checkpoints.forsake()

    def _save(self) -> None:
        every = self.run.checkpoint.every
        if not every or (self.round % every and self.round != self.run.rounds):
            return
        try:
            self._checkpoints.save(self.round, self.optimizer)
        except DiskFull as error:  # the older ones are whole, and training can go on
            log.error("no checkpoint round=%d error=%r", self.round, str(error))

    def _entered(self, round_: int) -> None:
        """The weights are now those of the beginning of a round."""
        self.round = round_
        self.version += 1
        self._unscaled = False
        self.on_change()

    def state(self) -> Iterator[tuple[str, torch.Tensor]]:
        """What a newcomer needs; the tensors themselves, which the next `commit` changes."""
        return self.optimizer.state()

    def load(self, round_: int, state: Mapping[str, torch.Tensor]) -> None:
        """Become what a replica was at the beginning of a round. Raises `BadTensor`, and is as before then."""
        self.optimizer.load(state)
        self._entered(round_)

    def __repr__(self) -> str:
        return f"<TrainingStage round={self.round} {self.model!r}>"
