"""Ways to generate from a session: what users do with one, each as a short coroutine.

Each takes anything with the `step` of a `swarm.session.Session`, so that the same course can be run over a chain of
peers and over the whole model in this process (`Undisturbed`).
"""

from __future__ import annotations

import random
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from arithmetic import ARITHMETIC, ArithmeticModel

from peer.stage import Stage, StepInput
from swarm.session import StepMeta
from swarm.types import Span


class Ends(Protocol):
    """What is before the first block and behind the last."""

    vocabulary: int

    def embedded(self, ids: torch.Tensor) -> torch.Tensor:
        """[B, N] to [B, N, H]."""

    def scores(self, hidden: torch.Tensor) -> torch.Tensor:
        """[B, N, H] to the logarithms of probabilities [B, N, V]."""


class Steps(Protocol):
    """A sequence batch that is being generated."""

    ends: Ends

    async def step(self, hidden: torch.Tensor, meta: StepMeta) -> torch.Tensor: ...


Decode = Callable[[Steps], Awaitable[list[list[int]]]]


class Undisturbed:
    """A whole model, here."""

    def __init__(
        self, blocks: int, batch: int, load: Callable[[Span], Any] = ArithmeticModel, ends: Ends = ARITHMETIC
    ) -> None:
        self.ends = ends
        self._stage = Stage(load(Span(0, blocks)))
        self._state = self._stage.open(Span(0, blocks), batch, 4096)

    async def step(self, hidden: torch.Tensor, meta: StepMeta) -> torch.Tensor:
        number = self._state.number + 1
        step = StepInput(number, meta.position, hidden, meta.rows, meta.position_ids, meta.mask)
        output = self._stage.run(self._state, step)
        return output[:, -meta.keep :] if meta.keep else output


@dataclass(frozen=True)
class Decoding:
    """One way to generate, with everything that chance decides in it.

    Attributes:
        kind: greedy, sampling, padded, beams or speculative.
    """

    kind: str
    seed: int
    prompt: int  # tokens
    tokens: int  # to generate

    @property
    def batch(self) -> int:
        """Rows of its session."""
        return {"padded": 3, "beams": 3}.get(self.kind, 1)

    @property
    def max_length(self) -> int:
        """Positions that its session needs."""
        return self.prompt + self.tokens + 8

    async def run(self, steps: Steps) -> list[list[int]]:
        """The tokens, the prompt not included, of each row."""
        generator = torch.Generator().manual_seed(self.seed)
        prompt = torch.randint(steps.ends.vocabulary, (1, self.prompt), generator=generator)
        decode = {
            "greedy": self._greedy,
            "sampling": self._sampling,
            "padded": self._padded,
            "beams": self._beams,
            "speculative": self._speculative,
        }[self.kind]
        return await decode(steps, prompt, generator)

    async def _greedy(self, steps: Steps, ids: torch.Tensor, _: torch.Generator) -> list[list[int]]:
        return await self._one_by_one(steps, ids, lambda row: int(row.argmax()))

    async def _sampling(self, steps: Steps, ids: torch.Tensor, generator: torch.Generator) -> list[list[int]]:
        return await self._one_by_one(steps, ids, lambda row: int(torch.multinomial(row.exp(), 1, generator=generator)))

    async def _one_by_one(
        self, steps: Steps, ids: torch.Tensor, choose: Callable[[torch.Tensor], int]
    ) -> list[list[int]]:
        answer: list[int] = []
        position = 0
        while True:
            output = steps.ends.scores(await steps.step(steps.ends.embedded(ids), StepMeta(position, keep=1)))
            position += ids.shape[1]
            answer.append(choose(output[0, -1]))
            if len(answer) == self.tokens:
                return [answer]
            ids = torch.tensor([[answer[-1]]])

    async def _padded(self, steps: Steps, ids: torch.Tensor, generator: torch.Generator) -> list[list[int]]:
        """Three prompts of different lengths, padded on the left, greedily."""
        prompt = torch.randint(steps.ends.vocabulary, (3, self.prompt), generator=generator)
        padding = torch.tensor([0, 1 % self.prompt, self.prompt // 2])
        mask = (torch.arange(self.prompt) >= padding[:, None]).to(torch.uint8)  # [B, N]
        places = (torch.cumsum(mask.to(torch.int64), dim=1) - 1).clamp(min=0)
        output = steps.ends.scores(await steps.step(steps.ends.embedded(prompt), StepMeta(0, 1, None, places, mask)))
        answer = [output[:, -1].argmax(dim=-1)]
        for index in range(self.tokens - 1):
            places = places[:, -1:] + 1
            meta = StepMeta(self.prompt + index, 0, None, places, torch.ones(3, 1, dtype=torch.uint8))
            output = steps.ends.scores(await steps.step(steps.ends.embedded(answer[-1][:, None]), meta))
            answer.append(output[:, -1].argmax(dim=-1))
        rows: list[list[int]] = torch.stack(answer, dim=1).tolist()
        return rows

    async def _beams(self, steps: Steps, ids: torch.Tensor, _: torch.Generator) -> list[list[int]]:
        """Three beams; the rows are moved whenever the best continuations are not one of each."""
        output = steps.ends.scores(await steps.step(steps.ends.embedded(ids.expand(3, -1)), StepMeta(0, keep=1)))
        totals, chosen = output[0, -1].topk(3)
        beams = chosen[:, None]  # [3, tokens]
        origin = torch.arange(3)
        for index in range(self.tokens - 1):
            meta = StepMeta(self.prompt + index, rows=origin.tolist())
            output = steps.ends.scores(await steps.step(steps.ends.embedded(beams[:, -1:]), meta))
            totals, flat = (totals[:, None] + output[:, -1]).flatten().topk(3)
            origin = flat // steps.ends.vocabulary
            beams = torch.cat([beams[origin], (flat % steps.ends.vocabulary)[:, None]], dim=1)
        result: list[list[int]] = beams.tolist()
        return result

    async def _speculative(self, steps: Steps, ids: torch.Tensor, _: torch.Generator) -> list[list[int]]:
        """Greedy, several guessed tokens at a time: those behind a wrong guess are rolled back."""
        chance = random.Random(self.seed)
        output = steps.ends.scores(await steps.step(steps.ends.embedded(ids), StepMeta(0, keep=1)))
        answer = [int(output[0, -1].argmax())]
        position = self.prompt
        while len(answer) < self.tokens:
            guesses = [chance.randrange(steps.ends.vocabulary) for _ in range(chance.randrange(4))]
            if guesses and chance.random() < 0.7:
                guesses[0] = await self._peek(steps, answer[-1], position)
            tried = torch.tensor([[answer[-1], *guesses]])
            output = steps.ends.scores(await steps.step(steps.ends.embedded(tried), StepMeta(position)))
            right = output[0].argmax(dim=-1).tolist()
            accepted = next((i for i, guess in enumerate(guesses) if guess != right[i]), len(guesses))
            answer += right[: accepted + 1]
            position += accepted + 1
        return [answer[: self.tokens]]

    async def _peek(self, steps: Steps, token: int, position: int) -> int:
        """The true next token: the step is run, and run again at the same position."""
        output = steps.ends.scores(await steps.step(steps.ends.embedded(torch.tensor([[token]])), StepMeta(position)))
        return int(output[0, -1].argmax())
