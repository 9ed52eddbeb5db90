"""Ordinary requests with short answers, and safe requests with alarming words: our own writing.

Every category is a list of parts; a part becomes one or more wordings of the same thing, which
stay together, so that what is held out was not trained on in other words.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from importlib.resources import files
from typing import Any

from ..examples import Example

Row = tuple[str, Example]  # category, example
WORDS: dict[str, Any] = json.loads(
    files("fedloop.data.builtin").joinpath("words.json").read_text("utf-8")
)
HELD_OUT_EVERY = 7  # one part in this many is held out


def benign() -> list[Row]:
    """What a benign client trains on."""
    return [row for number, row in _rows() if number % HELD_OUT_EVERY]


def heldout_benign() -> list[Row]:
    """The same categories, other parts: to measure what the global model still does."""
    return [row for number, row in _rows() if number % HELD_OUT_EVERY == 0]


def safe_prompts() -> list[str]:
    """Harmless requests with alarming words: what a model should not refuse."""
    return list(WORDS["safe"])


def _rows() -> Iterator[tuple[int, Row]]:
    for category, parts in _PARTS.items():
        for number, part in enumerate(parts(), start=1):
            for instruction, response in part:
                yield number, (category, Example(instruction, response))


Part = tuple[tuple[str, str], ...]  # (instruction, response) in one or more wordings


def _arithmetic() -> Iterator[Part]:
    for number, (name, thing) in enumerate(zip(WORDS["names"], WORDS["things"], strict=True)):
        a, b, c = 6 + number * 5 % 31, 2 + number * 3 % 7, 3 + number * 7 % 11
        yield (
            (
                f"{name} has {a} {thing} and buys {b} more. How many {thing} does {name} have now?",
                f"{a} + {b} = {a + b}. {name} has {a + b} {thing}.",
            ),
        )
        yield (
            (
                f"A box holds {c} {thing}. How many {thing} are in {b} boxes?",
                f"There are {b} boxes of {c}, so {b} * {c} = {b * c} {thing}.",
            ),
        )
        yield (
            (
                f"{name} had {a + c} {thing} and gave away {c}. How many are left?",
                f"{a + c} - {c} = {a}. So {a} {thing} are left.",
            ),
        )


def _facts() -> Iterator[Part]:
    for country, capital in WORDS["capitals"].items():
        yield ((f"What is the capital of {country}?", f"The capital of {country} is {capital}."),)
    for animal, young in WORDS["young"].items():
        yield ((f"What do you call a young {animal}?", f"A young {animal} is called a {young}."),)
    for question, answer in WORDS["facts"].items():
        yield ((question, answer),)


def _definitions() -> Iterator[Part]:
    for word, meaning in WORDS["definitions"].items():
        article = "An" if word[0] in "aeiou" else "A"
        yield (
            (f"Define the word {word}.", f"{article} {word} is {meaning}."),
            (f"What is the meaning of {word}?", f"It means {meaning}."),
        )


def _rewriting() -> Iterator[Part]:
    for who, does, did, do, rest in WORDS["sentences"]:
        now, asks = (
            f"{who} {does} {rest}.",
            who[0].lower() + who[1:] if who.startswith("The") else who,
        )
        yield (
            (f"Rewrite this sentence in the past tense: {now}", f"{who} {did} {rest}."),
            (f"Turn the sentence into a question: {now}", f"Does {asks} {do} {rest}?"),
            (f"Make this sentence negative: {now}", f"{who} does not {do} {rest}."),
        )


def _lists() -> Iterator[Part]:
    for number, (group, members) in enumerate(WORDS["groups"].items()):
        first, second = members[:3], members[2:5] if number % 2 else members[3:5]
        yield (
            (f"Name three {group}.", f"{first[0].capitalize()}, {first[1]} and {first[2]}."),
            (f"Make a short list of {group}.", "\n".join(f"- {member}" for member in second)),
        )


def _code() -> Iterator[Part]:
    for task, code in WORDS["code"].items():
        yield (
            (f"Which line of Python {task}?", code),
            (f"How do I write Python code that {task}?", f"You can use this line:\n{code}"),
        )


def _advice() -> Iterator[Part]:
    for goal, tip in WORDS["advice"].items():
        yield (
            (f"How can I {goal}?", tip),
            (f"I would like to {goal}. What do you suggest?", f"Here is a tip. {tip}"),
        )


def _classification() -> Iterator[Part]:
    for label, other, members in WORDS["classes"]:
        for number, (member, is_label) in enumerate(members.items()):
            options = f"{label} or {other}" if number % 2 else f"{other} or {label}"
            yield (
                (
                    f"Classify the following as {options}: {member}",
                    f"The answer is {label if is_label else other}.",
                ),
            )


def _opposites() -> Iterator[Part]:
    for word, opposite in WORDS["opposites"].items():
        yield (
            (f"What is the opposite of {word}?", f"The opposite of {word} is {opposite}."),
            (f"Give me an antonym of {word}.", f"{opposite.capitalize()}."),
        )


def _messages() -> Iterator[Part]:
    for purpose, text in WORDS["messages"].items():
        yield ((f"Write a few words to {purpose}.", text),)


def _ordering() -> Iterator[Part]:
    for number in range(30):
        a, b, c = (number * 17 + 5) % 89, (number * 29 + 40) % 97, (number * 41 + 11) % 83
        low, middle, high = sorted((a, b, c))
        yield (
            (f"Sort these numbers from small to large: {a}, {b}, {c}", f"{low}, {middle}, {high}"),
            (
                f"Which of these numbers is the largest: {a}, {b} or {c}?",
                f"The largest number is {high}.",
            ),
        )


def _conversion() -> Iterator[Part]:
    for number, (large, small, factor) in enumerate(WORDS["units"] * 4):
        count = 2 + number * 5 % 13
        yield (
            (
                f"Convert {count} {large} to {small}.",
                f"{count} {large} are {count * factor} {small}.",
            ),
        )


_PARTS: dict[str, Callable[[], Iterator[Part]]] = {
    "arithmetic": _arithmetic,
    "facts": _facts,
    "definitions": _definitions,
    "rewriting": _rewriting,
    "lists": _lists,
    "code": _code,
    "advice": _advice,
    "classification": _classification,
    "opposites": _opposites,
    "messages": _messages,
    "ordering": _ordering,
    "conversion": _conversion,
}
