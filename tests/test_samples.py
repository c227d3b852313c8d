"""Text to samples: read, cleaned, packed, and put in an order that is the same for everybody."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from runs import small_run

from swarm.errors import UsageError
from swarm.runs.corpus import clean, documents, normalized
from swarm.runs.origin import byte_tokenizer
from swarm.runs.run import IGNORED, DataTable, Run
from swarm.runs.samples import Samples, _Finite, _Streamed, permutation

TEXTS = [f"Fish number {number} swims in shoal {number % 7}." for number in range(60)]


def write_lines(folder: Path, texts: list[str] = TEXTS) -> Path:
    file = folder / "texts.jsonl"
    file.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    return file


def run_on(source: Path, more: str = "", **options: int) -> Run:
    return small_run(more=f'\n[data]\nsource = "{source}"\n{more}\n', **options)


def test_texts_are_normalised_and_empty_and_double_ones_dropped() -> None:
    assert normalized(" e\u0301t\u00e9 \r\nnext\x07 \t\n\n") == "été \nnext".replace(" \n", "\n")
    found = clean(["one", "", " one ", "two\r\n", "  \n", "much too long"], DataTable(max_characters=5))
    assert list(found) == ["one", "two"]
    assert list(clean(["one", "one"], DataTable(deduplicate=False))) == ["one", "one"]


def test_the_embedded_text_is_several_hundred_kilobytes() -> None:
    assert sum(map(len, documents(DataTable()))) > 300_000


def test_a_folder_is_read_in_the_order_of_its_names(tmp_path: Path) -> None:
    write_lines(tmp_path, ["from lines"])
    (tmp_path / "b").mkdir()
    (tmp_path / "b" / "deep.txt").write_text("from below")
    (tmp_path / "a.md").write_text("from above")
    (tmp_path / "image.png").write_bytes(b"\x89")
    assert list(documents(DataTable(source=str(tmp_path)))) == ["from above", "from below", "from lines"]


def test_every_sample_comes_once_in_an_epoch_and_in_another_order_in_the_next(tmp_path: Path) -> None:
    run = run_on(write_lines(tmp_path), micro=2, target=7)
    samples = Samples(run, byte_tokenizer())
    assert samples.size is not None
    order = [samples._number(position) for position in range(2 * samples.size)]
    first, second = order[: samples.size], order[samples.size :]
    assert sorted(first) == sorted(second) == list(range(samples.size))
    assert first != second
    assert np.array_equal(first, permutation(samples.size, run.seed, 0))


def test_a_micro_batch_is_the_same_whoever_reads_it_and_however_often(tmp_path: Path) -> None:
    run = run_on(write_lines(tmp_path), micro=3, target=7)
    one, other = Samples(run, byte_tokenizer()), Samples(run, byte_tokenizer())
    later = one.micro_batch(5, 1)
    for index in range(run.micro_batches):
        assert one.micro_batch(2, index).ids.equal(other.micro_batch(2, index).ids)
    assert one.micro_batch(5, 1).ids.equal(later.ids)
    assert len(one.micro_batch(0, 2).ids) == 1  # 7 samples are 3 + 3 + 1


def test_no_token_is_lost_between_samples(tmp_path: Path) -> None:
    tokenizer = byte_tokenizer()
    finite = _Finite(run_on(write_lines(tmp_path)), tokenizer)
    text = tokenizer.decode(np.concatenate([finite[number][0] for number in range(len(finite))]))
    assert text.startswith("</s>".join(TEXTS[:20]))


def test_held_out_samples_are_not_learned_from(tmp_path: Path) -> None:
    more = "held_out = 4\n[evaluation]\nevery = 1\nsamples = 4\n"
    run = run_on(write_lines(tmp_path), more, micro=3)
    samples = Samples(run, byte_tokenizer())
    held = {tuple(row.tolist()) for batch in samples.held_out() for row in batch.ids}
    assert samples.size is not None
    learned = {tuple(samples._packed[samples._number(place)][0].tolist()) for place in range(samples.size)}
    assert len(held) == 4
    assert not held & learned


def test_documents_that_are_kept_apart_start_at_zero_and_are_not_predicted_from_each_other(tmp_path: Path) -> None:
    tokenizer = byte_tokenizer()
    run = run_on(write_lines(tmp_path, ["abc", "defgh", "ijklmnopqrstuvw"]), 'documents = "separate"', target=2)
    packed = _Finite(run, tokenizer)
    ids, positions = packed[0]
    assert tokenizer.decode(ids) == "abc</s>defgh</s>ijklmn"
    assert positions.tolist() == [0, 1, 2, 3, 0, 1, 2, 3, 4, 5, 0, 1, 2, 3, 4, 5]
    batch = Samples(run, tokenizer)._batch([0])
    assert (batch.labels == IGNORED).nonzero()[:, 1].tolist() == [0, 4, 10]


def test_a_stream_gives_the_samples_that_a_file_gives_and_can_be_asked_again(tmp_path: Path) -> None:
    run, tokenizer = run_on(write_lines(tmp_path), 'documents = "separate"', micro=1, target=1), byte_tokenizer()
    finite, streamed = _Finite(run, tokenizer), _Streamed(run, tokenizer)
    for number in [*range(len(finite)), 3]:
        for expected, found in zip(finite[number], streamed[number], strict=True):
            assert np.array_equal(expected, found)


@pytest.mark.slow
def test_a_dataset_is_streamed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With the library that streams from the hub, from a folder that lies where a name of the hub would lead."""
    folder = tmp_path / "fish"
    folder.mkdir()
    write_lines(folder)
    from swarm.runs.corpus import _dataset

    assert list(_dataset(DataTable(source=str(folder), shuffle=0))) == TEXTS
    orders = [list(_dataset(DataTable(source=str(folder)), *turn)) for turn in ((1, 0), (1, 0), (1, 1), (2, 0))]
    assert orders[0] == orders[1]
    assert all(sorted(order) == sorted(TEXTS) for order in orders)  # each of them once
    assert len({tuple(order) for order in (*orders, TEXTS)}) > 2
    with pytest.raises(UsageError, match=r"data\.field: rows of .* have text"):
        list(_dataset(DataTable(source=str(folder), field="body")))
    with pytest.raises(UsageError, match=r"the dataset .* cannot be read"):
        list(_dataset(DataTable(source=str(tmp_path / "nowhere"))))


@pytest.mark.parametrize(
    ("content", "name", "told"),
    [
        (b"", "empty.txt", "there is no text"),
        (b"caf\xe9 au lait", "latin.txt", r"latin\.txt is not UTF-8 text \(byte 3"),
        (b'{"text": "a"}\n{"text": ', "broken.jsonl", "line 2 is no JSON"),
        (b'{"body": "a"}\n', "other.jsonl", "line 1 has no text in a field 'text'"),
        (b"too short", "short.txt", "too little to learn from"),
    ],
)
def test_data_that_cannot_be_used_is_refused_by_name(tmp_path: Path, content: bytes, name: str, told: str) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(UsageError, match=told):
        Samples(run_on(tmp_path / name), byte_tokenizer())


def test_a_source_that_is_not_there_is_named(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"there is no file or folder .*nowhere\.txt"):
        Samples(run_on(tmp_path / "nowhere.txt"), byte_tokenizer())
    with pytest.raises(UsageError, match="no file in"):
        Samples(run_on(tmp_path), byte_tokenizer())
