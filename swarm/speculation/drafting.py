"""Who drafts what may come next: the text itself, or a small model on this machine."""

from __future__ import annotations

import math
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol, cast

import torch

from swarm.cutting.skeleton import without_progress_bars
from swarm.errors import UsageError
from swarm.files.hub import resolve
from swarm.speculation.lookup import Candidate, Lookup
from swarm.speculation.odds import AHEAD, Guess
from swarm.speculation.tuning import MOST, Tuner

if TYPE_CHECKING:
    from transformers.modeling_utils import PreTrainedModel

_FAINT = 0.02  # the chance of a whole draft from which on it is not gone on with
_ASTRAY = 7  # tokens of a draft after the first wrong one, after which it is of use what the model said
_SURE = 1e-4  # chance of any other token, at least, however sure the model is


def load_draft_model(name: str, folder: Path, dtype: torch.dtype, device: str) -> PreTrainedModel:
    """The draft model `name` for the model in `folder`, whole.

    Raises:
        ModelNotFound, ModelCorrupt: it cannot be had.
        UsageError: its tokens are not the model's.
    """
    from transformers import AutoModelForCausalLM

    found = resolve(name)
    if _vocabulary(found) != _vocabulary(folder):
        raise UsageError(f"{name} cannot draft for {folder.name}: its tokenizer is another")
    with without_progress_bars():
        model: Any = AutoModelForCausalLM.from_pretrained(found, dtype=dtype)
    return cast("PreTrainedModel", model.to(device))


def _vocabulary(folder: Path) -> dict[str, int]:
    from transformers import AutoTokenizer

    try:
        return cast("dict[str, int]", AutoTokenizer.from_pretrained(folder).get_vocab())
    except (OSError, ValueError) as error:
        raise UsageError(f"{folder} has no tokenizer to tell whether the draft's tokens are the model's") from error


class Drafter(Protocol):
    """Guesses what comes next."""

    def draft(self, input_ids: torch.Tensor, most: int) -> list[int]:
        """Up to `most` tokens that may follow `input_ids` [1, N]; none is an answer too."""

    def learn(self, sent: int, tokens: list[int], scores: torch.Tensor, input_ids: torch.Tensor) -> None:
        """Of the last draft, `sent` tokens went along; these came: the accepted ones and one more.

        `scores` is [1, sent + 1, V]: the model's, before any processor. `input_ids` now ends with `tokens`.
        """


class LookupDrafter:
    """Drafts from the text itself. With a `least` of 0 only where that is worth more than it costs."""

    def __init__(self, tuner: Tuner, least: int) -> None:
        self._tuner = tuner
        self._least = least
        self._lookup = Lookup()
        self._guesses: list[Guess] = []
        self._draft: list[int] = []
        self._thought: torch.Tensor | None = None  # [V]: log probabilities for the place of the last token
        self._others = 0.0  # of those: of all tokens but the one that came

    def draft(self, input_ids: torch.Tensor, most: int) -> list[int]:
        started = time.perf_counter()
        self._lookup.extend(input_ids[0, len(self._lookup) :].tolist())
        self._guesses, self._draft, chance = [], [], 1.0
        while len(self._draft) < MOST and chance > _FAINT and (found := self._lookup.candidates(self._draft)):
            ahead = len(self._draft)
            guess = self._tuner.odds.guess(found, self._likes(found) if ahead < AHEAD else (), ahead)
            self._guesses.append(guess)
            self._draft.append(guess.token)
            chance *= guess.chance
        self._tuner.drafted(len(self._draft), time.perf_counter() - started)
        chances = [guess.chance for guess in self._guesses]
        return self._draft[: self._tuner.depth(chances[:most], self._least)]

    def _likes(self, found: Sequence[Candidate]) -> list[float]:
        if self._thought is None:
            return []
        return [each - self._others for each in self._thought[[each.token for each in found]].tolist()]

    def learn(self, sent: int, tokens: list[int], scores: torch.Tensor, input_ids: torch.Tensor) -> None:
        for guess, token in zip(self._guesses, tokens, strict=False):
            self._tuner.odds.saw(guess, token)
            if guess.token != token:
                break
        accepted = len(tokens) - 1
        if accepted < sent and self._draft[accepted] != tokens[-1]:
            said = scores[0, accepted + 1 : accepted + 1 + _ASTRAY].argmax(dim=-1).tolist()
            for length, token in enumerate(said, accepted + 1):
                self._lookup.said(self._draft[:length], token)
        self._thought = scores[0, accepted].log_softmax(dim=-1)
        self._others = math.log(max(_SURE, -math.expm1(float(self._thought[tokens[-1]]))))


class ModelDrafter:
    """Drafts with what transformers makes of a draft model, a prompt and so on (its candidate generators).

    Args:
        generator: one of those.
        tuner: chooses how much to draft; None to leave that to the generator.
    """

    def __init__(self, generator: Any, tuner: Tuner | None = None) -> None:
        self._generator = generator
        self._tuner = tuner
        self._draft: list[int] = []

    def draft(self, input_ids: torch.Tensor, most: int) -> list[int]:
        if self._tuner is not None:
            self._generator.num_assistant_tokens = self._tuner.depth(
                [self._tuner.acceptance.chance] * min(most, MOST), least=1
            )
        started = time.perf_counter()
        with _borrowed_randomness(input_ids.device):
            candidates, _ = self._generator.get_candidates(input_ids)
        self._draft = candidates[0, input_ids.shape[1] :].tolist()
        if self._tuner is not None:
            self._tuner.drafted(len(self._draft), time.perf_counter() - started)
        return self._draft[:most]

    def learn(self, sent: int, tokens: list[int], scores: torch.Tensor, input_ids: torch.Tensor) -> None:
        self._generator.update_candidate_strategy(input_ids, scores, min(len(tokens) - 1, sent))
        if self._tuner is not None:
            self._tuner.compare(self._draft[:sent], tokens)


@contextmanager
def _borrowed_randomness(device: torch.device) -> Iterator[None]:
    """Let the same random numbers come again, when the model chooses.

    A draft model that samples with the very numbers that the model will sample with agrees with it as often as two
    can without talking: Daliri, Musco and Suresh 2024, "Coupling without Communication and Drafter-Invariant
    Speculative Decoding". Torch samples one of many by dividing them by exponential noise: their Gumbel coupling.
    """
    with torch.random.fork_rng([device] if device.type == "cuda" else []):
        yield
