"""Drafts from the text itself: what followed the last time that its latest tokens stood there. Pure.

Cf. Saxena 2023, "Prompt Lookup Decoding", and Yang et al. 2023, "Inference with Reference": where a text repeats
itself (a summary, a correction, code), its own past is a better draft than most small models', and costs nothing.
"""

from __future__ import annotations

from collections.abc import Iterable

LONGEST = 10  # tokens that are looked for, at most: of longer runs there is no more to be told


class Lookup:
    """A text that grows, and where each short run of its tokens was last followed by something."""

    def __init__(self, longest: int = LONGEST) -> None:
        self.longest = longest
        self._tokens: list[int] = []
        self._after: dict[tuple[int, ...], int] = {}  # a run of tokens, and the position after its latest place

    def extend(self, tokens: Iterable[int]) -> None:
        """The text goes on with `tokens`."""
        for token in tokens:
            here = len(self._tokens)
            for start in range(max(0, here - self.longest), here):
                self._after[tuple(self._tokens[start:here])] = here
            self._tokens.append(token)

    def __len__(self) -> int:
        return len(self._tokens)

    def draft(self, most: int) -> tuple[list[int], int]:
        """Up to `most` tokens that may come next, and how many of the latest tokens speak for the first of them.

        Of the runs that end the text and stood in it before, the longest counts, and of its places the latest. A draft
        that reaches the end of the text goes on with itself, as befits a text that goes in circles.
        """
        here = len(self._tokens)
        for length in range(min(self.longest, here), 0, -1):
            if (start := self._after.get(tuple(self._tokens[here - length :]))) is not None:
                drafted = self._tokens[start : start + most]
                for position in range(len(drafted), most):
                    drafted.append(drafted[start + position - here])
                return drafted, length
        return [], 0
