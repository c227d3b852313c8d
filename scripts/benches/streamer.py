"""A client of `drain`: streams one answer and says when each token came.

Run as `python streamer.py FOLDER ADDRESS PROMPT NEW_TOKENS`, the prompt being token ids in JSON: prints a line for
each token, its id and the time (of the system's monotonic clock, in seconds), and ends when its stdin does, or with
the answer.
"""

from __future__ import annotations

import json
import sys
import threading
import time
from typing import Any

import torch
from transformers.generation.streamers import BaseStreamer

from benches.generation import endless
from swarm.client import SwarmModelForCausalLM


class _Teller(BaseStreamer):
    """Prints what it is told, but for the prompt."""

    begun = False

    def put(self, value: torch.Tensor) -> None:
        if self.begun:
            print(value.item(), time.monotonic(), flush=True)
        self.begun = True

    def end(self) -> None:
        pass


class _Over:
    """A stopping criterion: nobody listens any more."""

    def __init__(self) -> None:
        self.over = threading.Event()
        threading.Thread(target=self._listen, daemon=True).start()

    def _listen(self) -> None:
        sys.stdin.read()
        self.over.set()

    def __call__(self, ids: torch.Tensor, scores: Any, **_: Any) -> torch.Tensor:
        return torch.full((len(ids),), self.over.is_set())


def main() -> None:
    """Join, generate, tell."""
    folder, address, prompt, new_tokens = sys.argv[1:]
    torch.set_num_threads(1)
    ids = torch.tensor([json.loads(prompt)])
    with SwarmModelForCausalLM.from_pretrained(folder, initial_peers=[address]) as model:
        options = endless(model, int(new_tokens)) | {"streamer": _Teller(), "stopping_criteria": [_Over()]}
        model.generate(ids, attention_mask=torch.ones_like(ids), **options)


if __name__ == "__main__":
    main()
