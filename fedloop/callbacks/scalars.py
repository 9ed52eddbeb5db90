"""A round's record as named numbers, as trackers of experiments take them."""

from __future__ import annotations

from ..defense.types import RoundRecord


def scalars(record: RoundRecord) -> dict[str, float]:
    """ "group/name" -> number: factors, weights, last scores, cuts, losses, metrics, seconds."""
    groups = {
        "factor": record.factors,
        "weight": record.weights,
        "score": {client: scores[-1] for client, scores in record.scores.items()},
        "cut": record.cuts,
        "loss": record.losses,
        "metric": record.metrics,
        "seconds": record.seconds,
        "round": {"skipped": float(record.skipped)},
    }
    return {
        f"{group}/{name}": float(value)
        for group, values in groups.items()
        for name, value in values.items()
    }
