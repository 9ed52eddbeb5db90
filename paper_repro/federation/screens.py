"""What tells clients of a round apart before their mean is taken, beside a defence.

The rival's screen: how alike an update is to one harmful fine-tune, cut by a mixture. Score: sum
over the layers' q and v of the cosine between the change of the product since the round's global
LoRA and that of one harmful fine-tune. A Gaussian mixture of two components over the round's
scores; who belongs to the lower one with P >= 0.8 is averaged. With the BIC it splits only where
two components explain the scores better than one. Source: the independent reproduction of
Safe-FedLLM (arXiv:2601.07177) and its own method.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from fedloop.defense.types import Assessment
from loraprobe import Adapter
from loraprobe.adapters.deltas import add_delta, weight_delta
from zoo.smollm2.cohorts import by_bic, direction_scores, mixture

Kept = dict[str, bool]
Screen = Callable[[Assessment, Adapter], Kept]
"""What a defence accepted, and the round's global LoRA -> client -> whether it is averaged."""

NOTHING = np.empty(0)
MIXTURES = {"mixture": mixture, "mixture_by_bic": by_bic}


def rival(name: str, reference: Adapter) -> Screen:
    """The rival's.

    Args:
        name: in MIXTURES.
        reference: one harmful fine-tune whose B started at zero.
    """

    def screen(assessment: Assessment, start: Adapter) -> Kept:
        updates = assessment.accepted
        changes = [weight_delta(add_delta(start, one), start) for one in updates.values()]
        scores = direction_scores([*changes, reference], len(changes))[:-1]
        dropped = MIXTURES[name](scores, NOTHING)
        return {client: not out for client, out in zip(updates, dropped, strict=True)}

    return screen
