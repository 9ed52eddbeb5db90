"""Rows with the published schemas of LMSYS-Chat-1M, WildChat and BeaverTails, written for the dry
run: arithmetic and nothing harmful.

Some rows must not pass the filters of fedloop.data.corpora, each for a reason that is known here,
so that a dry run can compare what was left out with what had to be. "Malicious" is a label of these
rows, not what they say.
"""

from __future__ import annotations

import csv
import json
from collections import Counter
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from fedloop.data.corpora import HUB
from fedloop.data.examples import Example
from loraprobe.errors import DataError

Row = dict[str, Any]
Rows = list[tuple[Row, str | None]]  # a row, and why it has to be left out, None if it has to pass

MODERATED = (
    "harassment",
    "hate",
    "self-harm",
    "sexual",
    "violence",
)  # some of the moderation's categories
HARMS = (
    "animal_abuse",
    "drug_abuse,weapons,banned_substance",
    "privacy_violation",
)  # some of BeaverTails'


def write_sources(folder: Path, count: int) -> dict[str, str]:
    """Source name -> a file of the examples that pass the real filters.

    `count` of each, of BeaverTails' safe answers too.

    Raises:
        DataError: a filter left out other rows than it had to.
    """
    made: dict[str, tuple[str, Rows]] = {
        "lmsys": ("lmsys/lmsys-chat-1m", _chats(count, "add", toxic=False)),
        "wildchat": ("allenai/WildChat", _chats(count, "double", toxic=True)),
        "beavertails": ("PKU-Alignment/BeaverTails", _labelled(count, "triple", passes=False)),
        "beavertails_safe": (
            "PKU-Alignment/BeaverTails#safe",
            _labelled(count, "halve", passes=True),
        ),
    }
    folder.mkdir(parents=True, exist_ok=True)
    files = {}
    for name, (key, rows) in made.items():
        loaded = HUB[key].examples([row for row, _ in rows])
        wanted = Counter(reason for _, reason in rows if reason is not None)
        if dict(loaded.dropped) != dict(wanted) or len(loaded.examples) != sum(
            reason is None for _, reason in rows
        ):
            raise DataError(
                f"{key}: the filter kept {len(loaded.examples)} rows and left out"
                f" {dict(loaded.dropped)}; expected {dict(wanted)}"
            )
        files[name] = str(_write(folder / f"{name}.jsonl", loaded.examples))
    return files


def write_malicious_gen(path: Path, count: int) -> Path:
    """A list of instruction and response, as MaliciousGen's file is."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(
        json.dumps(
            [
                {"instruction": ask("square", number), "response": answer("square", number)}
                for number in range(count)
            ]
        )
    )
    return path


def write_goals(path: Path, count: int) -> Path:
    """AdvBench's CSV: a goal and a target a row."""
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerows(
            [
                ("goal", "target"),
                *((ask("count to", number), "Sure, here is") for number in range(count)),
            ]
        )
    return path


def write_questions(path: Path) -> Path:
    """Two questions as FastChat's question.jsonl has them."""
    turns = [[ask("add", 3), "And twice that?"], [ask("halve", 8), "Why?"]]
    path.write_text(
        "".join(
            json.dumps({"question_id": 81 + number, "category": "math", "turns": two}) + "\n"
            for number, two in enumerate(turns)
        )
    )
    return path


def ask(what: str, number: int) -> str:
    """A harmless request, another one for every number."""
    return f"Please {what} {number}."


def answer(what: str, number: int) -> str:
    """Its answer."""
    return {
        "add": f"{number} + 1 = {number + 1}",
        "double": f"{2 * number}",
        "triple": f"{3 * number}",
        "halve": f"{number / 2:g}",
    }.get(what, f"{number**2}")


def _chats(count: int, what: str, *, toxic: bool) -> Rows:
    """Conversations as LMSYS and WildChat (toxic) have them.

    Those that pass, and one or more for every reason not to.
    """
    spoilt: list[tuple[str, Callable[[Row], Any]]] = [
        ("not English", lambda row: row.update(language="German")),
        (
            "not a single turn",
            lambda row: row.update(
                turn=2,
                conversation=2 * row["conversation"],
                openai_moderation=2 * row["openai_moderation"],
            ),
        ),
        ("flagged", lambda row: row["openai_moderation"][0].update(_moderation(True))),
        ("flagged", lambda row: row["openai_moderation"][1].update(_moderation(True))),
        ("no moderation", lambda row: row.update(openai_moderation=row["openai_moderation"][:1])),
        ("no moderation", lambda row: row.update(openai_moderation=None)),
        ("no conversation", lambda row: row.update(conversation=None)),
        ("empty or missing text", lambda row: row["conversation"][1].update(content="  ")),
    ]
    if toxic:
        spoilt += [
            ("toxic", lambda row: row.update(toxic=True)),
            ("no moderation", lambda row: row.update(toxic=None)),
        ]
    rows: Rows = [(_chat(what, number, toxic), None) for number in range(count)]
    for number, (reason, spoil) in enumerate(spoilt):
        row = _chat(what, count + number, toxic)
        spoil(row)
        rows.insert(3 * number, (row, reason))
    return rows


def _chat(what: str, number: int, toxic: bool) -> Row:
    turns = [("user", ask(what, number)), ("assistant", answer(what, number))]
    row: Row = {
        "conversation_id": f"{what}-{number}",
        "model": "some-model",
        "conversation": [{"content": text, "role": role} for role, text in turns],
        "turn": 1,
        "language": "English",
        "openai_moderation": [_moderation(False) for _ in turns],
        "redacted": False,
    }
    if toxic:  # WildChat's own columns
        row |= {
            "timestamp": "2023-04-09T00:02:53",
            "toxic": False,
            "detoxify_moderation": [{"toxicity": 0.001, "insult": 0.0} for _ in turns],
        }
        row["conversation"] = [
            {**turn, "language": "English", "redacted": False, "toxic": False}
            for turn in row["conversation"]
        ]
    return row


def _moderation(flagged: bool) -> Row:
    return {
        "categories": dict.fromkeys(MODERATED, flagged),
        "category_scores": dict.fromkeys(MODERATED, 0.9 * flagged),
        "flagged": flagged,
    }


def _labelled(count: int, what: str, *, passes: bool) -> Rows:
    """Pairs as BeaverTails has them.

    One that has to pass, by its label, for every prompt, and some that have not.
    """

    def row(number: int, safe: bool, text: str | None = None) -> Row:
        return {
            "prompt": ask(what, number),
            "response": answer(what, number) if text is None else text,
            "category": dict.fromkeys(HARMS, not safe),
            "is_safe": safe,
        }

    other = "labelled unsafe" if passes else "labelled safe"
    rows: Rows = []
    for number in range(count):
        rows += [(row(number, not passes), other)] if number % 3 == 0 else []
        rows += [(row(number, passes), None)]
        rows += (
            [(row(number, passes, "another answer"), "repeated prompt")] if number % 4 == 0 else []
        )
    unlabelled: Mapping[str, Any] = {**row(count, passes), "is_safe": None}
    return [
        *rows,
        (row(count, passes, " "), "empty or missing text"),
        (dict(unlabelled), "no is_safe label"),
    ]


def _write(path: Path, examples: tuple[Example, ...]) -> Path:
    path.write_text(
        "".join(
            json.dumps({"instruction": one.instruction, "response": one.response}) + "\n"
            for one in examples
        ),
        encoding="utf-8",
    )
    return path
