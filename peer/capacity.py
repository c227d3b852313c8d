"""What this machine can do, measured."""

from __future__ import annotations

import statistics
import time
from dataclasses import dataclass
from pathlib import Path

import torch

from peer.stage import Stage, StepInput
from swarm.errors import UsageError

DEFAULT_CACHE_TOKENS = 16384
_RUNS = 3
_CACHE_SHARE = 0.8  # of the memory that is available now, at most


@dataclass(frozen=True, slots=True)
class Capacity:
    """What a stage can do on this machine."""

    tokens_per_second: float  # one session's decode through the whole stage
    bytes_per_token: int  # of its KV cache


def measure(stage: Stage) -> Capacity:
    """Run a few decode steps of one session: the median is the speed, what its cache holds is the size."""
    state = stage.open(stage.span, batch=1, max_length=_RUNS)
    hidden = torch.zeros(1, 1, stage.model.hidden_size)
    seconds = []
    for position in range(_RUNS):
        started = time.perf_counter()
        stage.run(state, StepInput(number=position + 1, position=position, hidden=hidden))
        seconds.append(time.perf_counter() - started)
    size = stage.bytes_per_token(state)
    stage.close(state)
    return Capacity(1.0 / max(statistics.median(seconds), 1e-6), size)


def cache_tokens(wanted: int | None, capacity: Capacity, available: int | None) -> int:
    """How many tokens the cache is to hold: what is `wanted`, else what a peer holds by default or memory allows.

    `available` is in bytes, None where that cannot be known. Raises `UsageError` where `wanted` would not fit: a
    peer that promises more than it has dies of it in the middle of somebody's answer.
    """
    if available is None or not capacity.bytes_per_token:
        return wanted or DEFAULT_CACHE_TOKENS
    most = max(1, int(_CACHE_SHARE * available) // capacity.bytes_per_token)
    if wanted is not None and wanted > most:
        raise UsageError(
            f"--cache-tokens {wanted} needs {wanted * capacity.bytes_per_token / 1e9:.1f} GB of memory, "
            f"{available / 1e9:.1f} GB are available; at most {most} tokens fit"
        )
    return wanted or min(DEFAULT_CACHE_TOKENS, most)


def available_memory(device: torch.device) -> int | None:
    """Bytes that can be used on the device without hurting others, None where that cannot be known."""
    if device.type == "cuda":
        return int(torch.cuda.mem_get_info(device)[0])
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
    except OSError:
        return None
    return next((int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable:")), None)
