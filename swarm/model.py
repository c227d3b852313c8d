"""Any Hugging Face causal LM, cut: the blocks of a span for a peer, and the two ends for a client."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from swarm.cutting.blocks import StageModel, reorder, rollback
from swarm.cutting.skeleton import Skeleton, num_blocks
from swarm.cutting.verdict import check_cut, examine
from swarm.errors import UsageError
from swarm.files.checkpoint import Checkpoint
from swarm.quantization.loading import load_quantized, quantize_head
from swarm.quantization.packed import pack, pack_head
from swarm.quantization.store import QuantStore
from swarm.quantization.weights import Kind
from swarm.types import Span

if TYPE_CHECKING:
    from transformers.modeling_utils import PreTrainedModel

__all__ = [
    "Progress",
    "StageModel",
    "check_cut",
    "load_ends",
    "load_stage",
    "num_blocks",
    "reorder",
    "rollback",
]

Progress = Callable[[int, int], None]
"""Called with (bytes taken so far, bytes in all): from the loader's threads, but one at a time."""


def load_stage(
    folder: Path,
    span: Span,
    *,
    dtype: torch.dtype,
    device: str | torch.device = "cpu",
    quantize: Kind | None = None,
    packed: bool = True,
    progress: Progress | None = None,
) -> StageModel:
    """The blocks of `span` of the model in `folder`, ready to run. Reads no other weights.

    On the CPU, weights that are stored in `dtype` are mapped from the file, not copied; but those of linear layers are
    `packed`, layer by layer, for faster products (`swarm.quantization.packed`). Where `quantize` asks for it they are
    quantized instead, block by block, and kept so in the user's cache folder for the next time.

    Raises:
        UsageError: the model has no such blocks.
        CannotCut: the model cannot be cut into stages.
        ModelNotFound: there is no model in `folder`.
        ModelCorrupt: a file of it is missing or damaged, or it is not what its config says.
    """
    checkpoint = Checkpoint(folder)
    config = checkpoint.config()
    cut = examine(config)
    if span.end > num_blocks(config):
        raise UsageError(f"blocks {span} are not in {folder}: it has blocks 0:{num_blocks(config)}")
    skeleton = Skeleton(config, dtype)
    skeleton.keep_span(span)
    if quantize is None:
        _load(skeleton, checkpoint, device, progress)
    else:
        reader, report = _reader(checkpoint, skeleton.needed(checkpoint.names), progress)
        load_quantized(skeleton, checkpoint, span, quantize, torch.device(device), reader, report)
    skeleton.compact(span)
    skeleton.settle(device)
    if packed and quantize is None and not skeleton.top.all_tied_weights_keys:
        for block in skeleton.blocks:
            pack(block)
        checkpoint.unmap()
    return StageModel(skeleton, span, device, cut.unbatched)


def load_ends(
    folder: Path,
    chain: Callable[[torch.Tensor], torch.Tensor],
    *,
    dtype: torch.dtype,
    device: str | torch.device = "cpu",
    mixin: type | None = None,
    quantize: Kind | None = None,
    packed: bool = False,
) -> PreTrainedModel:
    """The model in `folder` with `chain` in place of its blocks: embeddings, final norm and head are its own.

    Args:
        folder: with `config.json` and safetensors.
        chain: called once in every forward with the hidden states that go into the first block, [B, N, H]; returns
            what comes out of the last one, [B, N, H].
        dtype: of the weights and the hidden states.
        device: where the ends run.
        quantize: keep the head's weight so, by far the largest that is read for each token here.
        packed: or, on the CPU, have it laid out for faster products, in memory of its own.
        mixin: put before the family's class among the bases of the model's class.

    Raises:
        CannotCut, ModelNotFound, ModelCorrupt: as `load_stage`.
    """
    checkpoint = Checkpoint(folder)
    config = checkpoint.config()
    cut = examine(config)
    config.name_or_path = str(folder)
    skeleton = Skeleton(config, dtype, mixin)
    skeleton.keep_ends(chain, cut.returns)
    _load(skeleton, checkpoint, device, None)
    skeleton.settle(device)
    if quantize is not None:
        store = QuantStore(checkpoint.model_id, quantize, dtype)
        quantize_head(skeleton.top, store, num_blocks(config), torch.device(device))
    elif packed:
        pack_head(skeleton.top)
    if (checkpoint.folder / "generation_config.json").exists():
        from transformers import GenerationConfig

        skeleton.top.generation_config = GenerationConfig.from_pretrained(checkpoint.folder)
    return skeleton.top


def _load(skeleton: Skeleton, checkpoint: Checkpoint, device: str | torch.device, progress: Progress | None) -> None:
    names = skeleton.needed(checkpoint.names)
    reader, _ = _reader(checkpoint, names, progress)
    skeleton.load({name: reader(name) for name in names}, device)


def _reader(
    checkpoint: Checkpoint, names: Iterable[str], progress: Progress | None
) -> tuple[Callable[[str], Callable[[], torch.Tensor]], Callable[[str], None]]:
    """For each of `names` what reads it, and what tells that it need not be read; both tell how far it is."""
    report = _Report(progress, sum(checkpoint.names[name].nbytes for name in names))

    def done(name: str) -> None:
        report.add(checkpoint.names[name].nbytes)

    def reader(name: str) -> Callable[[], torch.Tensor]:
        def read() -> torch.Tensor:
            tensor = checkpoint.tensor(name)
            done(name)
            return tensor

        return read

    return reader, done


class _Report:
    """Adds up what the loader's threads have taken, and tells."""

    def __init__(self, progress: Progress | None, total: int) -> None:
        self._progress = progress
        self._total = total
        self._done = 0
        self._lock = threading.Lock()

    def add(self, size: int) -> None:
        if self._progress is None:
            return
        with self._lock:
            self._done += size
            self._progress(self._done, self._total)
