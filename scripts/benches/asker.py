"""A client of `aggregate` and `mixed`, a process of its own: generates as often as it is asked to.

Run as `python asker.py FOLDER ADDRESS DTYPE`: prints a line once it is there, then reads requests, a line of JSON each
with `prompt` (token ids) and `new_tokens`, and prints for each a line of JSON with `tokens` and `times` (when each
came, on the system's monotonic clock, in seconds). It ends when its stdin does.
"""

from __future__ import annotations

import json
import sys
import time

import torch
from transformers.generation.streamers import BaseStreamer

from benches.generation import endless
from swarm.client import SwarmModelForCausalLM


class _Clock(BaseStreamer):
    """Notes when each token came, and the prompt before them."""

    def __init__(self) -> None:
        self.times: list[float] = []

    def put(self, value: torch.Tensor) -> None:
        self.times.append(time.monotonic())

    def end(self) -> None:
        pass


def main() -> None:
    """Join, and answer requests."""
    folder, address, dtype = sys.argv[1:]
    torch.set_num_threads(1)
    with SwarmModelForCausalLM.from_pretrained(folder, initial_peers=[address], dtype=getattr(torch, dtype)) as model:
        print("ready", flush=True)
        for line in sys.stdin:
            request, clock = json.loads(line), _Clock()
            ids, options = torch.tensor([request["prompt"]]), endless(model, request["new_tokens"])
            output = model.generate(ids, attention_mask=torch.ones_like(ids), streamer=clock, **options)
            tokens = output[0, ids.shape[1] :].tolist()
            print(json.dumps({"tokens": tokens, "times": clock.times[1:]}), flush=True)


if __name__ == "__main__":
    main()
