"""Many sessions in one forward, with beams, rollbacks, padding and scattered pages: each as if it were alone."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from inprocess import save_llama

from peer.stage import PAGE, SessionState, Stage, StepInput
from swarm.batching.pool import Pool
from swarm.errors import BadTensor, BeyondCache
from swarm.model import StageModel, load_stage, reorder, rollback
from swarm.types import Span

BLOCKS = 3
HIDDEN = 32


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> StageModel:
    torch.set_num_threads(1)
    folder: Path = tmp_path_factory.mktemp("llama")
    save_llama(folder, num_hidden_layers=BLOCKS)
    return load_stage(folder, Span(0, BLOCKS), dtype=torch.float32)


def states(positions: int, rows: int = 1, seed: int = 0) -> torch.Tensor:
    return torch.randn(rows, positions, HIDDEN, generator=torch.Generator().manual_seed(seed))


def begun(stage: Stage, hidden: torch.Tensor, max_length: int = 64, span: Span | None = None) -> SessionState:
    """A session that holds `hidden`."""
    state = stage.open(span or stage.span, hidden.shape[0], max_length)
    stage.run(state, StepInput(1, 0, hidden))
    return state


@pytest.mark.parametrize("padded", [False, True])
def test_prefills_and_decodes_of_several_sessions_run_together(model: StageModel, padded: bool) -> None:
    stage = Stage(model, 256, padded=padded)
    old, beams, new = begun(stage, states(20)), begun(stage, states(5, 3)), stage.open(stage.span, 2, 30)
    caches = [model.new_cache() for _ in range(3)]
    model.forward(states(20), position=0, cache=caches[0])
    model.forward(states(5, 3), position=0, cache=caches[1])
    steps = [StepInput(2, 20, states(1, 1, 1)), StepInput(2, 5, states(2, 3, 2)), StepInput(1, 0, states(11, 2, 3))]
    outputs = stage.run_all(list(zip((old, beams, new), steps, strict=True)))
    for output, step, cache in zip(outputs, steps, caches, strict=True):
        assert isinstance(output, torch.Tensor)
        torch.testing.assert_close(output, model.forward(step.hidden, position=step.position, cache=cache))


def test_rows_that_are_picked_share_what_they_have_in_common(model: StageModel) -> None:
    stage, cache = Stage(model, 1024), model.new_cache()
    state = begun(stage, states(PAGE + 3, 3))
    model.forward(states(PAGE + 3, 3), position=0, cache=cache)
    for number, rows in enumerate(([2, 2, 1], [0, 0, 0], [1, 0, 2]), start=2):
        position = PAGE + 1 + number
        reorder(cache, torch.tensor(rows))
        expected = model.forward(states(1, 3, number), position=position, cache=cache)
        for _ in range(2):  # the second time it is the same step again
            output = stage.run(state, StepInput(number, position, states(1, 3, number), rows))
            torch.testing.assert_close(output, expected)
    assert stage.pages.used < 6
    stage.close(state)
    assert stage.pages.used == 0


def test_a_rollback_and_another_end(model: StageModel) -> None:
    stage, cache = Stage(model, 256), model.new_cache()
    state = begun(stage, states(40))
    model.forward(states(40), position=0, cache=cache)
    rollback(cache, 13)
    output = stage.run(state, StepInput(2, 13, states(4, 1, 9)))
    torch.testing.assert_close(output, model.forward(states(4, 1, 9), position=13, cache=cache))
    assert stage.pages.used == 2


def test_scattered_pages_are_as_good_as_pages_in_a_row(model: StageModel) -> None:
    stage = Stage(model, 6 * PAGE)
    blockers = [begun(stage, states(PAGE), PAGE) for _ in range(6)]
    for blocker in blockers[::2]:
        stage.close(blocker)
    hidden = states(2 * PAGE + 5, seed=4)
    state = stage.open(stage.span, 1, 3 * PAGE)
    output = stage.run(state, StepInput(1, 0, hidden))
    assert state.tables is not None
    assert len(state.tables.runs(0, state.length)) == 3
    torch.testing.assert_close(output, model.forward(hidden, position=0, cache=model.new_cache()))


def test_sessions_over_parts_of_the_span_keep_to_their_own_blocks(model: StageModel) -> None:
    stage = Stage(model, 256)
    whole = begun(stage, states(6))
    parts = [begun(stage, states(6, seed=5), span=Span(1, 2)), begun(stage, states(7, seed=6), span=Span(1, 3))]
    steps = [StepInput(2, 6, states(1)), StepInput(2, 6, states(1, seed=7)), StepInput(2, 7, states(1, seed=8))]
    outputs = stage.run_all(list(zip([whole, *parts], steps, strict=True)))
    for span, before, step, output in zip(
        (stage.span, Span(1, 2), Span(1, 3)),
        (states(6), states(6, seed=5), states(7, seed=6)),
        steps,
        outputs,
        strict=True,
    ):
        part = model.part(span)
        hidden = torch.cat([before, step.hidden], 1)
        expected = part.forward(hidden, position=0, cache=part.new_cache())[:, -1:]
        assert isinstance(output, torch.Tensor)
        torch.testing.assert_close(output, expected)


def test_a_step_that_makes_no_sense_costs_the_others_nothing(model: StageModel) -> None:
    stage = Stage(model, 256)
    good, gap, bad = (begun(stage, states(4, seed=seed)) for seed in range(3))
    works = [
        (gap, StepInput(2, 9, states(1))),
        (good, StepInput(2, 4, states(1))),
        (bad, StepInput(2, 4, states(1) * torch.nan)),
    ]
    outcomes = stage.run_all(works)
    assert [type(outcome) for outcome in outcomes] == [BeyondCache, torch.Tensor, BadTensor]
    assert [state.length for state in (good, gap, bad)] == [5, 4, 4]


def test_a_forward_that_fails_leaves_sessions_that_say_so(model: StageModel, monkeypatch: pytest.MonkeyPatch) -> None:
    stage = Stage(model, 256)
    states_ = [begun(stage, states(4, seed=seed)) for seed in range(2)]

    def fail(*_: object) -> torch.Tensor:
        raise RuntimeError("out of memory")

    with monkeypatch.context() as patch:
        patch.setattr(model, "forward_batch", fail)
        outcomes = stage.run_all([(state, StepInput(2, 4, states(1))) for state in states_])
    assert [str(outcome) for outcome in outcomes] == ["out of memory"] * 2
    assert [(state.number, state.length) for state in states_] == [(0, 0)] * 2
    assert stage.pages.used == 0
    stage.run(states_[0], StepInput(1, 0, states(4)))


def test_the_pool_may_keep_less_precisely_than_the_blocks_compute(model: StageModel) -> None:
    stage = Stage(model, 256, torch.bfloat16)
    state = begun(stage, states(20))
    output = stage.run(state, StepInput(2, 20, states(1)))
    hidden = torch.cat([states(20), states(1)], 1)
    expected = model.forward(hidden, position=0, cache=model.new_cache())[:, -1:]
    assert output.dtype == torch.float32
    torch.testing.assert_close(output, expected, atol=0.05, rtol=0.05)
    assert not torch.equal(output, expected)


def test_what_is_taken_out_of_the_pool_can_be_put_back_elsewhere() -> None:
    pool = Pool(32)
    keys, values = torch.randn(1, 2, 6, 4), torch.randn(1, 2, 6, 3)
    pool.write(0, slice(4, 10), keys, values)
    kept = pool.take_out([(4, 7), (7, 10)])
    pool.put_back(kept, [(20, 24), (30, 32)])
    found = pool.read(0, [(20, 24), (30, 32)], torch.float32)
    torch.testing.assert_close(found, (keys, values))


def test_what_is_put_out_comes_back_with_the_next_step(model: StageModel) -> None:
    stage = Stage(model, 1024)
    hidden, beams = states(PAGE + 5), states(PAGE + 2, 2)
    one, two = begun(stage, hidden), begun(stage, beams)
    for state in (one, two):
        stage.put_out(state)
        stage.put_out(state)
    assert stage.pages.used == 0
    other = begun(stage, states(40, seed=7))  # in their place
    outputs = stage.run_all(
        [(one, StepInput(2, PAGE + 5, states(1))), (two, StepInput(2, PAGE + 2, states(1, 2), [1, 1]))]
    )
    assert isinstance(outputs[0], torch.Tensor)
    assert isinstance(outputs[1], torch.Tensor)
    torch.testing.assert_close(outputs[0], alone(model, torch.cat([hidden, states(1)], 1))[:, -1:])
    torch.testing.assert_close(outputs[1], alone(model, torch.cat([beams[[1, 1]], states(1, 2)], 1))[:, -1:])
    stage.put_out(one)
    for state in (one, two, other):
        stage.close(state)
    assert stage.pages.used == 0


# --- beginnings that are there already ------------------------------------------------------------------------------


def alone(model: StageModel, hidden: torch.Tensor) -> torch.Tensor:
    return model.forward(hidden, position=0, cache=model.new_cache())


def test_a_session_that_begins_like_another_of_the_same_client_takes_its_pages(model: StageModel) -> None:
    stage = Stage(model, 1024)
    hidden, other_end = states(3 * PAGE + 5), states(9, seed=3)
    first = stage.open(stage.span, 1, 100, "a client")
    stage.run(first, StepInput(1, 0, hidden[:, : PAGE + 7]))  # in pieces that do not end where pages do
    for position in range(PAGE + 7, hidden.shape[1]):
        stage.run(first, StepInput(position - PAGE - 5, position, hidden[:, position : position + 1]))
    ran, used = stage.ran, stage.pages.used
    second = stage.open(stage.span, 1, 100, "a client")
    again = torch.cat([hidden, other_end], 1)
    output = stage.run(second, StepInput(1, 0, again))
    torch.testing.assert_close(output, alone(model, again))
    assert (stage.ran - ran, stage.reused) == (5 + 9, 3 * PAGE)
    assert stage.pages.used == used + 1
    stage.close(first)  # what it shared stays
    step = StepInput(2, again.shape[1], states(1))
    torch.testing.assert_close(stage.run(second, step), alone(model, torch.cat([again, states(1)], 1))[:, -1:])


def test_only_the_same_client_over_the_same_blocks_with_the_same_bytes_takes_them(model: StageModel) -> None:
    stage, hidden = Stage(model, 1024), states(2 * PAGE)
    stage.run(stage.open(stage.span, 1, 40, "a client"), StepInput(1, 0, hidden))
    for span, owner, begin in (
        (stage.span, "another", hidden),
        (stage.span, "", hidden),
        (Span(0, 2), "a client", hidden),
        (stage.span, "a client", hidden + 1e-6),
    ):
        output = stage.run(stage.open(span, 1, 40, owner), StepInput(1, 0, begin))
        torch.testing.assert_close(output, alone(model.part(span), begin))
    mask = torch.ones(1, 2 * PAGE, dtype=torch.uint8)
    mask[0, :3] = 0
    stage.run(stage.open(stage.span, 1, 40, "a client"), StepInput(1, 0, hidden, mask=mask))
    assert stage.reused == 0


def test_pages_that_are_shared_are_not_written_into(model: StageModel) -> None:
    stage, hidden = Stage(model, 1024), states(2 * PAGE)
    sessions = [stage.open(stage.span, 1, 64, "a client") for _ in range(2)]
    for session in sessions:
        stage.run(session, StepInput(1, 0, hidden))
    assert stage.reused == 2 * PAGE
    other = states(4, seed=8)
    output = stage.run(sessions[1], StepInput(2, PAGE + 3, other))  # a rollback into the second page
    torch.testing.assert_close(output, alone(model, torch.cat([hidden[:, : PAGE + 3], other], 1))[:, -4:])
    output = stage.run(sessions[0], StepInput(2, 2 * PAGE, states(1)))
    torch.testing.assert_close(output, alone(model, torch.cat([hidden, states(1)], 1))[:, -1:])


def test_what_is_kept_for_later_makes_room_when_it_is_needed(model: StageModel) -> None:
    stage = Stage(model, 4 * PAGE)
    for seed in range(6):
        session = stage.open(stage.span, 1, 4 * PAGE, "a client")
        hidden = states(4 * PAGE, seed=seed)
        torch.testing.assert_close(stage.run(session, StepInput(1, 0, hidden)), alone(model, hidden))
        stage.close(session)
        assert stage.pages.used == 4
