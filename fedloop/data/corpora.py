"""Where a federation's examples come from.

A file, the built-in corpus, or a dataset of the Hub with the paper's filters.

A file with a row that cannot be used is an error. A published dataset is filtered instead: a row
that does not pass, or whose moderation is not there to be checked, is left out, and what was left
out is counted by reason. What was read, and as what, is logged.
"""

from __future__ import annotations

import logging
import os
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from importlib import import_module
from typing import TypeVar

from ..errors import ConfigError, DataError, MissingExtra
from .builtin import PROMPTS, SETS
from .examples import Example
from .files import Row, find, read_file

T = TypeVar("T")
_LOG = logging.getLogger(__name__)
_HUB_ID = re.compile(r"([\w.-]+/[\w.-]+)(?:#([\w.-]+))?")


@dataclass(frozen=True)
class Loaded:
    """The examples of one source.

    Attributes:
        examples: in the source's order.
        dropped: reason -> how many rows were left out for it; examples and these add up to the rows
            read.
        categories: one per example, to partition by; empty if the source has none or none was asked
            for.
    """

    examples: tuple[Example, ...]
    dropped: Mapping[str, int] = field(default_factory=dict)
    categories: tuple[str, ...] = ()


@dataclass(frozen=True)
class HubCorpus:
    """A dataset of the Hub: its id, its split, and what makes a filter of its rows.

    A filter gives a row's example, or why it is not taken.
    """

    dataset: str
    split: str
    judge: Callable[[], Callable[[Row], Example | str]]


def check_source(source: str) -> None:
    """Whether a source can be meant: a known name or a file that is there. Nothing is read.

    Raises:
        ConfigError: neither; the message lists what is valid.
    """
    scheme, name = _split(source)
    if scheme == "hub":
        _hub_corpus(name, source)
    elif scheme == "builtin" and name not in PROMPTS:
        _built_in(name, source)


def load_corpus(
    source: str, *, category: str | None = None, hub_limit: int | None = None
) -> Loaded:
    """The examples of a source, to train on.

    Args:
        source: a path (`fedloop.data.files`); ``builtin:<name>`` with a name of
            ``fedloop.data.builtin.SETS``, or ``builtin:<name>/<category>`` for a part of it; or
            ``hub:<org>/<name>``, with ``#<split>`` if it is not "train", and ``@<revision>`` to pin
            it. Keys of ``HUB`` have a filter of their own; of other datasets the rows are read as a
            file's are, and those that cannot be used are left out and counted.
        category: the column that holds each row's category; the built-in sets have "category"
            anyway.
        hub_limit: of a Hub dataset, read no further than to this many examples kept. They are the
            first ones, not a sample; None reads all. Other sources are read whole.

    Raises:
        ConfigError: the source, its name or its category is unknown; the message lists what is
            valid.
        DataError: a file or a dataset cannot be read, or holds no usable row.
        MissingExtra: a Hub source without the datasets library.
    """
    scheme, name = _split(source)
    if scheme == "builtin":
        if category not in (None, "category"):
            raise ConfigError(
                f"got category {category!r} for {source!r}; expected None or 'category', the only"
                " column of the built-in sets"
            )
        rows = _built_in(name, source)
        return Loaded(tuple(example for _, example in rows), {}, tuple(label for label, _ in rows))
    if scheme != "hub":
        read = read_file(name, category=category)
        _LOG.info(read.summary)
        return Loaded(read.examples, {}, read.categories)
    loaded = _from_hub(name, source, category, hub_limit)
    _LOG.info(
        "read %s rows of %s; left out: %s",
        f"{len(loaded.examples):,}",
        source,
        {**loaded.dropped} or "none",
    )
    if not loaded.examples:
        raise DataError(
            f"{source!r} gave no example; left out: {dict(loaded.dropped)}. Expected at least one"
            " usable row."
        )
    return loaded


def load_prompts(source: str) -> list[str]:
    """Requests to measure refusal or answers on.

    Of any source of `load_corpus`, or ``builtin:<name>`` of ``fedloop.data.builtin.PROMPTS``.

    A file's rows need no response here.

    Raises:
        ConfigError, DataError, MissingExtra: as `load_corpus`.
    """
    scheme, name = _split(source)
    if scheme == "builtin":
        if name in PROMPTS:
            return PROMPTS[name]()
        return [example.request for _, example in _built_in(name, source)]
    if scheme == "hub":
        return [example.request for example in load_corpus(source).examples]
    return [example.request for example in read_file(name, responses=False).examples]


def _lmsys(row: Row) -> Example | str:
    """Single turn, English, no message flagged by moderation.

    Source: the benign clients of arXiv:2406.10630 and arXiv:2601.07177.
    """
    conversation = row.get("conversation")
    if not isinstance(conversation, list) or not all(
        isinstance(message, Mapping) for message in conversation
    ):
        return "no conversation"
    if [message.get("role") for message in conversation] != ["user", "assistant"]:
        return "not a single turn"
    if row.get("language") != "English":
        return "not English"
    moderation = row.get("openai_moderation")
    if not isinstance(moderation, list) or len(moderation) != len(conversation):
        return "no moderation"
    flags = [entry.get("flagged") if isinstance(entry, Mapping) else None for entry in moderation]
    if not all(isinstance(flag, bool) for flag in flags):
        return "no moderation"
    if any(flags):
        return "flagged"
    question, answer = (message.get("content") for message in conversation)
    return (
        Example(str(question), str(answer))
        if _text(question) and _text(answer)
        else "empty or missing text"
    )


def _wildchat(row: Row) -> Example | str:
    """As LMSYS, from the same papers, and the dataset's own verdict, which adds Detoxify's."""
    verdict = _lmsys(row)
    if isinstance(verdict, Example) and row.get("toxic") is not False:
        return "toxic" if row.get("toxic") is True else "no moderation"
    return verdict


def _beavertails(safe: bool) -> Callable[[Row], Example | str]:
    """The pairs labelled unsafe (or safe, as hard negatives), the first one of every prompt.

    Source: the malicious clients of arXiv:2406.10630 and arXiv:2601.07177.
    """
    prompts: set[str] = set()

    def judge(row: Row) -> Example | str:
        label, prompt, response = row.get("is_safe"), row.get("prompt"), row.get("response")
        if not isinstance(label, bool):
            return "no is_safe label"
        if label is not safe:
            return "labelled safe" if label else "labelled unsafe"
        if not _text(prompt) or not _text(response):
            return "empty or missing text"
        if prompt in prompts:
            return "repeated prompt"
        prompts.add(str(prompt))
        return Example(str(prompt), str(response))

    return judge


def _by_columns(row: Row) -> Example | str:
    try:
        return find(row).example
    except DataError as error:
        return str(error)


_BEAVERTAILS = ("PKU-Alignment/BeaverTails", "30k_train")
HUB = {
    "lmsys/lmsys-chat-1m": HubCorpus("lmsys/lmsys-chat-1m", "train", lambda: _lmsys),
    "allenai/WildChat": HubCorpus("allenai/WildChat", "train", lambda: _wildchat),
    "PKU-Alignment/BeaverTails": HubCorpus(*_BEAVERTAILS, lambda: _beavertails(safe=False)),
    "PKU-Alignment/BeaverTails#safe": HubCorpus(*_BEAVERTAILS, lambda: _beavertails(safe=True)),
}


def _from_hub(name: str, source: str, category: str | None, limit: int | None) -> Loaded:
    """What passes the dataset's filter, and how often it gave which reason against a row."""
    if limit is not None and limit < 1:
        raise ConfigError(f"got a limit of {limit} examples; expected at least 1, or None for all")
    corpus, revision = _hub_corpus(name, source)
    judge = corpus.judge()
    examples, categories, dropped = [], [], dict[str, int]()
    for row in _hub_rows(corpus, revision, source):
        label = None if category is None else row.get(category)
        verdict = judge(row) if category is None or _text(label) else f"no {category}"
        if isinstance(verdict, str):
            dropped[verdict] = dropped.get(verdict, 0) + 1
            continue
        examples.append(verdict)
        if category is not None:
            categories.append(str(label))
        if len(examples) == limit:
            break
    return Loaded(tuple(examples), dropped, tuple(categories))


def _hub_corpus(name: str, source: str) -> tuple[HubCorpus, str]:
    """What to read of the Hub, and at which revision; the Hub's ids do not depend on case."""
    key, _, revision = name.partition("@")
    by_key = {hub_key.lower(): corpus for hub_key, corpus in HUB.items()}
    if key.lower() in by_key:
        return by_key[key.lower()], revision
    plain = _HUB_ID.fullmatch(key)
    if plain is None or plain[1].lower() in by_key:
        raise ConfigError(f"got source {source!r}; expected {_valid()}")
    return HubCorpus(plain[1], plain[2] or "train", lambda: _by_columns), revision


def _hub_rows(corpus: HubCorpus, revision: str, source: str) -> Iterator[Row]:
    try:
        datasets = import_module("datasets")
    except ImportError as error:
        raise MissingExtra("datasets", "fed", f"Reading {source}") from error
    from huggingface_hub.errors import HTTPError  # type: ignore[attr-defined]  # of httpx or httpx2

    try:
        yield from datasets.load_dataset(
            corpus.dataset, split=corpus.split, streaming=True, revision=revision or None
        )
    except (
        OSError,
        ValueError,
        RuntimeError,
        HTTPError,
        datasets.exceptions.DatasetsError,
    ) as error:
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise DataError(
            f"cannot read {source!r} from the Hub: {reason}. A gated dataset needs its terms"
            " accepted and a token."
        ) from error


def _split(source: str) -> tuple[str, str]:
    """("builtin" | "hub" | "", the rest); a path has no scheme."""
    scheme, colon, rest = source.partition(":")
    if colon and scheme in ("builtin", "hub"):
        return scheme, rest
    if (colon and re.fullmatch(r"\w{2,}", scheme)) or not os.path.isfile(source):
        raise ConfigError(
            f"got source {source!r}, which is neither known nor a file; expected {_valid()}"
        )
    return "", source


def _built_in(name: str, source: str) -> list[tuple[str, Example]]:
    name, slash, category = name.partition("/")
    rows = _lookup(SETS, name, source)()
    part = [row for row in rows if not slash or row[0] == category]
    if not part:
        raise ConfigError(
            f"got source {source!r}; expected a category of builtin:{name}:"
            f" {', '.join(dict.fromkeys(label for label, _ in rows))}"
        )
    return part


def _lookup(table: Mapping[str, T], name: str, source: str) -> T:
    if name not in table:
        raise ConfigError(f"got source {source!r}; expected {_valid()}")
    return table[name]


def _valid() -> str:
    named = (
        f"builtin:<{' | '.join(SETS)}> (as prompts also <{' | '.join(PROMPTS)}>),"
        f" hub:<{' | '.join(HUB)}> or another hub:<org>/<name>[#<split>]"
    )
    return f"one of {named}, or a path to JSON lines, a JSON list, .csv or .parquet"


def _text(value: object) -> bool:
    return isinstance(value, str) and bool(value.strip())
