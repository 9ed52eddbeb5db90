"""Examples from files as people have them: JSON lines, a JSON list, CSV, Parquet.

The layout is found by a row's columns and named in `Read.summary`:

    messages            messages: turns of role and content
    ShareGPT            conversations: turns of from and value
    alpaca              instruction, output and optionally input
    prompt/completion   prompt, completion
    fedloop             instruction, response and optionally context
    pairs               any other of `QUESTIONS` with one of `ANSWERS`, and optionally of `CONTEXTS`

Of a conversation the first question and its answer are read, a system message before them with the
question. Nothing is dropped: a row that cannot be used is an error with its place.
"""

from __future__ import annotations

import codecs
import csv
import io
import json
import os
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from loraprobe.limits import TRAINING_DATA, read_limited

from ..errors import DataError, MissingExtra
from .examples import Example

QUESTIONS = ("instruction", "prompt", "question")
ANSWERS = ("response", "output", "answer", "completion")
CONTEXTS = ("context", "input")
CHATS = {"messages": "messages", "conversations": "ShareGPT"}
ROLES = {
    "user": ("user", "human", "prompter"),
    "assistant": ("assistant", "gpt", "model", "chatbot"),
    "system": ("system",),
}
_PAIRS = {
    ("instruction", "output"): "alpaca",
    ("prompt", "completion"): "prompt/completion",
    ("instruction", "response"): "fedloop",
}
_ROLE = {name: role for role, names in ROLES.items() for name in names}
_MARKS = {
    codecs.BOM_UTF8: "UTF-8",
    codecs.BOM_UTF16_LE: "UTF-16",
    codecs.BOM_UTF16_BE: "UTF-16",
}
_EXPECTED = "JSON lines or a JSON list in UTF-8, .csv or .parquet"

Row = Mapping[str, Any]


@dataclass(frozen=True)
class Parsed:
    """One row's example, and how it was found.

    Attributes:
        layout: what the row's layout is called.
        columns: those that were read.
        more: whether a conversation goes on after the answer.
    """

    example: Example
    layout: str
    columns: tuple[str, ...]
    more: bool = False


@dataclass(frozen=True)
class Read:
    """A file's rows.

    Attributes:
        categories: one per example; empty if none was asked for.
        summary: one line: how many rows were read as what.
    """

    examples: tuple[Example, ...]
    categories: tuple[str, ...]
    summary: str


def read_file(path: str | Path, *, category: str | None = None, responses: bool = True) -> Read:
    """Every row of a file, in its order.

    Args:
        category: a column to read beside, for a partition.
        responses: False for prompts, which need no answer.

    Raises:
        DataError: the file cannot be read or has no row, or a row has no layout, an empty text, one
            of another type or with half of a surrogate pair, or no category; with the line or row.
        MissingExtra: Parquet without pyarrow, which comes with the datasets library.
    """
    entries, categories = [], []
    for where, row in _rows(Path(path)):
        try:
            entries.append(find(row, responses=responses))
            if category is not None:
                categories.append(_text(row.get(category), category))
        except DataError as error:
            raise DataError(f"{where}: {error}. Mend the row, or remove it") from None
    if not entries:
        raise DataError(f"{path} holds no row; expected {_EXPECTED}, with at least one row")
    examples = tuple(entry.example for entry in entries)
    return Read(examples, tuple(categories), f"read {_summary(entries, path)}")


def find(row: Row, *, responses: bool = True) -> Parsed:
    """A row's example.

    Raises:
        DataError: why the row cannot be used, without its place.
    """
    if not isinstance(row, Mapping):
        raise DataError(f"expected a JSON object, got {type(row).__name__}")
    there = {name for name, value in row.items() if value is not None}
    for column, layout in CHATS.items():
        if column in there:
            question, answer, more = _exchange(row[column], column, responses)
            return Parsed(Example(question, answer), layout, (column,), more)
    names = {
        "instruction": _named(there, QUESTIONS, "instruction"),
        "context": _named(there, CONTEXTS, "context", needed=False),
        "response": _named(there, ANSWERS, "response", needed=responses),
    }
    optional = ("context",) if responses else ("context", "response")
    texts = {
        field: _text(row[name], name, empty=field in optional) if name else ""
        for field, name in names.items()
    }
    layout = _PAIRS.get((str(names["instruction"]), str(names["response"])), "pairs")
    if not responses:
        layout = "prompts"
    return Parsed(Example(**texts), layout, tuple(filter(None, names.values())))


def _named(
    there: set[str], names: tuple[str, ...], field: str, *, needed: bool = True
) -> str | None:
    got = [name for name in names if name in there]
    if not got and not needed:
        return None
    if len(got) != 1:
        layouts = "" if got else f" (or a conversation, called {' or '.join(CHATS)})"
        raise DataError(
            f"expected one {field}, called one of {', '.join(names)}{layouts}; got {got or 'none'}"
            f" among the columns {', '.join(sorted(map(str, there)))}"
        )
    return got[0]


def _exchange(turns: Any, column: str, responses: bool) -> tuple[str, str, bool]:
    """The first question, its answer, and whether the conversation goes on."""
    if not isinstance(turns, list) or not all(isinstance(turn, Mapping) for turn in turns):
        raise DataError(f"{column} must be a list of turns, got {type(turns).__name__}")
    names = [turn.get("role", turn.get("from")) for turn in turns]
    roles = [_ROLE.get(str(name)) for name in names]
    start = 1 if roles[:1] == ["system"] else 0
    expected = ["user", "assistant"] if responses else ["user"]
    end = start + len(expected)
    if roles[start:end] != expected:
        raise DataError(
            f"{column} must begin with turns of {' and '.join(expected)}, after a system message if"
            f" there is one; got the roles {[str(name)[:20] for name in names[:3]]}"
        )
    texts = [_text(turn.get("content", turn.get("value")), column) for turn in turns[:end]]
    question = "\n\n".join(texts[: start + 1])
    return question, texts[-1] if responses else "", len(turns) > end


def _text(value: Any, column: str, *, empty: bool = False) -> str:
    if not isinstance(value, str):
        raise DataError(f"{column} must be a string, got {type(value).__name__}")
    if not value.strip() and not empty:
        raise DataError(f"{column} must not be empty")
    try:
        value.encode("utf-8")
    except UnicodeEncodeError as error:
        half = ascii(value[error.start])
        raise DataError(
            f"{column} holds {half}, half of a surrogate pair, at character {error.start}; expected"
            " text that UTF-8 can hold"
        ) from None
    return value


def _summary(entries: list[Parsed], path: str | Path) -> str:
    counts = Counter(entry.layout for entry in entries)
    parts = []
    for layout, count in counts.items():
        columns = dict.fromkeys(
            name for entry in entries if entry.layout == layout for name in entry.columns
        )
        order = sorted(columns, key=(*QUESTIONS, *CONTEXTS, *ANSWERS, *CHATS).index)
        parts.append(f"{count:,} rows of {path} as {layout}: {', '.join(order)}")
    more = sum(entry.more for entry in entries)
    if more:
        parts.append(f"the first question and answer of {more:,} longer conversations")
    return "; ".join(parts)


def _rows(path: Path) -> Iterator[tuple[str, Any]]:
    """(where it stands, row) of everything in the file."""
    if not os.path.isfile(path):
        raise DataError(f"no such data file: {path}. Expected {_EXPECTED}")
    if path.suffix.lower() == ".parquet":
        yield from _parquet(path)
        return
    text = _decoded(path)
    if path.suffix.lower() == ".csv":
        yield from _csv(text, path)
    elif text.lstrip().startswith("["):
        for number, row in enumerate(_parsed(text, str(path)), start=1):
            yield f"{path}, row {number}", row
    else:  # not splitlines: U+2028 is text
        for number, line in enumerate(text.split("\n"), start=1):
            if line.strip():
                where = f"{path}, line {number}"
                yield where, _parsed(line, where)


def _decoded(path: Path) -> str:
    try:
        content = read_limited(path, TRAINING_DATA, DataError)
        for mark, encoding in _MARKS.items():
            if content.startswith(mark):
                raise _marked(f"{path}, line 1", encoding)
        return content.decode("utf-8")
    except UnicodeDecodeError as error:
        line = content.count(b"\n", 0, error.start) + 1
        raise DataError(
            f"{path}, line {line}: cannot be read as UTF-8 ({error.reason}). Save it in UTF-8"
        ) from None
    except OSError as error:
        raise DataError(f"cannot read {path}: {error}. Expected {_EXPECTED}") from error


def _marked(where: str, encoding: str) -> DataError:
    return DataError(
        f"{where}: begins with a byte-order mark of {encoding}; expected UTF-8 without one. Save it"
        " so"
    )


def _csv(text: str, path: Path) -> Iterator[tuple[str, Row]]:
    reader = csv.reader(io.StringIO(text, newline=""), strict=True)
    line = 1
    try:
        header = next(reader, [])
        twice = [name for name, count in Counter(header).items() if count > 1]
        if twice:
            raise DataError(
                f"{path}, line 1: got the column {twice[0]!r} twice; expected every column once"
            )
        line = reader.line_num + 1
        for fields in reader:
            if fields:
                if len(fields) != len(header):
                    raise DataError(
                        f"{path}, line {line}: got {len(fields)} fields, expected {len(header)} as"
                        " in the first line. Quote texts that hold commas or line breaks"
                    )
                yield f"{path}, line {line}", dict(zip(header, fields, strict=True))
            line = reader.line_num + 1
    except csv.Error as error:
        raise DataError(
            f"{path}, line {line}: {error}. Expected CSV with commas and double quotes; JSON lines"
            " have no limits of this kind"
        ) from None


def _parquet(path: Path) -> Iterator[tuple[str, Row]]:
    try:
        from pyarrow.lib import ArrowException
        from pyarrow.parquet import ParquetFile
    except ImportError as error:
        raise MissingExtra("datasets", "fed", f"Reading {path}") from error
    number = 0
    try:
        with ParquetFile(path) as file:
            for batch in file.iter_batches():
                for row in batch.to_pylist():
                    number += 1
                    yield f"{path}, row {number}", row
    except (ArrowException, OSError, ValueError) as error:
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise DataError(
            f"{path}: cannot be read after row {number}: {reason}. Expected a whole Parquet file"
        ) from error


def _parsed(text: str, where: str) -> Any:
    if text.startswith("\ufeff"):
        raise _marked(where, "UTF-8")
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        raise DataError(f"{where}: expected JSON, got {error!r}") from error
