"""Peers that are far apart: every link between any two takes 25 ms one way, through a relay on loopback.

Three stages, so that a token makes four trips: to each stage, and home. The reference of the first two rows is a
client that asks one stage after the other, and makes six: what its token takes is ours and two trips more, everything
else being the same. A token a trip can come close to 6/4 of that and never reach it, as the stages take their time in
both; with drafts (`auto`, what the `swarm` command does) a trip brings several tokens. The other rows compare drafts
with none: on answers that repeat their prompt (the key sentences of a text, a change to code) and on free ones, all of
these together. Answers end where the model ends them.
"""

from __future__ import annotations

import statistics
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from processes import LocalSwarm
from transformers.generation.streamers import BaseStreamer

from benches.generation import whole_model
from benches.plan import Plan
from benches.rows import Must, Rounds, Row
from swarm.client import SwarmCache, SwarmModelForCausalLM
from swarm.console.conversation import load_tokenizer
from swarm.files.checkpoint import Checkpoint
from swarm.files.hub import DEFAULT_MODEL, resolve
from swarm.speculation.tuning import Counts

ONE_WAY = 0.025  # seconds
STAGES = 3
NEW_TOKENS = 80
ROUNDS = 3
MUST_STRAIGHT, MUST_REPEATING, MUST_FREE = 1.5, 2.0, 1.0

_ARTICLE = (
    "A shoal is a group of fish that stay together for social reasons. When the fish swim in the same direction in a "
    "coordinated manner, they are schooling. About one quarter of all fish species shoal all their lives, and about "
    "one half shoal for part of their lives. Fish derive many benefits from shoaling. A shoal is better at finding "
    "food, it is better at seeing predators, and a predator finds it hard to single out one fish among many. Fish use "
    "their eyes and their lateral lines to keep their place in the shoal."
)
_CODE = """class Account:
    def __init__(self, owner, balance=0):
        self.owner = owner
        self.balance = balance

    def deposit(self, amount):
        self.balance = self.balance + amount
        return self.balance

    def withdraw(self, amount):
        if amount > self.balance:
            raise ValueError("not enough money")
        self.balance = self.balance - amount
        return self.balance
"""
REPEATING = {
    "summary": f"Give the key sentences of this text as a list:\n\n{_ARTICLE}",
    "code": f"Add a method `close` to this Python class, and give the whole class back:\n\n```python\n{_CODE}```",
}
FREE = {
    "story": "Write a short story about a fish that wants to leave its shoal.",
    "explanation": "Explain how a bicycle stays upright.",
    "question": "What is a shoal of fish, and why do fish form one?",
    "advice": "Give me three tips for learning to play the guitar.",
}


@dataclass(frozen=True, slots=True)
class Timed:
    """One answer."""

    tokens: list[int]
    seconds: float  # per token, the first left out
    counts: Counts


class _Clock(BaseStreamer):
    def __init__(self) -> None:
        self.times: list[float] = []

    def put(self, value: torch.Tensor) -> None:
        self.times.append(time.perf_counter())

    def end(self) -> None:
        pass


def measure(plan: Plan) -> list[Row]:
    """Rows for the way that a token takes, for repeating and for free text, and for whether the answers are equal."""
    plan.tell("wan: starting")
    checkpoint = Checkpoint(resolve(DEFAULT_MODEL))
    blocks: int = checkpoint.config().num_hidden_layers
    torch.set_num_threads(1)
    with LocalSwarm(one_way=ONE_WAY) as local:
        for stage in range(STAGES):
            local.serve(
                str(checkpoint.folder), "--blocks", f"{blocks * stage // STAGES}:{blocks * (stage + 1) // STAGES}"
            )
        local.wait_online(checkpoint.model_id, blocks, STAGES)
        connected = {"initial_peers": [local.address]}
        with (
            SwarmModelForCausalLM.from_pretrained(checkpoint.folder, speculate="off", **connected) as plain,
            SwarmModelForCausalLM.from_pretrained(checkpoint.folder, speculate="auto", **connected) as drafting,
        ):
            return _compare(plan, checkpoint.folder, plain, drafting)


def _compare(plan: Plan, folder: Path, plain: Any, drafting: Any) -> list[Row]:
    prompts = {name: _encode(folder, text) for name, text in {**REPEATING, **FREE}.items()}
    whole = whole_model(folder)
    expected = {name: _answer(whole, ids, None).tokens for name, ids in prompts.items()}
    found: dict[str, list[tuple[Timed, Timed]]] = {name: [] for name in prompts}
    for number in range(plan.rounds(ROUNDS)):
        for name, ids in prompts.items():
            plan.tell(f"wan: {name}, round {number + 1} of {plan.rounds(ROUNDS)}")
            in_order = [(plain, SwarmCache()), (drafting, SwarmCache())]
            answers = {id(model): _answer(model, ids, cache) for model, cache in in_order[:: -1 if number % 2 else 1]}
            found[name].append((answers[id(plain)], answers[id(drafting)]))
    repeating = [row for name in REPEATING for row in _drafts(f"wan: {name}", found[name], MUST_REPEATING)]
    free = _drafts("wan: free text", [pair for name in FREE for pair in found[name]], MUST_FREE)
    return [*_way([pair for pairs in found.values() for pair in pairs]), *repeating, *free, _equal(found, expected)]


def _encode(folder: Path, text: str) -> torch.Tensor:
    tokenizer: Any = load_tokenizer(str(folder))
    turns = [{"role": "user", "content": text}]
    return torch.tensor([tokenizer.apply_chat_template(turns, add_generation_prompt=True, return_dict=False)])


def _answer(model: Any, ids: torch.Tensor, cache: SwarmCache | None) -> Timed:
    clock = _Clock()
    options = {"do_sample": False, "max_new_tokens": NEW_TOKENS, "past_key_values": cache}
    output = model.generate(ids, attention_mask=torch.ones_like(ids), streamer=clock, **options)
    times = clock.times[1:]  # the prompt's left out
    counts = Counts()
    if cache is not None:
        counts = cache.tuner.counts
        cache.close()
    return Timed(output[0, ids.shape[1] :].tolist(), (times[-1] - times[0]) / (len(times) - 1), counts)


def _way(pairs: list[tuple[Timed, Timed]]) -> list[Row]:
    """Straight from stage to stage, over a round trip for each: without drafts and with them, on all texts."""
    there_and_back = [1 / (plain.seconds + (2 * STAGES - (STAGES + 1)) * ONE_WAY) for plain, _ in pairs]
    straight = Rounds([1 / plain.seconds for plain, _ in pairs], there_and_back)
    drafted = Rounds([1 / drafting.seconds for _, drafting in pairs], there_and_back)
    case = f"wan: {STAGES} stages"
    return [
        straight.row(f"{case}, a token a trip, over a round trip a stage", "tokens/s"),
        drafted.row(
            f"{case}, as by default, over a round trip a stage", "tokens/s", Must("ratio", ">=", MUST_STRAIGHT)
        ),
    ]


def _drafts(case: str, pairs: list[tuple[Timed, Timed]], must: float) -> list[Row]:
    rounds = Rounds([1 / drafting.seconds for _, drafting in pairs], [1 / plain.seconds for plain, _ in pairs])
    trips = statistics.median(drafting.counts.tokens / drafting.counts.trips for _, drafting in pairs)
    return [
        rounds.row(f"{case}, drafts over none", "tokens/s", Must("ratio", ">=", must)),
        Row(f"{case}, tokens a trip", trips, "tokens"),
    ]


def _equal(found: dict[str, list[tuple[Timed, Timed]]], expected: dict[str, list[int]]) -> Row:
    answers = [(name, each) for name, pairs in found.items() for pair in pairs for each in pair]
    share = sum(each.tokens == expected[name] for name, each in answers) / len(answers)
    return Row("wan: equal answers", share, "of all", must=Must("value", "==", 1.0))
