"""What a stage saves of itself: a folder a round, safetensors and a small JSON, whole or not at all.

`round-00000100/stage-1.safetensors` holds the weights by the names that the whole model gives them, and the moments of
the optimizer under `exp_avg.` and `exp_avg_sq.` (where rounds overlap, the weights of the round before under
`earlier.`); `stage-1.json` says of which run, and what else the next step needs.
"""

from __future__ import annotations

import contextlib
import errno
import json
import logging
import os
import re
from collections.abc import Iterator, Mapping
from pathlib import Path

import msgspec
import torch
from safetensors import SafetensorError, safe_open

from peer.training.optimizer import Optimizer, in_pieces
from swarm.errors import DiskFull, ModelCorrupt
from swarm.runs.run import Run
from swarm.tensors import to_bytes

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

    A checkpoint is good once a round has ended in a step from it: until then, its weights may be those of a model that
    has diverged. Older ones are deleted for the sake of good ones alone.

    Args:
        folder: None to save nothing.
        resume: whether what an earlier life has saved can be gone on from, too.
    """

    def __init__(self, folder: Path | None, run: Run, stage: int, resume: bool = False) -> None:
        self.folder = folder
        self._run = run
        self._stage = stage
        self._resume = resume
        self._own: set[int] = set()  # rounds that were saved in this life
        self._unproven: list[int] = []  # rounds that were saved, or gone on from, since the last step

    def rounds(self) -> list[int]:
        """The rounds that can be gone on from, the first one first."""
        if self.folder is None or not self.folder.is_dir():
            return []
        return [round_ for round_ in self._mine() if self._resume or round_ in self._own]

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
            _write(parts[0], _named(optimizer))
            parts[1].write_bytes(msgspec.json.format(msgspec.json.encode(self._about(round_, optimizer))))
            for part, path in zip(parts, (weights, about), strict=True):
                part.replace(path)
        except (OSError, SafetensorError) as error:
            for part in parts:
                part.unlink(missing_ok=True)
            full = isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT)
            what = "the disk is full" if full or "No space left" in str(error) else str(error)
            raise DiskFull(f"no checkpoint of round {round_} in {self.folder}: {what}") from error
        self._own.add(round_)
        self._unproven.append(round_)
        self._thin_out()
        log.info("saved round=%d file=%s", round_, weights)

    def proven(self) -> None:
        """What was saved last is good: a step was made from it."""
        if self._unproven:
            self._unproven.clear()
            self._thin_out()

    def forsake(self) -> int | None:
        """Delete what is not proven; the round of the newest that is left, None where there is none."""
        if self.folder is None or not self.folder.is_dir():
            return None
        for round_ in self._unproven:
            self._delete(round_)
        self._unproven.clear()
        return max(self._mine(), default=None)

    def load(self, round_: int, optimizer: Optimizer) -> Mapping[str, torch.Tensor]:
        """What `save` was given, as `Optimizer.state` has it. Raises `ModelCorrupt` where it is damaged."""
        weights, about = self._files(round_)
        try:
            said = msgspec.json.decode(about.read_bytes(), type=_About)
            named = _read(weights)
        except (OSError, SafetensorError, msgspec.DecodeError) as error:
            raise ModelCorrupt(f"the checkpoint {weights} cannot be read: {error}") from error
        if (said.run, said.stage, said.round) != (self._run.id, self._run.stages[self._stage], round_):
            raise ModelCorrupt(f"{about} is of another run or stage")
        self._unproven = [round_]
        rest = {"counters": torch.tensor([said.steps, said.unchanged]), "scale": torch.tensor(said.scale)}
        return _Saved(named, optimizer, weights, rest)

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
        """Keep the newest few of this stage's that are good, and the newest of all."""
        good = [round_ for round_ in self._mine() if round_ not in self._unproven]
        for round_ in (*good[: -self._run.checkpoint.keep], *self._unproven[:-1]):
            self._delete(round_)
        del self._unproven[:-1]

    def _mine(self) -> list[int]:
        assert self.folder is not None
        return [round_ for round_ in rounds_in(self.folder) if self._files(round_)[1].exists()]

    def _delete(self, round_: int) -> None:
        """A folder that nobody needs any more goes with the last file in it."""
        files = self._files(round_)
        for path in reversed(files):
            path.unlink(missing_ok=True)
        with contextlib.suppress(OSError):  # other stages still have theirs there
            files[0].parent.rmdir()


def rounds_in(folder: Path) -> list[int]:
    """The rounds of which something is saved in a folder."""
    found = (_ROUND.fullmatch(path.name) for path in folder.iterdir())
    return sorted(int(match[1]) for match in found if match)


def _named(optimizer: Optimizer) -> dict[str, torch.Tensor]:
    """Views of all that is saved."""
    named: dict[str, torch.Tensor] = {}
    for kind, vector in optimizer.vectors().items():
        named |= {f"{_prefix(kind)}{name}": view for name, view in optimizer.layout.views(vector).items()}
    return named


def _prefix(kind: str) -> str:
    return "" if kind == "weights" else f"{kind}."


def _write(file: Path, named: Mapping[str, torch.Tensor]) -> None:
    """Save float32 tensors as `safetensors.torch.save_file` does, which would have a copy of them all in memory."""
    header, end = {}, 0
    for name, tensor in named.items():
        start, end = end, end + tensor.nbytes
        header[name] = {"dtype": "F32", "shape": list(tensor.shape), "data_offsets": [start, end]}
    head = json.dumps(header).encode()
    head += b" " * (-len(head) % 8)
    with file.open("wb") as out:
        out.write(len(head).to_bytes(8, "little") + head)
        for tensor in named.values():
            out.write(to_bytes(tensor.cpu()))


def _read(file: Path) -> dict[str, torch.Tensor]:
    """The tensors of a file, mapped: only what is looked at is read."""
    with safe_open(file, framework="pt") as opened:
        return {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118 (it is no dict)


class _Saved(Mapping[str, torch.Tensor]):
    """What was saved, as `Optimizer.state` has it: each piece is put together when it is asked for."""

    def __init__(
        self, named: Mapping[str, torch.Tensor], optimizer: Optimizer, file: Path, rest: Mapping[str, torch.Tensor]
    ) -> None:
        self._entries = optimizer.layout.entries
        self._named = named
        self._rest = rest
        self._pieces: dict[str, tuple[str, int, int]] = {}  # of which vector, from where, how many
        for kind, vector in optimizer.vectors().items():
            start = 0
            for name, piece in in_pieces(kind, vector):
                self._pieces[name] = kind, start, len(piece)
                start += len(piece)
            for entry in self._entries:
                found = named.get(f"{_prefix(kind)}{entry.name}")
                if found is None or tuple(found.shape) != entry.shape:
                    raise ModelCorrupt(f"{file} lacks {_prefix(kind)}{entry.name}, or has it in another shape")

    def __getitem__(self, name: str) -> torch.Tensor:
        if name in self._rest:
            return self._rest[name]
        kind, start, count = self._pieces[name]
        piece = torch.empty(count)
        for entry in self._entries:
            low, high = max(entry.place.start, start), min(entry.place.stop, start + count)
            if low < high:
                flat = self._named[f"{_prefix(kind)}{entry.name}"].view(-1)
                piece[low - start : high - start] = flat[low - entry.place.start : high - entry.place.start]
        return piece

    def __iter__(self) -> Iterator[str]:
        return iter([*self._pieces, *self._rest])

    def __len__(self) -> int:
        return len(self._pieces) + len(self._rest)
