"""What clients notice when a peer leaves: the longest gap between two tokens that any of four sees meanwhile.

Four clients, each a process, stream from three stages. Then a second peer for one stage (the first, the middle and the
last in turn) comes, and the one that has held it so far gets SIGTERM: it hands all four sessions over and ends. A
figure is the longest gap that ends after the signal, up to the fourth token of each client after the peer's end; the
reference is the median gap of all four before the signal, while the second peer is there and idle.
"""

from __future__ import annotations

import contextlib
import itertools
import json
import statistics
import subprocess
import threading
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from processes import Failed, LocalSwarm, PeerProcess

from benches.child import running
from benches.generation import prompt, whole_model
from benches.plan import Plan
from benches.rows import Must, Rounds, Row
from swarm.files.checkpoint import Checkpoint
from swarm.files.hub import DEFAULT_MODEL, resolve

MUST = Must("ratio", "<=", 3.0)
ALL = Must("value", "==", 1.0)
ROUNDS = 6
STAGES = 3
PROMPTS = (128, 112, 96, 80)  # tokens, for each client
NEW_TOKENS = 1024  # more than is waited for: the clients are stopped before
BEFORE, AFTER = 16, 4  # tokens that each client gets before the signal, and once the peer has gone
WAIT_SECONDS = 120.0


def measure(plan: Plan) -> list[Row]:
    """The gap, whether the peers left as they should, and whether the answers are the whole model's."""
    checkpoint = Checkpoint(resolve(DEFAULT_MODEL))
    blocks: int = checkpoint.config().num_hidden_layers
    spans = [f"{blocks * stage // STAGES}:{blocks * (stage + 1) // STAGES}" for stage in range(STAGES)]
    plan.tell("drain: starting three peers")
    rounds: list[_Round] = []
    with LocalSwarm() as local:
        serving = [_serve(local, checkpoint.folder, span) for span in spans]
        for number in range(count := plan.rounds(ROUNDS)):
            plan.tell(f"drain: peer {number + 1} of {count}")
            stage = number % STAGES
            with _clients(checkpoint.folder, local.address) as clients:
                arrived = _serve(local, checkpoint.folder, spans[stage])
                rounds.append(_leave(serving[stage], clients))
                serving[stage] = arrived
    plan.tell("drain: comparing with the whole model")
    whole = whole_model(checkpoint.folder)
    equal = [same for each in rounds for same in _compared(each.answers, whole, checkpoint.folder)]
    return [
        Rounds([each.longest for each in rounds], [each.usual for each in rounds]).row("drain: longest gap", "s", MUST),
        Row("drain: left in order", statistics.mean(each.code == 0 for each in rounds), "of all", must=ALL),
        Row("drain: equal answers", statistics.mean(equal), "of all", must=ALL),
    ]


def _serve(local: LocalSwarm, folder: Path, span: str) -> PeerProcess:
    peer = local.serve(str(folder), "--blocks", span)
    peer.address()  # which it prints once it is online
    return peer


@dataclass(frozen=True, slots=True)
class _Round:
    """What came of one peer's leaving."""

    longest: float  # seconds
    usual: float
    code: int  # the peer's exit code
    answers: list[list[int]]  # each client's


def _leave(peer: PeerProcess, clients: Sequence[_Client]) -> _Round:
    began = time.monotonic()
    _wait(clients, BEFORE)
    asked = time.monotonic()
    peer.ask_to_end()
    code = peer.process.wait(WAIT_SECONDS)
    _wait(clients, AFTER)
    usual = statistics.median(gap for client in clients for gap in client.gaps(began, asked))
    longest = max(gap for client in clients for gap in client.gaps(asked, time.monotonic()))
    return _Round(longest, usual, code, [list(client.tokens) for client in clients])


@torch.inference_mode()
def _compared(answers: Sequence[list[int]], whole: Any, folder: Path) -> list[bool]:
    """Of each answer, whether each of its tokens is the one that the whole model puts after those before it."""
    equal = []
    for length, answer in zip(PROMPTS, answers, strict=True):
        ids = torch.cat([prompt(folder, length)[0], torch.tensor(answer)])
        likeliest = whole(ids[None, :-1], logits_to_keep=len(answer)).logits[0].argmax(dim=-1)
        equal.append(likeliest.tolist() == answer)
    return equal


# --- clients ----------------------------------------------------------------------------------------------------------


class _Client:
    """A process that streams one answer; which token came when is read as it comes."""

    def __init__(self, process: subprocess.Popen[str], first: str) -> None:
        self.tokens: list[int] = []
        self._times: list[float] = []
        self._process = process
        self._news = threading.Condition()
        self._ended = False
        self._take(first)
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()

    def _take(self, line: str) -> None:
        token, moment = line.split()
        self.tokens.append(int(token))
        self._times.append(float(moment))

    def _read(self) -> None:
        assert self._process.stdout is not None
        for line in self._process.stdout:
            with self._news:
                self._take(line)
                self._news.notify_all()
        with self._news:
            self._ended = True
            self._news.notify_all()

    def wait_until(self, count: int) -> None:
        """There are `count` tokens. Raises `Failed` where the answer has ended, or nothing comes."""
        with self._news:
            self._news.wait_for(lambda: len(self.tokens) >= count or self._ended, WAIT_SECONDS)
            if len(self.tokens) < count:
                raise Failed(f"a client got {len(self.tokens)} tokens, not {count}; what it says is above")

    def gaps(self, start: float, end: float) -> list[float]:
        """Seconds between tokens, of those gaps that end between the two times."""
        with self._news:
            return [after - before for before, after in itertools.pairwise(self._times) if start < after <= end]

    def stop(self) -> None:
        """End the process and read what it still says."""
        assert self._process.stdin is not None
        self._process.stdin.close()
        self._reader.join()


@contextlib.contextmanager
def _clients(folder: Path, address: str) -> Iterator[list[_Client]]:
    """One for each prompt, each with its first token."""
    with contextlib.ExitStack() as stack:
        clients = []
        for length in PROMPTS:
            ids = json.dumps(prompt(folder, length)[0].tolist())
            process, line = stack.enter_context(running("streamer.py", str(folder), address, ids, str(NEW_TOKENS)))
            clients.append(_Client(process, line))
            stack.callback(clients[-1].stop)
        yield clients


def _wait(clients: Sequence[_Client], more: int) -> None:
    """Until each has got so many more tokens."""
    for client, count in [(client, len(client.tokens) + more) for client in clients]:
        client.wait_until(count)
