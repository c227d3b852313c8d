"""Training as seen from a terminal: a bar for the round, a line for each that ends, a sample now and then, files."""

from __future__ import annotations

import asyncio
from collections.abc import Coroutine, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.progress import BarColumn, Progress, TextColumn
from rich.text import Text

from swarm.console.terminal import ProgressBars, console, error_line
from swarm.errors import DiskFull, RemoteError, ShoalError, UsageError
from swarm.imports import import_lightly
from swarm.runs.metrics import Metrics, Round
from swarm.runs.run import Run

if TYPE_CHECKING:
    from swarm.trainer import TrainerNode

SHOW_SECONDS = 0.2  # between two looks at how far the round is


@dataclass(frozen=True, slots=True)
class Training:
    """What `swarm train` was told."""

    run: Run
    initial_peers: list[str]
    in_flight: int
    output: Path | None
    metrics: Path
    plot: Path


async def train_and_show(wanted: Training) -> None:
    """Train until the run is over. What was learned of it until then is written also where it is broken off."""
    bars = ProgressBars()
    bars("starting", 0, 0)
    try:
        import_lightly("swarm.trainer")
        from swarm.trainer import TrainerNode

        node = await TrainerNode.start(wanted.run, wanted.initial_peers, wanted.in_flight, bars)
    finally:
        bars.stop()
    try:
        metrics = Metrics(wanted.metrics)
        try:
            await _unless_failed(_rounds(node, metrics), node.failed)
            if wanted.output is not None:
                round_ = await node.gather(wanted.output)
                console.print(f"the model of round {round_} is in {wanted.output}")
        finally:
            metrics.close()
            try:
                if metrics.curve:
                    metrics.plot(wanted.plot, wanted.run.name)
            except DiskFull as error:  # how the run ended is told as well
                console.print(error_line(str(error)), soft_wrap=True)
    finally:
        await node.close()


async def _rounds(node: TrainerNode, metrics: Metrics) -> None:
    run = node.run
    console.print(f"looking for the peers of {run.name} ...", style="dim")
    with _bar() as bar:
        task = bar.add_task("", total=run.batch.target)
        showing = asyncio.create_task(_show(bar, node, metrics))
        sampling: asyncio.Task[None] | None = None
        try:
            async for ended in node.trainer.rounds():
                metrics.add(ended)
                console.print(Text(line(ended, run), style="" if ended.outcome == "commit" else "yellow"))
                if run.sample.every and (ended.round + 1) % run.sample.every == 0 and (not sampling or sampling.done()):
                    sampling = asyncio.create_task(_sample(node, ended.round + 1))
            bar.update(task, completed=run.batch.target)
            if sampling is not None:
                await sampling
        finally:
            if sampling is not None:
                sampling.cancel()
            showing.cancel()
            await asyncio.wait({showing})


async def _unless_failed(work: Coroutine[Any, Any, None], failed: asyncio.Future[None]) -> None:
    """Run `work` to its end, or until `failed` is done, and raise what that says."""
    task = asyncio.ensure_future(work)
    try:
        done, _ = await asyncio.wait({task, failed}, return_when=asyncio.FIRST_COMPLETED)
        for each in done:
            each.result()
    finally:
        task.cancel()
        await asyncio.wait({task})


def _bar() -> Progress:
    columns = (TextColumn("{task.description}"), BarColumn(), TextColumn("{task.completed}/{task.total} samples"))
    return Progress(*columns, console=console, transient=True, disable=not console.is_terminal)


async def _show(bar: Progress, node: TrainerNode, metrics: Metrics) -> None:
    (task,) = bar.task_ids
    while True:
        last = metrics.recent[-1] if metrics.recent else None
        known = f"loss {last.loss:.3f}  {last.tokens_per_second:.0f} tokens/s  {_peers(last.peers)}  " if last else ""
        if missing := _missing(node):
            known = f"waiting for a peer with stage {', '.join(map(str, missing))}  "
        text = f"round {max(node.attendance.round, 0) + 1}/{node.run.rounds}  {known}"
        bar.update(task, description=text, completed=node.attendance.samples)
        await asyncio.sleep(SHOW_SECONDS)


def _missing(node: TrainerNode) -> list[int]:
    """The stages of the round that nobody is left of."""
    known = node.attendance.roster is not None
    return [stage for stage in range(len(node.run.stages)) if known and not node.attendance.hosts(stage)]


async def _sample(node: TrainerNode, round_: int) -> None:
    try:
        console.print(Text(f"  after round {round_}: {await node.sample()!r}", style="dim"))
    except (ShoalError, RemoteError) as error:  # training matters more
        console.print(Text(f"  no sample: {error}", style="dim"))


def line(ended: Round, run: Run) -> str:
    """One round in a line."""
    if ended.outcome == "lost":
        missing = ", ".join(str(stage) for stage, count in enumerate(ended.peers) if not count)
        return (
            f"round {ended.round + 1}/{run.rounds}  nobody holds stage {missing} of it any more: going back to the "
            "last checkpoint, as soon as somebody has that of every stage (peer train --resume)"
        )
    parts = [
        f"round {ended.round + 1}/{run.rounds}",
        f"loss {ended.loss:.4f}",
        *([f"held out {ended.evaluation:.4f}"] if ended.evaluation is not None else []),
        f"{ended.tokens_per_second:.0f} tokens/s",
        _peers(ended.peers),
        f"{ended.samples} samples",
    ]
    if ended.outcome != "commit":
        parts.append("skipped: the loss or a gradient is no finite number")
    if ended.lost:
        parts.append(f"lost {len(ended.lost)} on the way")
    return "  ".join(parts)


def _peers(peers: Sequence[int]) -> str:
    return f"peers {'+'.join(map(str, peers))}"


async def gather_held(run: Run, initial_peers: list[str], folder: Path) -> None:
    """Write what the members of a run hold now."""
    from swarm.network import Network
    from swarm.runs.origin import config_of, tokenizer_of
    from swarm.runs.weights import Fetcher, save_model, stage_plans

    tokenizer = await asyncio.to_thread(tokenizer_of, run)
    config = await asyncio.to_thread(config_of, run, tokenizer)
    network = await Network.start(initial_peers)
    try:
        plans = await asyncio.to_thread(stage_plans, run, config)
        offers = await network.offers(run.id, run.num_blocks)
        round_, weights = await Fetcher(run, network.rpc, plans).everything(offers, folder)
        await save_model(folder, config, weights, tokenizer)
    finally:
        await network.close()
    console.print(f"the model of round {round_} is in {folder}")


def gather_saved(run: Run, checkpoints: Path, folder: Path) -> None:
    """Write what the stages of a run have saved last, at a round that all of them have.

    Raises `UsageError` where there is none.
    """
    from swarm.runs.origin import config_of, tokenizer_of
    from swarm.runs.weights import saved_weights, stage_plans, write_model

    if not checkpoints.is_dir():
        raise UsageError(f"there is no folder {checkpoints}")
    tokenizer = tokenizer_of(run)
    config = config_of(run, tokenizer)
    round_, weights = saved_weights(run, stage_plans(run, config), checkpoints)
    write_model(folder, config, weights, tokenizer)
    console.print(f"the model of round {round_} is in {folder}")
