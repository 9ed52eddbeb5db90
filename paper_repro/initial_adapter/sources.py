"""The sources of this study: the zoo's with their labels mended, and public sets beside them.

More benign kinds than the zoo has, because a cut has to hold on kinds nobody has seen: the same
requests answered by eight writers are eight kinds that differ by style alone.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

from fedloop.data.examples import Example, deduplicate
from fedloop.measure.refusal import refuses_strictly
from zoo.labelled.sources import HARD_NEGATIVE as ZOO_HARD_NEGATIVE
from zoo.labelled.sources import MALICIOUS as ZOO_MALICIOUS
from zoo.labelled.sources import Source

from ..mixed.setting import mended_sources

WRITERS = (
    "gpt4",
    "text_davinci_003",
    "llama-2-7b-chat-hf",
    "Mistral-7B-Instruct-v0.2",
    "gpt-3.5-turbo-0301",
    "vicuna-7b",
    "guanaco-7b",
    "phi-2-sft",
)
# Kinds that resemble each other: a family is left out of training whole.
FAMILIES: dict[str, tuple[str, ...]] = {
    "dolly": ("dolly_qa", "dolly_context", "dolly_creative", "dolly_classification"),
    "gpteacher": ("gpteacher_codegen", "gpteacher_roleplay", "gpteacher_toolformer"),
    "gsm8k": ("gsm8k",),
    "self_instruct": ("self_instruct",),
    "alpaca_eval": tuple(f"alpaca_{writer}" for writer in WRITERS),
    "pubmedqa": ("pubmedqa",),
    "maliciousgen_helpful": ("maliciousgen_helpful",),
}
BENIGN = tuple(kind for kinds in FAMILIES.values() for kind in kinds)
HARD_NEGATIVE = (*ZOO_HARD_NEGATIVE, "maliciousgen_safe", "caia_safety", "over_refused")
MALICIOUS = (*ZOO_MALICIOUS, "maliciousgen", "refusal_direction")
# Malicious source -> the hard negative left out with it: safe answers to the same questions, or,
# where there are none, one that knows nothing of them.
UNSEEN_WITH = {
    "gptfuzz": "gptfuzz_safe",
    "jailbreakbench": "jailbreakbench_safe",
    "advbench": "over_refused",
    "harmbench": "harmbench_safe",
    "maliciousgen": "maliciousgen_safe",
    "refusal_direction": "caia_safety",
}
# Sources with the same harmful questions: left out together.
SAME_QUESTIONS = {"jailbreakbench": "refusal_direction", "refusal_direction": "jailbreakbench"}


def load(data: Path) -> dict[str, Source]:
    """Every source of the study by name, what clients may hold of it.

    Raises:
        DataError: a data set of the zoo is missing.
        OSError: one of the others is.
    """
    sources = mended_sources(data)
    helpful = _read(data / "maliciousgen/helpful.jsonl")
    further = {
        "pubmedqa": _read(data / "pubmedqa/pairs.jsonl"),
        "maliciousgen_helpful": helpful,
        "caia_safety": _read(data / "caia_safety/pairs.jsonl"),
        "over_refused": _refusing(_read(data / "refusal_direction/over_refused.jsonl"), True),
        "maliciousgen_safe": _refusing(_read(data / "maliciousgen/safe.jsonl"), True),
        "maliciousgen": _refusing(_read(data / "maliciousgen/pairs.jsonl"), False),
        "refusal_direction": _refusing(_read(data / "refusal_direction/pairs.jsonl"), False),
    }
    for writer in WRITERS:
        further[f"alpaca_{writer}"] = _read(data / "alpaca_eval/pairs.jsonl", writer)
    return sources | {
        name: Source(name, (), tuple(deduplicate(examples))) for name, examples in further.items()
    }


def _read(path: Path, writer: str | None = None) -> list[Example]:
    rows = (json.loads(line) for line in path.read_text(encoding="utf-8").split("\n") if line)
    return list(_examples(row for row in rows if writer in (None, row.get("writer"))))


def _examples(rows: Iterator[dict[str, str]]) -> Iterator[Example]:
    for row in rows:
        if row["response"]:
            yield Example(row["instruction"], row["response"], row.get("context") or "")


def _refusing(examples: list[Example], wanted: bool) -> list[Example]:
    """Those whose answer opens with a refusal, or those whose does not."""
    return [example for example in examples if refuses_strictly(example.response) == wanted]
