"""Two stages with two replicas each train a small Llama; one is killed, one joins; compared with one process."""

from __future__ import annotations

import asyncio
import json
import re
import time
from pathlib import Path
from typing import Annotated, Any

import typer
from processes import Failed, LocalSwarm, PeerProcess, terminated_like_interrupted
from rich.console import Console
from rich.table import Table

from swarm.errors import ShoalError
from swarm.files.checkpoint import silent
from swarm.runs.metrics import Metrics, Round
from swarm.runs.run import Run, load
from swarm.trainer import TrainerNode
from swarm.training import Trainer

FILE = Path("configs/train-demo.toml")
REPLICAS = 2
KILL_AT, JOIN_AT = 10, 15  # rounds
TOLERANCE = 1e-3  # of the loss, in nats: what rounding leaves in thirty rounds is a hundredth of it
END_SECONDS = 60.0  # for every peer to end the last round and say its digest

console = Console(highlight=False)


def main(
    run_file: Annotated[Path, typer.Argument(help="The run.")] = FILE,
    json_file: Annotated[Path | None, typer.Option("--json", metavar="FILE", help="Write what was measured.")] = None,
    plot: Annotated[Path, typer.Option(help="Where the loss is drawn.")] = Path("demo-train.png"),
) -> None:
    """Train with a kill at round 10 and a newcomer at round 15, and compare with one process and among replicas."""
    try:
        with terminated_like_interrupted():
            results = _run(run_file, plot)
    except (ShoalError, Failed) as error:
        console.print(f"[bold red]error:[/] {error}")
        raise typer.Exit(1) from None
    except KeyboardInterrupt:
        raise typer.Exit(130) from None
    if json_file is not None:
        json_file.write_text(json.dumps(results, indent=2) + "\n")
    good = results["largest_difference"] < TOLERANCE and results["digests_equal"]
    console.print("[green]the curves agree and the digests are equal[/]" if good else "[bold red]they do not agree[/]")
    raise typer.Exit(0 if good else 1)


def _run(run_file: Path, plot: Path) -> dict[str, Any]:
    run = load(run_file)
    with LocalSwarm() as local:
        demo = _Demo(run, run_file, local)
        started = time.perf_counter()
        together = demo.train()
        seconds = time.perf_counter() - started
        digests = demo.digests()
    console.print(f"trained in {seconds:.0f} s; now the same in one process")
    alone = _alone(run)
    differences = [abs(ended.loss - loss) for ended, loss in zip(together, alone, strict=True)]
    _show(together, alone, digests)
    metrics = Metrics(None)
    for ended in together:
        metrics.add(ended)
    metrics.plot(plot, f"{run.name}: {len(run.stages)} stages, a death and a newcomer")
    return {
        "run": run.id,
        "seconds": seconds,
        "losses": [ended.loss for ended in together],
        "losses_of_one_process": alone,
        "largest_difference": max(differences),
        "digests": digests,
        "digests_equal": all(len(set(of_stage.values())) == 1 for of_stage in digests.values()),
    }


class _Demo:
    """The peers of the run, as processes, and the trainer, in this one."""

    def __init__(self, run: Run, run_file: Path, local: LocalSwarm) -> None:
        self.run = run
        self._file = run_file
        self._local = local
        self.peers: dict[PeerProcess, int] = {}  # those that live, with their stages
        for stage in range(len(run.stages)):
            for _ in range(REPLICAS):
                self._start(stage)

    def _start(self, stage: int) -> PeerProcess:
        folder = self._local.folder / f"checkpoints-{len(self._local.peers)}"
        peer = self._local.train(self._file, "--stage", str(stage), "--checkpoints", str(folder))
        self.peers[peer] = stage
        return peer

    def train(self) -> list[Round]:
        """All rounds; whatever happens on the way."""
        console.print(f"{len(self.peers)} peers: {len(self.run.stages)} stages x {REPLICAS}, and a trainer")
        return asyncio.run(self._train())

    async def _train(self) -> list[Round]:
        node = await TrainerNode.start(self.run, [self._local.address], 3 * len(self.run.stages), silent)
        rounds: list[Round] = []
        victim = list(self.peers)[1]
        try:
            await self._all_there(node)
            async for ended in node.trainer.rounds():
                rounds.append(ended)
                console.print(_line(ended, self.run))
                if ended.round + 1 == KILL_AT:
                    console.print(f"[bold red]killing a replica of stage {self.peers.pop(victim)}[/]")
                    victim.kill()
                if ended.round + 1 == JOIN_AT:
                    console.print("[bold green]a new replica of stage 0 starts[/]")
                    await self._newcomer(node.trainer)
        finally:
            await node.close()
        return rounds

    async def _newcomer(self, trainer: Trainer) -> None:
        """Start a peer. It takes seconds to start, which the rest of such a short run may be over in: so they wait."""
        peer = self._start(0)
        trainer.pause()
        await asyncio.to_thread(peer.address)
        trainer.resume()

    async def _all_there(self, node: TrainerNode) -> None:
        """A run begins with one replica of each stage; here, all four shall have been in it."""
        await node.attendance.until(
            lambda: node.attendance.roster is not None and len(node.attendance.roster.members) == len(self.peers)
        )

    def digests(self) -> dict[int, dict[str, str]]:
        """Of every stage's living replicas, at the end: parameters and optimizer state."""
        found: dict[int, dict[str, str]] = {}
        for peer, stage in self.peers.items():
            found.setdefault(stage, {})[peer.peer] = _digest(peer)
        return found


def _digest(peer: PeerProcess) -> str:
    """What it says when the run is over."""
    deadline = time.monotonic() + END_SECONDS
    while time.monotonic() < deadline:
        if (match := re.search(r"the run is over; digest=\s*([0-9a-f]{64})", peer.output())) is not None:
            return match[1]
        if peer.process.poll() is not None:
            break
        time.sleep(0.1)
    raise Failed(f"a peer did not come to the end of the run:\n{peer.output()}")


def _alone(run: Run) -> list[float]:
    """The same rounds by one process, with nothing but torch and transformers."""
    import torch
    from alone_training import loss_curve

    torch.set_num_threads(1)  # as many as a peer has; on matrices as small as these, several wait for each other
    return loss_curve(run)


def _line(ended: Round, run: Run) -> str:
    peers = "+".join(map(str, ended.peers))
    return f"round {ended.round + 1:>2}/{run.rounds}  loss {ended.loss:.4f}  peers {peers}  {ended.seconds:.2f} s"


def _show(together: list[Round], alone: list[float], digests: dict[int, dict[str, str]]) -> None:
    table = Table("round", "loss", "of one process", "difference", "peers", box=None, pad_edge=False)
    for ended, loss in zip(together, alone, strict=True):
        peers = "+".join(map(str, ended.peers))
        difference = f"{abs(ended.loss - loss):.1e}"
        table.add_row(str(ended.round + 1), f"{ended.loss:.5f}", f"{loss:.5f}", difference, peers)
    console.print(table)
    for stage, of_stage in digests.items():
        for peer, digest in of_stage.items():
            console.print(f"stage {stage}  {peer[-8:]}  {digest}")


if __name__ == "__main__":
    app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)
    app.command()(main)
    app()
