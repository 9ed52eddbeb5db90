"""Marks of the adapters that a probe was fitted on, by which they are known again.

A mark is four numbers an adapter: its feature vector, scaled to length 1, on four fixed random
directions. They say nothing of the adapter, and hold up to the rounding of another machine.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from .errors import ProbeFormatError

_NUMBERS = 4
_ROUNDING = 2e-5


def marks_of(features: np.ndarray) -> list[list[float]]:
    """The marks of feature vectors (n, p): n times four numbers."""
    rows = np.asarray(features, np.float64)
    directions = np.random.default_rng(0).standard_normal((rows.shape[1], _NUMBERS))
    lengths = np.linalg.norm(rows, axis=1, keepdims=True)
    marks: list[list[float]] = np.round(rows @ directions / np.maximum(lengths, 1e-30), 6).tolist()
    return marks


def fitted_on(training: Any, features: np.ndarray) -> int | None:
    """How many of these feature vectors (n, p) a probe was fitted on.

    Args:
        training: facts["training"] of the probe.

    Returns:
        None where the probe does not say what it was fitted on.

    Raises:
        ProbeFormatError: its marks are of another form.
    """
    recorded = training.get("marks") if isinstance(training, dict) else None
    if recorded is None:
        return None
    try:
        marks = np.array(recorded, np.float64).reshape(-1, _NUMBERS)
    except (TypeError, ValueError) as error:
        raise ProbeFormatError(
            f"facts.training.marks: {error}; expected four numbers an adapter"
        ) from None
    rows = np.array(marks_of(features))
    apart = np.abs(rows[:, None] - marks[None]).max(axis=2)  # (n, m)
    blank = ~np.asarray(features).any(axis=1)
    return int(((apart < _ROUNDING).any(axis=1) & ~blank).sum())
