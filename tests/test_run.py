"""The file of a run: what it means, what it is called, and what is wrong with it."""

from __future__ import annotations

import re
import tomllib
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import BaseModel
from runs import run_text, save_run, small_run

from swarm.errors import UsageError
from swarm.runs.metrics import Metrics, Round
from swarm.runs.origin import byte_tokenizer, config_of
from swarm.runs.run import Run, differences, load, parse
from swarm.types import Span

CONFIGS = Path(__file__).parents[1] / "configs"


def changed(old: str, new: str) -> Run:
    assert old in run_text()
    return parse(run_text().replace(old, new))


def test_a_file_names_its_stages_and_micro_batches() -> None:
    run = small_run(("0:1", "1:4"), micro=2, target=7)
    assert run.spans == (Span(0, 1), Span(1, 4))
    assert [list(run.samples_of(index)) for index in range(run.micro_batches)] == [[0, 1], [2, 3], [4, 5], [6]]


@given(micro=st.integers(1, 40), target=st.integers(1, 400))
def test_the_micro_batches_of_a_round_hold_every_sample_once(micro: int, target: int) -> None:
    run = small_run(micro=min(micro, target), target=target)
    samples = [sample for index in range(run.micro_batches) for sample in run.samples_of(index)]
    assert samples == list(range(target))


def test_the_id_follows_from_what_must_agree_and_from_nothing_else() -> None:
    run = small_run()
    assert run.id == small_run().id
    local = '\n[checkpoint]\nfolder = "/elsewhere"\nkeep = 9\n\n[sample]\nevery = 3\nprompt = "Once"\n'
    assert small_run(more=local).id == run.id
    assert small_run(more="\n[checkpoint]\nevery = 5\n").id != run.id
    assert small_run(micro=3).id != run.id


def test_the_fields_that_differ_are_named_with_both_values() -> None:
    found = differences(small_run().terms, changed("learning_rate = 0.01", "learning_rate = 0.02").terms)
    assert found == ["optimizer.learning_rate is 0.02 there and 0.01 here"]
    assert differences(small_run().terms, small_run().terms) == []
    (missing,) = differences(small_run().terms, {**small_run().terms, "new": 1})
    assert missing == "new is 1 there and not set here"


@pytest.mark.parametrize(
    ("old", "new", "told"),
    [
        ("micro = 2", "micor = 2", "no field is called batch.micor; did you mean micro?"),
        ("rounds = 10", "", "the field rounds is missing"),
        ("micro = 2", "micro = 8", "a micro-batch of 8 samples is more than the target of 7"),
        ("micro = 2", "micro = 0", "batch.micro"),
        ("learning_rate = 0.01", "learning_rate = -1", "optimizer.learning_rate"),
        ('stages = ["0:4"]', 'stages = ["0:2", "3:4"]', "leave out blocks 2:3"),
        ('stages = ["0:4"]', 'stages = ["0:2", "1:4"]', "hold block 1 twice"),
        ('stages = ["0:4"]', 'stages = ["1:4"]', "leave out blocks 0:1"),
        ('stages = ["0:4"]', 'stages = ["0:four"]', "is no range of blocks"),
        ('stages = ["0:4"]', "stages = []", "stages"),
        ('architecture = "llama"', 'pretrained = "x"', "config is for an architecture"),
        ('dtype = "float32"', 'dtype = "float8"', "averaging.dtype"),
        ('name = "test"', 'name = "a/b"', "name"),
        ("rounds = 10", "rounds = [", "is no TOML"),
    ],
)
def test_a_wrong_field_is_named(old: str, new: str, told: str) -> None:
    with pytest.raises(UsageError, match="the run") as caught:
        changed(old, new)
    assert told in str(caught.value)


def test_the_example_explains_every_field() -> None:
    shown = re.sub(r"^# (?=\w+ = )", "", (CONFIGS / "train-demo.toml").read_text(), flags=re.MULTILINE)
    tables = {name: field.annotation for name, field in Run.model_fields.items()}
    said = tomllib.loads(shown)
    assert said.keys() == tables.keys()
    for name, kind in tables.items():
        if isinstance(kind, type) and issubclass(kind, BaseModel):
            assert said[name].keys() == kind.model_fields.keys(), name
    for file in CONFIGS.glob("train-*.toml"):
        assert load(file).spans


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="there is no disk here that is always full")
def test_a_full_disk_ends_the_metrics_and_not_the_training(caplog: pytest.LogCaptureFixture) -> None:
    metrics = Metrics(Path("/dev/full"))
    for number in range(3):
        metrics.add(Round(number, 5.0 - number, 7, 112, 0.1, [1], "commit", 1.0, 0.01))
    metrics.close()
    assert len(caplog.records) == 1
    assert "no more metrics are written file=/dev/full" in caplog.text
    assert metrics.curve == [(0, 5.0), (1, 4.0), (2, 3.0)]


def test_evaluation_needs_samples_that_are_held_out() -> None:
    with pytest.raises(UsageError, match="held_out"):
        small_run(more="\n[evaluation]\nevery = 1\nsamples = 4\n")


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    assert load(save_run(tmp_path)).id == small_run().id
    with pytest.raises(UsageError, match=r"there is no run file .*nowhere\.toml"):
        load(tmp_path / "nowhere.toml")


@pytest.mark.parametrize(
    ("old", "new", "told"),
    [
        ('architecture = "llama"', 'architecture = "lama"', "transformers knows no 'lama'"),
        ("hidden_size = 32", "hidden_sise = 32", "a llama has no such field"),
        ("hidden_size = 32", "hidden_size = 33", "model.config: llama refuses it"),
        ('stages = ["0:4"]', 'stages = ["0:3"]', "they cover blocks 0:3, the model has blocks 0:4"),
        ("hidden_size = 32", "vocab_size = 100\nhidden_size = 32", "has 259 tokens, the model's vocabulary has 100"),
        ("sequence_length = 16", "sequence_length = 65", "beyond the model's context of 64"),
    ],
)
def test_a_run_that_does_not_fit_its_model_is_refused(old: str, new: str, told: str) -> None:
    with pytest.raises(UsageError) as caught:
        config_of(changed(old, new), byte_tokenizer())
    assert told in str(caught.value)


def test_a_model_from_scratch_takes_the_size_of_its_vocabulary_from_the_tokenizer() -> None:
    tokenizer = byte_tokenizer()
    config = config_of(small_run(), tokenizer)
    assert config.vocab_size == len(tokenizer) == 259
    assert config.eos_token_id == tokenizer.eos_token_id
    assert tokenizer.decode(tokenizer("Fisch, möglichst frisch")["input_ids"]) == "Fisch, möglichst frisch"
