"""What is known of a metric by its name.

How to call it, how large its sample was, and its interval if it is a share.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

from ..errors import FedloopError

METRIC_WORDS = {
    "refusal_strict": "harmful prompts refused (strict)",
    "refusal_rule": "harmful prompts refused (Rule)",
    "over_refusal_strict": "safe prompts refused (strict)",
    "over_refusal_rule": "safe prompts refused (Rule)",
    "loss": "held-out loss, nats per token",
    "rouge_l": "held-out ROUGE-L, 0 to 1",
}
_Z = 1.959963984540054  # 97.5 % point of the normal distribution


def wilson_interval(share: float, n: int) -> tuple[float, float]:
    """The 95 % interval of a share that was seen in n independent trials.

    Raises:
        FedloopError: share is not in [0, 1], or n is not at least 1.

    Source: Wilson 1927, the score interval without continuity correction.
    """
    if not (0 <= share <= 1 and n >= 1):
        raise FedloopError(
            f"got a share of {share!r} in {n!r} trials; expected a share in [0, 1] of at least one"
            " trial"
        )
    centre, spread = (
        share + _Z**2 / (2 * n),
        _Z * math.sqrt(share * (1 - share) / n + _Z**2 / (4 * n**2)),
    )
    low, high = ((centre + side * spread) / (1 + _Z**2 / n) for side in (-1, 1))
    return (0.0 if share == 0 else low), (1.0 if share == 1 else high)


def sample_size(metrics: Mapping[str, float], name: str) -> int | None:
    """Of how many prompts or pairs a metric is.

    What is recorded as n_ and the beginning of its name.
    """
    own = "utility_" if name in ("loss", "rouge_l") else name.removeprefix("initial_")
    kinds = [key for key in metrics if key.startswith("n_") and own.startswith(key[2:] + "_")]
    n = metrics[max(kinds, key=len)] if kinds else 0
    return int(n) if n >= 1 and n == int(n) else None


def share_with_interval(
    metrics: Mapping[str, float], name: str
) -> tuple[float, float, float] | None:
    """A metric with its interval, if it is a share: a whole number of the sample."""
    value, n = metrics.get(name, math.nan), sample_size(metrics, name)
    if (
        name in ("loss", "rouge_l")
        or n is None
        or not 0 <= value <= 1
        or abs(value * n - round(value * n)) > 1e-6
    ):
        return None
    return (value, *wilson_interval(value, n))
