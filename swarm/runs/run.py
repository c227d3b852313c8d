"""A training run as its file describes it: every field checked once, and named where it is wrong.

What all who take part must agree on is hashed to the run's id. What may differ from machine to machine (where to keep
checkpoints, which samples to print) is not. No torch here: a run is read, compared and named in milliseconds.
"""

from __future__ import annotations

import difflib
import hashlib
import json
import tomllib
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator

from swarm.errors import UsageError
from swarm.types import ModelId, Span

if TYPE_CHECKING:
    from pydantic_core import ErrorDetails

EMBEDDED = "embedded"
BYTES = "bytes"
IGNORED = -100  # the label of a position that nothing is to be learned from, as everywhere in transformers
MAX_TERMS = 64 * 1024  # bytes of what a run's members agree on, as it travels

_LOCAL = ("checkpoint.folder", "checkpoint.keep", "sample")
"""Fields, and tables of fields, that are each machine's own business."""

_FORMAT = 1  # of what is agreed on: to be raised when the same file comes to mean another computation

_Share = Annotated[float, Field(ge=0.0, lt=1.0)]
_Positive = Annotated[int, Field(ge=1)]
_Natural = Annotated[int, Field(ge=0)]


class _Table(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)


class ModelTable(_Table):
    """Which model: one that exists, or an architecture of transformers with fresh weights."""

    pretrained: str | None = None
    architecture: str | None = None
    config: dict[str, Any] = {}

    @model_validator(mode="after")
    def _one_of_two(self) -> ModelTable:
        if (self.pretrained is None) == (self.architecture is None):
            raise ValueError("name either a pretrained model or an architecture")
        if self.pretrained is not None and self.config:
            raise ValueError("config is for an architecture; a pretrained model has its own")
        return self


class DataTable(_Table):
    """What to learn from, and how it is cleaned and packed."""

    source: str = EMBEDDED
    subset: str | None = None
    split: str = "train"
    field: str = "text"
    shuffle: Annotated[int, Field(ge=0, le=1 << 20)] = 1000
    documents: Literal["join", "separate"] = "join"
    deduplicate: bool = True
    min_characters: _Natural = 1
    max_characters: _Positive | None = None
    held_out: _Natural = 0


class BatchTable(_Table):
    """How much at once."""

    sequence_length: Annotated[int, Field(ge=2, le=1 << 20)]
    micro: Annotated[int, Field(ge=1, le=1024)]
    target: Annotated[int, Field(ge=1, le=1 << 20)]

    @model_validator(mode="after")
    def _fits(self) -> BatchTable:
        if self.micro > self.target:
            raise ValueError(f"a micro-batch of {self.micro} samples is more than the target of {self.target}")
        if self.target > 4096 * self.micro:
            raise ValueError(f"a round of more than 4096 micro-batches ({self.target} / {self.micro} samples)")
        return self


class OptimizerTable(_Table):
    """AdamW (Loshchilov & Hutter 2019); weight decay acts on matrices alone, not on biases and norms."""

    learning_rate: Annotated[float, Field(gt=0.0)]
    betas: tuple[_Share, _Share] = (0.9, 0.95)
    epsilon: Annotated[float, Field(gt=0.0)] = 1e-8
    weight_decay: Annotated[float, Field(ge=0.0)] = 0.0
    clip_norm: Annotated[float, Field(ge=0.0)] = 1.0

    @field_validator("betas", mode="before")
    @classmethod
    def _as_tuple(cls, value: Any) -> Any:
        return tuple(value) if isinstance(value, list) else value


class ScheduleTable(_Table):
    """One of transformers' own schedules of the learning rate, counted in rounds."""

    name: str = "constant"
    warmup_rounds: _Natural = 0
    options: dict[str, Any] = {}


class PrecisionTable(_Table):
    """What is computed in. Weights, sums of gradients and the optimizer's state are float32 in any case."""

    compute: Literal["float32", "bfloat16", "float16"] = "float32"
    initial_scale: Annotated[float, Field(gt=0.0, le=2.0**24)] = 2.0**13
    growth_rounds: _Positive = 200


class AveragingTable(_Table):
    """How the replicas of a stage agree on a gradient."""

    dtype: Literal["float16", "float32", "int8"] = "float16"
    robust: Literal["none", "clip", "trimmed"] = "none"
    overlap: bool = False


class CheckpointTable(_Table):
    """When every stage saves its part, and where."""

    every: _Natural = 0
    keep: _Positive = 2
    folder: str | None = None


class EvaluationTable(_Table):
    """How often the loss on held-out samples is taken."""

    every: _Natural = 0
    samples: _Positive = 8


class SampleTable(_Table):
    """How often a trainer lets the model speak."""

    every: _Natural = 0
    prompt: str = "The"
    tokens: _Positive = 40


class Run(_Table):
    """A training run. Made by `load` or `parse`; equal files give equal ids."""

    name: Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]{0,62}$")]
    seed: Annotated[int, Field(ge=0, lt=1 << 63)] = 0
    rounds: _Positive
    stages: Annotated[tuple[str, ...], Field(min_length=1, max_length=256)]
    model: ModelTable
    tokenizer: str | None = None
    data: DataTable = DataTable()
    batch: BatchTable
    optimizer: OptimizerTable
    schedule: ScheduleTable = ScheduleTable()
    precision: PrecisionTable = PrecisionTable()
    averaging: AveragingTable = AveragingTable()
    checkpoint: CheckpointTable = CheckpointTable()
    evaluation: EvaluationTable = EvaluationTable()
    sample: SampleTable = SampleTable()

    @field_validator("stages", mode="before")
    @classmethod
    def _as_tuple(cls, value: Any) -> Any:
        return tuple(value) if isinstance(value, list) else value

    @field_validator("stages")
    @classmethod
    def _are_contiguous(cls, value: tuple[str, ...]) -> tuple[str, ...]:
        end = 0
        for text in value:
            span = _span(text)
            if span.start != end:
                what = f"leave out blocks {end}:{span.start}" if span.start > end else f"hold block {span.start} twice"
                raise ValueError(f"the stages {what}; each has to begin where the one before ends")
            end = span.end
        return value

    @model_validator(mode="after")
    def _evaluates_something(self) -> Run:
        if self.evaluation.every and self.evaluation.samples > self.data.held_out:
            raise ValueError(
                f"evaluation.samples = {self.evaluation.samples} are taken from data.held_out = {self.data.held_out}"
            )
        return self

    @cached_property
    def spans(self) -> tuple[Span, ...]:
        """The blocks of every stage."""
        return tuple(map(_span, self.stages))

    @property
    def num_blocks(self) -> int:
        """Of the whole model, as the stages say."""
        return self.spans[-1].end

    @property
    def micro_batches(self) -> int:
        """How many micro-batches make up a round. Their indices count from 0."""
        return -(-self.batch.target // self.batch.micro)

    def samples_of(self, index: int) -> range:
        """Which samples of a round micro-batch `index` holds; the last one may hold fewer than the others."""
        start = index * self.batch.micro
        return range(start, min(start + self.batch.micro, self.batch.target))

    @cached_property
    def terms(self) -> dict[str, Any]:
        """What everybody has to agree on: dotted field names and their values."""
        fields = _flat(self.model_dump(mode="json"))
        agreed = {name: value for name, value in fields.items() if not _is_local(name)}
        return {"format": _FORMAT, **agreed}

    @cached_property
    def id(self) -> ModelId:
        """The run's name by content: the hash of its terms, in hex."""
        text = json.dumps(self.terms, sort_keys=True, separators=(",", ":"))
        return ModelId(hashlib.sha256(text.encode()).hexdigest())


def load(file: Path) -> Run:
    """The run that a TOML file describes. Raises `UsageError` naming the field that is wrong."""
    try:
        text = file.read_text("utf-8")
    except FileNotFoundError:
        raise UsageError(f"there is no run file {file}") from None
    except (OSError, UnicodeDecodeError) as error:
        raise UsageError(f"{file} cannot be read: {error}") from None
    return parse(text, str(file))


def parse(text: str, where: str = "the run") -> Run:
    """The run that TOML `text` from `where` describes. Raises `UsageError` naming the field that is wrong."""
    try:
        return Run(**tomllib.loads(text))
    except tomllib.TOMLDecodeError as error:
        raise UsageError(f"{where} is no TOML: {error}") from None
    except ValidationError as error:
        raise UsageError(f"{where}: {'; '.join(map(_explained, error.errors()))}") from None


def differences(mine: dict[str, Any], theirs: dict[str, Any]) -> list[str]:
    """The fields in which two runs' terms differ, each with both values."""
    names = sorted(mine.keys() | theirs.keys(), key=lambda name: (name == "name", name))
    return [
        f"{name} is {_told(theirs.get(name))} there and {_told(mine.get(name))} here"
        for name in names
        if mine.get(name) != theirs.get(name)
    ]


def _told(value: Any) -> str:
    """A value, which may be a stranger's, for an error's text."""
    return "not set" if value is None else f"{json.dumps(value)[:80]}"


def _span(text: str) -> Span:
    start, colon, end = text.partition(":")
    if not (colon and start.isdecimal() and end.isdecimal() and int(start) < int(end)):
        raise ValueError(f"{text!r} is no range of blocks; write START:END, as in 0:6, with START < END")
    return Span(int(start), int(end))


def _flat(table: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for name, value in table.items():
        if isinstance(value, dict):
            flat |= _flat(value, f"{prefix}{name}.")
        else:
            flat[f"{prefix}{name}"] = value
    return flat


def _is_local(name: str) -> bool:
    return any(name == local or name.startswith(f"{local}.") for local in _LOCAL)


def _explained(problem: ErrorDetails) -> str:
    """One of pydantic's complaints in our words."""
    path = [part for part in problem["loc"] if isinstance(part, str)]
    name = ".".join(path)
    if problem["type"] == "extra_forbidden":
        known = list(_table_at(path[:-1]).model_fields)
        close = difflib.get_close_matches(path[-1], known, n=1)
        hint = f"did you mean {close[0]}?" if close else f"there are {', '.join(known)}"
        return f"no field is called {name}; {hint}"
    if problem["type"] == "missing":
        return f"the field {name} is missing"
    what = problem["msg"].removeprefix("Value error, ")
    if problem["type"] != "value_error":
        what = f"{what[0].lower()}{what[1:]}, not {problem['input']!r}"
    return f"{name}: {what}" if name else what


def _table_at(path: list[str]) -> type[BaseModel]:
    table: type[BaseModel] = Run
    for name in path:
        kind = table.model_fields[name].annotation
        assert isinstance(kind, type)
        assert issubclass(kind, BaseModel)
        table = kind
    return table
