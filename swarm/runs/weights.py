"""A run's weights as they are now, fetched from its members: the ends for a client, all of them for a folder."""

from __future__ import annotations

import asyncio
import logging
import os
import tempfile
from collections.abc import Awaitable, Callable, Collection, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import msgspec
import torch
from safetensors import SafetensorError, safe_open

from swarm import tensors
from swarm.cutting.skeleton import Skeleton, patching
from swarm.errors import BadTensor, DiskFull, Malformed, ModelCorrupt, NoRoute, RemoteError, UsageError
from swarm.rpc import Link, Rpc
from swarm.runs.layout import Entry, Layout
from swarm.runs.run import Run
from swarm.runs.trainable import cut_for_training, examine_ends
from swarm.runs.wire_weights import MAX_CHUNK, NEWEST, Slice, Weights
from swarm.types import Offer, Span

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedTokenizerBase

log = logging.getLogger(__name__)

T = TypeVar("T")

SECONDS = 30.0  # for a member to answer with a chunk
ATTEMPTS = 5  # at weights of one and the same round
STEP_SECONDS = 0.1  # for the others to make the step that one has made; twice as long each time
SHARD = "1GB"  # of a model that is written: as much of it is in memory at once


@dataclass(frozen=True, slots=True)
class StagePlan:
    """What a stage holds, known without holding it."""

    span: Span
    layout: Layout
    tied: dict[str, str]  # as `TrainableStage.tied`


def stage_plans(run: Run, config: PreTrainedConfig) -> list[StagePlan]:
    """The stages of a run. Raises `CannotCut`."""
    return [_plan(config, span) for span in run.spans]


def _plan(config: PreTrainedConfig, span: Span) -> StagePlan:
    skeleton = Skeleton(config, torch.float32)
    ties = cut_for_training(skeleton, span, examine_ends(config))
    shapes = {name: tuple(weight.shape) for name, weight in skeleton.top.named_parameters()}
    return StagePlan(span, Layout(shapes, ties), ties)


class Fetcher:
    """Asks members for weights."""

    def __init__(self, run: Run, rpc: Rpc, plans: Sequence[StagePlan]) -> None:
        self.plans = list(plans)
        self._key = bytes.fromhex(run.id)[:16]
        self._rpc = rpc

    async def ends(self, offers: Sequence[Offer]) -> tuple[int, dict[str, torch.Tensor]]:
        """A round, and the weights beside the blocks at its beginning, by their names in the whole model.

        Raises `NoRoute` or a `RemoteError`.
        """
        for attempt in range(ATTEMPTS):
            rounds: set[int] = set()
            found: dict[str, torch.Tensor] = {}
            for plan in self._outer:
                weights, round_ = await self._stage(plan, offers, _beside(plan), NEWEST)
                rounds.add(round_)
                found |= weights
            if len(rounds) == 1:
                return rounds.pop(), found
            await asyncio.sleep(STEP_SECONDS * 2**attempt)
        raise NoRoute("the ends of the model are never at the same round while they are fetched")

    async def newest(self, offers: Sequence[Offer]) -> int | None:
        """The round whose weights both ends of the model have at this moment; None while one is ahead.

        Raises as `ends`.
        """
        rounds = set()
        for plan in self._outer:
            entry = plan.layout.entries[0]

            def ask(link: Link, entry: Entry = entry) -> Awaitable[int]:
                return self._fill(torch.empty(1), link, entry, NEWEST)

            rounds.add(await self._of_any(plan, offers, ask))
        return rounds.pop() if len(rounds) == 1 else None

    @property
    def _outer(self) -> list[StagePlan]:
        """The first and the last stage."""
        return self.plans[:1] if len(self.plans) == 1 else [self.plans[0], self.plans[-1]]

    async def everything(self, offers: Sequence[Offer], folder: Path) -> tuple[int, dict[str, torch.Tensor]]:
        """A round, and all weights at its beginning, mapped from a file on the disk of `folder`: memory may be smaller.

        Raises `NoRoute` or a `RemoteError`, `DiskFull` where there is no room.
        """
        room = room_on_disk(folder, sum(plan.layout.size for plan in self.plans))
        for _ in range(ATTEMPTS):
            rounds: list[int] = []
            found: dict[str, torch.Tensor] = {}
            rest = room
            for plan in self.plans:
                part, rest = rest[: plan.layout.size], rest[plan.layout.size :]
                names = {each.name for each in plan.layout.entries}
                weights, round_ = await self._stage(plan, offers, names, NEWEST, part)
                rounds.append(round_)
                found |= weights
            if len(set(rounds)) == 1:
                return rounds[0], found
            log.info("the stages were at different rounds, once more rounds=%s", rounds)
        raise NoRoute("the stages of the run are never at the same round while their weights are fetched")

    async def _stage(
        self,
        plan: StagePlan,
        offers: Sequence[Offer],
        names: Collection[str],
        round_: int,
        room: torch.Tensor | None = None,
    ) -> tuple[dict[str, torch.Tensor], int]:
        """Weights of one stage under the whole model's names, in `room` if there is some; the round they are of."""
        return await self._of_any(plan, offers, lambda link: self._from(link, plan, names, round_, room))

    async def _of_any(self, plan: StagePlan, offers: Sequence[Offer], ask: Callable[[Link], Awaitable[T]]) -> T:
        """What the first member of a stage says that says something."""
        last: Exception = NoRoute(f"nobody holds blocks {plan.span}", ((plan.span.start, plan.span.end),))
        for offer in [offer for offer in offers if offer.span == plan.span]:
            try:
                return await ask(await self._rpc.connect(offer.peer, offer.addresses))
            except RemoteError as error:
                log.info("no weights from peer=%s error=%r", offer.peer[-6:], str(error))
                last = error
        raise last

    async def _from(
        self, link: Link, plan: StagePlan, names: Collection[str], round_: int, room: torch.Tensor | None
    ) -> tuple[dict[str, torch.Tensor], int]:
        found = {}
        for entry in plan.layout.entries:
            if entry.name in names:
                count = entry.place.stop - entry.place.start
                flat = torch.empty(count) if room is None else room[entry.place]
                round_ = await self._fill(flat, link, entry, round_)
                found[plan.tied.get(entry.name, entry.name)] = flat.view(entry.shape)
        return found, round_

    async def _fill(self, flat: torch.Tensor, link: Link, entry: Entry, round_: int) -> int:
        for start in range(0, len(flat), MAX_CHUNK):
            part = flat[start : start + MAX_CHUNK]
            message = Weights(self._key, round_, entry.start + start, len(part))
            answer, body = await link.call(message, timeout=SECONDS)
            if not isinstance(answer, Slice):
                raise Malformed("an answer to Weights that is none", link.peer)
            (weights,) = tensors.decode(body, [answer.weights])
            if weights.shape != part.shape or weights.dtype != part.dtype or not torch.isfinite(weights).all():
                raise BadTensor("weights that are not what was asked for", link.peer)
            part.copy_(weights)
            round_ = answer.round
        return round_


def room_on_disk(folder: Path, count: int) -> torch.Tensor:
    """Room for `count` float32 values beside `folder`: in a file without a name, which ends with the tensor.

    Raises `DiskFull`.
    """
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile(dir=folder.parent, prefix=f".{folder.name}.") as file:
            if hasattr(os, "posix_fallocate"):  # a mapped page that cannot be written would end this process
                os.posix_fallocate(file.fileno(), 0, 4 * count)
            return torch.from_file(file.name, shared=True, size=count, dtype=torch.float32)
    except OSError as error:
        raise DiskFull(f"no room for the weights beside {folder}: {error}") from error


def saved_weights(run: Run, plans: Sequence[StagePlan], folder: Path) -> tuple[int, dict[str, torch.Tensor]]:
    """The latest round at which every stage of a run was saved in `folder`, and all weights at its beginning.

    Raises `UsageError` where there is no such round, `ModelCorrupt` where a file cannot be read.
    """
    for path in sorted(folder.glob("round-*"), reverse=True):
        files = [path / f"stage-{number}.safetensors" for number in range(len(plans))]
        if not all(file.exists() for file in files):
            continue
        found: dict[str, torch.Tensor] = {}
        for plan, file in zip(plans, files, strict=True):
            found |= _read(run, plan, file)
        return int(path.name.removeprefix("round-")), found
    raise UsageError(f"{folder} has no round at which all {len(plans)} stages of the run were saved")


def _read(run: Run, plan: StagePlan, file: Path) -> dict[str, torch.Tensor]:
    try:
        about = msgspec.json.decode(file.with_suffix(".json").read_bytes(), type=dict[str, Any])
        with safe_open(file, framework="pt") as tensors_:
            found = {entry.name: tensors_.get_tensor(entry.name) for entry in plan.layout.entries}
    except (OSError, SafetensorError, msgspec.DecodeError) as error:
        raise ModelCorrupt(f"{file} cannot be read: {error}") from None
    if about.get("run") != run.id:
        raise ModelCorrupt(f"{file} is of another run")
    return {plan.tied.get(name, name): weight for name, weight in found.items()}


def _beside(plan: StagePlan) -> set[str]:
    """The names of a stage's weights that are in no block."""
    marks = [f".{index}." for index in plan.span]
    return {entry.name for entry in plan.layout.entries if not any(mark in entry.name for mark in marks)}


async def save_model(
    folder: Path, config: PreTrainedConfig, weights: dict[str, torch.Tensor], tokenizer: PreTrainedTokenizerBase
) -> None:
    """An ordinary folder that `from_pretrained` loads. Raises `DiskFull` where it cannot be written."""
    await asyncio.to_thread(write_model, folder, config, weights, tokenizer)


def write_model(
    folder: Path, config: PreTrainedConfig, weights: dict[str, torch.Tensor], tokenizer: PreTrainedTokenizerBase
) -> None:
    """As `save_model`: through transformers' own saving, which undoes what its loading does to names and layouts."""
    skeleton = Skeleton(config, torch.float32)
    top: Any = skeleton.top
    for name in [name for name, _ in top.named_parameters() if name not in top.all_tied_weights_keys]:
        parent, _, own = name.rpartition(".")
        top.get_submodule(parent).register_parameter(own, torch.nn.Parameter(weights[name]))
    with patching:
        top.tie_weights(recompute_mapping=False)
    part = folder.with_name(f".{folder.name}.part")
    try:
        top.save_pretrained(part, max_shard_size=SHARD)
        tokenizer.save_pretrained(part)
        _exchange(part, folder)
    except OSError as error:
        raise DiskFull(f"the model cannot be written to {folder}: {error}") from error


def _exchange(part: Path, folder: Path) -> None:
    """Put a whole folder in the place of an older one."""
    folder.mkdir(parents=True, exist_ok=True)
    for file in part.iterdir():
        file.replace(folder / file.name)
    part.rmdir()
