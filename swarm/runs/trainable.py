"""A stage of a run: its blocks and, at the two ends of the chain, what comes before the first and after the last.

The model is cut as for serving (`swarm.cutting.skeleton`), except that the first stage keeps the embedding and whatever
else runs before the blocks, and the last keeps the final norm, the head and whatever else runs after them. Which is
which is seen by running a small copy of the model once. The loss is ours: the cross entropy of the next token, averaged
over the tokens of each sample and summed over the samples, so that gradients of any micro-batches add up.

A weight that both ends hold (a head tied to the embedding) is one weight: both start with the same values, and their
gradients are added before either steps.

Dropout is off, so that a forward done again is the same forward.
"""

from __future__ import annotations

import copy
import inspect
import itertools
from collections.abc import Callable
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from swarm.cutting.blocks import StageModel
from swarm.cutting.shrink import shrink
from swarm.cutting.skeleton import Skeleton, num_blocks, patching
from swarm.cutting.splice import Splice
from swarm.cutting.verdict import examine, remembered
from swarm.errors import CannotCut
from swarm.files.checkpoint import Checkpoint
from swarm.runs.initial import initialize, own_dice
from swarm.runs.run import IGNORED
from swarm.types import Span

if TYPE_CHECKING:
    from transformers.configuration_utils import PreTrainedConfig

_TOLERANCE = 1e-4  # of a gradient's norm: rounding leaves a hundredth of it, a wrong cut far more


@dataclass(frozen=True, slots=True)
class Ends:
    """What runs beside the blocks: paths of modules that have weights."""

    before: frozenset[str]
    after: frozenset[str]


class TrainableStage:
    """A span of a model that can be trained. Not for two threads at a time.

    Attributes:
        span: which blocks. first, last: whether the model begins or ends here.
        names: every parameter's name here, and what the whole model calls it.
        tied: of every weight that the other end of the chain holds too, its name and what the whole model calls
            both.
        served: the same weights as a stage that serves.
        device: where the weights are.
        hidden_size: H. vocabulary: how many tokens there are.
    """

    def __init__(
        self, skeleton: Skeleton, span: Span, ties: dict[str, str], device: str | torch.device, unbatched: str = ""
    ) -> None:
        """`skeleton` holds what is left of the model, not yet compacted; `ties` as `cut_for_training`."""
        count = num_blocks(skeleton.config)
        self.span, self.first, self.last = span, span.start == 0, span.end == count
        self.device = torch.device(device)
        self.tied = ties
        absolute = {id(weight): name for name, weight in skeleton.top.named_parameters()}
        skeleton.compact(span)
        skeleton.settle(device)
        self.served = StageModel(_sharing(skeleton), span, device, unbatched)
        self.names = {name: absolute[id(weight)] for name, weight in skeleton.top.named_parameters()}
        self.hidden_size: int = self.served.hidden_size
        self.vocabulary: int = skeleton.config.vocab_size
        self.model = skeleton.top if self.last else skeleton.owner
        self._top = skeleton.top
        self._takes = inspect.signature(inspect.unwrap(type(self.model).forward)).parameters
        self._splice = Splice()
        if not self.first:
            self._splice.enter_at(skeleton.blocks[0])
        if not self.last:
            self._splice.leave_at(skeleton.blocks[-1])

    def parameters(self) -> dict[str, nn.Parameter]:
        """All weights, by what the whole model calls them, sorted by that name."""
        found = {self.names[name]: weight for name, weight in self._top.named_parameters()}
        return dict(sorted(found.items()))

    def forward(self, inputs: torch.Tensor, position_ids: torch.Tensor | None = None) -> torch.Tensor:
        """Run the stage, in whatever gradient mode the caller is.

        Args:
            inputs: token ids [B, N] at the first stage, hidden states [B, N, H] at the others.
            position_ids: [B, N], starting anew at every document that is to see only itself; None for 0, 1, ...

        Returns:
            The hidden states [B, N, H]; at the last stage, the logits [B, N, vocabulary].
        """
        ids = torch.arange(inputs.shape[1], device=inputs.device)[None] if position_ids is None else position_ids
        given: dict[str, Any] = {"input_ids": inputs} if self.first else {"inputs_embeds": inputs.detach()}
        given |= {"position_ids": ids, "use_cache": False}
        with self._splice.given(inputs):
            result = self.model(**{name: value for name, value in given.items() if name in self._takes})
            return result.logits if self.last else self._splice.output

    def loss(self, logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        """The sum over samples of the mean cross entropy of each sample's next tokens, in nats.

        Args:
            logits: [B, N, vocabulary].
            labels: [B, N], the tokens themselves or `IGNORED`; position i is predicted from those before it.
        """
        predicted, wanted = logits[:, :-1].float(), labels[:, 1:]
        each = nn.functional.cross_entropy(
            predicted.flatten(0, 1), wanted.flatten(), ignore_index=IGNORED, reduction="none"
        ).view_as(wanted)
        counts = wanted.ne(IGNORED).sum(1).clamp(min=1)
        return (each.sum(1) / counts).sum()

    def __repr__(self) -> str:
        ends = "".join(mark for mark, here in (("<", self.first), (">", self.last)) if here)
        return f"<TrainableStage {self.span}{ends} weights={sum(w.numel() for w in self.parameters().values())}>"


def fresh_stage(config: PreTrainedConfig, span: Span, seed: int, device: str | torch.device = "cpu") -> TrainableStage:
    """A stage with new weights, which follow from `seed` and each module's name: equal however the model is cut.

    Raises:
        CannotCut: the model cannot be cut for training.
    """
    return _fresh(config, span, seed, device, examine_ends(config), examine(config).unbatched)


def load_stage(folder: Path, span: Span, device: str | torch.device = "cpu") -> TrainableStage:
    """A stage with the weights of the model in `folder`, as float32.

    Raises:
        CannotCut: the model cannot be cut for training.
        ModelNotFound, ModelCorrupt: as `swarm.model.load_stage`.
    """
    checkpoint = Checkpoint(folder)
    config = checkpoint.config()
    skeleton, whole = Skeleton(config, torch.float32), Skeleton(config, torch.float32)
    ties = cut_for_training(skeleton, span, examine_ends(config))
    keys = whole.resolver()
    stored = {name: name for name in skeleton.needed(checkpoint.names)}
    for name, (here, source) in itertools.product(checkpoint.names, ties.items()):
        if source in keys(name):
            stored[here] = name
    skeleton.load({name: partial(checkpoint.tensor, stored[name]) for name in stored}, device)
    return TrainableStage(skeleton, span, ties, device, examine(config).unbatched)


def _fresh(
    config: PreTrainedConfig,
    span: Span,
    seed: int,
    device: str | torch.device,
    ends: Ends,
    unbatched: str = "",
) -> TrainableStage:
    skeleton = Skeleton(config, torch.float32)
    ties = cut_for_training(skeleton, span, ends)
    initialize(skeleton, ties, seed, device)
    return TrainableStage(skeleton, span, ties, device, unbatched)


def cut_for_training(skeleton: Skeleton, span: Span, ends: Ends) -> dict[str, str]:
    """Take everything out of `skeleton` that the stage of `span` does not train.

    Returns:
        Of every weight that is here and tied to one that is not, its name, and what the whole model calls both.
    """
    ties = dict(skeleton.top.all_tied_weights_keys)
    beside = ends.before if span.start == 0 else frozenset()
    if span.end == skeleton.count:
        beside |= ends.after
    skeleton.keep_span(span, beside)
    here = {name for name, _ in skeleton.top.named_parameters(remove_duplicate=False)}
    return {to if to in here else of: of for to, of in ties.items() if (to in here) != (of in here)}


def examine_ends(config: PreTrainedConfig) -> Ends:
    """What runs before the blocks and what after them; a good answer is kept in the user's cache folder.

    It is seen in a small copy of the model, and tried: cut, the copy must have the gradients that it has whole.

    Raises:
        CannotCut: something that has weights and is no block runs in the midst of them, or the gradients differ.
    """
    found = remembered("ends", config, lambda: {name: sorted(part) for name, part in asdict(_try(config)).items()})
    return Ends(frozenset(found["before"]), frozenset(found["after"]))


def _try(config: PreTrainedConfig) -> Ends:
    examine(config)
    small = shrink(config)
    with patching, own_dice():
        whole = Skeleton(small, torch.float32, device="cpu")
    watch = _Watch(whole)
    whole.top.train(False)
    with torch.no_grad():
        whole.top(input_ids=torch.ones(1, 2, dtype=torch.long), use_cache=False)
    ends = watch.ends()
    count = num_blocks(small)
    expected = _gradients([_fresh(small, Span(0, count), 0, "cpu", ends)])
    halves = [Span(0, count // 2), Span(count // 2, count)]
    found = _gradients([_fresh(small, span, 0, "cpu", ends) for span in halves])
    for name, gradient in expected.items():
        if name not in found or (found[name] - gradient).norm() > _TOLERANCE * gradient.norm():
            raise CannotCut(f"{config.model_type}: cut in stages, {name} has another gradient")
    return ends


@torch.enable_grad()
def _gradients(stages: list[TrainableStage]) -> dict[str, torch.Tensor]:
    """The gradient of every weight for two sequences, through `stages` one after another in one graph."""
    dice = torch.Generator().manual_seed(1)
    tokens = torch.randint(1, stages[0].vocabulary, (2, 9), generator=dice)
    hidden = tokens
    for stage in stages:
        hidden = stage.forward(hidden)
    stages[-1].loss(hidden, tokens).backward()  # type: ignore[no-untyped-call]
    sums: dict[str, torch.Tensor] = {}
    for stage in stages:
        for name, weight in stage.parameters().items():
            if weight.grad is not None:
                key = stage.tied.get(name, name)
                sums[key] = sums[key] + weight.grad if key in sums else weight.grad
    return sums


class _Watch:
    """Notes in what order the modules beside the blocks, and the blocks, are called."""

    def __init__(self, skeleton: Skeleton) -> None:
        self._calls: list[str | int] = []
        self._count = skeleton.count
        self._beside = skeleton.beside()
        for name in self._beside:
            skeleton.top.get_submodule(name).register_forward_pre_hook(self._noting(name))
        for index, block in enumerate(skeleton.blocks):
            block.register_forward_pre_hook(self._noting(index))

    def _noting(self, what: str | int) -> Callable[..., None]:
        return lambda *_: self._calls.append(what)

    def ends(self) -> Ends:
        first = self._calls.index(0)
        last = len(self._calls) - 1 - self._calls[::-1].index(self._count - 1)
        before, after = set(self._calls[:first]), set(self._calls[last:]) - {self._count - 1}
        midst = {call for call in self._calls[first:last] if isinstance(call, str)}
        if odd := sorted(midst | (set(self._beside) - before - after)):
            raise CannotCut(f"cannot be cut for training: nobody could hold {odd[0]}, which is no block and no end")
        return Ends(frozenset(map(str, before)), frozenset(map(str, after)))


def _sharing(skeleton: Skeleton) -> Skeleton:
    """Modules of its own, the same weights."""
    weights = [*skeleton.top.parameters(), *skeleton.top.buffers()]
    return copy.deepcopy(skeleton, {id(weight): weight for weight in weights})
