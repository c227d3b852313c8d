"""What trainers and stages say to each other about micro-batches, with its limits.

A pass goes to the first stage and from there on, each stage calling the next; the answer comes back the same way, and
with it the gradient. So whoever calls still has what it sent, and can call another replica if the first one dies.
"""

from __future__ import annotations

from typing import Annotated

import msgspec

from swarm import wire
from swarm.agreement.messages import Index, Round
from swarm.wire import Endpoint, Key, Message, Name, TensorSpec

MAX_HOPS = 64  # stages after this one
MAX_CANDIDATES = 8  # replicas of one stage that are named in a pass

Candidates = Annotated[list[Endpoint], msgspec.Meta(min_length=1, max_length=MAX_CANDIDATES)]


class Pass(Message, tag="pass"):
    """Run this micro-batch forward, through the stages after this one, and backward; answered by `Passed`.

    The body holds `inputs` (token ids [B, N] for the first stage, else hidden states [B, N, H]), `labels` [B, N] and,
    where documents are kept apart, `position_ids` [B, N]. With `round` -1 it is an evaluation: forward only.
    """

    run: Key
    round: Round
    index: Index
    inputs: TensorSpec
    labels: TensorSpec
    position_ids: TensorSpec | None
    onward: Annotated[list[Candidates], msgspec.Meta(max_length=MAX_HOPS)]  # per following stage, the best first

    def specs(self) -> list[TensorSpec]:
        """The tensors of the body, in their order."""
        return [spec for spec in (self.inputs, self.labels, self.position_ids) if spec is not None]


class Passed(Message, tag="passed"):
    """The loss of the micro-batch and, to a stage, the gradient with respect to what it sent: [B, N, H] in the body."""

    loss: float  # the sum of the samples' losses, in nats; not a finite number where the model has diverged
    gradient: TensorSpec | None
    lost: Annotated[list[Name], msgspec.Meta(max_length=MAX_HOPS * MAX_CANDIDATES)]  # who failed on the way


class Terms(Message, tag="terms"):
    """What does everybody in the run agree on? Answered by `Agreement`."""

    run: Key


class Agreement(Message, tag="agreement"):
    """The terms of the run, as JSON in the body."""


wire.carry(Pass, Passed, Terms, Agreement)
