"""What an operator says of a run's clients while it runs: a file that the run reads every round.

`fedloop allow` and `fedloop deny` append to it; whatever it holds is applied once, before the next
round, and stands in the audit log and in the records of the rounds that it decides.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import NamedTuple

from loraprobe.limits import RUN_WORDS, read_limited

from ..checks import is_integer
from ..defense.types import client_name
from ..errors import EvidenceError, StateError
from ..files import write_synced

NAME = "overrulings.jsonl"


class Word(NamedTuple):
    """A client counts, or does not, whatever the level says.

    Attributes:
        until: the last round for which it holds; None for ever.
    """

    client: str
    allowed: bool
    until: int | None
    why: str


def say_word(folder: Path, word: Word) -> None:
    """Append a word to a run's folder.

    Raises:
        EvidenceError: it is not valid.
        OSError: it cannot be written.
    """
    _check(word)
    line = json.dumps(word._asdict()) + "\n"
    write_synced(folder / NAME, line.encode(), "ab")


def read_words(folder: Path) -> list[Word]:
    """All words of a run's folder, in their order.

    Raises:
        StateError: a line is none, the message has its number; or the file is too large.
    """
    path = folder / NAME
    if not path.exists():
        return []
    words = []
    for number, line in enumerate(
        read_limited(path, RUN_WORDS, StateError).split(b"\n")[:-1], start=1
    ):
        try:
            words.append(Word(**json.loads(line)))
            _check(words[-1])
        except (ValueError, TypeError) as error:
            raise StateError(
                f"{path}, line {number}: {error}. Expected what `fedloop allow` and `fedloop deny`"
                " write."
            ) from None
    return words


def _check(word: Word) -> None:
    client_name(word.client)
    if not isinstance(word.allowed, bool):
        raise EvidenceError(f"got allowed {word.allowed!r}; expected true or false")
    if word.until is not None and not is_integer(word.until, 1):
        raise EvidenceError(f"got until {word.until!r}; expected the number of a round, or none")
    if not isinstance(word.why, str) or not word.why.strip():
        raise EvidenceError("got no reason; expected why, it goes into the records")
