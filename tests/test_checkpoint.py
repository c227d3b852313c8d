"""Folders on disk: what is whole opens without a copy and has one name; what is not says which file, and what to do."""

from __future__ import annotations

import json
import logging
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from swarm.errors import ModelCorrupt, ModelNotFound
from swarm.files import checkpoint
from swarm.files.checkpoint import CONFIG, INDEX, SINGLE, Checkpoint, file_sha256

CONFIG_OF_A_LLAMA = {"model_type": "llama", "hidden_size": 8, "num_attention_heads": 2, "num_hidden_layers": 2}
LONG_AGO = 1_700_000_000


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache" / "shoal"


def weights(seed: int = 0) -> dict[str, torch.Tensor]:
    random = torch.Generator().manual_seed(seed)
    return {name: torch.randn(4, 8, generator=random) for name in ("a", "b", "c")}


def whole(folder: Path, tensors: dict[str, torch.Tensor] | None = None, **config: Any) -> Path:
    folder.mkdir()
    (folder / CONFIG).write_text(json.dumps(CONFIG_OF_A_LLAMA | config))
    save_file(tensors or weights(), folder / SINGLE)
    os.utime(folder / SINGLE, (LONG_AGO, LONG_AGO))
    return folder


def sharded(folder: Path) -> Path:
    folder.mkdir()
    (folder / CONFIG).write_text(json.dumps(CONFIG_OF_A_LLAMA))
    tensors = weights()
    save_file({"a": tensors["a"]}, folder / "model-00001-of-00002.safetensors")
    save_file({"b": tensors["b"], "c": tensors["c"]}, folder / "model-00002-of-00002.safetensors")
    places = {"a": "model-00001-of-00002.safetensors", "b": "model-00002-of-00002.safetensors"}
    (folder / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": places | {"c": places["b"]}}))
    return folder


@pytest.mark.parametrize("make", [whole, sharded])
def test_tensors_are_what_was_saved(tmp_path: Path, make: Callable[[Path], Path]) -> None:
    opened = Checkpoint(make(tmp_path / "model"))
    assert set(opened.names) == {"a", "b", "c"}
    for name, tensor in weights().items():
        info = opened.names[name]
        assert (info.dtype, info.shape, info.nbytes) == ("F32", (4, 8), 128)
        assert torch.equal(opened.tensor(name), tensor)
    assert opened.config().hidden_size == 8


def test_repr_shows_what_it_holds(tmp_path: Path) -> None:
    assert repr(Checkpoint(sharded(tmp_path / "m"))) == "<Checkpoint llama tensors=3 files=2 0MB>"


# --- damage -----------------------------------------------------------------------------------------------------------


def shorten(path: Path) -> None:
    os.truncate(path, path.stat().st_size - 1)


def lengthen(path: Path) -> None:
    with path.open("ab") as file:
        file.write(b"more")


def garble_header(path: Path) -> None:
    path.write_bytes((20).to_bytes(8, "little") + b"this is not JSON at all")


def huge_header(path: Path) -> None:
    path.write_bytes(b"\xff" * 100)


def not_utf8(path: Path) -> None:
    path.write_bytes((4).to_bytes(8, "little") + b'{"\xff"')


def empty(path: Path) -> None:
    path.write_bytes(b"")


@pytest.mark.parametrize("damage", [Path.unlink, shorten, lengthen, garble_header, huge_header, not_utf8, empty])
def test_a_damaged_shard_is_named_before_anything_is_loaded(tmp_path: Path, damage: Callable[[Path], None]) -> None:
    folder = sharded(tmp_path / "model")
    damage(folder / "model-00002-of-00002.safetensors")
    with pytest.raises(ModelCorrupt, match=r"model-00002-of-00002\.safetensors.*fetch the model again"):
        Checkpoint(folder)


def test_a_header_that_lies_about_its_tensors_is_found_when_it_is_mapped(tmp_path: Path) -> None:
    folder = whole(tmp_path / "model")
    header = json.dumps({"a": {"dtype": "F32", "shape": [99, 99], "data_offsets": [0, 16]}}).encode()
    (folder / SINGLE).write_bytes(len(header).to_bytes(8, "little") + header + bytes(16))
    with pytest.raises(ModelCorrupt, match="cannot be read"):
        Checkpoint(folder).tensor("a")


def test_an_unknown_tensor_is_named(tmp_path: Path) -> None:
    with pytest.raises(ModelCorrupt, match="no tensor 'd'"):
        Checkpoint(whole(tmp_path / "model")).tensor("d")


@pytest.mark.parametrize(
    ("places", "message"),
    [
        ({"d": "model-00001-of-00002.safetensors"}, "lacks the tensor 'd'"),
        ({"a": "../model/model-00001-of-00002.safetensors"}, "cannot be a shard"),
        ({"a": "/etc/passwd"}, "cannot be a shard"),
        ({"a": ".."}, "cannot be a shard"),
        ({"a": ""}, "cannot be a shard"),
        ({"a": 7}, "is damaged"),
    ],
)
def test_an_index_that_cannot_be_followed(tmp_path: Path, places: dict[str, Any], message: str) -> None:
    folder = sharded(tmp_path / "model")
    (folder / INDEX).write_text(json.dumps({"weight_map": places}))
    with pytest.raises(ModelCorrupt, match=message):
        Checkpoint(folder)


def test_folders_without_a_model(tmp_path: Path) -> None:
    with pytest.raises(ModelNotFound, match="there is no folder"):
        Checkpoint(tmp_path / "nowhere")
    with pytest.raises(ModelNotFound, match=r"no config\.json"):
        Checkpoint(tmp_path)
    (tmp_path / CONFIG).write_text("{}")
    (tmp_path / "pytorch_model.bin").write_bytes(b"\x80")
    with pytest.raises(ModelNotFound, match="pickled ones are never opened"):
        Checkpoint(tmp_path)


def test_shards_without_their_index(tmp_path: Path) -> None:
    folder = sharded(tmp_path / "model")
    (folder / INDEX).unlink()
    with pytest.raises(ModelCorrupt, match="neither"):
        Checkpoint(folder)


@pytest.mark.parametrize("text", ["", "[]", "{", "\udcff"])
def test_a_damaged_config(tmp_path: Path, text: str) -> None:
    folder = whole(tmp_path / "model")
    (folder / CONFIG).write_bytes(text.encode(errors="surrogateescape"))
    with pytest.raises(ModelCorrupt, match=r"config\.json is damaged"):
        Checkpoint(folder)


@pytest.mark.parametrize(
    "change",
    [{"model_type": "nobody-knows"}, {"hidden_size": "wide"}, {"num_attention_heads": 0}, {"model_type": None}],
)
def test_a_config_that_transformers_refuses(tmp_path: Path, change: dict[str, Any]) -> None:
    with pytest.raises(ModelCorrupt, match="transformers cannot use"):
        Checkpoint(whole(tmp_path / "model", **change)).config()


def test_code_that_comes_with_a_model_is_not_run(tmp_path: Path) -> None:
    folder = whole(tmp_path / "model", model_type="own", auto_map={"AutoConfig": "own.Config"})
    (folder / "own.py").write_text("raise SystemExit('ran foreign code')")
    with pytest.raises(ModelCorrupt):
        Checkpoint(folder).config()


# --- mapping ----------------------------------------------------------------------------------------------------------


def mapped_at(address: int) -> dict[str, int]:
    """What the system says of the mapping of a model's file in which `address` lies, in bytes."""
    found: dict[str, int] | None = None
    for line in Path("/proc/self/smaps").read_text().splitlines():
        first, *rest = line.split()
        if "-" in first and not first.endswith(":"):
            start, end = (int(bound, 16) for bound in first.split("-"))
            if found is not None:
                break
            found = {} if start <= address < end and line.endswith(SINGLE) else None
        elif found is not None and rest[-1] == "kB":
            found[first.rstrip(":")] = int(rest[0]) * 1024
    assert found is not None, "no file is mapped there"
    return found


def test_tensors_are_not_copied(tmp_path: Path) -> None:
    size = 64 << 20
    tensor = Checkpoint(whole(tmp_path / "model", {"a": torch.ones(size // 4)})).tensor("a")
    assert int(tensor.sum(dtype=torch.float64)) == size // 4  # every page was touched
    mapped = mapped_at(tensor.data_ptr())
    assert mapped["Rss"] >= size
    assert mapped["Anonymous"] == 0


def test_writing_to_a_tensor_leaves_the_file_alone(tmp_path: Path) -> None:
    folder = whole(tmp_path / "model")
    tensor = Checkpoint(folder).tensor("a")
    before = (folder / SINGLE).read_bytes()
    tensor.zero_()
    assert (folder / SINGLE).read_bytes() == before
    assert torch.equal(Checkpoint(folder).tensor("a"), weights()["a"])


# --- names by content -------------------------------------------------------------------------------------------------


def test_what_does_not_change_the_computation_does_not_change_the_name(tmp_path: Path) -> None:
    plain = Checkpoint(whole(tmp_path / "plain"))
    text = {"dtype": "float32", "transformers_version": "5.23.0", "_name_or_path": "/here"}
    other = Checkpoint(whole(tmp_path / "other", torch_dtype="bfloat16", text_config=text))
    same = Checkpoint(whole(tmp_path / "same", use_cache=False, text_config={}))
    assert other.model_id == same.model_id != plain.model_id
    assert len(plain.model_id) == 64


def test_other_weights_or_another_config_are_another_model(tmp_path: Path) -> None:
    folders = [whole(tmp_path / "a"), whole(tmp_path / "b", weights(1)), whole(tmp_path / "c", rms_norm_eps=1e-6)]
    folders.append(sharded(tmp_path / "d"))
    assert len({Checkpoint(folder).model_id for folder in folders}) == 4


def test_the_name_does_not_depend_on_the_place_or_the_order_of_keys(tmp_path: Path) -> None:
    folder = whole(tmp_path / "a")
    moved = whole(tmp_path / "b")
    (moved / CONFIG).write_text(json.dumps(dict(reversed(CONFIG_OF_A_LLAMA.items())), indent=4))
    assert Checkpoint(folder).model_id == Checkpoint(moved).model_id


def hash_nothing(path: Path, progress: checkpoint.Progress) -> str:
    raise AssertionError(f"{path} was hashed")


def test_a_file_is_hashed_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = whole(tmp_path / "model")
    first = Checkpoint(folder).model_id
    monkeypatch.setattr(checkpoint, "hash_file", hash_nothing)
    assert Checkpoint(folder).model_id == first


def test_a_changed_file_is_hashed_again(tmp_path: Path) -> None:
    folder = whole(tmp_path / "model")
    first = Checkpoint(folder).model_id
    save_file(weights(1), folder / SINGLE)
    assert Checkpoint(folder).model_id != first


def test_the_hash_of_a_file_just_written_is_not_trusted(tmp_path: Path, cache: Path) -> None:
    path = tmp_path / "file"
    path.write_bytes(b"now")
    file_sha256(path)
    assert not list(cache.glob("hashes/*"))


def test_a_damaged_memory_is_not_believed(tmp_path: Path, cache: Path) -> None:
    folder = whole(tmp_path / "model")
    first = Checkpoint(folder).model_id
    (entry,) = cache.glob("hashes/*")
    for nonsense in (b"", b"nonsense", b"\xff" * 64):
        entry.write_bytes(nonsense)
        assert Checkpoint(folder).model_id == first


def test_a_cache_that_cannot_be_written_costs_time_only(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    folder = whole(tmp_path / "model")
    (tmp_path / "file").touch()
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    with caplog.at_level(logging.WARNING):
        assert len(Checkpoint(folder).model_id) == 64
    assert "cannot remember a hash" in caplog.text


def test_a_relative_cache_home_is_ignored(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", "relative")
    assert checkpoint.cache_folder() == Path.home() / ".cache" / "shoal"


def test_a_blob_of_the_hub_is_not_read_to_be_hashed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = whole(tmp_path / "model")
    plain = Checkpoint(folder).model_id
    blob = tmp_path / "blobs" / checkpoint.hash_file(folder / SINGLE)
    blob.parent.mkdir()
    (folder / SINGLE).rename(blob)
    (folder / SINGLE).symlink_to(blob)
    monkeypatch.setattr(checkpoint, "hash_file", hash_nothing)
    assert Checkpoint(folder).model_id == plain


def test_naming_a_model_needs_neither_torch_nor_transformers(tmp_path: Path) -> None:
    folder = whole(tmp_path / "model")
    code = (
        "import sys; from pathlib import Path; from swarm.files.checkpoint import Checkpoint;"
        "print(Checkpoint(Path(sys.argv[1])).model_id);"
        "assert not {'torch', 'transformers', 'numpy'} & set(sys.modules)"
    )
    command = [sys.executable, "-c", code, str(folder)]
    said = subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip()
    assert said == Checkpoint(folder).model_id


def test_hashing_tells_how_far_it_is(tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_bytes(bytes(3 << 20))
    told: list[tuple[str, int, int]] = []
    file_sha256(path, lambda *said: told.append(said))
    assert told == [("hashing", done << 20, 3 << 20) for done in (1, 2, 3)]


def test_a_file_that_vanishes_is_named(tmp_path: Path) -> None:
    opened = Checkpoint(whole(tmp_path / "model"))
    (opened.folder / SINGLE).unlink()
    with pytest.raises(ModelCorrupt, match=r"model\.safetensors cannot be read"):
        _ = opened.model_id
    with pytest.raises(ModelCorrupt, match=r"model\.safetensors cannot be read"):
        opened.tensor("a")
