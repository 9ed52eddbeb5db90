"""How the scores of a probe are distributed, as counts that its facts hold and its card shows."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

BINS = 40
_FIELDS = {"what", "unit", "bins", "counts"}
_MAX_BINS = 1000
_MAX_GROUPS = 24


def distribution_of(what: str, unit: str, groups: Mapping[str, np.ndarray]) -> dict[str, Any]:
    """The fact that a card's figure is drawn from.

    Args:
        what: which scores they are.
        unit: what one score is of.
        groups: name -> scores (n,) in [0, 1], to be counted in 40 bins.

    >>> scores = {"benign": np.array([0.0, 0.01, 1.0])}
    >>> distribution_of("scores", "adapter", scores)["counts"]["benign"][::39]
    [2, 1]
    """
    counts = {
        name: np.histogram(scores, BINS, (0.0, 1.0))[0].tolist() for name, scores in groups.items()
    }
    return {"what": what, "unit": unit, "bins": BINS, "counts": counts}


def score_distribution(facts: Mapping[str, Any]) -> Mapping[str, Any] | None:
    """What `distribution_of` made, or None.

    It is facts["score_distribution"], or else facts["training"]["score_distribution"].

    Raises:
        TypeError, ValueError: it is of another form.
    """
    fact = facts.get("score_distribution", facts.get("training", {}).get("score_distribution"))
    if fact is None:
        return None
    if not isinstance(fact, Mapping) or set(fact) != _FIELDS:
        raise TypeError(
            f"score_distribution: expected an object with the fields {', '.join(sorted(_FIELDS))}"
        )
    counts = fact["counts"]
    bins = fact["bins"]
    if not isinstance(counts, Mapping):
        raise TypeError("score_distribution: expected counts to be an object of groups")
    if not isinstance(fact["what"], str) or not isinstance(fact["unit"], str):
        raise TypeError("score_distribution: expected what and unit to be text")
    if type(bins) is not int or not 1 < bins <= _MAX_BINS or not 0 < len(counts) <= _MAX_GROUPS:
        raise ValueError(
            f"score_distribution: expected 2 to {_MAX_BINS} bins and 1 to {_MAX_GROUPS} groups"
        )
    for name, row in counts.items():
        sized = isinstance(row, list) and len(row) == bins
        if not sized or not all(type(count) is int and count >= 0 for count in row):
            raise ValueError(
                f"score_distribution: group {name!r}: expected {bins} counts, whole numbers of at"
                " least 0"
            )
    return fact
