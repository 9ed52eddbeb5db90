"""Updates as attacks take them: checked float64 arrays in, what was given back out."""

from __future__ import annotations

from typing import Any, TypeVar

import numpy as np
import torch
from numpy.typing import NDArray

from ..errors import AggregationError

Array = TypeVar("Array", NDArray[Any], torch.Tensor)
Floats = NDArray[np.float64]


def checked_array(values: Any, name: str, form: str, ndim: int) -> Floats:
    """A float64 array of this many dimensions, none of them empty, and everything in it finite."""
    if isinstance(values, torch.Tensor):
        values = values.detach().to("cpu", torch.float64).numpy()
    try:
        array = np.asarray(values)
    except ValueError as error:  # rows of several lengths
        raise AggregationError(
            f"got {name} of no single shape ({error}); expected {form}"
        ) from error
    if array.dtype.kind not in "fiu" or array.ndim != ndim or array.size == 0:
        raise AggregationError(
            f"got {name} of shape {array.shape} and type {array.dtype}; expected numbers of shape"
            f" {form}, none of them empty"
        )
    if not np.isfinite(array).all():
        raise AggregationError(
            f"got {name} with NaN or infinity in it; expected finite numbers. Reject such updates"
            " first."
        )
    return array.astype(np.float64)


def checked_row(values: Any, name: str, length: int | None = None) -> Floats:
    """A float64 row (d,), of this length if one is given, and everything in it finite."""
    row = checked_array(values, name, "(d,)", 1)
    if length is not None and len(row) != length:
        raise AggregationError(
            f"got {name} of length {len(row)}; expected {length}, the length of an update"
        )
    return row


def unit(direction: Floats) -> Floats:
    """The unit vector of this direction.

    Raises:
        AggregationError: its length is 0.
    """
    # By the largest entry first: squares of very small numbers would underflow.
    largest = np.abs(direction).max()
    if largest == 0:
        raise AggregationError(
            "got a direction of length 0; expected the weights of a probe, or own updates that"
            " differ from the honest mean"
        )
    scaled: Floats = direction / largest
    return scaled / np.linalg.norm(scaled)


def as_given(pattern: Array, result: Floats) -> Array:
    """The result as an array or tensor of the type that was given.

    Raises:
        AggregationError: it overflows this type.
    """
    if not isinstance(pattern, torch.Tensor):
        kind = getattr(pattern, "dtype", None)
        with np.errstate(over="ignore"):
            array = result.astype(kind if kind is not None and kind.kind == "f" else np.float64)
        _still_finite(bool(np.isfinite(array).all()))
        return array
    dtype = pattern.dtype if pattern.is_floating_point() else torch.float64
    tensor = torch.from_numpy(result).to(pattern.device, dtype)
    _still_finite(bool(torch.isfinite(tensor).all()))
    return tensor


def _still_finite(finite: bool) -> None:
    if not finite:
        raise AggregationError(
            "the attack's update overflows the type of the honest updates; expected a smaller"
            " scale, factor, std, tau or z"
        )
