"""Quantized blocks on disk, so that a peer quantizes once: in the cache folder, one file a block.

A file is written whole or not at all. What is there and does not fit is as good as not there.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from swarm.files.checkpoint import cache_folder
from swarm.quantization.weights import GROUP, Kind, QuantizedWeight, fitting
from swarm.types import ModelId

log = logging.getLogger(__name__)

_REVISION = 2  # of how weights are quantized and kept: a change makes earlier files void
_VALUES, _SCALES = ".values", ".scales"


class QuantStore:
    """The quantized blocks of one model.

    Args:
        model: its content; weights of another are never taken for it.
        dtype: what the weights were loaded in before they were quantized.
    """

    def __init__(self, model: ModelId, kind: Kind, dtype: torch.dtype) -> None:
        self.kind = kind
        name = f"{model[:32]}-{kind}-{str(dtype).removeprefix('torch.')}-{_REVISION}"
        self.folder = cache_folder() / "quantized" / name

    def _file(self, block: int) -> Path:
        return self.folder / f"block-{block:05}.safetensors"

    def read(self, block: int, shapes: Mapping[str, tuple[int, int]]) -> dict[str, QuantizedWeight] | None:
        """The weights of a block, mapped from the file, or None where they are not there.

        Args:
            shapes: [N, K] of each, by its path in the block.
        """
        file = self._file(block)
        if not file.exists():
            return None
        try:
            with safe_open(file, framework="pt") as tensors:
                found = {name: tensors.get_tensor(name) for name in tensors.keys()}  # noqa: SIM118 - it is no dict
            return {path: _weight(found, path, fitting(self.kind, shape[1]), shape) for path, shape in shapes.items()}
        except (SafetensorError, OSError, KeyError, ValueError) as error:
            log.warning("quantized anew, the cached block is damaged file=%s error=%r", file, str(error))
            return None

    def write(self, block: int, weights: Mapping[str, QuantizedWeight]) -> None:
        """Keep the weights of a block. Where that is not possible, the next start takes longer, and no more."""
        file = self._file(block)
        part = file.with_name(f".{file.name}.{os.getpid()}")
        tensors = {f"{path}{_VALUES}": weight.values.cpu() for path, weight in weights.items()}
        tensors |= {f"{path}{_SCALES}": weight.scales.cpu() for path, weight in weights.items()}
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            save_file(tensors, part)
            part.replace(file)
        except (SafetensorError, OSError) as error:
            part.unlink(missing_ok=True)
            log.warning("quantized blocks cannot be kept folder=%s error=%r", self.folder, str(error))


def _weight(found: Mapping[str, torch.Tensor], path: str, kind: Kind, shape: tuple[int, int]) -> QuantizedWeight:
    """Raises `KeyError` or `ValueError`."""
    values, scales = found[path + _VALUES], found[path + _SCALES]
    rows, columns = shape
    expected: tuple[object, ...]
    if kind == "int8":
        expected = (torch.int8, (rows, columns), torch.float32, (rows,))
    else:
        expected = (torch.uint8, (rows, columns // 2), torch.bfloat16, (columns // GROUP, rows, 2))
    if (values.dtype, tuple(values.shape), scales.dtype, tuple(scales.shape)) != expected:
        raise ValueError(f"{path} has another form")
    return QuantizedWeight(kind, values, scales)
