"""How likely the candidates for the next token are, by what speaks for each. Pure.

Each has odds against "none of them": the product of what each thing that speaks for it is worth. So two that are
equally well supported share what one alone would have; and what is worth less than it was expected to be in one text
is soon believed less there (stochastic gradient descent on the likelihood of what came).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from swarm.speculation.lookup import Candidate

# Logarithms of what things are worth, by maximum likelihood over 34 answers of SmolLM2-135M-Instruct: twelve passages
# of Python's help summarised, twelve functions of its library edited, ten free ones.
_RUN = (-1.48, -1.33, 0.11, 1.07, 1.21, 1.35, 1.64, 2.02, 2.11, 2.93, 3.79)  # by how many tokens it is
_SAID = (0.0, 1.32, 1.52, 2.37)  # the same
_TIMES = 0.48  # for each factor of e in how often it stood there
_LIKED = (0.164, 0.1, 0.05)  # for each nat of what the model thought of it for the last token, by tokens since
_USUAL, _FAINTEST = -6.0, -10.0  # nats: what it thinks of most, and what is as good as nothing

_LEARN_ALL, _LEARN_RUN = 0.05, 0.1  # how fast

AHEAD = len(_LIKED)  # tokens, for which it is of use what the model thought of them


@dataclass(frozen=True, slots=True)
class Guess:
    """The candidates for one token, and the chance of each; the rest is that of none of them."""

    candidates: Sequence[Candidate]
    chances: Sequence[float]

    @property
    def token(self) -> int:
        """The likeliest."""
        return max(zip(self.chances, self.candidates, strict=True))[1].token

    @property
    def chance(self) -> float:
        """That of the likeliest."""
        return max(self.chances)


class Odds:
    """What things that speak for a token are worth in one session."""

    def __init__(self) -> None:
        self._all = 0.0
        self._run = list(_RUN)

    def guess(self, candidates: Sequence[Candidate], liked: Sequence[float] = (), ahead: int = 0) -> Guess:
        """The chances of one candidate or more.

        Args:
            liked: log odds that the model gave each for the place of the last token that came, where it did not take
                that one; empty if they are not known.
            ahead: how many drafted tokens lie between.
        """
        thought = _LIKED[ahead] if liked and ahead < AHEAD else 0.0
        odds = [
            math.exp(
                self._all
                + self._run[each.run]
                + _SAID[each.said]
                + _TIMES * math.log(max(each.times, 1))
                + thought * (max(likes, _FAINTEST) - _USUAL)
            )
            for each, likes in zip(candidates, liked or [_USUAL] * len(candidates), strict=True)
        ]
        whole = 1.0 + sum(odds)
        return Guess(candidates, [each / whole for each in odds])

    def saw(self, guess: Guess, token: int) -> None:
        """Learn from the one that came."""
        for candidate, chance in zip(guess.candidates, guess.chances, strict=True):
            missed = (candidate.token == token) - chance
            self._all += _LEARN_ALL * missed
            self._run[candidate.run] += _LEARN_RUN * missed
