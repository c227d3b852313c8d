"""A swarm in this very process: real nodes, real sockets, a real DHT, tiny random models."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, LlamaConfig, LogitsProcessor

from peer.config import BootstrapSettings, ServeSettings
from peer.joining import start_discovery
from peer.node import Node
from swarm.background import BackgroundLoop
from swarm.discovery import Discovery
from swarm.files.checkpoint import silent
from swarm.identity import Identity

TINY = {
    "vocab_size": 128,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 6,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}


def save_random(folder: Path, config: Any, seed: int = 0) -> Any:
    """A random model of `config`, saved to `folder` and returned whole, in fp32, with weights large enough to tell."""
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.normal_(0.0, 0.15)
    model.save_pretrained(folder)
    model.train(False)
    return model


def save_llama(folder: Path, seed: int = 0, **changes: Any) -> Any:
    """A tiny random Llama."""
    return save_random(folder, LlamaConfig(**{**TINY, **changes}), seed)


class Swarm:
    """A bootstrap node and the peers that are started on it, in a background loop of their own."""

    def __init__(self) -> None:
        self.background = BackgroundLoop("test swarm")
        settings = BootstrapSettings()
        self.bootstrap: Discovery = self.background.run(start_discovery(settings, Identity.generate(), 0))
        self.address = self.bootstrap.addresses[0]
        self.nodes: list[Node] = []
        self._killed: list[Node] = []

    def serve(self, model: Path, blocks: str | None = None, **settings: Any) -> Node:
        """Start a peer and wait until it is online."""
        chosen = ServeSettings(model=str(model), blocks=blocks, initial_peers=[self.address], threads=1, **settings)

        async def start() -> Node:
            node = Node(chosen, Identity.generate(), silent)
            self.nodes.append(node)
            await node.start()
            return node

        return self.background.run(start())

    def stop(self, node: Node) -> None:
        """Let a peer leave."""
        self.nodes.remove(node)
        self.background.run(node.close())

    def serve_soon(self, model: Path, blocks: str | None, **settings: Any) -> threading.Thread:
        """Start a peer and do not wait; may be called in any thread."""
        thread = threading.Thread(target=self.serve, args=(model, blocks), kwargs=settings)
        thread.start()
        return thread

    def kill(self, node: Node) -> None:
        """End a peer as SIGKILL does, as far as others can tell: its sockets close, its offer stays."""

        async def kill() -> None:
            for task in node._tasks:
                task.cancel()
            await node.rpc.close()

        self.background.run(kill())
        self.nodes.remove(node)
        self._killed.append(node)

    def close(self) -> None:
        """Take everything down."""
        for node in self._killed:
            self.background.run(node.close())
        for node in list(self.nodes):
            self.stop(node)
        self.background.run(self.bootstrap.close())
        self.background.close()


@contextlib.contextmanager
def running_swarm() -> Iterator[Swarm]:
    """A `Swarm` for the time of a `with`."""
    swarm = Swarm()
    try:
        yield swarm
    finally:
        swarm.close()


class AtStep(LogitsProcessor):
    """Does something when the model has been asked so many times."""

    def __init__(self, actions: dict[int, Callable[[], None]]) -> None:
        self.actions = actions
        self.step = 0

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        self.step += 1
        if (action := self.actions.get(self.step)) is not None:
            action()
        return scores
