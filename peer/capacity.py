"""What this machine can do, measured: how fast it runs blocks, how much memory they take, how many of them fit."""

from __future__ import annotations

import ctypes
import gc
import statistics
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from peer.stage import SessionState, Stage, StepInput
from swarm.batching.lean import PROOFS, TAPED
from swarm.errors import UsageError
from swarm.links.bodies import forget_spare
from swarm.quantization.layers import weight_bytes
from swarm.types import Span

DEFAULT_CACHE_TOKENS = 16384
LEAST_CACHE_TOKENS = 1024  # for which a block more is given up
PREFILL = 512  # positions that the prefill is measured for
LONG_SECONDS = 0.2  # of a step: where it takes as long, what a model does around its products is of no account
RUNS = 3
_AS_FAST = 1.1  # times the fastest: what is not slower than that is as fast
_SHARE = 0.8  # of the memory that is available, that blocks and their cache may take


@dataclass(frozen=True, slots=True)
class Capacity:
    """What a stage can do on this machine.

    Attributes:
        seconds_per_block: one session's decode of one token.
        prefill_seconds_per_block: `PREFILL` positions of one session.
        bytes_per_token: of the KV cache of all blocks of the stage.
        weights: bytes of all blocks of the stage.
        blocks: how many they are.
        activation: bytes of one token's hidden states, as they travel.
    """

    seconds_per_block: float
    prefill_seconds_per_block: float
    bytes_per_token: int
    weights: int
    blocks: int
    activation: int

    def tokens_per_second(self, blocks: int, bandwidth: float | None = None) -> float:
        """One session's decode through so many blocks, where `bandwidth` is in bytes per second."""
        travel = self.activation / bandwidth if bandwidth else 0.0
        return 1.0 / (self.seconds_per_block * blocks + travel)


def measure(stage: Stage, threads: Sequence[int] = ()) -> Capacity:
    """Run a few decode steps of one session through the stage, and a prefill through one of its blocks.

    Of several numbers of `threads`, the `fastest` is what this thread computes with from now on.
    """
    for _ in range(PROOFS + 1):  # the very first one is watched
        if rehearse(stage, 1) > LONG_SECONDS:
            break
    counts = threads or [torch.get_num_threads()]
    count, seconds = fastest({count: [decode(stage, count) for _ in range(RUNS)] for count in counts})
    torch.set_num_threads(count)
    return Capacity(
        seconds_per_block=seconds,
        prefill_seconds_per_block=_prefill(stage),
        bytes_per_token=_bytes_per_token(stage),
        weights=weight_bytes(stage.model.model),
        blocks=len(stage.span),
        activation=stage.model.hidden_size * stage.model.dtype.itemsize,
    )


def thread_counts(most: int) -> list[int]:
    """The numbers of threads to try where there may be `most`: the largest first."""
    return [most >> halvings for halvings in range(most.bit_length())]


def fastest(taken: Mapping[int, Sequence[float]]) -> tuple[int, float]:
    """By what steps took with so many threads: the largest number that is as fast as any, and how fast that is.

    More are not always faster: a product ends when the last of them has done its part, and that one may be waiting for
    a core that others use, for many times as long as the product takes.
    """
    medians = {count: statistics.median(seconds) for count, seconds in taken.items()}
    count = max(count for count, seconds in medians.items() if seconds <= _AS_FAST * min(medians.values()))
    return count, medians[count]


def decode(stage: Stage, threads: int) -> float:
    """Seconds that a token of one session takes in a block, on average, where so many threads compute."""
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        return max(rehearse(stage, 1), 1e-6) / len(stage.span)
    finally:
        torch.set_num_threads(before)


def _bytes_per_token(stage: Stage) -> int:
    state = stage.open(stage.span, batch=1, max_length=1)
    _time(stage, state, 0, 1)
    size = stage.bytes_per_token(state)
    stage.close(state)
    return size


def _prefill(stage: Stage) -> float:
    """Seconds that one of its blocks takes for `PREFILL` positions."""
    first = stage.open(Span(stage.span.start, stage.span.start + 1), batch=1, max_length=PREFILL)
    positions = min(PREFILL, getattr(stage.model.config, "max_position_embeddings", None) or PREFILL)
    seconds = _time(stage, first, 0, positions)
    stage.close(first)
    return seconds * PREFILL / positions


def rehearsals(most: int) -> list[int]:
    """How many tokens to `rehearse` with, one time after another, where `most` are held. A single one is known."""
    return [tokens for tokens in range(2, min(TAPED, most) + 1) for _ in range(PROOFS)]


def rehearse(stage: Stage, tokens: int) -> float:
    """Run a step of so many tokens, of which nothing is kept; the seconds that it took.

    The first steps of each number of tokens take several times as long, until the stage knows a shorter way for them,
    and trusts it (`swarm.batching.lean`): better now than when somebody waits for them.
    """
    state = stage.open(stage.span, batch=1, max_length=tokens)
    seconds = _time(stage, state, 0, tokens)
    stage.close(state)
    return seconds


def _time(stage: Stage, state: SessionState, position: int, count: int) -> float:
    """Seconds that the next step takes, of `count` positions from `position` on."""
    hidden = torch.randn(1, count, stage.model.hidden_size)
    started = time.perf_counter()
    stage.run(state, StepInput(number=state.number + 1, position=position, hidden=hidden))
    return time.perf_counter() - started


# --- memory -----------------------------------------------------------------------------------------------------------


def budget(device: torch.device, cap: int | None) -> int | None:
    """Bytes that blocks and their cache may take: what is allowed and there, None where neither is known."""
    available = available_memory(device)
    known = [size for size in (cap, None if available is None else int(_SHARE * available)) if size is not None]
    return min(known, default=None)


def fitting_blocks(block: Capacity, wanted_tokens: int | None, room: int | None, most: int) -> int:
    """How many blocks like the one that was measured fit into `room` bytes with their cache; `most` at most.

    Raises `UsageError` where not even one does.
    """
    if room is None:
        return most
    tokens = DEFAULT_CACHE_TOKENS if wanted_tokens is None else wanted_tokens
    if (count := room // (block.weights + tokens * block.bytes_per_token)) >= 1:
        return min(count, most)
    least = block.weights + min(tokens, LEAST_CACHE_TOKENS) * block.bytes_per_token
    if room < least:
        raise UsageError(f"one block needs {least / 1e6:.0f} MB of memory with its cache, {room / 1e6:.0f} MB are free")
    return 1


def cache_tokens(wanted: int | None, bytes_per_token: int, room: int | None) -> int:
    """How many tokens the cache is to hold: what is `wanted`, else what a peer holds by default or memory allows.

    `room` is in bytes, None where that cannot be known. Raises `UsageError` where `wanted` would not fit: a peer that
    promises more than it has dies of it in the middle of somebody's answer. So does it where nothing is left.
    """
    if room is None or not bytes_per_token:
        return wanted or DEFAULT_CACHE_TOKENS
    if (most := room // bytes_per_token) < 1:
        raise UsageError(
            f"the blocks take all the memory that is free and allowed (--memory), and {max(-room, 0) / 1e6:.0f} MB "
            "more: none is left for a cache; host fewer (--blocks, --num-blocks)"
        )
    if wanted is not None and wanted > most:
        raise UsageError(
            f"--cache-tokens {wanted} needs {wanted * bytes_per_token / 1e9:.1f} GB of memory, "
            f"{max(room, 0) / 1e9:.1f} GB are left for it; at most {most} tokens fit"
        )
    return wanted or min(DEFAULT_CACHE_TOKENS, most)


def host_tokens(tokens: int, bytes_per_token: int, room: int | None) -> int:
    """How many tokens of idle sessions may be beside a pool of `tokens`: as many again, as far as `room` bytes go."""
    if room is None or not bytes_per_token:
        return tokens
    return max(0, min(tokens, room // bytes_per_token - tokens))


def available_memory(device: torch.device) -> int | None:
    """Bytes that can be used on the device without hurting others, None where that cannot be known."""
    if device.type == "cuda":
        return int(torch.cuda.mem_get_info(device)[0])
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
    except OSError:
        return None
    return next((int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable:")), None)


def release_memory() -> None:
    """Give back what nobody refers to any more: Python's cycles, the device's pool, the allocator's free pages."""
    gc.unfreeze()  # a stage that was served was frozen with everything else
    keep_small()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def keep_small() -> None:
    """Give back what went since the last time. Short enough for in between; may be called in any thread.

    Python looks for cycles among its older objects when a quarter as many have come, and counts those of all that was
    imported and loaded, frozen or not: a hundred thousand objects, and the tensors and buffers that they hold, would
    wait for that. glibc keeps what lies between pieces that stay; each connection that comes and goes leaves a few
    kilobytes of that.
    """
    gc.collect()
    forget_spare()
    if (trim := getattr(ctypes.CDLL(None), "malloc_trim", None)) is not None:
        trim(0)
