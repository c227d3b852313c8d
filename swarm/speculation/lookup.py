"""What may come next, by the text itself and by what the model said where drafts went astray. Pure.

Cf. Saxena 2023, "Prompt Lookup Decoding", and Yang et al. 2023, "Inference with Reference": where a text repeats
itself (a summary, a correction, code), its own past is a better draft than most small models', and costs nothing. And
Luo et al. 2024, "Turning Trash into Treasure" (token recycling): the model has also told what it would go on with after
each token of a draft that it did not follow. That is lost with the draft, and often what comes a little later.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import NamedTuple

LONGEST = 10  # tokens that are compared, at most: of longer runs there is no more to be told
LONGEST_SAID = 3  # the same of what the model said elsewhere

_PLACES = 64  # of a token, the latest, that are looked at
_SAYINGS = 4


class Candidate(NamedTuple):
    """A token that may come next, and what speaks for it."""

    token: int
    run: int  # how many of the latest tokens stood before it in the text, 0 where it never followed the last one
    times: int  # how often it followed the last one
    said: int = 0  # after how many of the latest tokens the model said it where a draft went astray, 0 if it did not


class Lookup:
    """A text that grows, and where each of its tokens stands."""

    def __init__(self) -> None:
        self._tokens: list[int] = []
        self._after: dict[int, list[int]] = {}  # a token, and the positions after it
        self._said: dict[int, list[tuple[list[int], int]]] = {}  # a token, the latest up to it, and what was said then

    def extend(self, tokens: Iterable[int]) -> None:
        """The text goes on with `tokens`."""
        for token in tokens:
            if self._tokens:
                self._after.setdefault(self._tokens[-1], []).append(len(self._tokens))
            self._tokens.append(token)

    def __len__(self) -> int:
        return len(self._tokens)

    def said(self, drafted: Sequence[int], token: int) -> None:
        """Had the text gone on with `drafted`, the model would have gone on with `token`."""
        latest = self._latest(drafted, LONGEST_SAID)
        sayings = self._said.setdefault(latest[-1], [])
        sayings.append((latest, token))
        del sayings[:-_SAYINGS]

    def candidates(self, drafted: Sequence[int] = ()) -> list[Candidate]:
        """What may follow the text and `drafted` after it: all that followed the last token, and what was said then."""
        latest = self._latest(drafted, LONGEST)
        if not latest:
            return []
        found: dict[int, Candidate] = {}
        for position in self._after.get(latest[-1], ())[-_PLACES:]:
            token, run = self._tokens[position], _common(self._tokens, position, latest)
            _, longest, times, _ = found.get(token, (token, 0, 0, 0))
            found[token] = Candidate(token, max(run, longest), times + 1)
        sayings = [(_common(before, len(before), latest), token) for before, token in self._said.get(latest[-1], ())]
        if sayings:
            said, token = max(reversed(sayings), key=lambda saying: saying[0])
            _, run, times, _ = found.get(token, (token, 0, 0, 0))
            found[token] = Candidate(token, run, times, said)
        return list(found.values())

    def _latest(self, drafted: Sequence[int], most: int) -> list[int]:
        return [*self._tokens[-most:], *drafted][-most:]


def _common(tokens: Sequence[int], end: int, latest: Sequence[int]) -> int:
    """How many of the tokens before `end` are the latest ones."""
    most = min(end, len(latest))
    return next((n for n in range(most) if tokens[end - 1 - n] != latest[-1 - n]), most)
