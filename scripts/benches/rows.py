"""Figures, what they must be, and how they are told: pure, no clock and no processes."""

from __future__ import annotations

import operator
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

from rich.table import Table

_HOLDS = {"<=": operator.le, ">=": operator.ge, "==": operator.eq}


@dataclass(frozen=True, slots=True)
class Must:
    """What a row's value or ratio has to be."""

    figure: Literal["value", "ratio"]
    relation: Literal["<=", ">=", "=="]
    bound: float

    def __str__(self) -> str:
        return f"{self.figure} {self.relation} {self.bound:g}"


@dataclass(frozen=True, slots=True)
class Row:
    """One figure of a bench.

    Attributes:
        value: the median of the rounds, in `unit`.
        reference: the median of what it is compared with, in the same unit; None where there is nothing to compare.
        ratio: the median of value / reference, round by round: what slows both of a round down leaves it alone.
        spread: the distance between the quartiles over the median, of the ratios or else the values; None where the
            figure comes of one measurement.
        must: None for a row that only informs.
    """

    case: str
    value: float
    unit: str
    reference: float | None = None
    ratio: float | None = None
    spread: float | None = None
    must: Must | None = None

    @property
    def ok(self) -> bool:
        """Whether it is what it must be. A figure that is missing, or no number, is not."""
        if self.must is None:
            return True
        figure = self.value if self.must.figure == "value" else self.ratio
        return figure is not None and bool(_HOLDS[self.must.relation](figure, self.must.bound))

    def to_json(self) -> dict[str, Any]:
        """For a machine to read."""
        return {
            "case": self.case,
            "value": self.value,
            "unit": self.unit,
            "reference": self.reference,
            "ratio": self.ratio,
            "spread": self.spread,
            "must": str(self.must) if self.must else None,
            "ok": self.ok,
        }


@dataclass(frozen=True, slots=True)
class Rounds:
    """What was measured, round by round, and the reference in the same rounds."""

    values: Sequence[float]
    references: Sequence[float] = ()

    def row(self, case: str, unit: str, must: Must | None = None) -> Row:
        """The medians as a row."""
        value = statistics.median(self.values)
        if not self.references:
            return Row(case, value, unit, spread=spread(self.values), must=must)
        ratios = [value / reference for value, reference in zip(self.values, self.references, strict=True)]
        reference = statistics.median(self.references)
        return Row(case, value, unit, reference, statistics.median(ratios), spread(ratios), must)


def spread(figures: Sequence[float]) -> float | None:
    """The distance between the quartiles over the median; None for fewer than two figures or a median of zero."""
    middle = statistics.median(figures)
    if len(figures) < 2 or not middle:
        return None
    low, _, high = statistics.quantiles(figures, method="inclusive")
    return (high - low) / abs(middle)


def exit_code(rows: Sequence[Row]) -> int:
    """0 where there are figures and all are what they must be, else 1."""
    return 0 if rows and all(row.ok for row in rows) else 1


def table(rows: Sequence[Row]) -> Table:
    """For a person to read."""
    result = Table(box=None, pad_edge=False, header_style="bold")
    result.add_column("case", no_wrap=True)
    for column in ("value", "unit", "reference", "ratio", "spread", "must", ""):
        result.add_column(column, justify="left" if column in ("unit", "must", "") else "right", no_wrap=True)
    for row in rows:
        mark = "" if row.must is None else "[green]ok[/]" if row.ok else "[bold red]short[/]"
        figures = (_figure(row.value), row.unit, _figure(row.reference), _figure(row.ratio))
        percent = "" if row.spread is None else f"{row.spread:.1%}"
        result.add_row(row.case, *figures, percent, str(row.must or ""), mark)
    return result


def _figure(figure: float | None) -> str:
    return "" if figure is None else f"{figure:.0f}" if abs(figure) >= 1000 else f"{figure:.3g}"
