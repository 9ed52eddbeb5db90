"""The rival's screen: how alike an update is to one harmful fine-tune, cut by a mixture.

Score: sum over the layers' q and v of the cosine between the change of the product since the
round's global LoRA and that of one harmful fine-tune. A Gaussian mixture of two components over the
round's scores; who belongs to the lower one with P >= 0.8 is averaged. With the BIC it splits only
where two components explain the scores better than one.

Source: the independent reproduction of Safe-FedLLM (arXiv:2601.07177) and its own method.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import numpy as np

from loraprobe import Adapter
from loraprobe.adapters.deltas import add_delta, weight_delta
from zoo.smollm2.cohorts import by_bic, direction_scores, mixture

Kept = dict[str, bool]
NO_REFERENCE = np.empty(0)
SCREENS: dict[str, Callable[[np.ndarray, np.ndarray], np.ndarray]] = {
    "mixture": mixture,
    "mixture_by_bic": by_bic,
}


def kept_by(
    screen: str, updates: Mapping[str, Adapter], start: Adapter, reference: Adapter
) -> Kept:
    """Client -> whether its update is averaged.

    Args:
        screen: in SCREENS.
        updates: of a round, kind "factor_delta".
        start: the round's global LoRA.
        reference: one harmful fine-tune whose B started at zero.
    """
    changes = [weight_delta(add_delta(start, update), start) for update in updates.values()]
    scores = direction_scores([*changes, reference], len(changes))[:-1]
    dropped = SCREENS[screen](scores, NO_REFERENCE)
    return {client: not out for client, out in zip(updates, dropped, strict=True)}
