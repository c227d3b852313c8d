"""Text to learn from: where it comes from, and how it is cleaned. Documents stream; none is kept here."""

from __future__ import annotations

import hashlib
import json
import re
import unicodedata
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from swarm.errors import UsageError
from swarm.runs.run import EMBEDDED, DataTable

_TEXTS = (".txt", ".md", ".rst")
_LINES = (".jsonl", ".ndjson")
_DATASET = re.compile(r"[\w.-]+(/[\w.-]+)?", re.ASCII)
_CONTROL = re.compile(r"[\x00-\x08\x0b\x0c\x0e-\x1f\x7f]")
_TRAILING = re.compile(r"[ \t]+$", re.MULTILINE)


def documents(data: DataTable, seed: int = 0, epoch: int = 0) -> Iterator[str]:
    """The documents that a run's `data` table names, cleaned, in an order that is always the same.

    A dataset's order follows from the seed and the epoch; all others come as they lie. Raises `UsageError` where there
    are none, or where a file cannot be read as what it seems to be.
    """
    return clean(raw_documents(data, seed, epoch), data)


def is_stream(data: DataTable) -> bool:
    """Whether the source is a dataset of a hub, which is read as it comes and has no end that is known.

    Raises `UsageError` where it can only be a file, and there is none.
    """
    path = Path(data.source)
    if data.source == EMBEDDED or path.exists():
        return False
    if path.suffix in (*_TEXTS, *_LINES) or not _DATASET.fullmatch(data.source):
        raise UsageError(f"data.source: there is no file or folder {data.source}")
    return True


def raw_documents(data: DataTable, seed: int = 0, epoch: int = 0) -> Iterator[str]:
    """The documents as they are. Raises as `documents`."""
    path = Path(data.source)
    if data.source == EMBEDDED:
        return _embedded()
    if is_stream(data):
        return _dataset(data, seed, epoch)
    return _folder(path, data.field) if path.is_dir() else _file(path, data.field)


def clean(texts: Iterable[str], data: DataTable) -> Iterator[str]:
    """Normalised, without what is empty, a duplicate, too short or too long."""
    seen: set[bytes] = set()
    for text in map(normalized, texts):
        if not text or not data.min_characters <= len(text) <= (data.max_characters or len(text)):
            continue
        if data.deduplicate:
            digest = hashlib.blake2b(text.encode("utf-8", "surrogatepass"), digest_size=16).digest()
            if digest in seen:
                continue
            seen.add(digest)
        yield text


def normalized(text: str) -> str:
    """Composed characters (NFC), newlines as LF, without control characters and without space at ends."""
    text = unicodedata.normalize("NFC", text).replace("\r\n", "\n").replace("\r", "\n")
    return _TRAILING.sub("", _CONTROL.sub("", text)).strip()


def _embedded() -> Iterator[str]:
    """The reference of the Python language, as every CPython carries it: several hundred kilobytes of English."""
    from pydoc_data.topics import topics

    for name in sorted(topics):
        yield topics[name]


def _folder(folder: Path, field: str) -> Iterator[str]:
    files = sorted(path for path in folder.rglob("*") if path.suffix in (*_TEXTS, *_LINES))
    if not files:
        raise UsageError(f"data.source: no file in {folder} ends in {', '.join((*_TEXTS, *_LINES))}")
    for file in files:
        yield from _file(file, field)


def _file(file: Path, field: str) -> Iterator[str]:
    try:
        with file.open(encoding="utf-8") as lines:
            if file.suffix not in _LINES:
                yield lines.read()
                return
            for number, line in enumerate(lines, 1):
                if line.strip():
                    yield _field(line, field, f"{file}, line {number}")
    except UnicodeDecodeError as error:
        raise UsageError(f"data.source: {file} is not UTF-8 text (byte {error.start}: {error.reason})") from None
    except OSError as error:
        raise UsageError(f"data.source: {file} cannot be read: {error}") from None


def _field(line: str, field: str, where: str) -> str:
    try:
        value = json.loads(line)
    except ValueError as error:
        raise UsageError(f"data.source: {where} is no JSON: {error}") from None
    if not isinstance(value, dict) or not isinstance(value.get(field), str):
        raise UsageError(f"data.source: {where} has no text in a field {field!r}; data.field names it")
    return str(value[field])


def _dataset(data: DataTable, seed: int = 0, epoch: int = 0) -> Iterator[str]:
    """A dataset of the Hugging Face hub, streamed: nothing is downloaded before it is needed.

    Shuffled by datasets itself: its files, and what comes of them through a buffer. Each row comes once, in an order
    that is the same for whoever has the same seed.
    """
    try:
        from datasets import load_dataset
    except ImportError:
        raise UsageError(
            f"data.source: for the dataset {data.source}, install the package datasets (pip install 'shoal[data]')"
        ) from None
    try:
        rows: Any = load_dataset(data.source, data.subset, split=data.split, streaming=True)
        if data.shuffle:
            rows = rows.shuffle(seed=seed, buffer_size=data.shuffle)
            rows.set_epoch(epoch)
        for row in rows:
            if not isinstance(row.get(data.field), str):
                raise UsageError(
                    f"data.field: rows of {data.source} have {', '.join(row)}, and no text in {data.field!r}"
                )
            yield row[data.field]
    except (OSError, ValueError) as error:  # what datasets raises for what is not there, or cannot be read
        raise UsageError(f"data.source: the dataset {data.source} cannot be read: {error}") from None
