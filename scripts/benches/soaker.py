"""A client of `soak`: asks again and again, in every way there is, and stops in the middle of some answers.

Run as `python soaker.py FOLDER ADDRESS WORK SEED`, WORK being a JSON file of what to ask and what must come of it.
Prints a word for each answer (`exact`, `wrong`, `cancelled`, `refused`) and leaves when its stdin ends.
"""

from __future__ import annotations

import json
import random
import sys
import threading
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from swarm.client import SwarmCache, SwarmModelForCausalLM
from swarm.errors import NoRoom, NoRoute

NEW_TOKENS = 24
WAYS: dict[str, dict[str, Any]] = {
    "greedy": {},
    "lookup": {"prompt_lookup_num_tokens": 4},
    "beams": {"num_beams": 3},
}
RETRY_SECONDS = (0.1, 0.5)  # between two attempts where the swarm is full
CANCELLED = 0.25  # of all answers


@dataclass(frozen=True, slots=True)
class Work:
    """Something to ask, and the right answer."""

    way: str
    rows: list[list[int]]
    answer: list[list[int]]  # the rows and what follows them

    def ids(self) -> torch.Tensor:
        """[B, N]"""
        return torch.tensor(self.rows)


def options(way: str) -> dict[str, Any]:
    """For `generate()`."""
    return {"max_new_tokens": NEW_TOKENS, "do_sample": False, "pad_token_id": 0, **WAYS[way]}


def save(work: list[Work], file: Path) -> None:
    """For the clients."""
    file.write_text(json.dumps([asdict(each) for each in work]))


class _Cancelling:
    """A stopping criterion that breaks an answer off as Ctrl-C does, after so many tokens."""

    def __init__(self, after: int) -> None:
        self._left = after

    def __call__(self, ids: torch.Tensor, scores: Any, **_: Any) -> torch.Tensor:
        self._left -= 1
        if not self._left:
            raise KeyboardInterrupt
        return torch.zeros(len(ids), dtype=torch.bool)


class Soaker:
    """One client's life."""

    def __init__(self, model: Any, work: list[Work], seed: int) -> None:
        self._model = model
        self._work = work
        self._chance = random.Random(seed)
        self._over = threading.Event()
        threading.Thread(target=self._listen, daemon=True).start()

    def _listen(self) -> None:
        sys.stdin.read()
        self._over.set()

    def live(self) -> None:
        """Until nobody listens any more."""
        while not self._over.is_set():
            word = self._ask(self._chance.choice(self._work))
            print(word, flush=True)
            if word == "refused":
                self._over.wait(self._chance.uniform(*RETRY_SECONDS))

    def _ask(self, work: Work) -> str:
        cancelled = self._chance.random() < CANCELLED
        criteria = [_Cancelling(self._chance.randint(1, NEW_TOKENS - 1))] if cancelled else []
        cache = SwarmCache()
        ids = work.ids()
        try:
            found = self._model.generate(
                ids,
                attention_mask=torch.ones_like(ids),
                past_key_values=cache,
                stopping_criteria=criteria,
                **options(work.way),
            )
        except KeyboardInterrupt:
            return "cancelled"
        except (NoRoom, NoRoute):
            return "refused"
        finally:
            if self._chance.random() < 0.5:  # else it goes with the garbage
                cache.close()
        return "exact" if found.tolist() == work.answer else "wrong"


def main() -> None:
    """Join, ask until it is over, leave."""
    folder, address, file, seed = sys.argv[1:]
    torch.set_num_threads(1)
    work = [Work(**each) for each in json.loads(Path(file).read_text())]
    with SwarmModelForCausalLM.from_pretrained(folder, initial_peers=[address]) as model:
        Soaker(model, work, int(seed)).live()


if __name__ == "__main__":
    main()
