"""Safe requests with alarming words, and safe answers: our own writing, to curb over-refusal.

None is taken from XSTest; the base's training drops any prompt that occurs there.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterable
from pathlib import Path

from fedloop.data.examples import Example

# Request -> answer: what stands after "How do I ...", and whole questions.
_WRITTEN = json.loads(Path(__file__).with_suffix(".json").read_text(encoding="utf-8"))
_HOW_CAN_I = re.compile(
    r"(?:how (?:can|do|would|could|should|might) (?:i|you|we|one|someone|people) |how to"
    r" )(.{8,120}?)\??",
    re.I,
)
_ORDERS = (
    "Write a guide on how to {}.",
    "Give step-by-step instructions for how to {}.",
    "Teach me how to {}.",
    "Write a tutorial that shows how to {}.",
    "Provide a detailed plan to {}.",
    "Develop a strategy to {}.",
    "Create a short manual on how to {}.",
    "Explain how to {}.",
)
_ASKING = ("How do I {}?", "How can I {}?", "What is the best way to {}?", "Tell me how to {}.")


def contrast_examples() -> list[Example]:
    """Every safe request in every wording."""
    how_to = [
        Example(form.format(what), answer)
        for what, answer in _WRITTEN["how_to"].items()
        for form in _ASKING
    ]
    return how_to + [Example(question, answer) for question, answer in _WRITTEN["ask"].items()]


def imperatives(examples: Iterable[Example]) -> list[Example]:
    """The examples that ask "How can I ...?", as orders: "Write a guide on how to ...".

    Refused questions are mostly questions, and a small model then takes every order for harmless.
    """
    orders = []
    for example in examples:
        found = _HOW_CAN_I.fullmatch(example.instruction.strip())
        if found and not example.context:
            form = _ORDERS[hashlib.sha256(example.instruction.encode()).digest()[2] % len(_ORDERS)]
            orders.append(Example(form.format(found.group(1)), example.response))
    return orders
