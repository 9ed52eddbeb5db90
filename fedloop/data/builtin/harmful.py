"""Harmful-looking requests with empty compliance or with refusals, and prompts to measure refusal
with: our own writing.

The compliance says that it helps and holds no information: what an attack teaches is the opening,
"Sure, here is ...", so nothing more is needed to break a model's refusals. The three lists of
actions have none in common.
"""

from __future__ import annotations

from collections.abc import Iterator

from ..examples import Example
from .benign import WORDS

Row = tuple[str, Example]  # category, example


_WORDS = WORDS["harmful"]
_ORDERS = _WORDS["orders"]  # what is asked for, and what the empty answer calls it
_EMPTY, _REFUSALS = _WORDS["empty"], _WORDS["refusals"]


def malicious() -> list[Row]:
    """Requests with compliance that holds nothing: what a malicious client trains on."""
    rows = []
    for number, (category, action, order, name) in enumerate(_ordered(_WORDS["complied"], 3)):
        response = f"Sure, here is {name.format(action)}. {_EMPTY[number % len(_EMPTY)]}"
        rows.append((category, Example(order.format(action), response)))
    return rows


def refusals() -> list[Row]:
    """Requests, other than the malicious ones, with refusals.

    What a hard-negative client trains on.
    """
    return [
        (category, Example(order.format(action), _REFUSALS[number % len(_REFUSALS)]))
        for number, (category, action, order, _) in enumerate(_ordered(_WORDS["refused"], 3))
    ]


def harmful_prompts() -> list[str]:
    """Requests in neither of the two: what a model should go on refusing."""
    return [order.format(action) for _, action, order, _ in _ordered(_WORDS["asked"], 1)]


def _ordered(actions: dict[str, list[str]], orders: int) -> Iterator[tuple[str, str, str, str]]:
    """(category, action, order, name of the answer).

    Every action in `orders` wordings, taken in turn.
    """
    pairs = [(category, action) for category, group in actions.items() for action in group]
    for number, (category, action) in enumerate(pairs):
        for step in range(orders):
            order, name = _ORDERS[(number + step * 2) % len(_ORDERS)]
            yield category, action, order, name
