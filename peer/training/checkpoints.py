"""What a stage saves of itself: a folder a round, safetensors and a small JSON, whole or not at all.

`round-00000100/stage-1.safetensors` holds the weights by the names that the whole model gives them, and the moments of
the optimizer under `exp_avg.` and `exp_avg_sq.` (where rounds overlap, the weights of the round before under
`earlier.`); `stage-1.json` says of which run, and what else the next step needs.
"""

from __future__ import annotations

import contextlib
import errno
import logging
import os
import re
from collections.abc import Mapping
from pathlib import Path

import msgspec
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from peer.training.optimizer import Optimizer, in_pieces
from swarm.errors import DiskFull, ModelCorrupt
from swarm.runs.run import Run

log = logging.getLogger(__name__)

_ROUND = re.compile(r"round-(\d{8,})")


class _About(msgspec.Struct):
    """What stands in the JSON file."""

    run: str
    stage: str
    round: int
    steps: int
    unchanged: int
    scale: tuple[float, float]


class Checkpoints:
    """One stage's part in the checkpoints of a run, in a folder that other stages and replicas may share.

    Args:
        folder: None to save nothing.
        resume: whether to offer what an earlier life has saved.
    """

    def __init__(self, folder: Path | None, run: Run, stage: int, resume: bool = False) -> None:
        self.folder = folder
        self._run = run
        self._stage = stage
        self._resume = resume

    def rounds(self) -> list[int]:
        """The rounds that can be gone on from, the first one first."""
        if self.folder is None or not self._resume or not self.folder.is_dir():
            return []
        return sorted(round_ for round_ in rounds_in(self.folder) if self._files(round_)[1].exists())

    def save(self, round_: int, optimizer: Optimizer) -> None:
        """Save the state of the beginning of a round, and delete what is too old.

        Raises `DiskFull` where it cannot be written; the older ones are as before then.
        """
        if self.folder is None:
            return
        weights, about = self._files(round_)
        parts = [path.with_name(f".{path.name}.{os.getpid()}") for path in (weights, about)]
        try:
            weights.parent.mkdir(parents=True, exist_ok=True)
            save_file(_named(optimizer), parts[0])
            parts[1].write_bytes(msgspec.json.format(msgspec.json.encode(self._about(round_, optimizer))))
            for part, path in zip(parts, (weights, about), strict=True):
                part.replace(path)
        except (OSError, SafetensorError) as error:
            for part in parts:
                part.unlink(missing_ok=True)
            full = isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT)
            what = "the disk is full" if full or "No space left" in str(error) else str(error)
            raise DiskFull(f"no checkpoint of round {round_} in {self.folder}: {what}") from error
        self._thin_out()
        log.info("saved round=%d file=%s", round_, weights)

    def load(self, round_: int, optimizer: Optimizer) -> dict[str, torch.Tensor]:
        """What `save` was given, as `Optimizer.state` has it. Raises `ModelCorrupt` where it is damaged."""
        weights, about = self._files(round_)
        try:
            said = msgspec.json.decode(about.read_bytes(), type=_About)
            named = load_file(weights)
        except (OSError, SafetensorError, msgspec.DecodeError) as error:
            raise ModelCorrupt(f"the checkpoint {weights} cannot be read: {error}") from error
        if (said.run, said.stage, said.round) != (self._run.id, self._run.stages[self._stage], round_):
            raise ModelCorrupt(f"{about} is of another run or stage")
        state = _flattened(named, optimizer, weights)
        counters = torch.tensor([said.steps, said.unchanged])
        return {**state, "counters": counters, "scale": torch.tensor(said.scale)}

    def _about(self, round_: int, optimizer: Optimizer) -> _About:
        state = dict(optimizer.state())
        steps, unchanged = state["counters"].tolist()
        now, earlier = state["scale"].tolist()
        stage = self._run.stages[self._stage]
        return _About(self._run.id, stage, round_, steps, unchanged, (now, earlier))

    def _files(self, round_: int) -> tuple[Path, Path]:
        assert self.folder is not None
        stem = self.folder / f"round-{round_:08d}" / f"stage-{self._stage}"
        return stem.with_suffix(".safetensors"), stem.with_suffix(".json")

    def _thin_out(self) -> None:
        """Keep the newest few of this stage's; a folder that nobody needs any more goes with the last file in it."""
        assert self.folder is not None
        mine = sorted(round_ for round_ in rounds_in(self.folder) if self._files(round_)[1].exists())
        for round_ in mine[: -self._run.checkpoint.keep]:
            for path in reversed(self._files(round_)):
                path.unlink(missing_ok=True)
            with contextlib.suppress(OSError):  # other stages still have theirs there
                path.parent.rmdir()


def rounds_in(folder: Path) -> list[int]:
    """The rounds of which something is saved in a folder."""
    found = (_ROUND.fullmatch(path.name) for path in folder.iterdir())
    return sorted(int(match[1]) for match in found if match)


def _named(optimizer: Optimizer) -> dict[str, torch.Tensor]:
    named: dict[str, torch.Tensor] = {}
    for kind, vector in optimizer.vectors().items():
        views = optimizer.layout.views(vector.cpu())
        named |= {f"{_prefix(kind)}{name}": view.clone() for name, view in views.items()}
    return named


def _prefix(kind: str) -> str:
    return "" if kind == "weights" else f"{kind}."


def _flattened(named: Mapping[str, torch.Tensor], optimizer: Optimizer, file: Path) -> dict[str, torch.Tensor]:
    state: dict[str, torch.Tensor] = {}
    for kind in optimizer.vectors():
        flat, prefix = torch.empty(optimizer.layout.size), _prefix(kind)
        for name, view in optimizer.layout.views(flat).items():
            tensor = named.get(f"{prefix}{name}")
            if tensor is None or tensor.shape != view.shape:
                raise ModelCorrupt(f"{file} lacks {prefix}{name}, or has it in another shape")
            view.copy_(tensor)
        state |= dict(in_pieces(kind, flat))
    return state
