"""Weights to begin with: the family's own initialisation, with dice of its own for every module.

The dice of a module follow from the run's seed and the module's name in the whole model. So a stage is given the same
weights whatever else is in the same process, and all stages together those of a model that was never cut.
"""

from __future__ import annotations

import contextlib
import hashlib
import threading
from collections.abc import Iterator
from typing import TYPE_CHECKING

import torch
from torch import nn

from swarm.cutting.skeleton import Skeleton, patching

if TYPE_CHECKING:
    from transformers.modeling_utils import PreTrainedModel

_throwing = threading.Lock()


@torch.no_grad()
def initialize(skeleton: Skeleton, ties: dict[str, str], seed: int, device: str | torch.device) -> None:
    """Give every weight of `skeleton` that is on the meta device a value on `device`.

    Args:
        ties: of every weight here that is tied to one that was taken out, its name and the name of both.
    """
    top = skeleton.top
    with patching, own_dice():
        _fill(top, top, "", seed)
        top.tie_weights(recompute_mapping=False)
        for here, value in _lent(skeleton, ties, seed):
            top.get_parameter(here).copy_(value)
    for weight in top.parameters():
        weight.data = weight.data.to(device)
        weight._is_hf_initialized = True  # type: ignore[attr-defined]  # or `Skeleton.settle` would begin anew


@contextlib.contextmanager
def own_dice() -> Iterator[None]:
    """Throw torch's dice, which are the whole process's, without anybody else noticing."""
    with _throwing, torch.random.fork_rng(devices=[]):
        yield


def _fill(top: PreTrainedModel, module: nn.Module, path: str, seed: int) -> None:
    """Children first, as transformers does it: some families' parents rescale what their children were given."""
    for name, child in module.named_children():
        _fill(top, child, f"{path}.{name}" if path else name, seed)
    for name, weight in module.named_parameters(recurse=False):
        if weight.is_meta:
            module.register_parameter(name, nn.Parameter(torch.zeros_like(weight, device="cpu")))
    if next(module.parameters(), None) is not None:
        torch.manual_seed(_dice(seed, path))
        top._init_weights(module)  # type: ignore[no-untyped-call]


def _dice(seed: int, path: str) -> int:
    return int.from_bytes(hashlib.sha256(f"{seed}\0{path}".encode()).digest()[:8], "big") >> 1


def _lent(skeleton: Skeleton, ties: dict[str, str], seed: int) -> Iterator[tuple[str, torch.Tensor]]:
    """The values of weights that are copies of one that is held elsewhere."""
    copies = {here: source for here, source in ties.items() if here != source}
    if not copies:
        return
    whole = Skeleton(skeleton.config, skeleton.dtype)
    for here, source in copies.items():
        path, _, name = source.rpartition(".")
        module = whole.top.get_submodule(path)
        _fill(whole.top, module, path, seed)
        yield here, module.get_parameter(name)
