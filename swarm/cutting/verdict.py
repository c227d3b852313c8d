"""Whether a model can be cut, found out by cutting a small random copy of it and comparing."""

from __future__ import annotations

import contextlib
import copy
import hashlib
import inspect
import itertools
import json
import math
import os
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from functools import partial
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from swarm.batching.together import Recording, why_apart
from swarm.cutting.blocks import CACHE_ARGUMENTS, StageModel
from swarm.cutting.shrink import fewer_blocks, shrink
from swarm.cutting.skeleton import Skeleton, model_class, num_blocks
from swarm.errors import CannotCut
from swarm.files.checkpoint import cache_folder, canonical
from swarm.types import Span

if TYPE_CHECKING:
    from transformers.cache_utils import Cache
    from transformers.configuration_utils import PreTrainedConfig

_REVISION = 2  # of what is checked: a change makes earlier verdicts void
_TOLERANCE = 2e-5  # of the largest value: what float32 rounding leaves is a tenth of it, a wrong cut far more
_TOLERANCE_OF_PIECES = 2e-4  # the same, where a recurrence adds up in another order
_MOST_WEIGHTS = 2**25  # of a copy that is tried, which has to fit beside everything else on the machine
_PADDING = 2  # of the second sequence, on the left
_USUAL = (9, 1, 1)  # positions per step: what `generate` does, prefill and then decode
_PIECES = (4, 5, 1, 1)  # the same, prefilled in two pieces


@dataclass(frozen=True, slots=True)
class Cut:
    """What trying the cut has shown.

    Attributes:
        returns: 0 if a block returns a tensor, otherwise the length of the tuple whose first item is the hidden states.
        unbatched: why sessions have to run one by one, empty where many can run in one forward.
    """

    returns: int
    unbatched: str = ""


def check_cut(config: PreTrainedConfig) -> None:
    """See that a model of `config` computes the same whole and in stages, cut between any two blocks.

    Raises:
        CannotCut: it does not, or it cannot be tried; the message says why.
    """
    examine(config)


def examine(config: PreTrainedConfig) -> Cut:
    """`check_cut`, and what it found out. A good verdict is kept in the user's cache folder, a bad one is not.

    Raises:
        CannotCut: as `check_cut`.
    """
    return Cut(**remembered("cut", config, lambda: asdict(_try_cut(config))))


def remembered(about: str, config: PreTrainedConfig, find_out: Callable[[], dict[str, Any]]) -> dict[str, Any]:
    """What `find_out` found out `about` models of this config: from the user's cache folder if it is there."""
    kept = cache_folder() / "cuts" / f"{_fingerprint(config)}-{about}.json"
    with contextlib.suppress(OSError, ValueError, TypeError):  # none yet, or not readable: find out again
        return dict(json.loads(kept.read_text()))
    found = find_out()
    with contextlib.suppress(OSError):  # a read-only home costs time at the next start, no more
        _write(kept, json.dumps(found))
    return found


def _fingerprint(config: PreTrainedConfig) -> str:
    import transformers

    versions = [_REVISION, metadata.version("shoal"), transformers.__version__, torch.__version__]
    about = [type(config).__name__, canonical(config.to_dict()), *versions]
    return hashlib.sha256(json.dumps(about, sort_keys=True, default=str).encode()).hexdigest()


def _write(path: Path, text: str) -> None:
    """Whole or not at all: other processes may read or write the same verdict now."""
    part = path.with_name(f".{path.name}.{os.getpid()}")
    path.parent.mkdir(parents=True, exist_ok=True)
    part.write_text(text)
    part.replace(path)


def _try_cut(config: PreTrainedConfig) -> Cut:
    """Compare on a small copy; on one with fewer blocks only, where the small one cannot even be built or run."""
    _refuse_what_no_trial_shows(config)
    reasons = []
    for make_smaller in (shrink, fewer_blocks):
        try:
            with torch.random.fork_rng(devices=[]):  # the caller's dice are not ours to throw
                sample = _Sample(make_smaller(config))
        except CannotCut:
            raise
        except Exception as error:  # noqa: BLE001 - what a family's code raises for sizes that do not fit together
            reasons.append(f"{type(error).__name__}: {error}")
            continue
        return _compare(sample)
    raise CannotCut(f"{config.model_type}: no small copy of it can be run to check the cut ({'; '.join(reasons)})")


def _refuse_what_no_trial_shows(config: PreTrainedConfig) -> None:
    model_class(config)
    if getattr(config, "quantization_config", None) is not None:
        raise CannotCut(f"{config.model_type}: its weights are stored quantized; convert them to bfloat16 first")
    if "'rope_type': 'dynamic'" in repr(getattr(config, "rope_parameters", None)):
        raise CannotCut(f"{config.model_type}: its rotary table follows the longest session that a stage has seen")


def _compare(sample: _Sample) -> Cut:
    expected = _attempt(sample, "prefilled in pieces", partial(sample.uncut, _PIECES))
    off = sample.off(expected, sample.usual)
    if not off <= _TOLERANCE_OF_PIECES:
        raise CannotCut(
            f"{sample.family}: prefilled in pieces it computes something else, even uncut (off by {off:.1e})"
        )
    for spans in _partitions(sample.count):
        off = sample.off(_attempt(sample, "cut in stages", partial(sample.cut_in, spans)), expected)
        if not off <= _TOLERANCE:
            raise CannotCut(f"{sample.family}: cut in stages it computes something else (off by {off:.1e})")
    return replace(sample.cut, unbatched=why_apart(*sample.recorded(), _TOLERANCE))


def _attempt(sample: _Sample, how: str, run: Callable[[], torch.Tensor]) -> torch.Tensor:
    try:
        return run()
    except CannotCut:
        raise
    except Exception as error:  # whatever the family's code raises when it is used in a way it does not expect
        raise CannotCut(f"{sample.family}: {how} it fails with {type(error).__name__}: {error}") from error


def _partitions(count: int) -> list[list[Span]]:
    """Every block alone, and in halves."""
    half = max(1, count // 2)
    alone = [Span(index, index + 1) for index in range(count)]
    return [alone, [Span(0, half), Span(half, count)]] if count > 1 else [alone]


class _Sample:
    """A small model with random weights, a batch with padding, and the logits that the uncut model has for it."""

    def __init__(self, config: PreTrainedConfig) -> None:
        self.family: str = config.model_type
        weights = sum(weight.numel() for weight in Skeleton(config, torch.float32).top.parameters())
        if weights > _MOST_WEIGHTS:
            raise ValueError(f"{weights} weights are too many to try")
        self.whole = Skeleton(config, torch.float32, device="cpu")
        self.whole.top.tie_weights()
        self.whole.top.train(False)
        self.count = num_blocks(config)
        randomize(self.whole.top)
        length = sum(_PIECES)
        self.tokens = torch.randint(1, config.vocab_size, (2, length), generator=torch.Generator().manual_seed(1))
        self.mask = torch.ones(2, length, dtype=torch.long)
        self.mask[1, :_PADDING] = 0
        self.positions = (self.mask.cumsum(-1) - 1).clamp(min=0)
        self.cut = Cut(0)
        self.usual = self._watched()

    def _watched(self) -> torch.Tensor:
        """The logits of the whole model as `generate` would have them; notes what a block returns."""
        block = self.whole.blocks[0]
        forward = block.forward

        def watch(*args: Any, **kwargs: Any) -> Any:
            result = forward(*args, **kwargs)
            self.cut = Cut(0 if isinstance(result, torch.Tensor) else len(result))
            return result

        block.forward = watch
        try:
            return self.uncut(_USUAL)
        finally:
            del block.forward

    def uncut(self, pieces: tuple[int, ...]) -> torch.Tensor:
        """The logits of the whole model, in steps of `pieces` positions."""
        from transformers.cache_utils import DynamicCache

        cache = DynamicCache(config=self.whole.top.config)
        return self.in_steps(pieces, lambda start, end: self.call(self.whole.top, start, end, cache))

    def cut_in(self, spans: list[Span]) -> torch.Tensor:
        """The logits of the chain of stages of `spans`, prefilled in pieces."""
        return self.in_steps(_PIECES, _Chain(self, spans).step)

    def recorded(self) -> tuple[StageModel, list[Recording]]:
        """A stage of all blocks, and what it made of each row alone; the rows in different pieces and slots."""
        chain = _Chain(self, [Span(0, self.count)])
        self.in_steps(_PIECES, chain.step)
        hidden, output = (torch.cat(tensors, 1) for tensors in zip(*chain.seen, strict=True))
        pieces, runs = ((1, 2, 1, 7), _PIECES), ([(3, 40)], [(0, 2), (45, 46), (50, 64)])
        return chain.stages[0], [
            Recording(
                hidden[row : row + 1],
                output[row : row + 1],
                self.positions[row : row + 1],
                self.mask[row].bool(),
                pieces[row],
                runs[row],
            )
            for row in range(len(self.mask))
        ]

    @torch.inference_mode()
    def in_steps(self, pieces: tuple[int, ...], step: Callable[[int, int], torch.Tensor]) -> torch.Tensor:
        """What `step` gives for positions `start` to `end`, one piece after the other."""
        ends = itertools.accumulate(pieces)
        return torch.cat([step(end - count, end) for end, count in zip(ends, pieces, strict=True)], 1)

    def call(self, model: nn.Module, start: int, end: int, cache: Cache) -> torch.Tensor:
        """The logits that `model` gives for positions `start` to `end`."""
        offered = {"position_ids": self.positions[:, start:end], **dict.fromkeys(CACHE_ARGUMENTS, cache)}
        taken = inspect.signature(type(model).forward).parameters
        offered = {name: value for name, value in offered.items() if name in taken}
        tokens, mask = self.tokens[:, start:end], self.mask[:, :end]
        logits: torch.Tensor = model(tokens, attention_mask=mask, use_cache=True, **offered).logits
        return logits

    def off(self, found: torch.Tensor, expected: torch.Tensor) -> float:
        """The largest difference at a real position, as a part of the largest value."""
        if not found.shape[:2] == expected.shape[:2] == self.mask.shape:
            return math.inf
        difference = (found - expected)[self.mask.bool()].abs().nan_to_num(math.inf)
        return float(difference.max() / expected.abs().max())


class _Chain:
    """A sample cut in stages of `spans` and two ends, in one process."""

    def __init__(self, sample: _Sample, spans: list[Span]) -> None:
        from swarm.cutting.caches import LengthCache

        self.sample = sample
        self.stages = [_stage(sample.whole, span) for span in spans]
        self.caches = [stage.new_cache() for stage in self.stages]
        self.ends = copy.deepcopy(sample.whole)
        self.ends.keep_ends(self._run, sample.cut.returns)
        self.cache = LengthCache()
        self.start = self.end = 0
        self.seen: list[tuple[torch.Tensor, torch.Tensor]] = []  # what went in and came out, [B, N, H] each

    def step(self, start: int, end: int) -> torch.Tensor:
        self.start, self.end = start, end
        self.cache.length = start
        return self.sample.call(self.ends.top, start, end, self.cache)

    def _run(self, hidden: torch.Tensor) -> torch.Tensor:
        mask, positions = self.sample.mask[:, : self.end], self.sample.positions[:, self.start : self.end]
        entered = hidden
        for stage, cache in zip(self.stages, self.caches, strict=True):
            hidden = stage.run(hidden, position=self.start, cache=cache, attention_mask=mask, position_ids=positions)
        self.seen.append((entered, hidden))
        return hidden


def _stage(whole: Skeleton, span: Span) -> StageModel:
    skeleton = copy.deepcopy(whole)
    skeleton.keep_span(span)
    skeleton.compact(span)
    return StageModel(skeleton, span, "cpu")


def randomize(model: nn.Module) -> None:
    """Give every weight a value of its own, so that a norm, bias or scale that is left out makes a difference."""
    dice = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for weight in model.parameters():
            noise = torch.randn(weight.shape, generator=dice)
            weight.copy_(noise / weight.shape[-1] ** 0.5 if weight.ndim > 1 else weight + 0.2 * noise)
