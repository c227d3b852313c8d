"""Peers that are far apart: every link between any two takes 25 ms one way, through a relay on loopback.

Three stages, so that a token makes four trips: to each stage, and home. The reference of the first two rows is a
client that asks one stage after the other, and makes six: what its token takes is ours and two trips more, everything
else being the same. A token a trip can come close to 6/4 of that and never reach it, as the stages take their time in
both; with drafts (`auto`, what the `swarm` command does) a trip brings several tokens. The other rows compare drafts
with none. Answers end where the model ends them.

The texts were chosen by rule, before anything was measured with them: passages and functions of Python's own library
to summarise and to edit, and free questions. What drafts are expected to be worth at first (`swarm.speculation.odds`)
was fitted to others: the passages at places 5, 15, 25 and 35 of the same list and at 2, 7, 12 and so on, the functions
at 1, 3, 5 and 7 and eight of other modules, and ten other questions. Beside the tokens that a trip brought stands what
drafts from the text alone would have, had each ended where it was right. Ours do not know where that is; but they learn
from what the model says after a wrong token, too.
"""

from __future__ import annotations

import ast
import importlib
import inspect
import itertools
import time
from dataclasses import dataclass, field
from pathlib import Path
from pydoc_data.topics import topics
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
from swarm.speculation.lookup import Lookup
from swarm.speculation.odds import Odds
from swarm.speculation.tuning import MOST, Counts

ONE_WAY = 0.025  # seconds
STAGES = 3
NEW_TOKENS = 80
ROUNDS = 2
MUST_STRAIGHT, MUST_REPEATING, MUST_FREE = 1.5, 2.0, 1.0

_MODULES = ("bisect", "calendar", "colorsys", "fnmatch", "heapq", "posixpath", "random", "shlex")
PASSAGES, FUNCTIONS = (0, 10, 20), (0, 2, 4)  # which of those there are
FREE_TEXT = "free text"
FREE = [
    "Write a short story about a fish that wants to leave its shoal.",
    "Explain how a bicycle stays upright.",
    "What is a shoal of fish, and why do fish form one?",
    "Give me three tips for learning to play the guitar.",
]


def passages() -> list[str]:
    """Of each of Python's help topics in turn, the first paragraph of 60 to 120 words of prose."""
    found = []
    for topic in sorted(topics):
        paragraphs = (" ".join(each.split()) for each in topics[topic].split("\n\n"))
        prose = (p for p in paragraphs if p[:1].isupper() and p.endswith(".") and "::=" not in p and "|" not in p)
        found += list(itertools.islice((each for each in prose if 60 <= len(each.split()) <= 120), 1))
    return found


def functions() -> list[tuple[str, str]]:
    """Of some of Python's modules, the first function of 8 to 20 lines with a variable: its source, and its name."""
    found = []
    for module in _MODULES:
        source = inspect.getsource(importlib.import_module(module))
        for node in ast.parse(source).body:
            text = ast.get_source_segment(source, node) or ""
            names = [
                each.id for each in ast.walk(node) if isinstance(each, ast.Name) and isinstance(each.ctx, ast.Store)
            ]
            if isinstance(node, ast.FunctionDef) and 8 <= len(text.splitlines()) <= 20 and names:
                found.append((text, names[0]))
                break
    return found


def repeating() -> dict[str, list[str]]:
    """Questions whose answers repeat a part of them, by kind."""
    texts, sources = passages(), functions()
    return {
        "summaries": [f"Summarize this text in a few sentences:\n\n{texts[place]}" for place in PASSAGES],
        "code": [_edit(*sources[place]) for place in FUNCTIONS],
    }


def _edit(source: str, name: str) -> str:
    asked = f"Rename the variable `{name}` to `{name}_value` in this Python function, and give the whole function back"
    return f"{asked}:\n\n```python\n{source}\n```"


@dataclass(frozen=True, slots=True)
class Timed:
    """One answer."""

    tokens: list[int]
    seconds: float  # per token, the first left out
    counts: Counts


@dataclass(slots=True)
class _Asked:
    """A question, what has to come of it, and what came: without drafts and with them."""

    kind: str
    ids: torch.Tensor  # [1, N]
    expected: list[int]
    pairs: list[tuple[Timed, Timed]] = field(default_factory=list)


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
    kinds = {
        kind: [_encode(folder, text) for text in texts] for kind, texts in {**repeating(), FREE_TEXT: FREE}.items()
    }
    whole = whole_model(folder)
    asked = [_Asked(kind, ids, _answer(whole, ids, None).tokens) for kind, prompts in kinds.items() for ids in prompts]
    for number in range(plan.rounds(ROUNDS)):
        for place, each in enumerate(asked):
            plan.tell(f"wan: round {number + 1} of {plan.rounds(ROUNDS)}, text {place + 1} of {len(asked)}")
            in_order = [(plain, SwarmCache()), (drafting, SwarmCache())][:: -1 if number % 2 else 1]
            answers = {id(model): _answer(model, each.ids, cache) for model, cache in in_order}
            each.pairs.append((answers[id(plain)], answers[id(drafting)]))
    rows = _way([pair for each in asked for pair in each.pairs])
    rows += _drafts("wan: text that repeats itself", [each for each in asked if each.kind != FREE_TEXT], MUST_REPEATING)
    for kind in kinds:
        must = MUST_FREE if kind == FREE_TEXT else None
        rows += _drafts(f"wan: {kind}", [each for each in asked if each.kind == kind], must)
    return [*rows, _equal(asked)]


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
        Row(f"{case}, a token a trip, if stages took no time", 2 * STAGES / (STAGES + 1), "of the reference"),
    ]


def _drafts(case: str, asked: list[_Asked], must: float | None) -> list[Row]:
    pairs = [pair for each in asked for pair in each.pairs]
    rounds = Rounds([1 / drafting.seconds for _, drafting in pairs], [1 / plain.seconds for plain, _ in pairs])
    counts = [drafting.counts for _, drafting in pairs]
    trips = sum(each.tokens for each in counts) / sum(each.trips for each in counts)
    best = sum(len(each.expected) - 1 for each in asked) / sum(_least_trips(each) for each in asked)
    accepted = sum(each.accepted for each in counts) / max(sum(each.drafted for each in counts), 1)
    return [
        rounds.row(f"{case}, drafts over none", "tokens/s", None if must is None else Must("ratio", ">=", must)),
        Row(f"{case}, tokens a trip", trips, "tokens", best, trips / best),
        Row(f"{case}, accepted of what was drafted", accepted, "of all"),
    ]


def _least_trips(asked: _Asked) -> int:
    """After the one that reads the prompt, had each draft from the text alone been sent as far as it was right."""
    text, odds = [*asked.ids[0].tolist(), asked.expected[0]], Odds()
    left, lookup, trips = asked.expected[1:], Lookup(), 0
    while left:
        lookup.extend(text[len(lookup) :])
        right: list[int] = []
        while len(right) < min(MOST, len(left) - 1) and (found := lookup.candidates(right)):
            if (token := odds.guess(found).token) != left[len(right)]:
                break
            right.append(token)
        came = len(right) + 1
        text, left, trips = text + left[:came], left[came:], trips + 1
    return trips


def _equal(asked: list[_Asked]) -> Row:
    answers = [(each.expected, answer) for each in asked for pair in each.pairs for answer in pair]
    share = sum(answer.tokens == expected for expected, answer in answers) / len(answers)
    return Row("wan: equal answers", share, "of all", must=Must("value", "==", 1.0))
