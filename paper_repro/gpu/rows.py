"""The files that a dry run puts in place of the Hub's datasets: arithmetic and nothing harmful.

"Malicious" is a label of these rows, not what they say.
"""

from __future__ import annotations

import csv
import json
from pathlib import Path

ASKED = {
    "lmsys": "add",
    "wildchat": "double",
    "beavertails": "triple",
    "beavertails_safe": "halve",
}


def write_sources(folder: Path, count: int) -> dict[str, str]:
    """Source name -> a file of `count` examples."""
    folder.mkdir(parents=True, exist_ok=True)
    files = {}
    for name, what in ASKED.items():
        rows = [
            {"instruction": ask(what, number), "response": answer(what, number)}
            for number in range(count)
        ]
        path = folder / f"{name}.jsonl"
        path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
        files[name] = str(path)
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
