"""The map from a head's scores to probabilities that a published probe carries.

It is fitted by `loraprobe.fit.calibration`.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from itertools import pairwise
from typing import Literal, get_args

import numpy as np

from .errors import FitError, quoted
from .heads import sigmoid

Method = Literal["platt", "isotonic"]
METHODS: tuple[Method, ...] = get_args(Method)
_CLIP = 1e-12  # keeps the logit of a saturated score finite


@dataclass(frozen=True)
class Calibration:
    """A monotone map of scores to probabilities.

    Attributes:
        method: "platt", sigmoid(a * logit(p) + b), or "isotonic", a step-wise linear map.
        inputs, outputs: (a,) and (b,) for Platt; the knots of the map for isotonic.
        unit: what one row was when it was fitted ("client update", "local step", ...).
        rows, groups: how much it was fitted on.

    Raises:
        FitError: the numbers are no such map.

    Source: Platt 1999; Zadrozny & Elkan, KDD 2002.
    """

    method: Method
    inputs: tuple[float, ...]
    outputs: tuple[float, ...]
    unit: str
    rows: int
    groups: int

    def __post_init__(self) -> None:
        check_method(self.method)
        numbers = (*self.inputs, *self.outputs)
        whole = bool(numbers) and len(self.inputs) == len(self.outputs)
        if not whole or not all(math.isfinite(number) for number in numbers):
            raise FitError("a calibration needs as many finite inputs as outputs, at least one")
        if self.method == "platt" and (len(self.inputs) != 1 or self.inputs[0] <= 0):
            raise FitError(
                f"got Platt slope {self.inputs}; expected one slope above 0: scores must rise with"
                " the probability"
            )
        rises = _rises(self.inputs) and _rises(self.outputs)
        in_range = self.outputs[0] >= 0 and self.outputs[-1] <= 1
        if self.method == "isotonic" and not (rises and in_range):
            raise FitError("isotonic knots must rise, and their outputs must lie in [0, 1]")

    def __call__(self, scores: np.ndarray) -> np.ndarray:
        """(n,) scores in [0, 1] -> (n,) probabilities."""
        if self.method == "platt":
            return sigmoid(self.inputs[0] * logit(scores) + self.outputs[0])
        return np.asarray(np.interp(scores, self.inputs, self.outputs))


def check_method(method: object) -> Method:
    """A method of calibration, by its name.

    Raises:
        FitError: there is none of that name.
    """
    for name in METHODS:
        if method == name:
            return name
    raise FitError(f"got calibration {quoted(method)}; expected one of {', '.join(METHODS)}")


def logit(scores: np.ndarray) -> np.ndarray:
    """(n,) scores in [0, 1] -> (n,) log odds; those of 0 and 1 are finite."""
    clipped = np.clip(scores, _CLIP, 1 - _CLIP)
    return np.asarray(np.log(clipped / (1 - clipped)))


def _rises(values: tuple[float, ...]) -> bool:
    return all(a <= b for a, b in pairwise(values))
