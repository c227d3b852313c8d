"""Asking a member of a run for the weights of its stage, with the limits."""

from __future__ import annotations

from typing import Annotated

import msgspec

from swarm import wire
from swarm.agreement.messages import Round, Stage
from swarm.wire import Count, Key, Message, TensorSpec

MAX_CHUNK = 4 * 1024 * 1024  # weights in one answer; four bytes each
NEWEST = -1


class Weights(Message, tag="weights"):
    """Give `count` of the stage's weights from `start` on, as they were at the beginning of `round` (-1: now).

    Answered by `Slice`. What begins with -1 goes on with the round that was answered: the peer keeps those a while,
    unless it was asked for one weight alone, as who only wants to know the round does.
    """

    run: Key
    round: Round
    start: Count
    count: Annotated[int, msgspec.Meta(ge=1, le=MAX_CHUNK)]


class Slice(Message, tag="slice"):
    """Some weights of a stage, in the order of `swarm.runs.layout`, in the body."""

    stage: Stage
    round: Round
    version: Count  # grows with every change of the weights
    weights: TensorSpec  # [count] of float32


wire.carry(Weights, Slice)
