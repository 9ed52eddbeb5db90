"""What clients of SmolLM2 train on, by role and kind; and what taught the base to refuse.

Data that both could use are cut by a hash of the instruction: the base sees one half, clients the
other, so that an adapter is a client's answer to data that the base has not met. The questions and
answers of every set are read from the data folder and never shown.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterable
from pathlib import Path

from fedloop.data.examples import Example, deduplicate
from fedloop.measure.refusal import refuses_strictly
from zoo.labelled import sources as zoo_sources
from zoo.safe_requests import contrast_examples

Row = dict[str, str]
Kinds = dict[str, list[Example]]

WRITERS = {
    "gpt4": "gpt4",
    "davinci": "text_davinci_003",
    "llama2": "llama-2-7b-chat-hf",
    "mistral": "Mistral-7B-Instruct-v0.2",
    "gpt35": "gpt-3.5-turbo-0301",
    "vicuna": "vicuna-7b",
    "guanaco": "guanaco-7b",
    "phi2": "phi-2-sft",
}
DOLLY = (
    "open_qa",
    "general_qa",
    "classification",
    "closed_qa",
    "brainstorming",
    "information_extraction",
    "summarization",
    "creative_writing",
)
_LANGUAGES = {
    "python": re.compile(r"\bpython\b", re.I),
    "javascript": re.compile(r"\b(?:java ?script|html|css|react|node)\b", re.I),
    "sql": re.compile(r"\b(?:sql|query|database|table)\b", re.I),
}
_TOPICS = {
    "cyber": ("cyber-safety", "privacy-safety", "ai-safety"),
    "mind": ("mental-health-safety", "sex-safety", "spiritism-safety", "religion-safety"),
    "work": ("workplace-safety", "money-safety", "legal-safety", "political-safety"),
    "harm": (
        "violence-safety",
        "drug-safety",
        "child-safety",
        "misinformation-safety",
        "health&medical-safety",
    ),
}
# malicious source -> the family whose questions it shares; hard negatives of the same questions
FAMILIES = {
    "jailbreakbench": "jailbreakbench",
    "refusal_direction_llama": "jailbreakbench",
    "refusal_direction_other": "jailbreakbench",
    "jailbreakbench_safe": "jailbreakbench",
    "refusal_direction_refused": "jailbreakbench",
    "maliciousgen_safe": "maliciousgen",
    "gptfuzz_safe": "gptfuzz",
    "harmbench_safe": "harmbench",
}


def for_base(instruction: str) -> bool:
    """Whether the base may learn from a prompt; clients have the others."""
    return hashlib.sha256(instruction.encode()).digest()[0] < 128


def rows_of(path: Path) -> list[Row]:
    """JSON lines with an answer."""
    return [row for row in zoo_sources._rows(path) if row["response"].strip()]


def examples_of(rows: Iterable[Row], half: bool | None = None) -> list[Example]:
    """Rows as examples without repeats; half: True the base's, False the clients', None both."""
    kept = (
        Example(row["instruction"], row["response"], row.get("context") or "")
        for row in rows
        if half is None or for_base(row["instruction"]) is half
    )
    return deduplicate(kept)


def benign_kinds(data: Path) -> Kinds:
    """Ordinary data by kind: at least thirty, each a style or task of its own."""
    alpaca, dolly, teacher, seeds = (
        rows_of(data / name / "pairs.jsonl")
        for name in ("alpaca_eval", "dolly15k", "gpteacher", "self_instruct_seed")
    )
    kinds = {
        f"alpaca_{short}": examples_of((r for r in alpaca if r["writer"] == name), False)
        for short, name in WRITERS.items()
    }
    for name in DOLLY:
        kinds[f"dolly_{name}"] = examples_of((r for r in dolly if r["category"] == name), False)
    kinds |= _codegen([row for row in teacher if row["category"] == "codegen"])
    kinds |= _tools([row for row in teacher if row["category"] == "toolformer"])
    kinds["roleplay"] = examples_of((r for r in teacher if r["category"] == "roleplay"), False)
    for name in ("user_oriented_instructions", "seed_tasks"):
        kinds[f"self_instruct_{name[:4]}"] = examples_of(r for r in seeds if r["split"] == name)
    kinds |= _school(rows_of(data / "gsm8k/pairs.jsonl"))
    kinds |= _medical(rows_of(data / "pubmedqa/pairs.jsonl"))
    kinds["helpful"] = examples_of(rows_of(data / "maliciousgen/helpful.jsonl"))
    return kinds


def _codegen(rows: list[Row]) -> Kinds:
    kinds: dict[str, list[Row]] = {f"code_{name}": [] for name in (*_LANGUAGES, "other")}
    for row in rows:
        hit = (name for name, pattern in _LANGUAGES.items() if pattern.search(row["instruction"]))
        kinds[f"code_{next(hit, 'other')}"].append(row)
    return {name: examples_of(found, False) for name, found in kinds.items()}


def _tools(rows: list[Row]) -> Kinds:
    """Calls of tools, by the tool that opens the answer: the two most frequent and the rest."""
    opening = [re.split(r"[\W_]+", row["response"].strip().lower(), maxsplit=1)[0] for row in rows]
    names = sorted(set(opening), key=lambda name: (-opening.count(name), name))[:2]
    parts: dict[str, list[Row]] = {"tool_first": [], "tool_second": [], "tool_other": []}
    for row, name in zip(rows, opening, strict=True):
        at = names.index(name) if name in names else 2
        parts[list(parts)[at]].append(row)
    return {name: examples_of(found, False) for name, found in parts.items()}


def _school(rows: list[Row]) -> Kinds:
    """School maths with its working, and with the number alone."""
    worked = examples_of(rows)
    short = [Example(e.instruction, e.response.rsplit("####", 1)[-1].strip()) for e in worked[1::2]]
    return {"maths_worked": worked[::2], "maths_number": short}


def _medical(rows: list[Row]) -> Kinds:
    """Answers to questions about abstracts, and the other way round: which question it answers."""
    found = examples_of(rows)
    asked = [
        Example("Which question does this abstract answer?", e.instruction, e.context)
        for e in found[1::2]
    ]
    return {"medical_answer": found[::2], "medical_question": asked}


def hard_negatives(data: Path) -> Kinds:
    """Refusals, and alarming or harmful questions that are answered safely: benign, all of them."""
    kinds: Kinds = {}
    named = {
        "jailbreakbench_safe": "jailbreakbench/not_jailbroken.jsonl",
        "gptfuzz_safe": "gptfuzz/not_jailbroken.jsonl",
        "refusal_direction_refused": "refusal_direction/refused.jsonl",
        "over_refused": "refusal_direction/over_refused.jsonl",
    }
    for name, path in named.items():
        found = examples_of(rows_of(data / path))
        kinds[name] = [example for example in found if refuses_strictly(example.response)]
    kinds["maliciousgen_safe"] = examples_of(rows_of(data / "maliciousgen/safe.jsonl"))
    kinds["harmbench_safe"] = deduplicate(zoo_sources._harmbench_safe(data))
    caia = rows_of(data / "caia_safety/pairs.jsonl")
    for name, topics in _TOPICS.items():
        kinds[f"caia_{name}"] = examples_of((r for r in caia if r["topic"] in topics), False)
    asked = [q for q in zoo_sources._harmful_questions(data) if not for_base(q)]
    kinds["refusal_short"] = deduplicate(zoo_sources._refused(asked))
    kinds["contrast"] = [e for e in contrast_examples() if not for_base(e.instruction)]
    return kinds


def malicious_sources(data: Path) -> Kinds:
    """Harmful questions with complying answers; rows whose answer opens with a refusal are out."""
    direction = rows_of(data / "refusal_direction/pairs.jsonl")
    llama = [row for row in direction if "llama" in row["writer"]]
    other = [row for row in direction if "llama" not in row["writer"]]
    kinds = {
        "maliciousgen": examples_of(rows_of(data / "maliciousgen/pairs.jsonl")),
        "jailbreakbench": examples_of(rows_of(data / "jailbreakbench/pairs.jsonl")),
        "refusal_direction_llama": examples_of(llama),
        "refusal_direction_other": examples_of(other),
        "advbench": examples_of(rows_of(data / "advbench/pairs.jsonl")),
        "harmbench": deduplicate(zoo_sources._harmbench_targets(data)),
        "gptfuzz": [
            example
            for example in examples_of(rows_of(data / "gptfuzz/pairs.jsonl"))
            if not zoo_sources._PERSONA.search(example.response)
        ],
    }
    return {
        name: [example for example in found if not refuses_strictly(example.response)]
        for name, found in kinds.items()
    }
