"""A stage of a run: micro-batches added up, rounds ended by a step that is the same everywhere, and checkpoints."""

from __future__ import annotations

import errno
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from allocations import allocated
from runs import reference_curve, small_run, tokens

from peer.training.checkpoints import Checkpoints
from peer.training.optimizer import PIECE, Optimizer
from peer.training.stage import MicroBatch, TrainingStage
from swarm.errors import BadTensor, DiskFull, ModelCorrupt, StaleRound, SumLost, UsageError
from swarm.runs.origin import byte_tokenizer, config_of, stage_of
from swarm.runs.run import Run
from swarm.runs.schedule import schedule_of
from swarm.tensors import to_bytes
from swarm.wire import MAX_POSITIONS

LENGTH = 16


def stages_of(run: Run, folder: Path | None = None, resume: bool = False) -> list[TrainingStage]:
    """All stages of a run, at its beginning or where they were saved last."""
    config = config_of(run, byte_tokenizer())
    found = []
    for index in range(len(run.stages)):
        checkpoints = Checkpoints(folder, run, index, resume)
        stage = TrainingStage(run, partial(stage_of, run, config, index), checkpoints)
        stage.restore(stage.saved()[-1])
        found.append(stage)
    return found


def digest(stage: TrainingStage) -> bytes:
    return b"".join(bytes(to_bytes(tensor)) for _, tensor in stage.state())


def batch_of(run: Run, index: int, round: int = 0) -> torch.Tensor:
    return tokens(len(run.samples_of(index)), LENGTH, 259, seed=100 * round + index)


def round_of(run: Run, round: int) -> torch.Tensor:
    return torch.cat([batch_of(run, index, round) for index in range(run.micro_batches)])


def through(stages: list[TrainingStage], index: int, round: int = 0, ahead: bool = False) -> float:
    """One micro-batch forward and backward through all stages; `ahead`: before its round is collected."""
    of = stages[0].round + 1 if ahead else None
    ids = batch_of(stages[0].run, index, round)
    inputs = [ids]
    for stage in stages[:-1]:
        inputs.append(stage.forward(MicroBatch(inputs[-1], round=of)))
    loss, gradient = stages[-1].finish(MicroBatch(inputs[-1], ids, round=of), add=True)
    for stage, given in zip(stages[-2::-1], inputs[-2::-1], strict=True):
        assert gradient is not None
        gradient = stage.backward(MicroBatch(given, round=of), gradient, add=True)
    assert gradient is None
    return loss


def whole_round(stages: list[TrainingStage], round: int = 0) -> float:
    """A round as replicas without others end it, clipped by the global norm."""
    run = stages[0].run
    loss = sum(through(stages, index, round) for index in range(run.micro_batches)) / run.batch.target
    end_round(stages)
    return loss


def end_round(stages: list[TrainingStage]) -> None:
    """Average and step."""
    run = stages[0].run
    means: list[dict[str, torch.Tensor]] = [
        {group: total / run.batch.target for group, total in stage.sums().items()} for stage in stages
    ]
    if len(stages) > 1 and "tied" in means[0]:
        means[0]["tied"] = means[-1]["tied"] = means[0]["tied"] + means[-1]["tied"]
    squares = sum(float(mean["stage"].square().sum()) for mean in means)
    squares += float(means[0]["tied"].square().sum()) if "tied" in means[0] else 0.0
    factor = min(1.0, run.optimizer.clip_norm / (squares**0.5 + 1e-12))
    for stage, mean in zip(stages, means, strict=True):
        stage.commit(mean, factor)


@pytest.mark.parametrize("tied", [pytest.param(False, marks=pytest.mark.slow), True], ids=["untied", "tied"])
@pytest.mark.parametrize(
    "stages",
    [("0:4",), ("0:2", "2:4"), pytest.param(("0:1", "1:3", "3:4"), marks=pytest.mark.slow)],
    ids=["1", "2", "3"],
)
def test_the_loss_curve_is_that_of_one_process(stages: tuple[str, ...], tied: bool) -> None:
    run = small_run(stages, tied=tied)
    members = stages_of(run)
    found = [whole_round(members, round) for round in range(8)]
    assert found == pytest.approx(reference_curve(run, 8, partial(round_of, run)), abs=1e-4)


OVERLAP = "overlap = true\n"  # of the averaging table


@pytest.mark.parametrize("stages", [("0:4",), ("0:2", "2:4")], ids=["1", "2"])
def test_rounds_that_overlap_make_the_curve_of_one_process_whose_gradients_are_a_step_old(
    stages: tuple[str, ...],
) -> None:
    """However many of a round's micro-batches are computed before the step of the round before."""
    run = small_run(stages, tied=True, more=OVERLAP)
    members = stages_of(run)
    losses = [[0.0] * run.micro_batches for _ in range(9)]
    for round in range(8):
        early, now = (round + 2) % (run.micro_batches + 1), (round + 1) % (run.micro_batches + 1) if round else 0
        for index in range(early):
            losses[round + 1][index] = through(members, index, round + 1, ahead=True)
        for index in range(now, run.micro_batches):
            losses[round][index] = through(members, index, round)
        end_round(members)
    found = [sum(each) / run.batch.target for each in losses[:8]]
    assert found == pytest.approx(reference_curve(run, 8, partial(round_of, run)), abs=1e-4)
    assert found != pytest.approx(reference_curve(small_run(stages, tied=True), 8, partial(round_of, run)), abs=1e-3)


def test_what_is_summed_ahead_is_kept_apart_and_outlives_a_sum_that_is_void_and_a_round_that_is_skipped() -> None:
    (member,) = stages_of(small_run(more=OVERLAP))
    through([member], 0)
    assert not member.optimizer.ahead.any()
    before = member.sums()["stage"].clone()
    through([member], 1, 1, ahead=True)
    ahead = member.optimizer.ahead.clone()
    assert ahead.any()
    assert torch.equal(member.sums()["stage"], before)
    member.void(0)
    assert not member.sums()["stage"].any()
    member.skip()
    assert torch.equal(member.sums()["stage"], ahead)
    member.void(1)
    assert not member.sums()["stage"].any()
    with pytest.raises(StaleRound, match="of round 1 are taken, not of 0"):
        member.finish(MicroBatch(batch_of(member.run, 0), batch_of(member.run, 0), round=0), add=True)


def test_between_micro_batches_the_weights_are_those_of_now(tmp_path: Path) -> None:
    """Whoever uses the model while it is trained, newcomers and checkpoints find nothing else."""
    run = small_run(more=OVERLAP + "\n[checkpoint]\nevery = 1\n")
    (member,) = stages_of(run, tmp_path)
    whole_round([member], 0)
    through([member], 0, 1)
    for name, view in member.optimizer.layout.views(member.optimizer.weights).items():
        assert member.model.parameters()[name].data_ptr() == view.data_ptr()
    (fetched,), (resumed,) = stages_of(run), stages_of(run, tmp_path, resume=True)
    fetched.load(1, {name: tensor.clone() for name, tensor in member.state()})
    assert digest(fetched) == digest(resumed) == digest(member)
    member.void(1)
    assert whole_round([fetched], 1) == whole_round([resumed], 1) == whole_round([member], 1)
    assert digest(fetched) == digest(resumed) == digest(member)


def test_with_a_scaled_loss_a_round_keeps_the_scale_that_it_was_begun_with() -> None:
    precision = '\n[precision]\ncompute = "float16"\ninitial_scale = 1024.0\n'
    (member,) = stages_of(small_run(more=OVERLAP + precision))
    through([member], 0, 1, ahead=True)
    member.skip()
    assert member.optimizer.scale == 512.0
    through([member], 1, 1)
    found = member.sums()["stage"].clone()
    (other,) = stages_of(small_run(more=precision))
    through([other], 0, 1)
    through([other], 1, 1)
    assert (found - other.sums()["stage"]).norm() < 0.02 * found.norm()


def test_both_ends_of_a_tied_embedding_stay_equal() -> None:
    members = stages_of(small_run(("0:2", "2:4"), tied=True))
    for round in range(3):
        whole_round(members, round)
    ends = [member.optimizer.weights[member.optimizer.layout.groups["tied"]] for member in (members[0], members[-1])]
    assert torch.equal(*ends)
    assert ends[0].abs().sum() > 0


def test_a_micro_batch_that_is_not_to_be_added_is_answered_all_the_same() -> None:
    first, last = stages_of(small_run(("0:2", "2:4")))
    ids = batch_of(first.run, 1)
    hidden = first.forward(MicroBatch(ids))
    loss, gradient = last.finish(MicroBatch(hidden, ids), add=True)
    before = last.sums()["stage"].clone()
    again, same = last.finish(MicroBatch(hidden, ids), add=False)
    assert again == loss
    assert gradient is not None
    assert same is not None
    assert torch.equal(gradient, same)
    assert torch.equal(last.sums()["stage"], before)


@pytest.mark.parametrize(
    ("ids", "labels"),
    [
        (tokens(3, LENGTH), tokens(3, LENGTH)),  # two are a micro-batch
        (tokens(2, LENGTH - 1), tokens(2, LENGTH - 1)),
        (tokens(2, LENGTH).float(), tokens(2, LENGTH)),
        (tokens(2, LENGTH) + 259, tokens(2, LENGTH)),
        (tokens(2, LENGTH), tokens(2, LENGTH) + 259),
        (tokens(2, LENGTH), None),
        (tokens(2, LENGTH), tokens(2, LENGTH).int()),
    ],
)
def test_what_cannot_be_a_micro_batch_is_refused(ids: torch.Tensor, labels: torch.Tensor | None) -> None:
    (member,) = stages_of(small_run())
    with pytest.raises(BadTensor):
        member.finish(MicroBatch(ids, labels), add=True)
    assert not member.sums()["stage"].any()


def test_a_backward_that_fails_halfway_leaves_nothing_behind(monkeypatch: pytest.MonkeyPatch) -> None:
    (member,) = stages_of(small_run())
    through([member], 0)

    def fail(*_: Any) -> None:
        member.optimizer.gradient.add_(1.0)
        raise MemoryError

    monkeypatch.setattr(torch.autograd, "backward", fail)
    with pytest.raises(SumLost, match="failed halfway"):
        through([member], 1)
    assert not member.sums()["stage"].any()


def test_a_newcomer_that_takes_over_a_replicas_state_goes_on_like_it() -> None:
    run = small_run()
    (old,), (new,) = stages_of(run), stages_of(run)
    whole_round([old], 0)
    assert digest(old) != digest(new)
    new.load(old.round, {name: tensor.clone() for name, tensor in old.state()})
    assert digest(new) == digest(old)
    for round in (1, 2):
        assert whole_round([new], round) == whole_round([old], round)
    assert digest(new) == digest(old)


def test_a_state_comes_in_pieces_that_may_travel(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """A stage may have more weights than a dimension of one message may have items."""
    assert PIECE <= MAX_POSITIONS
    monkeypatch.setattr("peer.training.optimizer.PIECE", 1000)
    run = small_run(more="\n[checkpoint]\nevery = 1\n")
    (old,), (new,) = stages_of(run, tmp_path), stages_of(run)
    whole_round([old], 0)
    state = dict(old.state())
    assert max(map(len, state.values())) == 1000
    assert sum(len(piece) for name, piece in state.items() if "/" in name) == 3 * old.optimizer.layout.size
    new.load(old.round, {name: tensor.clone() for name, tensor in state.items()})
    (resumed,) = stages_of(run, tmp_path, resume=True)
    assert digest(new) == digest(old) == digest(resumed)


def test_a_state_that_cannot_be_is_refused_and_changes_nothing() -> None:
    (member,) = stages_of(small_run())
    before = digest(member)
    good = {name: tensor.clone() for name, tensor in member.state()}
    bad: list[dict[str, torch.Tensor]] = [
        {},
        good | {"weights/0": good["weights/0"][1:]},
        good | {"exp_avg/0": good["exp_avg/0"].double()},
        good | {"weights/0": good["weights/0"].index_fill(0, torch.tensor([3]), float("nan"))},
        good | {"more": torch.zeros(1)},
    ]
    for state in bad:
        with pytest.raises(BadTensor):
            member.load(3, state)
        assert (digest(member), member.round) == (before, 0)


def test_sums_of_a_scaled_loss_are_not_scaled_even_between_two_attempts() -> None:
    exact, scaled = (
        stages_of(small_run(more=f'\n[precision]\ncompute = "{name}"\n'))[0] for name in ("float32", "float16")
    )
    assert scaled.optimizer.scale == 2.0**13
    for member in (exact, scaled):
        through([member], 0)
        member.sums()
        through([member], 1)
    difference = (scaled.sums()["stage"] - exact.sums()["stage"]).norm() / exact.sums()["stage"].norm()
    assert 0 < difference < 0.02


def test_the_scale_halves_with_a_skipped_round_and_grows_with_good_ones() -> None:
    (member,) = stages_of(small_run(more='\n[precision]\ncompute = "float16"\ngrowth_rounds = 2\n'))
    member.skip()
    assert (member.round, member.optimizer.scale) == (1, 2.0**12)
    whole_round([member], 1)
    whole_round([member], 2)
    assert member.optimizer.scale == 2.0**13


@pytest.mark.slow
def test_bfloat16_learns() -> None:
    run = small_run(more='\n[precision]\ncompute = "bfloat16"\n')
    (member,) = stages_of(run)
    losses = [whole_round([member], 0 if round == 0 else round) for round in range(8)]
    assert losses == pytest.approx(reference_curve(run, 8, partial(round_of, run)), abs=0.05)


def test_evaluating_counts_nothing() -> None:
    (member,) = stages_of(small_run())
    ids = batch_of(member.run, 0)
    assert member.evaluate(MicroBatch(ids, ids)) == pytest.approx(through([member], 0), rel=1e-6)


@pytest.mark.parametrize(
    ("name", "told"), [("reduce_lr_on_plateau", "follows the loss"), ("cosin", "cannot be used like this")]
)
def test_a_schedule_that_cannot_be_used_is_refused(name: str, told: str) -> None:
    from runs import run_text

    from swarm.runs.run import parse

    with pytest.raises(UsageError, match=told):
        schedule_of(parse(run_text().replace('"cosine"', f'"{name}"')))


@pytest.mark.parametrize(("more", "numbers"), [("", 4), (OVERLAP, 6)], ids=["in turn", "overlap"])
def test_a_stage_needs_four_numbers_for_a_weight_or_six_where_rounds_overlap(more: str, numbers: int) -> None:
    """Weights, gradient and two moments; with overlap, weights and gradient twice. The averaging buffer is one more."""
    (member,) = stages_of(small_run(more=more))
    optimizer: Optimizer = member.optimizer
    tensors = [*(tensor for _, tensor in member.state()), optimizer.gradient, optimizer.ahead]
    tensors += [
        each for weight in member.model.parameters().values() for each in (weight, weight.grad) if each is not None
    ]
    held = {tensor.untyped_storage().data_ptr(): tensor.untyped_storage().nbytes() for tensor in tensors}
    assert numbers * 4 * optimizer.layout.size <= sum(held.values()) < numbers * 4 * optimizer.layout.size + 1024


@pytest.mark.parametrize("more", ["", OVERLAP], ids=["in turn", "overlap"])
def test_neither_a_step_nor_a_checkpoint_needs_room_for_the_weights_again(
    more: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("peer.training.optimizer.BLOCK", 1000)
    monkeypatch.setattr("peer.training.optimizer.PIECE", 1000)
    run = small_run(more=more + "\n[checkpoint]\nevery = 1\n")
    (member,) = stages_of(run, tmp_path)
    through([member], 0)
    mean = {group: total.clone() for group, total in member.sums().items()}
    with allocated() as stepping:
        member.commit(mean, 1.0)
    (resumed,) = stages_of(run)
    saved = Checkpoints(tmp_path, run, 0, resume=True).load(1, resumed.optimizer)  # mapped, not read
    with allocated() as resuming:
        resumed.optimizer.load(saved)
    assert digest(resumed) == digest(member)
    weights = 4 * member.optimizer.layout.size
    assert 0 < stepping.peak < weights / 8
    assert 0 < resuming.peak < weights / 8


# --- checkpoints -----------------------------------------------------------------------------------------------------

SAVING = "\n[checkpoint]\nevery = 2\nkeep = 2\n"


def test_a_run_that_is_resumed_goes_on_as_if_nothing_had_happened(tmp_path: Path) -> None:
    run = small_run(("0:2", "2:4"), tied=True, more=SAVING)
    stages = stages_of(run, tmp_path)
    for round in range(5):
        whole_round(stages, round)
    expected = [whole_round(stages, round) for round in (5, 6)]
    resumed = stages_of(run, tmp_path, resume=True)
    assert [stage.round for stage in resumed] == [6, 6]
    assert whole_round(resumed, 6) == expected[1]
    assert list(map(digest, resumed)) == list(map(digest, stages))


def test_only_the_newest_checkpoints_are_kept(tmp_path: Path) -> None:
    run = small_run(more=SAVING)
    stages = stages_of(run, tmp_path)
    for round in range(6):
        whole_round(stages, round)
    assert Checkpoints(tmp_path, run, 0, resume=True).rounds() == [2, 4, 6]  # the last one is to be proven yet
    whole_round(stages, 6)
    assert Checkpoints(tmp_path, run, 0, resume=True).rounds() == [4, 6]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["round-00000004", "round-00000006"]
    assert Checkpoints(tmp_path, run, 0).rounds() == []  # without being asked to resume


def test_of_a_model_that_diverges_the_last_good_checkpoint_is_left(tmp_path: Path) -> None:
    run = small_run(more="\n[checkpoint]\nevery = 1\nkeep = 1\n")
    (member,) = stages = stages_of(run, tmp_path)
    for round in range(3):
        whole_round(stages, round)
    assert Checkpoints(tmp_path, run, 0, resume=True).rounds() == [2, 3]
    for _ in range(3):
        member.skip()
    assert member.forsake() == 2
    assert Checkpoints(tmp_path, run, 0, resume=True).rounds() == [2]


def test_a_full_disk_costs_a_checkpoint_and_no_more(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = small_run(more=SAVING)
    stages = stages_of(run, tmp_path)
    for round in range(2):
        whole_round(stages, round)
    before = {path.name: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}

    def full(path: Path, tensors: Any) -> None:
        path.write_bytes(b"the beginning of it")
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("peer.training.checkpoints._write", full)
    for round in range(2, 4):
        whole_round(stages, round)
    assert stages[0].round == 4
    assert {path.name: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()} == before
    with pytest.raises(DiskFull, match=r"no checkpoint of round 4 in .*: the disk is full"):
        Checkpoints(tmp_path, run, 0).save(4, stages[0].optimizer)


def test_a_checkpoint_that_is_damaged_or_anothers_is_refused(tmp_path: Path) -> None:
    run = small_run(more=SAVING)
    stages = stages_of(run, tmp_path)
    for round in range(2):
        whole_round(stages, round)
    other = small_run(more=SAVING, micro=3)
    with pytest.raises(ModelCorrupt, match="of another run"):
        stages_of(other, tmp_path, resume=True)
    weights = tmp_path / "round-00000002" / "stage-0.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    with pytest.raises(ModelCorrupt, match="cannot be read"):
        stages_of(run, tmp_path, resume=True)
