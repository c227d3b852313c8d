"""As `reducer.py`, by hivemind's `DecentralizedAverager`, which forks and so wants no event loop around it.

Run as `python hivemind_reducer.py RANK SIZE DTYPE`. It finds its group before it is told to begin: it is asked twice.
"""

from __future__ import annotations

import faulthandler
import json
import os
import sys
import time
import traceback
from typing import Any

import hivemind
import psutil
import torch
from hivemind.averaging import DecentralizedAverager
from hivemind.averaging.control import AveragingStage
from hivemind.compression import Float16Compression, NoCompression
from hivemind.utils import get_dht_time

from benches.reducer import SAMPLED, say, vector

PATIENCE = 30.0  # seconds
MATCHMAKING = 2.0  # seconds


def hear() -> Any:
    """A line of JSON from the bench; None where there are no more.

    What is done with it ends before long, or this process does: hivemind's processes wait for each other for ever at
    times.
    """
    faulthandler.cancel_dump_traceback_later()
    line = sys.stdin.readline()
    faulthandler.dump_traceback_later(2 * PATIENCE, exit=True)
    return json.loads(line) if line else None


def start(rank: int, length: int, dtype: str) -> tuple[DecentralizedAverager, int]:
    """An averager in a DHT with the others, and how many they are. Its group's size is given: its best settings."""
    first = hivemind.DHT(start=True, host_maddrs=["/ip4/127.0.0.1/tcp/0"]) if rank == 0 else None
    say(addresses=[str(address) for address in first.get_visible_maddrs()] if first is not None else [])
    everyone = hear()
    dht = first or hivemind.DHT(
        initial_peers=everyone[0]["addresses"], start=True, host_maddrs=["/ip4/127.0.0.1/tcp/0"]
    )
    averager = DecentralizedAverager(
        averaged_tensors=[vector(rank, length)],
        dht=dht,
        prefix="bench",
        target_group_size=len(everyone),
        min_group_size=len(everyone),
        min_matchmaking_time=MATCHMAKING,
        request_timeout=MATCHMAKING / 2,
        compression=Float16Compression() if dtype == "float16" else NoCompression(),
        start=True,
    )
    return averager, len(everyone)


def average(averager: DecentralizedAverager, mine: torch.Tensor) -> tuple[float, torch.Tensor]:
    """Seconds from the word to begin, and the mean."""
    with averager.get_tensors() as tensors:
        tensors[0].copy_(mine)
    soon = get_dht_time() + MATCHMAKING
    control = averager.step(wait=False, scheduled_time=soon, require_trigger=True, timeout=PATIENCE)
    deadline = time.monotonic() + PATIENCE
    while control.stage is not AveragingStage.AWAITING_TRIGGER:
        if control.done() or time.monotonic() > deadline:
            raise TimeoutError(f"no group was found: {control.stage}")
        time.sleep(0.002)
    say(matched=True)
    hear()
    started = time.perf_counter()
    control.allow_allreduce()
    control.result(PATIENCE)
    seconds = time.perf_counter() - started
    with averager.get_tensors() as tensors:
        return seconds, tensors[0].clone()


def main(rank: int, length: int, dtype: str) -> None:
    """Average whenever told to, until stdin ends."""
    torch.set_num_threads(1)
    averager, count = start(rank, length, dtype)
    mine = vector(rank, length)
    expected = sum(vector(each, length)[::SAMPLED].clone() for each in range(count)) / count
    say(ready=True)
    while hear() is not None:
        seconds, mean = average(averager, mine)
        say(seconds=seconds, error=float((mean[::SAMPLED] - expected).norm() / expected.norm()))


if __name__ == "__main__":
    code = 1
    try:
        main(int(sys.argv[1]), int(sys.argv[2]), sys.argv[3])
        code = 0
    except Exception:  # noqa: BLE001 (told, and the bench is not kept waiting by what hivemind leaves running)
        traceback.print_exc()
    finally:
        for child in psutil.Process().children(recursive=True):
            child.kill()
        os._exit(code)
