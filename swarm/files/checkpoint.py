"""A model on disk: a folder with a config and safetensors shards, opened lazily, mapped into memory, named by content.

Opening reads the headers only. They say how long each shard must be, so a download that was cut short is found before
anything is loaded. Nothing here unpickles anything.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import re
import struct
import time
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import msgspec

from swarm.errors import ModelCorrupt, ModelNotFound
from swarm.types import ModelId

if TYPE_CHECKING:
    import torch
    from safetensors import safe_open
    from transformers import PreTrainedConfig

log = logging.getLogger(__name__)

CONFIG = "config.json"
SINGLE = "model.safetensors"
INDEX = "model.safetensors.index.json"

_HEADER_LIMIT = 100_000_000  # bytes; safetensors' own limit
_SHA256 = re.compile(r"[0-9a-f]{64}")
_SETTLED = 2.0  # seconds after which a file that changes again is sure to get another mtime
# What `save_pretrained` writes differently from one machine or release to the next, without changing what is computed.
_VOLATILE = frozenset(
    {
        "_attn_implementation",
        "_commit_hash",
        "_name_or_path",
        "dtype",
        "torch_dtype",
        "transformers_version",
        "use_cache",
    }
)
_AGAIN = "delete it and fetch the model again"


class Progress(Protocol):
    """Told how far something long has come; `total` is 0 where nobody knows."""

    def __call__(self, what: str, done: int, total: int, /) -> None: ...


def silent(what: str, done: int, total: int, /) -> None:
    """A `Progress` that nobody watches."""


@dataclass(frozen=True, slots=True)
class TensorInfo:
    """Where a tensor is and what it will be, known without reading it."""

    file: Path
    dtype: str  # in safetensors' spelling: "F32", "BF16", "F16", ...
    shape: tuple[int, ...]
    nbytes: int  # on disk, and of address space once mapped


class Checkpoint:
    """A folder with `config.json` and safetensors, whole (`model.safetensors`) or in shards with an index.

    Attributes:
        folder: the absolute path of the folder.
        names: every tensor's name, in the files' order, and what is known about it.

    Raises:
        ModelNotFound: the folder holds no model that can be used.
        ModelCorrupt: a file is missing, cut short or damaged. The message names it and says what to do.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = Path(folder).absolute()
        self._raw_config = _read_config(self.folder)
        self.names: dict[str, TensorInfo] = _read_names(self.folder)
        self._open: dict[Path, safe_open] = {}

    def __repr__(self) -> str:
        size = sum(info.nbytes for info in self.names.values())
        kind = self._raw_config.get("model_type", "unknown")
        return f"<Checkpoint {kind} tensors={len(self.names)} files={len(self.files)} {size / 1e6:.0f}MB>"

    @property
    def files(self) -> list[Path]:
        """The weight files that hold at least one of the tensors, sorted by path."""
        return sorted({info.file for info in self.names.values()})

    def tensor(self, name: str) -> torch.Tensor:
        """The tensor, on the CPU, as a view of the mapped file: nothing is copied, pages are read when first touched.

        The map is private: every process on the machine shares the same clean pages, and writing to the tensor copies
        the page written and never changes the file. The tensor stays valid after the checkpoint is dropped.

        Raises `ModelCorrupt` where there is no such tensor or its file cannot be read.
        """
        from safetensors import SafetensorError

        info = self.names.get(name)
        if info is None:
            raise ModelCorrupt(f"{self.folder} has no tensor {name!r}: it is not the model that its {CONFIG} describes")
        try:
            tensor: torch.Tensor = self._mapped(info.file).get_tensor(name)  # type: ignore[no-untyped-call]
        except (SafetensorError, OSError) as error:
            raise ModelCorrupt(f"{info.file} cannot be read ({error}): {_AGAIN}") from error
        return tensor

    def unmap(self) -> None:
        """Let go of the files: what no tensor of theirs is needed for counts no longer as memory of this process."""
        self._open.clear()

    def config(self) -> PreTrainedConfig:
        """The model's configuration, as transformers understands it; code that came with the model is never run.

        Raises `ModelCorrupt` where transformers does not know the model or refuses its values.
        """
        from huggingface_hub.errors import StrictDataclassError
        from transformers import AutoConfig, PreTrainedConfig

        try:
            config = AutoConfig.from_pretrained(self.folder, local_files_only=True, trust_remote_code=False)
        except (ValueError, TypeError, LookupError, AttributeError, ArithmeticError, StrictDataclassError) as error:
            raise ModelCorrupt(f"transformers cannot use {self.folder / CONFIG}: {error}") from error
        assert isinstance(config, PreTrainedConfig)
        return config

    @cached_property
    def model_id(self) -> ModelId:
        """The model's name by content: 64 hex digits that two folders share only if they hold the same model.

        It covers the config, less what varies without changing the computation, and the SHA-256 of every weight file
        (not their names). Hashing whole files, rather than tensors, makes the same weights in other shards another
        model; in return it is the hash that hubs publish for each file, so a model downloaded from one needs no
        hashing at all, and anyone can compute it with `sha256sum`. Other files are hashed once and remembered.

        Raises `ModelCorrupt` where a weight file cannot be read.
        """
        content = {"config": canonical(self._raw_config), "weights": sorted(map(file_sha256, self.files))}
        text = json.dumps(content, sort_keys=True, separators=(",", ":"))
        return ModelId(hashlib.sha256(text.encode()).hexdigest())

    def _mapped(self, file: Path) -> safe_open:
        # Two threads may both open a file for the first time: one handle is dropped, which harms nobody.
        if file not in self._open:
            from safetensors import safe_open

            self._open.setdefault(file, safe_open(file, framework="pt", device="cpu"))
        return self._open[file]


def canonical(config: Any) -> Any:
    """`config` without what varies from one copy of a model to the next, at every depth."""
    if isinstance(config, dict):
        return {key: canonical(value) for key, value in config.items() if key not in _VOLATILE}
    if isinstance(config, list):
        return [canonical(value) for value in config]
    return config


# --- reading folders --------------------------------------------------------------------------------------------------


def _read_config(folder: Path) -> dict[str, Any]:
    if not folder.is_dir():
        raise ModelNotFound(f"there is no folder {folder}")
    try:
        return msgspec.json.decode((folder / CONFIG).read_bytes(), type=dict[str, Any])
    except FileNotFoundError:
        raise ModelNotFound(f"{folder} holds no model: there is no {CONFIG} in it") from None
    except (msgspec.DecodeError, UnicodeDecodeError, OSError) as error:
        raise ModelCorrupt(f"{folder / CONFIG} is damaged ({error}): {_AGAIN}") from error


def _read_names(folder: Path) -> dict[str, TensorInfo]:
    if (folder / SINGLE).exists() or (folder / SINGLE).is_symlink():
        return _read_header(folder / SINGLE)
    if (folder / INDEX).exists():
        return _read_shards(folder)
    if any(folder.glob("*.safetensors")):
        raise ModelCorrupt(f"{folder} has neither {SINGLE} nor {INDEX}: fetch the model again")
    raise ModelNotFound(
        f"{folder} has no weights in safetensors (pickled ones are never opened: convert them with save_pretrained)"
    )


class _Index(msgspec.Struct):
    weight_map: dict[str, str]


def _read_shards(folder: Path) -> dict[str, TensorInfo]:
    path = folder / INDEX
    try:
        weight_map = msgspec.json.decode(path.read_bytes(), type=_Index).weight_map
    except (msgspec.DecodeError, UnicodeDecodeError, OSError) as error:
        raise ModelCorrupt(f"{path} is damaged ({error}): {_AGAIN}") from error
    shards = {shard: _read_header(_inside(folder, shard)) for shard in sorted(set(weight_map.values()))}
    for name, shard in weight_map.items():
        if name not in shards[shard]:
            raise ModelCorrupt(f"{folder / shard} lacks the tensor {name!r} that {INDEX} promises: {_AGAIN}")
    return {name: shards[shard][name] for name, shard in weight_map.items()}


def _inside(folder: Path, shard: str) -> Path:
    """An index comes with the model, from strangers: it must not lead out of the folder."""
    if "/" in shard or not shard.endswith(".safetensors"):
        raise ModelCorrupt(f"{folder / INDEX} names what cannot be a shard in its folder: {shard!r}")
    return folder / shard


class _Entry(msgspec.Struct):
    dtype: str
    shape: tuple[int, ...]
    data_offsets: tuple[int, int]


def _read_header(path: Path) -> dict[str, TensorInfo]:
    """What a safetensors file holds. Its length is checked here, the rest by safetensors itself when it maps it."""
    try:
        with path.open("rb") as file:
            size = os.fstat(file.fileno()).st_size
            length = _header_length(path, file.read(8))
            raw = msgspec.json.decode(file.read(length), type=dict[str, msgspec.Raw])
        raw.pop("__metadata__", None)
        entries = {name: msgspec.json.decode(entry, type=_Entry) for name, entry in raw.items()}
    except FileNotFoundError:
        raise ModelCorrupt(f"{path} is missing: fetch the model again") from None
    except (msgspec.DecodeError, UnicodeDecodeError, OSError) as error:
        raise ModelCorrupt(f"{path} has a damaged header ({error}): {_AGAIN}") from error
    _check_size(path, size, 8 + length + max((entry.data_offsets[1] for entry in entries.values()), default=0))
    return {
        name: TensorInfo(path, entry.dtype, entry.shape, entry.data_offsets[1] - entry.data_offsets[0])
        for name, entry in entries.items()
    }


def _header_length(path: Path, head: bytes) -> int:
    length: int = struct.unpack("<Q", head)[0] if len(head) == 8 else _HEADER_LIMIT + 1
    if length > _HEADER_LIMIT:
        raise ModelCorrupt(f"{path} is not a safetensors file: {_AGAIN}")
    return length


def _check_size(path: Path, size: int, expected: int) -> None:
    if size < expected:
        raise ModelCorrupt(f"{path} was cut short at {size} of {expected} bytes: {_AGAIN}")
    if size > expected:
        raise ModelCorrupt(f"{path} is {size - expected} bytes longer than its header says: {_AGAIN}")


# --- hashing files ----------------------------------------------------------------------------------------------------


def cache_folder() -> Path:
    """Where everything lies that can be made again: `$XDG_CACHE_HOME/shoal`, or `~/.cache/shoal`."""
    base = os.environ.get("XDG_CACHE_HOME", "")
    # The specification says that a relative path is to be ignored.
    return (Path(base) if os.path.isabs(base) else Path.home() / ".cache") / "shoal"


def file_sha256(path: Path, progress: Progress = silent) -> str:
    """The SHA-256 of a file in hex, remembered under its path, size, mtime and inode.

    A file that is a link into a Hugging Face cache is named by its SHA-256 there (where it is stored in LFS or Xet, as
    weights are), and is not read. Raises `ModelCorrupt` where the file cannot be read.
    """
    try:
        real = path.resolve(strict=True)
        if real != path and real.parent.name == "blobs" and _SHA256.fullmatch(real.name):
            return real.name
        return _remembered_sha256(real, progress)
    except OSError as error:
        raise ModelCorrupt(f"{path} cannot be read ({error}): fetch the model again") from error


def _remembered_sha256(path: Path, progress: Progress) -> str:
    before = path.stat()
    entry = _entry_of(path, before)
    if known := _recall(entry):
        return known
    digest = hash_file(path, progress)
    # A file that changes while it is hashed, or right after, could keep its mtime and leave a wrong hash behind.
    if _entry_of(path, path.stat()) == entry and time.time() - before.st_mtime > _SETTLED:
        _remember(entry, digest)
    return digest


def hash_file(path: Path, progress: Progress = silent) -> str:
    """The SHA-256 of what `path` holds now, in hex. Raises `OSError`."""
    digest, buffer, done = hashlib.sha256(), memoryview(bytearray(1 << 20)), 0
    with path.open("rb", buffering=0) as file:
        total = os.fstat(file.fileno()).st_size
        while count := file.readinto(buffer):
            digest.update(buffer[:count])
            done += count
            progress("hashing", done, total)
    return digest.hexdigest()


def _entry_of(path: Path, stat: os.stat_result) -> Path:
    key = f"{path}\0{stat.st_size}\0{stat.st_mtime_ns}\0{stat.st_ino}"
    return cache_folder() / "hashes" / hashlib.sha256(key.encode("utf-8", "surrogateescape")).hexdigest()


def _recall(entry: Path) -> str | None:
    try:
        text = entry.read_text("ascii")
    except (OSError, UnicodeDecodeError):  # not there, or not ours: hash again
        return None
    return text if _SHA256.fullmatch(text) else None


def _remember(entry: Path, digest: str) -> None:
    part = entry.with_name(f".{entry.name}.{os.getpid()}")
    try:
        entry.parent.mkdir(parents=True, exist_ok=True)
        part.write_text(digest, "ascii")
        part.replace(entry)
    except OSError as error:  # costs the next start a second, and is no reason to fail this one
        log.warning("cannot remember a hash in %s: %s", entry.parent, error)
