"""One stage of half a model, with no network and no clients: the tokens of many sessions in one forward, against one's.

A figure is tokens per second of the processor's time, so that it tells of the engine alone: what `aggregate` can come
to where clients have machines of their own. Sessions are of different lengths, and a round
runs a few steps of each.
"""

from __future__ import annotations

import time
from collections.abc import Sequence

import torch

from benches.plan import Plan
from benches.rows import Row
from peer.stage import SessionState, Stage, StepInput
from swarm.files.checkpoint import Checkpoint
from swarm.files.hub import DEFAULT_MODEL, resolve
from swarm.model import load_stage
from swarm.types import Span

SESSIONS = (1, 4, 8, 16)
ROUNDS = 15
STEPS = 8
SHORTEST = 32  # positions that a session has at first; each has one more than the one before it


def measure(plan: Plan) -> list[Row]:
    """A row for each number of sessions and each dtype."""
    torch.set_num_threads(1)
    checkpoint = Checkpoint(resolve(DEFAULT_MODEL))
    half = Span(0, checkpoint.config().num_hidden_layers // 2)
    rows: list[Row] = []
    for dtype in ("float32", "bfloat16"):
        plan.tell(f"stage: loading blocks {half}, {dtype}")
        stage = Stage(load_stage(checkpoint.folder, half, dtype=getattr(torch, dtype)))
        sessions = [_open(stage, SHORTEST + number) for number in range(max(SESSIONS))]
        rows += [_compare(plan, dtype, stage, sessions[:count]) for count in SESSIONS]
    return rows


def _compare(plan: Plan, dtype: str, stage: Stage, sessions: Sequence[SessionState]) -> Row:
    case = f"stage: {len(sessions)} session{'s' if len(sessions) > 1 else ''}, {dtype}"
    _tokens_per_second(stage, sessions)  # warms up
    rounds = plan.alternate(
        case,
        plan.rounds(ROUNDS),
        lambda: _tokens_per_second(stage, sessions),
        lambda: _tokens_per_second(stage, sessions[:1]),
    )
    return rounds.row(case, "tokens/s")


def _open(stage: Stage, positions: int) -> SessionState:
    state = stage.open(stage.span, batch=1, max_length=positions + STEPS)
    stage.run(state, _step(stage, state, 0, positions))
    return state


def _step(stage: Stage, state: SessionState, position: int, count: int) -> StepInput:
    hidden = torch.randn(1, count, stage.model.hidden_size, dtype=stage.model.dtype)
    return StepInput(state.number + 1, position, hidden)


def _tokens_per_second(stage: Stage, sessions: Sequence[SessionState]) -> float:
    """Of a few steps of all `sessions` together, each from where it was at first."""
    seconds = 0.0
    for number in range(STEPS):
        works = [(state, _step(stage, state, SHORTEST + place + number, 1)) for place, state in enumerate(sessions)]
        started = time.thread_time()
        outcomes = stage.run_all(works)
        seconds += time.thread_time() - started
        for outcome in outcomes:
            if isinstance(outcome, Exception):
                raise outcome
    return STEPS * len(sessions) / seconds
