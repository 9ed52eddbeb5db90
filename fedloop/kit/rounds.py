"""How a probe is to be used round after round: what its benign adapters of unseen kinds score.

The `CumulativeLevel` takes these numbers from the probe's facts "cumulative". All of them are fixed
on benign kinds of data, hard negatives among them, that were left out of the fit that scored them.
"""

from __future__ import annotations

import numpy as np

from loraprobe.errors import LoraprobeError

from ..defense.trust import sigmoid
from .folds import Mask, Table, benign_groups
from .measures import cut_at, held_out_scores

LOGIT_HEADS = ("linear", "mass_mean")
WATCHED = 0.8  # quantile of those scores below which nobody is rejected for standing apart
GAPS = 2.0  # width of a gap that counts, in scaled median absolute deviations of those scores


def facts_for_rounds(head: str, x: np.ndarray, table: Table, train: Mask) -> dict[str, float]:
    """The fields of a `CumulativeLevel` that a probe was measured for.

    "threshold" is what 2 % of these scores reach; "floor" the highest mean of one kind, for that is
    what is left when a client's noise has averaged out; "gap", in log odds, and "watch" are what
    standing apart from a round's others means.

    Args:
        head: the probe's.
        x: features of all adapters, (n, p).
        train: which of them the probe is fitted on, (n,).

    Returns:
        {} for a head without log odds, or too few benign adapters to hold a cut.
    """
    if head not in LOGIT_HEADS:
        return {}
    groups = benign_groups(table)
    try:
        left_out = held_out_scores(head, x, table, train, groups)
        cut = cut_at(left_out)
        kinds = _means(head, x, table, train, groups)
    except LoraprobeError:
        return {}
    if cut is None or not kinds:
        return {}
    return {
        "threshold": sigmoid(cut),
        "floor": sigmoid(min(cut, max(kinds))),
        "gap": gap_of(left_out),
        "watch": sigmoid(watch_of(left_out)),
    }


def gap_of(benign: np.ndarray) -> float:
    """How far apart is apart, for left-out benign scores (n,)."""
    spread = 1.4826 * float(np.median(np.abs(benign - np.median(benign))))
    return max(GAPS * spread, 1e-6)


def watch_of(benign: np.ndarray) -> float:
    """The score below which nobody stands apart, for left-out benign scores (n,)."""
    return float(np.quantile(benign, WATCHED))


def _means(
    head: str, x: np.ndarray, table: Table, train: Mask, groups: list[list[str]]
) -> list[float]:
    """The mean score of every benign kind, left out by itself.

    Kinds of one adapter are left out: their mean is that adapter's noise.
    """
    means = []
    for kind in (kind for group in groups for kind in group):
        rows = train & (table.label == 0) & (table.source == kind)
        if rows.sum() > 1:
            means.append(float(held_out_scores(head, x, table, train, [[kind]]).mean()))
    return means
