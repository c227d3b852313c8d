"""Training together: the loss curve is that of one process, whoever holds what and whoever dies."""

from __future__ import annotations

import asyncio
from pathlib import Path

import pytest
import torch
from runs import reference_curve, run_text, small_run
from training_swarm import TrainingSwarm, samples_of_rounds, train, training_swarm
from transformers import AutoModelForCausalLM, AutoTokenizer

from swarm.agreement import cohort
from swarm.agreement import member as rounds_of_member
from swarm.chain import Terms
from swarm.console.conversation import Conversation
from swarm.discovery import Discovery
from swarm.errors import DeadlineExceeded, ModelDiverged, UsageError
from swarm.network import Waiting
from swarm.runmodel import open_run
from swarm.runs.metrics import Round
from swarm.runs.origin import byte_tokenizer
from swarm.runs.run import Run, parse
from swarm.runs.samples import Samples
from swarm.runs.schedule import schedule_of
from swarm.speculation.tuning import Counts
from swarm.types import Offer, Span, State

pytestmark = pytest.mark.slow

TWO = ("0:2", "2:4")


def expected(run: Run, rounds: int) -> list[float]:
    return reference_curve(run, rounds, samples_of_rounds(run, Samples(run, byte_tokenizer())))


def losses(rounds: list[Round]) -> list[float]:
    return [ended.loss for ended in rounds]


@pytest.mark.parametrize(
    ("stages", "replicas"),
    [(("0:4",), 1), (TWO, 1), (TWO, 2), (("0:4",), 3)],
    ids=["1x1", "2x1", "2x2", "1x3"],
)
async def test_the_loss_curve_is_that_of_one_process(stages: tuple[str, ...], replicas: int, tmp_path: Path) -> None:
    """Seven samples in micro-batches of two: the last is smaller, and of three replicas some have none in a round."""
    run = small_run(stages, rounds=30, tied=True, micro=2 if replicas < 3 else 4)
    async with training_swarm(run, tmp_path) as swarm:
        await asyncio.gather(*(swarm.member(stage) for stage in range(len(stages)) for _ in range(replicas)))
        rounds = await train(await swarm.trainer())
        assert [ended.outcome for ended in rounds] == ["commit"] * 30
        assert max(map(abs, map(float.__sub__, losses(rounds), expected(run, 30)))) < 1e-4
        digests = await swarm.digests()
        by_stage = {node.settings.stage: digest for node, digest in zip(swarm.members, digests, strict=True)}
        assert len(set(digests)) == len(by_stage) == len(stages)


async def test_a_replica_dies_and_another_joins_and_the_curve_does_not_show_it(tmp_path: Path) -> None:
    run = small_run(TWO, rounds=24, target=8)
    async with training_swarm(run, tmp_path) as swarm:
        members = await asyncio.gather(*(swarm.member(stage) for stage in (0, 0, 1, 1)))
        trainer = await swarm.trainer()
        rounds: list[Round] = []
        async with asyncio.timeout(55.0):
            async for ended in trainer.trainer.rounds():
                rounds.append(ended)
                if ended.round == 6:
                    await swarm.kill(members[1])
                if ended.round == 10:
                    trainer.trainer.pause()  # or the run is over before it has started
                    await swarm.member(0)
                    trainer.trainer.resume()
        assert rounds[-1].peers == [2, 2]
        assert losses(rounds) == pytest.approx(expected(run, 24), abs=1e-4)
        digests = await swarm.digests()
        assert len(set(digests)) == 2


async def test_rounds_that_overlap_make_the_curve_of_one_process_whose_gradients_are_a_step_old(tmp_path: Path) -> None:
    run = small_run(TWO, rounds=12, target=8, tied=True, more="overlap = true\n")
    async with training_swarm(run, tmp_path) as swarm:
        members = await asyncio.gather(*(swarm.member(stage) for stage in (0, 0, 1, 1)))
        rounds = await train(await swarm.trainer())
        assert [ended.outcome for ended in rounds] == ["commit"] * 12
        assert losses(rounds) == pytest.approx(expected(run, 12), abs=1e-4)
        digests = await swarm.digests()
        assert len(set(digests)) == 2
        assert {member.stage.round for member in members if member.stage} == {12}


async def test_two_trainers_use_every_sample_once(tmp_path: Path) -> None:
    run = small_run(rounds=12, target=8)
    async with training_swarm(run, tmp_path) as swarm:
        await swarm.member(0)
        both = await asyncio.gather(*(train(trainer) for trainer in [await swarm.trainer(), await swarm.trainer()]))
        for number, loss in enumerate(expected(run, 12)):  # who came late has not seen the first
            ended = [each for rounds in both for each in rounds if each.round == number and each.samples]
            assert sum(each.samples for each in ended) == 8
            assert sum(each.loss * each.samples for each in ended) / 8 == pytest.approx(loss, abs=1e-4)


async def test_a_run_whose_peers_all_died_is_resumed(tmp_path: Path) -> None:
    run = small_run(TWO, rounds=12, more="\n[checkpoint]\nevery = 3\n")
    wanted = expected(run, 12)
    async with training_swarm(run, tmp_path) as swarm:
        await asyncio.gather(swarm.member(0), swarm.member(1))
        trainer = await swarm.trainer()
        before: list[float] = []
        async for ended in trainer.trainer.rounds():
            before.append(ended.loss)
            if ended.round == 7:
                break
        assert before == pytest.approx(wanted[:8], abs=1e-4)
    async with training_swarm(run, tmp_path) as swarm:
        await asyncio.gather(swarm.member(0, resume=True), swarm.member(1, resume=True))
        rounds = await train(await swarm.trainer())
    assert rounds[0].round == 6
    assert losses(rounds) == pytest.approx(wanted[6:], abs=1e-4)


@pytest.mark.parametrize("stage", [0, 1])
async def test_a_stage_whose_peers_all_died_is_gone_on_with_from_its_checkpoint(
    stage: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Those who are left, and saved what they held then, go back to it."""
    for module in (cohort, rounds_of_member):
        monkeypatch.setattr(module, "GIVE_UP", 3.0)
    run = small_run(TWO, rounds=12, more="\n[checkpoint]\nevery = 3\n")
    wanted = expected(run, 12)
    async with training_swarm(run, tmp_path) as swarm:
        members = await asyncio.gather(swarm.member(0), swarm.member(1))
        trainer = await swarm.trainer()
        seen: list[Round] = []
        async with asyncio.timeout(50.0):
            async for ended in trainer.trainer.rounds():
                seen.append(ended)
                if ended.round == 7 and members[stage] in swarm.members:
                    await swarm.kill(members[stage])
                    await swarm.member(stage, resume=True)
    lost = next(place for place, ended in enumerate(seen) if ended.outcome == "lost")
    assert [count > 0 for count in seen[lost].peers] == [stage == 1, stage == 0]
    assert [ended.round for ended in seen[lost + 1 :]] == list(range(6, 12))
    assert losses(seen[:8]) == pytest.approx(wanted[:8], abs=1e-4)
    assert losses(seen[lost + 1 :]) == pytest.approx(wanted[6:], abs=1e-4)


async def test_what_was_trained_is_gathered_into_an_ordinary_folder(tmp_path: Path) -> None:
    run = small_run(TWO, rounds=3, tied=True, more="\n[checkpoint]\nevery = 3\n")
    async with training_swarm(run, tmp_path) as swarm:
        await asyncio.gather(swarm.member(0), swarm.member(1))
        trainer = await swarm.trainer()
        await train(trainer)
        await swarm.digests()
        assert await trainer.gather(tmp_path / "model") == 3
        samples = Samples(run, byte_tokenizer())
        evaluated = await swarm_loss(swarm, samples.micro_batch(9, 0).ids)
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "model")
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "model")
    assert len(tokenizer) == 259
    ids = samples.micro_batch(9, 0).ids
    with torch.no_grad():
        assert model(input_ids=ids, labels=ids).loss.item() == pytest.approx(evaluated, rel=1e-5)

    from swarm.console.trainshow import gather_saved

    gather_saved(run, tmp_path / "checkpoints", tmp_path / "saved")
    saved = AutoModelForCausalLM.from_pretrained(tmp_path / "saved")
    for name, weight in model.named_parameters():
        assert torch.equal(weight, saved.get_parameter(name)), name


async def swarm_loss(swarm: TrainingSwarm, ids: torch.Tensor) -> float:
    """The mean loss as the run's stages have it now."""
    from swarm.runs.passing import EVALUATION, Parcel

    trainer = swarm.trainers[0].trainer
    route = trainer._route((), 0)
    assert route is not None
    return (await trainer._passing.send(Parcel(EVALUATION, 0, ids, ids), route)).loss / len(ids)


async def test_a_run_is_used_while_it_is_trained(tmp_path: Path) -> None:
    """A session notices that the weights have changed, and reads its text again with the new ones."""
    run = small_run(TWO, rounds=60, tied=True, more="\n[sample]\nprompt = 'The '\ntokens = 24\n")
    async with training_swarm(run, tmp_path) as swarm:
        await asyncio.gather(swarm.member(0), swarm.member(1))
        trainer = await swarm.trainer()
        sampling: asyncio.Task[str] | None = None
        seen: list[int] = []
        async with asyncio.timeout(50.0):
            async for ended in trainer.trainer.rounds():
                if ended.round == 1:
                    sampling = asyncio.create_task(trainer.sample())
                if sampling is not None:
                    seen.append(ended.round)
                    if sampling.done():
                        break
            assert sampling is not None
            text = await sampling
        assert text.startswith("The ")
        assert len(seen) > 1  # rounds went on meanwhile


async def test_after_the_run_its_model_says_what_the_gathered_one_says(tmp_path: Path) -> None:
    run = small_run(TWO, rounds=6, more="\n[sample]\nprompt = 'The '\ntokens = 12\n")
    async with training_swarm(run, tmp_path) as swarm:
        await asyncio.gather(swarm.member(0), swarm.member(1))
        trainer = await swarm.trainer()
        async with asyncio.timeout(50.0):
            async for ended in trainer.trainer.rounds():
                if ended.round == 1:
                    trainer.trainer.pause()
                    await trainer.sample()  # of other weights: embedding and head too are those of the moment
                    trainer.trainer.resume()
        await swarm.digests()
        text = await trainer.sample()
        assert trainer._talk is not None
        ends = dict(trainer._talk.model.named_parameters())
        await trainer.gather(tmp_path / "model")
        drafted, counts = await asyncio.to_thread(asked, run, swarm.address, "The ", 12)
    assert drafted == text
    assert counts.drafted > 0
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "model")
    assert all(torch.equal(weight, model.get_parameter(name)) for name, weight in ends.items())
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "model")
    ids = tokenizer("The ", return_tensors="pt", add_special_tokens=False)["input_ids"]
    output = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=12, do_sample=False)
    assert text == tokenizer.decode(output[0], skip_special_tokens=True)


def asked(run: Run, address: str, prompt: str, tokens: int) -> tuple[str, Counts]:
    """What the model of a run says to a client of its own, on other terms than usual."""
    terms = Terms.parse(exact=True, priority="low")
    model, tokenizer = open_run(run, [address], speculate="lookup", terms=terms)
    with model:
        talk = Conversation(model, tokenizer)
        answer = talk.answer(talk.encode(prompt, raw=True), max_new_tokens=tokens, do_sample=False)
        talk.forget()
    return prompt + answer.text, answer.counts


async def test_who_wants_a_runs_model_before_its_peers_are_there_waits_for_them(tmp_path: Path) -> None:
    run = small_run(rounds=2)
    loop, missed, told = asyncio.get_running_loop(), asyncio.Event(), list[tuple[Span, ...]]()

    def tell(missing: tuple[Span, ...]) -> None:
        told.append(missing)
        loop.call_soon_threadsafe(missed.set)

    async with training_swarm(run, tmp_path) as swarm:
        waiting = Waiting(first=40.0, on_missing=tell)
        opening = asyncio.ensure_future(asyncio.to_thread(open_run, run, [swarm.address], waiting))
        await asyncio.wait({opening, asyncio.ensure_future(missed.wait())}, return_when=asyncio.FIRST_COMPLETED)
        await swarm.member(0)
        await train(await swarm.trainer())
        model, _ = await opening
        await asyncio.to_thread(model.close)
    assert told[0] == (Span(0, 4),)


async def test_a_member_whose_news_nobody_took_tells_it_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run, told = small_run(rounds=2), list[State]()
    publish = Discovery.publish

    async def fails_once(discovery: Discovery, offer: Offer) -> None:
        told.append(offer.state)
        if told.count(State.ONLINE) == 1:
            raise DeadlineExceeded("nobody took it")
        await publish(discovery, offer)

    monkeypatch.setattr(Discovery, "publish", fails_once)
    async with training_swarm(run, tmp_path) as swarm:
        await swarm.member(0)
        await train(await swarm.trainer())
        waiting = Waiting(first=40.0)
        model, _ = await asyncio.to_thread(open_run, run, [swarm.address], waiting)
        await asyncio.to_thread(model.close)
    assert told.count(State.ONLINE) >= 2


async def test_another_file_under_the_same_name_is_refused_with_the_field(tmp_path: Path) -> None:
    run = small_run(rounds=2)
    async with training_swarm(run, tmp_path) as swarm:
        await swarm.member(0)
        other = parse(run_text(rounds=2).replace("learning_rate = 0.01", "learning_rate = 0.02"))
        told = "optimizer.learning_rate is 0.01 there and 0.02 here"
        with pytest.raises(UsageError, match=told):
            await swarm.member(0, other)
        with pytest.raises(UsageError, match=told):
            await swarm.trainer(other)


@pytest.mark.parametrize("compute", ["float32", "float16"])
async def test_a_learning_rate_that_diverges_stops_the_run_with_its_last_good_checkpoint(
    compute: str, tmp_path: Path
) -> None:
    """The first step warms up with a rate of nothing; a scaled loss is given the time that its scale takes to be 1."""
    more = f'\n[checkpoint]\nevery = 1\nkeep = 1\n\n[precision]\ncompute = "{compute}"\n'
    text = run_text(rounds=40, more=more).replace("learning_rate = 0.01", "learning_rate = 1e30")
    run = parse(text.replace("clip_norm = 1.0", "clip_norm = 0.0"))
    async with training_swarm(run, tmp_path) as swarm:
        member = await swarm.member(0)
        trainer = await swarm.trainer()
        seen: list[Round] = []

        async def watch() -> None:
            async for ended in trainer.trainer.rounds():
                seen.append(ended)  # noqa: PERF401 (what was seen before it raises is wanted)

        with pytest.raises(ModelDiverged, match="no finite number"):
            await asyncio.wait_for(watch(), 50.0)
        assert {ended.outcome for ended in seen} == {"commit", "skip", "stop"}
        with pytest.raises(ModelDiverged, match="the last good checkpoint is of round 1, in"):
            await member.ended()
        assert [path.name for path in (tmp_path / "checkpoints").iterdir()] == ["round-00000001"]
        with pytest.raises(ModelDiverged):  # whoever comes too late is told as well
            await train(await swarm.trainer())


async def test_the_held_out_loss_is_taken_now_and_then(tmp_path: Path) -> None:
    run = small_run(rounds=4, more="\n[data]\nheld_out = 6\n\n[evaluation]\nevery = 2\nsamples = 6\n")
    async with training_swarm(run, tmp_path) as swarm:
        await swarm.member(0)
        rounds = await train(await swarm.trainer())
    assert [ended.evaluation is not None for ended in rounds] == [False, True, False, True]
    assert all(3.0 < ended.evaluation < 7.0 for ended in rounds if ended.evaluation is not None)


async def test_a_peer_takes_the_stage_that_the_fewest_hold(tmp_path: Path) -> None:
    run = small_run(TWO, rounds=2)
    async with training_swarm(run, tmp_path) as swarm:
        await swarm.member(1)
        node = await swarm.member(None)
        assert node.status().stage == 0
        assert len(await train(await swarm.trainer())) == 2


async def test_float16_with_a_scaled_loss_learns(tmp_path: Path) -> None:
    more = '\n[precision]\ncompute = "float16"\ninitial_scale = 16777216.0\n'
    run = small_run(TWO, rounds=14, more=more)
    async with training_swarm(run, tmp_path) as swarm:
        await asyncio.gather(swarm.member(0), swarm.member(1))
        rounds = await train(await swarm.trainer())
        digests = await swarm.digests()
    assert len(set(digests)) == 2
    assert rounds[-1].loss < rounds[0].loss
    factor, steps = schedule_of(run), 0
    for ended in rounds:
        assert ended.learning_rate == pytest.approx(run.optimizer.learning_rate * factor(steps))
        steps += ended.outcome == "commit"
    assert 0 < steps < len(rounds)  # the first were skipped: the schedule has not advanced
