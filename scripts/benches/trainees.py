"""A run with peers as processes and a trainer in this one, a round at a time: for the benches of training."""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import AsyncIterator, Iterator
from pathlib import Path

from processes import START_SECONDS, Failed, LocalSwarm

from swarm.background import BackgroundLoop
from swarm.files.checkpoint import silent
from swarm.runs.metrics import Round
from swarm.runs.run import Run, load
from swarm.trainer import TrainerNode


class Trainees:
    """Members of one run and a trainer that can be stopped between two measurements."""

    def __init__(self, run_file: Path, local: LocalSwarm) -> None:
        self.run: Run = load(run_file)
        self._background = BackgroundLoop("trainer")
        self.node = self._background.run(TrainerNode.start(self.run, [local.address], 3 * len(self.run.stages), silent))
        self._rounds: AsyncIterator[Round] = self.node.trainer.rounds()

    def wait_for(self, members: int) -> None:
        """Until so many are in the roster."""

        async def there() -> None:
            attendance = self.node.attendance
            async with asyncio.timeout(START_SECONDS):
                await attendance.until(lambda: len(attendance.roster.members if attendance.roster else ()) == members)

        self._background.run(there())

    def next_round(self) -> Round:
        """Wait for the end of a round. Raises `Failed` where none ends."""

        async def ended() -> Round:
            try:
                async with asyncio.timeout(START_SECONDS):
                    return await anext(self._rounds)
            except TimeoutError:
                raise Failed(f"no round has ended within {START_SECONDS:.0f} s: have the peers died?") from None

        return self._background.run(ended())

    def seconds_of(self, rounds: int) -> float:
        """How long a round takes on average, over some that begin and end while the trainer works at full tilt."""
        self.go(True)
        self.next_round()  # what was left of the last one
        started = time.perf_counter()
        for _ in range(rounds):
            self.next_round()
        seconds = (time.perf_counter() - started) / rounds
        self.go(False)
        return seconds

    def go(self, on: bool) -> None:
        """Begin micro-batches or, once those under way have ended, do nothing."""

        async def switch() -> None:
            trainer = self.node.trainer
            if on:
                trainer.resume()
                return
            trainer.pause()
            await trainer.idle()

        self._background.run(switch())

    def close(self) -> None:
        """Leave."""
        self._background.run(self.node.close())
        self._background.close()


@contextlib.contextmanager
def training(run_file: Path, local: LocalSwarm) -> Iterator[Trainees]:
    """`Trainees` for the time of a `with`."""
    trainees = Trainees(run_file, local)
    try:
        yield trainees
    finally:
        trainees.close()


def write_run(
    folder: Path, name: str, stages: str, micro: int, target: int, length: int, config: str, more: str = ""
) -> Path:
    """A run's file: a Llama from scratch that learns the embedded default, byte by byte, for as long as it takes.

    `more` goes on in the table of averaging.
    """
    file = folder / f"{name}.toml"
    file.write_text(
        f'name = "{name}"\nrounds = 100000\nstages = {stages}\ntokenizer = "bytes"\n\n'
        f'[model]\narchitecture = "llama"\n\n[model.config]\n{config}\n\n'
        f"[batch]\nsequence_length = {length}\nmicro = {micro}\ntarget = {target}\n\n"
        f'[optimizer]\nlearning_rate = 1e-4\n\n[averaging]\ndtype = "float32"\n{more}'
    )
    return file
