"""Ten minutes of clients that come, go, cancel and die, while the peers' cache has room for about half of them.

Eight clients at a time, each a process that asks in every way there is (greedily, with drafts, in beams, several rows
at once) and breaks a quarter of its answers off. Each leaves after a while and another comes in its place: some say
goodbye, some get SIGKILL in the middle of an answer. Wanted: the memory that each peer holds for itself does not grow
once the first third of the time is over (the slope through its samples, Theil and Sen's), no session is left when all
clients have gone and the last lease has ended, and every answer that came to its end is the whole model's.
"""

from __future__ import annotations

import itertools
import math
import random
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from pathlib import Path
from typing import Any

import psutil
import torch
from processes import START_SECONDS, Failed, LocalSwarm, PeerProcess
from transformers import LlamaConfig, LlamaForCausalLM
from transformers.utils import logging

from benches import soaker
from benches.plan import Plan
from benches.rows import Must, Row
from benches.soaker import WAYS, Work
from swarm.files.checkpoint import Checkpoint

SECONDS, QUICK_SECONDS = 600.0, 60.0
CLIENTS = 8
LIVES = (15.0, 40.0)  # seconds that a client stays
KILLED = 0.5  # of the clients
SPANS = ("0:3", "3:6", "3:6")
BLOCKS = 6
CACHE_TOKENS = 320  # of a peer; eight clients together want about twice as many
LEASE_SECONDS = 5
WARM_UP = 1 / 3  # of the time
ARRIVAL_SECONDS = 3 * START_SECONDS  # for so many clients to start at once
TELL_SECONDS = 10
MUST_SLOPE = Must("value", "<=", 0.5)  # MB a minute
NONE, ALL = Must("value", "==", 0), Must("value", "==", 1.0)


def measure(plan: Plan) -> list[Row]:
    """A row of memory for each peer, one for the sessions that are left, and one for the answers."""
    seconds = QUICK_SECONDS if plan.quick else SECONDS
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory(prefix="shoal-bench-") as folder, LocalSwarm() as local:
        plan.tell("soak: starting")
        work = _make_work(_make_model(Path(folder)))
        soaker.save(work, local.folder / "work.json")
        limits = ["--cache-tokens", CACHE_TOKENS, "--lease-seconds", LEASE_SECONDS]
        peers = [local.serve(folder, "--blocks", span, *map(str, limits)) for span in SPANS]
        model = Checkpoint(Path(folder)).model_id
        local.wait_online(model, BLOCKS, len(SPANS))
        crowd = _Crowd([folder, local.address, str(local.folder / "work.json")], seconds)
        memory = _watch(plan, peers, crowd, seconds)
        crowd.join()
        plan.tell("soak: waiting for the last leases to end")
        left = _left(local, model)
    words = crowd.words
    finished = words["exact"] + words["wrong"]
    if not finished:
        raise Failed("soak: no answer came to its end")
    return [
        *(_memory(f"soak: memory of blocks {span}", memory[peer.pid]) for peer, span in zip(peers, SPANS, strict=True)),
        Row("soak: sessions that are left", left, "sessions", must=NONE),
        Row("soak: equal answers", words["exact"] / finished, "of all", must=ALL),
        Row("soak: finished answers", finished, "answers"),
        Row("soak: answers broken off", words["cancelled"], "answers"),
        Row("soak: refused for want of room", words["refused"], "times"),
        Row("soak: clients that went", crowd.went, "clients"),
        Row("soak: clients that were killed", crowd.killed, "clients"),
    ]


def _make_model(folder: Path) -> Any:
    """A small random model, whose weights are large enough for its tokens to differ from each other."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=512,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=BLOCKS,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=512,
        eos_token_id=None,
    )
    logging.disable_progress_bar()
    model = LlamaForCausalLM(config)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.normal_(0.0, 0.15)
    model.save_pretrained(folder)
    return model.eval()


def _make_work(whole: Any) -> list[Work]:
    """Questions with the whole model's answers."""
    chance = random.Random(1)
    work = []
    for way, rows in itertools.product(WAYS, (1, 1, 2)):
        if rows > 1 and way == "lookup":  # drafts are for one row
            continue
        for length in (4, 20, 60):
            asked = [[chance.randrange(3, 512) for _ in range(length)] for _ in range(rows)]
            ids = torch.tensor(asked)
            answer = whole.generate(ids, attention_mask=torch.ones_like(ids), **soaker.options(way))
            work.append(Work(way, asked, answer.tolist()))
    return work


class _Crowd:
    """So many clients at a time, for so long; whoever goes is followed by another."""

    def __init__(self, arguments: list[str], seconds: float) -> None:
        self.words: Counter[str] = Counter()
        self.went = self.killed = 0
        self._lock = threading.Lock()
        self._arguments = arguments
        self._seconds = seconds
        self._all_here = threading.Barrier(CLIENTS, self._begin)
        self._end = math.inf  # until the first of every place has got an answer
        self._failure: str | None = None
        self._places = [threading.Thread(target=self._keep, args=(number,)) for number in range(CLIENTS)]
        for place in self._places:
            place.start()

    def _begin(self) -> None:
        self._end = time.monotonic() + self._seconds

    @property
    def left(self) -> float:
        """Seconds until no more clients come; infinite before the first ones are here."""
        return self._end - time.monotonic()

    @property
    def over(self) -> bool:
        """Whether no more clients come."""
        return self.left <= 0 or self._failure is not None

    def join(self) -> None:
        """Wait until the last one has gone. Raises `Failed` where one has failed."""
        for place in self._places:
            place.join()
        if self._failure is not None:
            raise Failed(self._failure)

    def _keep(self, number: int) -> None:
        chance = random.Random(number)
        for life in itertools.count():
            if self.over:
                return
            self._live(chance.uniform(*LIVES), chance.random() < KILLED, chance.randrange(1 << 30), first=not life)

    def _are_all_here(self) -> bool:
        try:
            self._all_here.wait(ARRIVAL_SECONDS)
        except threading.BrokenBarrierError:
            self._failure = f"soak: {CLIENTS} clients had no answer within {ARRIVAL_SECONDS:.0f} s"
        return self._failure is None

    def _live(self, stays: float, killed: bool, seed: int, first: bool) -> None:
        """One client, from its first word on for so many seconds."""
        command = [sys.executable, "-P", soaker.__file__, *self._arguments, str(seed)]
        pipe = subprocess.PIPE
        with subprocess.Popen(command, stdin=pipe, stdout=pipe, text=True, start_new_session=True) as client:
            assert client.stdout is not None
            assert client.stdin is not None
            begun = client.stdout.readline()
            if first and not self._are_all_here():
                return
            ending = threading.Timer(min(stays, self.left), client.kill if killed else client.stdin.close)
            ending.start()
            with self._lock:
                self.words.update(word.strip() for word in (begun, *client.stdout) if word.strip())
            ending.cancel()
            code = client.wait()
        with self._lock:
            self.killed, self.went = self.killed + killed, self.went + (not killed)
            if code and not killed:
                self._failure = f"soak: a client ended with code {code}; what it says is above"


def _watch(plan: Plan, peers: list[PeerProcess], crowd: _Crowd, seconds: float) -> dict[int, list[tuple[float, float]]]:
    """Minutes and megabytes, sampled until no more clients come."""
    samples: dict[int, list[tuple[float, float]]] = {peer.pid: [] for peer in peers}
    for second in itertools.count():
        if crowd.over:
            return samples
        for peer in peers:
            if peer.process.poll() is not None:
                raise Failed(f"a peer ended:\n{peer.output()}")
            if crowd.left <= (1 - WARM_UP) * seconds:
                size = psutil.Process(peer.pid).memory_full_info().uss / 1e6
                samples[peer.pid].append((time.monotonic() / 60, size))
        if second % TELL_SECONDS == 0:
            plan.tell(f"soak: {min(crowd.left, seconds):.0f} s to go, {crowd.went + crowd.killed} clients have gone")
        time.sleep(1.0)
    raise AssertionError("it counts for ever")


def _memory(case: str, samples: list[tuple[float, float]]) -> Row:
    slope = theil_sen(samples)
    middle = sorted(size for _, size in samples)[len(samples) // 2]
    return Row(f"{case} ({middle:.0f} MB)", slope, "MB/min", must=MUST_SLOPE)


def theil_sen(samples: list[tuple[float, float]]) -> float:
    """The median of the slopes between all pairs of samples (x, y): a few outliers do not move it."""
    slopes = sorted((b[1] - a[1]) / (b[0] - a[0]) for a, b in itertools.combinations(samples, 2))
    return slopes[len(slopes) // 2]


def _left(local: LocalSwarm, model: Any) -> int:
    """Sessions that the peers still say they hold, long after the last client has gone."""
    deadline = time.monotonic() + 6 * LEASE_SECONDS
    while time.monotonic() < deadline:
        offers = local.offers(model, BLOCKS)
        if all(offer.sessions == 0 and offer.cache_free == offer.cache_tokens for offer in offers):
            return 0
        time.sleep(1.0)
    return max(sum(offer.sessions for offer in offers), 1)
