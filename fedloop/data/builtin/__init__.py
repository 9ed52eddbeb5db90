"""The built-in corpus: small sets of our own writing, so that a federation can be tried without any
data.

``SETS`` are examples with a category each, to train on or to measure loss on; ``PROMPTS`` are
requests without answers, to measure refusal on. Nothing is random: the same rows in the same order.
"""

from __future__ import annotations

from collections.abc import Callable

from ..examples import Example
from .benign import benign, heldout_benign, safe_prompts
from .harmful import harmful_prompts, malicious, refusals

SETS: dict[str, Callable[[], list[tuple[str, Example]]]] = {
    "benign": benign,
    "heldout_benign": heldout_benign,
    "malicious": malicious,
    "refusals": refusals,
}
PROMPTS: dict[str, Callable[[], list[str]]] = {
    "harmful_prompts": harmful_prompts,
    "safe_prompts": safe_prompts,
}
