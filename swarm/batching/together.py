"""Whether a family computes the same for many sessions in one forward as for each alone: tried on a small stage."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from swarm.batching.pool import Pool
from swarm.cutting.blocks import StageModel

if TYPE_CHECKING:
    from transformers.configuration_utils import PreTrainedConfig

    from swarm.batching.ragged import Part

_SLOTS = 64


@dataclass(slots=True)
class Recording:
    """A session that was run alone. N positions of one row.

    Attributes:
        hidden: [1, N, H], what went in.
        output: [1, N, H], what came out.
        position_ids: [1, N]
        real: [N] of bool, which positions are no padding.
        pieces: how many positions each step has.
        runs: which slots to use.
    """

    hidden: torch.Tensor
    output: torch.Tensor
    position_ids: torch.Tensor
    real: torch.Tensor
    pieces: tuple[int, ...]
    runs: list[tuple[int, int]]


def why_apart(stage: StageModel, recordings: Sequence[Recording], tolerance: float) -> str:
    """Why sessions of this family have to run one by one; empty where together they give what each gave alone."""
    if (told := _follows_the_longest(stage.config)) != "":
        return told
    try:
        off = _off(stage, recordings)
    except Exception as error:  # noqa: BLE001 - whatever the family's code raises when it meets what it does not expect
        return f"its attention does not go through transformers' interface alone ({type(error).__name__}: {error})"[
            :512
        ]
    return "" if off <= tolerance else f"together they compute something else (off by {off:.1e})"


def _follows_the_longest(config: PreTrainedConfig) -> str:
    if "'rope_type': 'longrope'" in repr(getattr(config, "rope_parameters", None)):
        return "its rotary table follows the longest session of a batch"
    return ""


def _off(stage: StageModel, recordings: Sequence[Recording]) -> float:
    """The largest difference at a real position, as a part of the largest value; each starts a turn after the last."""
    from swarm.batching.ragged import Batch

    pool = Pool(_SLOTS)
    found: list[list[torch.Tensor]] = [[] for _ in recordings]
    for turn in range(max(len(recording.pieces) + late for late, recording in enumerate(recordings))):
        on = [index for index, each in enumerate(recordings) if 0 <= turn - index < len(each.pieces)]
        parts = [_part(recordings[index], turn - index) for index in on]
        spans = [(recordings[index], slice(part.start, part.end)) for index, part in zip(on, parts, strict=True)]
        hidden = torch.cat([each.hidden[:, where] for each, where in spans], 1)
        positions = torch.cat([each.position_ids[:, where] for each, where in spans], 1)
        output = stage.forward_batch(hidden, positions, Batch(parts, pool))
        for index, piece in zip(on, torch.split(output, [part.count for part in parts], 1), strict=True):
            found[index].append(piece)
    return max(_difference(torch.cat(pieces, 1), each) for pieces, each in zip(found, recordings, strict=True))


def _part(recording: Recording, number: int) -> Part:
    from swarm.batching.ragged import Part, between

    ends = list(itertools.accumulate(recording.pieces))
    end, count = ends[number], recording.pieces[number]
    real = recording.real[:end]
    return Part(end - count, count, between(recording.runs, 0, end), None if bool(real.all()) else real)


def _difference(found: torch.Tensor, recording: Recording) -> float:
    difference = (found - recording.output)[0, recording.real].abs().nan_to_num(torch.inf)
    return float(difference.max() / recording.output.abs().max())
