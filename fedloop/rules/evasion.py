"""Hiding from a linear probe: the nearest update whose score is what the attacker wants."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from ..checks import is_number
from ..errors import AggregationError
from .updates import Array, as_given, checked_row, unit


def evade(
    update: Array,
    direction: NDArray[Any] | torch.Tensor,
    target: float = 0.0,
    max_norm: float | None = None,
) -> Array:
    """The nearest vector with a signed length along a direction, and a norm within a bound.

    With u = direction / ‖direction‖: what is orthogonal to u is kept, and shortened if the norm
    asks for it; the part along u is replaced by target × u. A score sigmoid(w·x + c) becomes
    sigmoid(target × ‖w‖ + c).

    Args:
        update: (d,).
        direction: (d,), of any length but 0.
        target: the signed length, x·u, to end up with.
        max_norm: bound on the L2 norm of the result, at least |target|; None for no bound.

    Raises:
        AggregationError: the direction is zero, shapes differ, something is not finite, or
            max_norm < |target|.

    Source: orthogonal projection on the intersection of a hyperplane and a ball.
    """
    x = checked_row(update, "update")
    u = unit(checked_row(direction, "direction", len(x)))
    aim = _finite(target, "target")
    rest = x - (x @ u) * u
    # Once more: the first subtraction leaves a rounding error of the size of x·u.
    rest -= (rest @ u) * u
    if max_norm is not None:
        bound = _finite(max_norm, "max_norm")
        if bound < abs(aim):
            raise AggregationError(
                f"got max_norm {bound} and target {aim}; expected a max_norm of at least |target|,"
                " or no update fulfils both"
            )
        length = float(np.linalg.norm(rest))
        room = math.sqrt((bound - aim) * (bound + aim))
        if length > room:
            rest *= room / length
    return as_given(update, aim * u + rest)


def _finite(value: Any, name: str) -> float:
    if not is_number(value):
        raise AggregationError(f"got {name} {value!r}; expected a finite number")
    return float(value)
