"""A metric by its name: how to call it, of how many prompts it is, its interval."""

from __future__ import annotations

import math
from collections.abc import Mapping

METRIC_WORDS = {
    "refusal_strict": "harmful prompts refused (strict)",
    "refusal_rule": "harmful prompts refused (Rule)",
    "over_refusal_strict": "safe prompts refused (strict)",
    "over_refusal_rule": "safe prompts refused (Rule)",
    "loss": "held-out loss, nats per token",
    "rouge_l": "held-out ROUGE-L, 0 to 1",
}


def words_of(name: str) -> str:
    """A metric as a reader would call it."""
    return METRIC_WORDS.get(name, name)


def sample_size(metrics: Mapping[str, float], name: str) -> int | None:
    """Of how many prompts or pairs a metric is.

    What is recorded as n_ and the beginning of its name.
    """
    stem = "utility_" if name in ("loss", "rouge_l") else name.removeprefix("initial_")
    kinds = [key for key in metrics if key.startswith("n_") and stem.startswith(key[2:] + "_")]
    n = metrics[max(kinds, key=len)] if kinds else 0
    return int(n) if n >= 1 and n == int(n) else None


def share_with_interval(
    metrics: Mapping[str, float], name: str
) -> tuple[float, float, float] | None:
    """A metric with its 95 % Wilson interval, if it is a share: a whole number of the sample."""
    value, n = metrics.get(name, math.nan), sample_size(metrics, name)
    if name in ("loss", "rouge_l") or n is None or not 0 <= value <= 1:
        return None
    hits = round(value * n)
    if abs(value * n - hits) > 1e-6:
        return None
    from scipy.stats import binomtest

    interval = binomtest(hits, n).proportion_ci(method="wilson")
    return value, float(interval.low), float(interval.high)
