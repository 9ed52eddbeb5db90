"""Flat arrays on the wire: float32, or float16 with a scale.

What comes in is a stranger's, and is checked before it is read.
"""

from __future__ import annotations

import io
from typing import TYPE_CHECKING, Any

import numpy as np

from ..checks import is_number
from ..errors import MessageError

if TYPE_CHECKING:
    from flwr.app import Array


def encode(vector: np.ndarray, wire: str = "float32") -> tuple[Array, float]:
    """A flat float32 array as Flower sends it, and what its numbers have to be multiplied with.

    In float16 they are divided by the largest: changes of a LoRA are small, and float16 knows
        little below 6e-5.
    """
    from flwr.app import Array

    if wire == "float32":
        return Array(np.ascontiguousarray(vector, dtype="<f4")), 1.0
    scale = float(np.abs(vector).max(initial=0.0)) or 1.0
    return Array((vector / np.float32(scale)).astype("<f2")), scale


def decode(array: Array, what: str, size: int, wire: str, scale: Any) -> np.ndarray:
    """The inverse of `encode`: (size,) float32.

    Raises:
        MessageError: another type, shape or length, or a number that is not finite.
    """
    dtype = np.dtype("<f4" if wire == "float32" else "<f2")
    header = _header(dtype, size)
    if (array.dtype, tuple(array.shape), array.stype) != (wire, (size,), "numpy.ndarray"):
        got = (
            f"{str(array.stype)[:40]} of {str(array.dtype)[:40]} and shape"
            f" {str(tuple(array.shape))[:40]}"
        )
        raise MessageError(
            f"{what}: got a {got}; expected a numpy.ndarray of {wire} and shape ({size},)"
        )
    # The bytes are compared with what NumPy would have written, not parsed: they are a stranger's,
    # and may promise terabytes.
    if len(array.data) != len(header) + size * dtype.itemsize or not array.data.startswith(header):
        raise MessageError(
            f"{what}: got {len(array.data)} bytes that are not {size} numbers of {wire} in NumPy's"
            " format"
        )
    if not is_number(scale) or not 0 < scale < 3e38:
        raise MessageError(f"{what}: got scale {str(scale)[:40]}; expected a finite number above 0")
    with np.errstate(over="ignore", invalid="ignore"):
        vector = np.frombuffer(array.data, dtype, offset=len(header)).astype(
            np.float32
        ) * np.float32(scale)
    if not np.isfinite(vector).all():
        raise MessageError(
            f"{what}: {int((~np.isfinite(vector)).sum())} of {size} numbers are NaN or infinite;"
            " expected finite ones"
        )
    return vector


def _header(dtype: np.dtype[Any], size: int) -> bytes:
    buffer = io.BytesIO()
    np.lib.format.write_array_header_1_0(
        buffer, {"descr": dtype.str, "fortran_order": False, "shape": (size,)}
    )
    return buffer.getvalue()


def itemsize(wire: str) -> int:
    """Bytes of a number."""
    return 4 if wire == "float32" else 2
