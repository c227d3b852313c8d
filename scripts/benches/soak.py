"""Ten minutes of clients that come, go, cancel and die, while the peers' cache has room for about half of them.

Eight clients at a time, each a process that asks in every way there is (greedily, with drafts, in beams, several rows
at once) and breaks a quarter of its answers off. Each leaves after a while and another comes in its place: some say
goodbye, some get SIGKILL in the middle of an answer. Wanted: the memory that each peer holds for itself, and that of
its p2pd, is flat once the first third of the time is over, no session is left when all clients have gone and the last
lease has ended, and every answer that came to its end is the whole model's.

Flat means: of the slope through the medians of each 20 s (Theil and Sen's), the upper end of the interval in which it
lies with 95% confidence (Sen 1968) is below half a megabyte a minute. Single samples would seem to say more than they
do: eight clients that come at once make a step of some megabytes, and what they leave is given back every 20 s.
"""

from __future__ import annotations

import itertools
import math
import random
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psutil
import torch
from processes import START_SECONDS, Failed, LocalSwarm, PeerProcess
from scipy.stats import theilslopes
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
STRETCH = 20.0  # seconds, of which the median counts as one sample
CONFIDENCE = 0.95
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
        *(
            row
            for peer, span in zip(peers, SPANS, strict=True)
            for row in _memory(f"soak: blocks {span}", memory[peer.pid])
        ),
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


@dataclass(slots=True)
class _Samples:
    """Minutes, and megabytes that a peer and its p2pd hold for themselves then."""

    minutes: list[float] = field(default_factory=list)
    own: list[float] = field(default_factory=list)
    daemon: list[float] = field(default_factory=list)

    def take(self, pid: int) -> None:
        """Now."""
        process = psutil.Process(pid)
        self.minutes.append(time.monotonic() / 60)
        self.own.append(_megabytes(process))
        self.daemon.append(sum(map(_megabytes, process.children())))


def _megabytes(process: psutil.Process) -> float:
    return float(process.memory_full_info().uss / 1e6)


def _watch(plan: Plan, peers: list[PeerProcess], crowd: _Crowd, seconds: float) -> dict[int, _Samples]:
    """Samples by process id, taken until no more clients come."""
    samples = {peer.pid: _Samples() for peer in peers}
    for second in itertools.count():
        if crowd.over:
            return samples
        for peer in peers:
            if peer.process.poll() is not None:
                raise Failed(f"a peer ended:\n{peer.output()}")
            if crowd.left <= (1 - WARM_UP) * seconds:
                samples[peer.pid].take(peer.pid)
        if second % TELL_SECONDS == 0:
            plan.tell(f"soak: {min(crowd.left, seconds):.0f} s to go, {crowd.went + crowd.killed} clients have gone")
        time.sleep(1.0)
    raise AssertionError("it counts for ever")


def _memory(case: str, samples: _Samples) -> list[Row]:
    rows = []
    for name, sizes in (("memory", samples.own), ("p2pd's memory", samples.daemon)):
        slope, highest = slope_of(samples.minutes, sizes)
        rows += [
            Row(f"{case}: {name}, median {statistics.median(sizes):.0f} MB, slope", slope, "MB/min"),
            Row(f"{case}: {name}, slope with {CONFIDENCE:.0%} confidence at most", highest, "MB/min", must=MUST_SLOPE),
        ]
    return rows


def slope_of(minutes: list[float], sizes: list[float]) -> tuple[float, float]:
    """The slope through the medians of stretches, and the highest that it is with `CONFIDENCE`. See the module."""
    stretches: dict[int, list[float]] = {}
    for minute, size in zip(minutes, sizes, strict=True):
        stretches.setdefault(int((minute - minutes[0]) * 60 / STRETCH), []).append(size)
    medians = [statistics.median(each) for each in stretches.values()]
    found = theilslopes(medians, [number * STRETCH / 60 for number in stretches], alpha=CONFIDENCE)
    return float(found.slope), float(found.high_slope)


def _left(local: LocalSwarm, model: Any) -> int:
    """Sessions that the peers still say they hold, long after the last client has gone."""
    deadline = time.monotonic() + 6 * LEASE_SECONDS
    while time.monotonic() < deadline:
        offers = local.offers(model, BLOCKS)
        if all(offer.sessions == 0 and offer.cache_free == offer.cache_tokens for offer in offers):
            return 0
        time.sleep(1.0)
    return max(sum(offer.sessions for offer in offers), 1)
