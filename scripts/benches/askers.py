"""Many clients at once, each a process that generates when it is asked to, and the swarm that they ask."""

from __future__ import annotations

import contextlib
import json
import subprocess
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

from processes import Failed, LocalSwarm

from benches.child import running
from swarm.files.checkpoint import Checkpoint


@dataclass(frozen=True, slots=True)
class Answer:
    """What a client got."""

    tokens: list[int]
    times: list[float]  # seconds, when each came


class Asker:
    """One client."""

    def __init__(self, process: subprocess.Popen[str]) -> None:
        self._process = process

    def ask(self, prompt: Sequence[int], new_tokens: int) -> None:
        """Have it begin; does not wait."""
        assert self._process.stdin is not None
        self._process.stdin.write(json.dumps({"prompt": list(prompt), "new_tokens": new_tokens}) + "\n")
        self._process.stdin.flush()

    def answer(self) -> Answer:
        """Wait for what came of it. Raises `Failed` where it ends instead."""
        assert self._process.stdout is not None
        if not (line := self._process.stdout.readline()):
            raise Failed(f"a client ended with code {self._process.wait()}; what it says is above")
        return Answer(**json.loads(line))


@contextlib.contextmanager
def asking(checkpoint: Checkpoint, stages: int, clients: int, dtype: str = "float32") -> Iterator[list[Asker]]:
    """So many clients of a model that so many peers hold together, one thread each."""
    blocks: int = checkpoint.config().num_hidden_layers
    with LocalSwarm() as local, contextlib.ExitStack() as stack:
        for stage in range(stages):
            span = f"{blocks * stage // stages}:{blocks * (stage + 1) // stages}"
            local.serve(str(checkpoint.folder), "--blocks", span, "--dtype", dtype)
        local.wait_online(checkpoint.model_id, blocks, stages)
        arguments = ("asker.py", str(checkpoint.folder), local.address, dtype)
        with ThreadPoolExecutor(clients) as starting:  # they take seconds to start: all at the same time
            started = list(starting.map(stack.enter_context, [running(*arguments) for _ in range(clients)]))
        yield [Asker(process) for process, _ in started]
