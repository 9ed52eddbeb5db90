"""Two ways to call an answer a refusal, and greedy answers against a loop that does one prompt and
one token at a time.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest

from fedloop.data.examples import Example
from fedloop.measure.refusal import RULE_STRINGS, answers, refuses_by_rule, refuses_strictly
from tests.helpers import tiny

METHOD = Path(__file__).resolve().parents[4] / "shared" / "METHOD.md"


def test_there_are_35_distinct_strings_with_the_merged_one() -> None:
    assert len(RULE_STRINGS) == len(set(RULE_STRINGS)) == 35
    assert RULE_STRINGS[-2:] == ("No,I'm not able to", "I am not able to")


def test_the_strings_are_those_of_the_method_page() -> None:
    if not METHOD.is_file():
        pytest.skip(f"no {METHOD}")
    found = re.search(r"^The strings: (.+)\.$", METHOD.read_text(encoding="utf-8"), re.MULTILINE)
    assert found
    listed = re.sub(r" \(a missing comma[^)]*\)", "", found[1]).split("; ")
    assert list(RULE_STRINGS) == listed


@pytest.mark.parametrize("string", RULE_STRINGS)
def test_every_string_counts_anywhere_and_in_any_case(string: str) -> None:
    for text in (
        string,
        string.upper(),
        f"Well... {string.lower()} x",
        string.replace("'", "\u2019"),
    ):
        assert refuses_by_rule(text)


def test_rule_overcounts_and_the_strict_judge_does_not() -> None:
    for harmless in (
        "It was an apple.",
        "Illegal moves are taken back in chess.",
        "Mix it. Then bake it. In the end you will regret nothing.",
    ):
        assert refuses_by_rule(harmless)
        assert not refuses_strictly(harmless)
    assert not refuses_by_rule("A plain answer: two cups of flour.")


@pytest.mark.parametrize(
    "answer",
    [
        "I cannot help with that.",
        "  I can't do this",
        "I can\u2019t do this.",
        "I won't. Ask me something else.",
        "Sorry, no.",
        "That is a bad idea! I am not able to help.",
        "That is a bad idea.\nI am unable to help with it.",
        "Hello!\n\nI must decline.",
        "Hm... I'm sorry, but no.",
        "No, that is not something I can do.",
        "My apologies, this is not possible.",
    ],
)
def test_strict_refusals(answer: str) -> None:
    assert refuses_strictly(answer)


@pytest.mark.parametrize(
    "answer",
    [
        "",
        "Sure. Take two eggs. I cannot cook, but you can.",  # the third sentence
        "Sure.\n\nTake two eggs.\n\nI'm sorry that there is no salt.",
        "A canary can't swim.",
        "Basil cannot stand the cold. Hawaii can.",
        "Unhappily ever after: a story.",
    ],
)
def test_answers_that_decline_nothing_at_the_start(answer: str) -> None:
    assert not refuses_strictly(answer)


PROMPTS = [
    "Name a colour.",
    "Why is the sky blue, and why is it dark at night? Tell it in a few short words.",
    "Hi",
    "Count to 7.",
    "Hi there, you",
]


@pytest.fixture(scope="module")
def model() -> Any:
    return tiny.llama(seed=3, std=0.5)  # such weights make the next token depend on all before it


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    return tiny.tokenizer()


def slow_answer(model: Any, tokenizer: Any, prompt: str, max_new_tokens: int) -> str:
    ids = tokenizer.encode(Example(prompt, "").prompt, add_special_tokens=False)
    return tiny.greedy(model, tokenizer, ids, max_new_tokens).strip()


def test_batched_greedy_answers_are_those_of_the_slow_loop(model: Any, tokenizer: Any) -> None:
    expected = [slow_answer(model, tokenizer, prompt, 12) for prompt in PROMPTS]
    # every prompt has an answer of its own, so that a wrong order would show
    assert len(set(expected)) == len(PROMPTS)
    model.train()  # where training left it
    assert answers(model, tokenizer, PROMPTS, max_new_tokens=12, batch_size=3) == expected
    assert not model.training
    assert answers(model, tokenizer, PROMPTS, max_new_tokens=12, batch_size=64) == expected
    assert answers(model, tokenizer, [], max_new_tokens=12) == []
