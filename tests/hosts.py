"""Swarms of real processes for the tests: a model that never stops by itself, who hosts it, what belongs to a peer."""

from __future__ import annotations

import re
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
import torch
from commands import save_talking
from inprocess import AtStep
from nursery import Forked
from processes import LocalSwarm, PeerProcess, terminated_like_interrupted
from transformers import LogitsProcessorList

from swarm import SwarmCache
from swarm.console.conversation import Conversation, load_tokenizer
from swarm.files.checkpoint import Checkpoint
from swarm.session import Session
from swarm.types import ModelId, Offer, PeerId

BLOCKS = 6
SLACK = 3.0  # seconds on top of what is promised, for a machine that does other things too
PROMPT = torch.tensor([[5, 6, 7]])


@dataclass
class Model:
    """A tiny model that never ends an answer by itself, on disk and in memory."""

    folder: Path
    whole: Any

    @property
    def id(self) -> ModelId:
        return Checkpoint(self.folder).model_id

    def continues(self, count: int) -> list[int]:
        """The greedy continuation of `PROMPT` by the whole model, the prompt included."""
        return generated(self.whole, count)

    def says(self, text: str, count: int) -> str:
        """The greedy answer of the whole model."""
        talk = Conversation(self.whole, load_tokenizer(str(self.folder)))
        ids = torch.tensor([talk.encode(text)])
        output = self.whole.generate(
            ids, attention_mask=torch.ones_like(ids), max_new_tokens=count, do_sample=False, pad_token_id=0
        )
        return str(talk.tokenizer.decode(output[0, ids.shape[1] :], skip_special_tokens=True))


def make_model(folder: Path, seed: int) -> Model:
    return Model(folder, save_talking(folder, seed, max_position_embeddings=8192, eos_token_id=None))


def generated(model: Any, count: int, **options: Any) -> list[int]:
    """The greedy continuation of `PROMPT`, the prompt included."""
    tokens: list[int] = model.generate(
        PROMPT,
        attention_mask=torch.ones_like(PROMPT),
        max_new_tokens=count,
        do_sample=False,
        pad_token_id=0,
        **options,
    )[0].tolist()
    return tokens


def disturbed(client: Any, count: int, actions: dict[int, Callable[[Session], None]]) -> tuple[list[int], Session]:
    """What the swarm makes of `PROMPT` where `actions` are done, each after so many tokens; and the session."""
    cache = SwarmCache(PROMPT.shape[1] + count)

    def doing(action: Callable[[Session], None]) -> Callable[[], None]:
        return lambda: action(session_of(cache))

    at_step = AtStep({step: doing(action) for step, action in actions.items()})
    tokens = generated(client, count, past_key_values=cache, logits_processor=LogitsProcessorList([at_step]))
    session = session_of(cache)
    cache.close()
    return tokens, session


def session_of(cache: SwarmCache) -> Session:
    assert cache.session is not None
    return cache.session


class Hosts:
    """Peers that each host one of `spans` of a model; who dies is replaced when that is asked for."""

    def __init__(self, swarm: LocalSwarm, model: Model, spans: Sequence[str]) -> None:
        self.swarm = swarm
        self.model = model
        self.peers: dict[str, list[PeerProcess]] = {span: [] for span in spans}

    def fill(self, count: int) -> None:
        """Have so many living peers online for every span."""
        fresh = []
        for span, peers in self.peers.items():
            peers[:] = [peer for peer in peers if peer.process.poll() is None]
            for _ in range(count - len(peers)):
                peers.append(self.swarm.serve(str(self.model.folder), "--blocks", span))
                fresh.append(peers[-1])
        for peer in fresh:
            peer.address()  # which it prints once it is online

    def named(self, peer: PeerId) -> PeerProcess:
        """The last process of that name."""
        return next(each for each in reversed(self.swarm.peers) if each.peer == peer)

    def at(self, session: Session, hop: int) -> PeerProcess:
        """Who serves a hop of the session now."""
        assert session.route is not None
        return self.named(session.route.hops[hop].peer)

    def kill(self, hop: int) -> Callable[[Session], None]:
        """SIGKILL for who serves the hop, as an action."""
        return lambda session: self.at(session, hop).kill()


@contextmanager
def clean_swarm(listen: str = "127.0.0.1:0", popen: Any = Forked) -> Iterator[LocalSwarm]:
    """A swarm of processes, and the proof that it leaves nothing behind."""
    with terminated_like_interrupted(), LocalSwarm(listen, popen=popen) as swarm:
        yield swarm
        seen = {each: daemon_folders(each) for peer in swarm.peers for each in family(peer)}
    assert until(lambda: not [each for each in seen if alive(each)], SLACK)
    assert not [folder for folders in seen.values() for folder in folders if folder.exists()]


def offered(swarm: LocalSwarm, model: Model) -> dict[str, Offer]:
    """Who offers the model, as a client that looks now sees it."""
    return {offer.peer: offer for offer in swarm.offers(model.id, BLOCKS)}


def family(peer: PeerProcess) -> list[psutil.Process]:
    """The peer's process and all that it started."""
    if not psutil.pid_exists(peer.pid):
        return []
    parent = psutil.Process(peer.pid)
    return [parent, *parent.children(recursive=True)]


def p2pd_of(peer: PeerProcess) -> psutil.Process:
    """The DHT daemon of a peer."""
    return next(each for each in family(peer) if each.name() == "p2pd")


def daemon_folders(process: psutil.Process) -> list[Path]:
    found = re.search(r"-listen=/unix(\S+)/control.sock", " ".join(process.cmdline()))
    return [Path(found[1])] if found else []


def alive(process: psutil.Process) -> bool:
    return process.is_running() and process.status() != psutil.STATUS_ZOMBIE


def until(true: Callable[[], Any], seconds: float) -> Any:
    """Wait for what no event tells of; what it was at last."""
    deadline = time.monotonic() + seconds
    while not (found := true()) and time.monotonic() < deadline:
        time.sleep(0.05)
    return found
