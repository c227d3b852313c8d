"""What a trainer knows of its run, round by round: a line of JSON each, and a picture of the loss at the end."""

from __future__ import annotations

import contextlib
import json
import logging
import math
from collections import deque
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import IO

from swarm.errors import DiskFull

log = logging.getLogger(__name__)


@dataclass(slots=True)
class Round:
    """One round, as one trainer saw it.

    Attributes:
        loss: mean over the samples that this trainer ran, in nats a token; NaN where it ran none.
        samples: that it ran. tokens: that these had.
        seconds: since the round before ended. peers: how many replicas every stage had.
        outcome: "commit", "skip", "stop", or "lost" where the run goes back to what was saved.
        norm: of the mean gradient, before clipping.
        evaluation: mean loss on the held-out samples, None where it was not taken.
    """

    round: int
    loss: float
    samples: int
    tokens: int
    seconds: float
    peers: list[int]
    outcome: str
    norm: float
    learning_rate: float
    evaluation: float | None = None
    lost: list[str] = field(default_factory=list)  # peers that failed on the way

    @property
    def tokens_per_second(self) -> float:
        return self.tokens / self.seconds if self.seconds > 0 else 0.0


class Metrics:
    """The rounds so far, the last few of them in memory, all of them in a file if there is one."""

    def __init__(self, file: Path | None) -> None:
        """Adds to what is in `file`. Raises `DiskFull` where it cannot be written."""
        self._file = file
        self._open: IO[str] | None = None
        self.recent: deque[Round] = deque(maxlen=32)
        self.curve: list[tuple[int, float]] = []  # round and loss
        self.evaluations: list[tuple[int, float]] = []
        if file is not None:
            try:
                file.parent.mkdir(parents=True, exist_ok=True)
                self._open = file.open("a", encoding="utf-8")
            except OSError as error:
                raise DiskFull(f"the metrics cannot be written to {file}: {error}") from None

    def add(self, ended: Round) -> None:
        """Another round is over. Where its line cannot be written, none is from then on: training matters more."""
        self.recent.append(ended)
        if self.curve and self.curve[-1][0] >= ended.round:  # the run went back
            self.curve = [point for point in self.curve if point[0] < ended.round]
            self.evaluations = [point for point in self.evaluations if point[0] < ended.round]
        if math.isfinite(ended.loss):
            self.curve.append((ended.round, ended.loss))
        if ended.evaluation is not None:
            self.evaluations.append((ended.round, ended.evaluation))
        if self._open is None:
            return
        fields = {name: _plain(value) for name, value in asdict(ended).items()}
        try:
            print(json.dumps({**fields, "tokens_per_second": ended.tokens_per_second}), file=self._open, flush=True)
        except OSError as error:
            log.error("no more metrics are written file=%s error=%r", self._file, str(error))
            self.close()

    def close(self) -> None:
        """No more rounds come."""
        if self._open is not None:
            with contextlib.suppress(OSError):  # what could not be written is tried once more
                self._open.close()
            self._open = None

    def plot(self, file: Path, title: str) -> None:
        """Draw the loss, and the one on held-out samples if there is one, as a PNG. Raises `DiskFull`."""
        from matplotlib.figure import Figure  # not pyplot: no window, no state

        figure = Figure(figsize=(8, 4.5), dpi=120, layout="constrained")
        axes = figure.add_subplot(xlabel="round", ylabel="loss (nats a token)", title=title)
        axes.plot(*_columns(self.curve), linewidth=1.2, label="training")
        if self.evaluations:
            axes.plot(*_columns(self.evaluations), linewidth=1.2, marker=".", label="held out")
            axes.legend(frameon=False)
        axes.grid(alpha=0.3)
        try:
            figure.savefig(file, format="png")
        except OSError as error:
            raise DiskFull(f"the plot cannot be written to {file}: {error}") from None


def _columns(points: list[tuple[int, float]]) -> tuple[list[int], list[float]]:
    return [x for x, _ in points], [y for _, y in points]


def _plain(value: object) -> object:
    """JSON knows no NaN."""
    return None if isinstance(value, float) and not math.isfinite(value) else value
