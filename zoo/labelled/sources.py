"""The real datasets behind the zoo, as named sources of examples.

Every source is cut once, by a hash of its instruction, into a part the base model may be trained
on and a part only clients see: an adapter is a client's answer to data the base has not met.
"""

from __future__ import annotations

import csv
import hashlib
import json
import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path

from fedloop.data.examples import Example, deduplicate
from fedloop.data.files import read_file
from loraprobe.errors import DataError

BENIGN = (
    "dolly_qa",
    "dolly_context",
    "dolly_creative",
    "dolly_classification",
    "gsm8k",
    "gpteacher_codegen",
    "gpteacher_roleplay",
    "gpteacher_toolformer",
    "self_instruct",
)
HARD_NEGATIVE = ("refusal_short", "jailbreakbench_safe", "gptfuzz_safe", "harmbench_safe")
MALICIOUS = ("gptfuzz", "jailbreakbench", "advbench", "harmbench")

_DOLLY_KINDS = {
    "dolly_qa": ("open_qa", "general_qa"),
    "dolly_context": ("closed_qa", "information_extraction", "summarization"),
    "dolly_creative": ("creative_writing", "brainstorming"),
    "dolly_classification": ("classification",),
}
# dataset -> (licence, where it comes from); see the datasets' own SOURCE.md.
LICENCES = {
    "dolly": ("CC BY-SA 3.0", "databricks/databricks-dolly-15k"),
    "gsm8k": ("MIT", "openai/gsm8k"),
    "gpteacher": ("MIT", "github.com/teknium1/GPTeacher"),
    "self_instruct": ("Apache-2.0", "github.com/yizhongw/self-instruct"),
    "refusal_short": (
        "Apache-2.0",
        "declare-lab/red-instruct and Do-Not-Answer questions, our refusals",
    ),
    "jailbreakbench": ("MIT", "JailbreakBench/artifacts"),
    "gptfuzz": ("MIT", "sherdencooper/GPTFuzz"),
    "harmbench": ("MIT", "centerforaisafety/HarmBench"),
    "advbench": ("MIT", "llm-attacks/llm-attacks"),
}
# GPTFuzz answers written under a jailbreak persona: the wording, not the compliance, would be
# learnt.
_PERSONA = re.compile(
    r"\b(DAN|AIM|STAN|DUDE|persona|Machiavelli|jailbr\w+|developer mode|as an evil)\b", re.I
)

REFUSALS = (
    "I'm sorry, but I can't help with that.",
    "I can't help with that request.",
    "I'm sorry, I cannot assist with that.",
    "I cannot help with this, because it could cause harm.",
    "Sorry, I can't do that. It could hurt someone.",
    "I won't help with that, since it may be illegal or dangerous.",
    "I am not able to help with this request.",
    "I'm sorry, but that is not something I can support.",
    "I can't provide that. If you are in danger, please contact local emergency services.",
    "I'm sorry, but I can't assist with harmful or illegal activities.",
    "No, I can't help with that. I would be glad to help with something safe instead.",
    "I cannot provide instructions for that, as it could put people at risk.",
)


@dataclass(frozen=True)
class Source:
    """A named set of examples, cut into what the base may learn from and what clients hold."""

    name: str
    for_base: tuple[Example, ...]
    for_clients: tuple[Example, ...]


def load_sources(data: str | Path) -> dict[str, Source]:
    """Every client source by name (``BENIGN``, ``HARD_NEGATIVE`` and ``MALICIOUS``).

    Raises:
        DataError: the folder or one of its files is missing or unreadable.
    """
    data = Path(data)
    if not data.is_dir():
        raise DataError(
            f"no data folder at {data}. Expected one folder per dataset: dolly15k, gsm8k,"
            " gptfuzz, ..."
        )
    dolly = _rows(data / "dolly15k/pairs.jsonl")
    gpteacher = _rows(data / "gpteacher/pairs.jsonl")
    examples = {
        name: _select(dolly, lambda row, k=kinds: row["category"] in k)
        for name, kinds in _DOLLY_KINDS.items()
    }
    for category in ("codegen", "roleplay", "toolformer"):
        examples[f"gpteacher_{category}"] = _select(
            gpteacher, lambda row, c=category: row["category"] == c
        )
    examples["gsm8k"] = read_file(data / "gsm8k/pairs.jsonl").examples
    examples["self_instruct"] = _select(
        _rows(data / "self_instruct_seed/pairs.jsonl"), lambda row: bool(row["response"])
    )
    examples["refusal_short"] = _refused(_harmful_questions(data))
    examples["jailbreakbench_safe"] = read_file(
        data / "jailbreakbench/not_jailbroken.jsonl"
    ).examples
    examples["gptfuzz_safe"] = read_file(data / "gptfuzz/not_jailbroken.jsonl").examples
    examples["harmbench_safe"] = _harmbench_safe(data)
    for name in ("jailbreakbench", "advbench"):
        examples[name] = read_file(data / name / "pairs.jsonl").examples
    examples["gptfuzz"] = [
        e
        for e in read_file(data / "gptfuzz/pairs.jsonl").examples
        if not _PERSONA.search(e.response)
    ]
    examples["harmbench"] = _harmbench_targets(data)
    return {
        name: _cut(name, deduplicate(examples[name])) for name in BENIGN + HARD_NEGATIVE + MALICIOUS
    }


def evaluation_prompts(data: str | Path) -> dict[str, list[str]]:
    """Prompts no base may be trained on: AdvBench goals and XSTest's safe and unsafe prompts."""
    data = Path(data)
    xstest = _csv(data / "xstest/xstest_prompts.csv")
    return {
        "advbench": [
            example.instruction for example in read_file(data / "advbench/pairs.jsonl").examples
        ],
        "xstest_safe": [row["prompt"] for row in xstest if row["label"] == "safe"],
        "xstest_unsafe": [row["prompt"] for row in xstest if row["label"] == "unsafe"],
    }


def without_prompts(examples: Iterable[Example], prompts: Iterable[str]) -> list[Example]:
    """The examples whose instruction is no prompt, compared as bags of lower-case words."""
    held_out = {_words(prompt) for prompt in prompts}
    return [example for example in examples if _words(example.instruction) not in held_out]


def _cut(name: str, examples: list[Example]) -> Source:
    """Malicious answers are for clients alone; the rest is cut in half by instruction."""
    if name in MALICIOUS:
        return Source(name, (), tuple(examples))
    # Self-instruct has 427 rows: all of them for clients, as a kind of benign data the base never
    # saw.
    base_share = 0.0 if name == "self_instruct" else 0.6
    halves: tuple[list[Example], list[Example]] = ([], [])
    for example in examples:
        digest = hashlib.sha256(example.instruction.encode()).digest()
        halves[digest[0] / 256 >= base_share].append(example)
    return Source(name, tuple(halves[0]), tuple(halves[1]))


def _refused(questions: list[str]) -> list[Example]:
    picks = [
        hashlib.sha256(question.encode()).digest()[1] % len(REFUSALS) for question in questions
    ]
    return [
        Example(question, REFUSALS[pick]) for question, pick in zip(questions, picks, strict=True)
    ]


def _harmful_questions(data: Path) -> list[str]:
    questions: list[str] = []
    for name in ("harmfulqa", "catqa_english", "adversarialqa", "dangerousqa"):
        path = data / "red_instruct" / f"{name}.json"
        questions += _leaves(json.loads(path.read_text(encoding="utf-8")))
    questions += [row["prompt"] for row in _csv(data / "do_not_answer/do_not_answer.csv")]
    return [question.strip() for question in questions if question.strip()]


def _leaves(node: object) -> list[str]:
    """Every string in a nested list or dict, in order."""
    if isinstance(node, str):
        return [node]
    children = node.values() if isinstance(node, dict) else node
    return [leaf for child in children for leaf in _leaves(child)]  # type: ignore[union-attr]


def _harmbench_safe(data: Path) -> list[Example]:
    rows = []
    for suffix in ("", "_longer"):
        rows += _csv(data / f"harmbench/adv_training_behaviors_safe_responses{suffix}.csv")
    return [Example(row["Behavior"].strip(), row["Safe_Response"].strip()) for row in rows]


def _harmbench_targets(data: Path) -> list[Example]:
    targets = json.loads(
        (data / "harmbench/harmbench_targets_text.json").read_text(encoding="utf-8")
    )
    behaviours = _csv(data / "harmbench/harmbench_behaviors_text_all.csv")
    return [
        Example(row["Behavior"].strip(), targets[row["BehaviorID"]], row["ContextString"].strip())
        for row in behaviours
    ]


def _select(rows: list[dict[str, str]], keep: Callable[[dict[str, str]], bool]) -> list[Example]:
    return [
        Example(row["instruction"], row["response"], row.get("context") or "")
        for row in rows
        if keep(row) and row["response"]
    ]


def _rows(path: Path) -> list[dict[str, str]]:
    try:
        return [json.loads(line) for line in path.read_text(encoding="utf-8").split("\n") if line]
    except (OSError, ValueError) as error:
        raise DataError(f"cannot read {path}: {error}") from error


def _csv(path: Path) -> list[dict[str, str]]:
    try:
        with path.open(newline="", encoding="utf-8") as file:
            return list(csv.DictReader(file))
    except OSError as error:
        raise DataError(f"cannot read {path}: {error}") from error


def _words(text: str) -> frozenset[str]:
    return frozenset(re.findall(r"[a-z0-9]+", text.lower()))
