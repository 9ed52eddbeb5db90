"""What a featurizer learnt, as one safetensors file: the bases of products, or an initial adapter.

    left.<module>       (d_out, k) float16
    right.<module>      (d_in, k) float16
    center              (p,) float32
    initial.<module>    (r, d_in) float16, lora_A of the adapter that training started from

Recipes of products have the first three, recipes of factors may have the last, others have none.
"""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import safetensors.numpy
from safetensors import SafetensorError

from ..adapters.safetensors import header_of
from ..errors import ProbeFormatError, quoted
from ..features.initial import InitialAdapter
from ..features.invariant import Bases, width_of
from ..featurizer import Featurizer

Arrays = dict[str, np.ndarray]
_EXPONENT = np.uint16(0x7C00)  # of a float16: all ones in NaN and infinity, and only there
_Expected = dict[str, tuple[type[np.generic], tuple[int, ...]]]


def featurizer_bytes(featurizer: Featurizer) -> bytes | None:
    """The file of a featurizer; None where there is nothing to keep."""
    arrays: Arrays = {}
    if featurizer.bases is not None:
        for side in ("left", "right"):
            bases = getattr(featurizer.bases, side)
            arrays |= {f"{side}.{module}": basis for module, basis in bases.items()}
        arrays["center"] = featurizer.bases.center
    if featurizer.initial is not None:
        factors = featurizer.initial.factors
        arrays |= {f"initial.{module}": factor for module, factor in factors.items()}
    return safetensors.numpy.save(arrays) if arrays else None


def with_arrays(featurizer: Featurizer, data: bytes, where: str) -> Featurizer:
    """The featurizer with what its file holds, after checking all of it.

    Raises:
        ProbeFormatError: not exactly the arrays that recipe and layout ask for, in type and shape,
            or numbers that are not finite.
    """
    header_of(data)
    try:
        arrays: Arrays = safetensors.numpy.load(data)
    except (SafetensorError, ValueError, KeyError, TypeError) as error:
        raise ProbeFormatError(
            f"{where} is not a readable safetensors file: {quoted(str(error), 200)}"
        ) from None
    if featurizer.recipe.reads_product:
        return replace(featurizer, bases=_bases(featurizer, arrays, where))
    if featurizer.recipe.reads_factors:
        return replace(featurizer, initial=_initial(featurizer, arrays, where))
    raise ProbeFormatError(f"{where} is there; expected none, the recipe learns nothing")


def _bases(featurizer: Featurizer, arrays: Arrays, where: str) -> Bases:
    expected: _Expected = {}
    total, k = 0, featurizer.recipe.k or 0
    for module, (d_out, d_in) in featurizer.weight_shapes.items():
        left, right = min(k, d_out), min(k, d_in)
        expected[f"left.{module}"] = (np.float16, (d_out, left))
        expected[f"right.{module}"] = (np.float16, (d_in, right))
        total += width_of(left, right, featurizer.recipe.features)
    expected["center"] = (np.float32, (total,))
    _check(arrays, expected, where)
    if not any(arrays[name].any() for name in expected if name != "center"):
        raise ProbeFormatError(
            f"{where}: every basis is zero, so that all adapters look alike; expected directions"
            " learnt in training. Use another probe"
        )
    modules = featurizer.layout.scalings
    return Bases(
        {module: arrays[f"left.{module}"] for module in modules},
        {module: arrays[f"right.{module}"] for module in modules},
        arrays["center"],
    )


def _initial(featurizer: Featurizer, arrays: Arrays, where: str) -> InitialAdapter:
    expected: _Expected = {}
    for slot in featurizer.layout.slots:
        name = f"initial.{slot.module}"
        shape = arrays[name].shape if name in arrays else ()
        rank = slot.shape[0] if slot.factor == "A" else slot.shape[1]
        # d_in is that of the file where the layout has B alone.
        expected[name] = (np.float16, (rank, *(shape[1:2] or (0,))))
    _check(arrays, expected, where)
    return InitialAdapter(
        {module: arrays[f"initial.{module}"] for module in featurizer.layout.scalings}
    )


def _finite(array: np.ndarray) -> bool:
    """Whether no number is NaN or infinite; of float16 by its exponent, NumPy being slow at it."""
    if array.dtype != np.float16:
        return bool(np.isfinite(array).all())
    return not np.any(array.view(np.uint16) & _EXPONENT == _EXPONENT)


def _check(arrays: Arrays, expected: _Expected, where: str) -> None:
    if different := sorted(expected.keys() ^ arrays.keys()):
        raise ProbeFormatError(
            f"{where}: {len(different)} arrays are missing or unknown, first"
            f" {quoted(different[0], 200)}; expected those of recipe and layout"
        )
    for name, (dtype, shape) in expected.items():
        array = arrays[name]
        if array.dtype != dtype or array.shape != shape or not _finite(array):
            raise ProbeFormatError(
                f"{where}: got {quoted(name, 200)} of type {array.dtype} and shape {array.shape};"
                f" expected finite numbers of type {np.dtype(dtype)} and shape {shape}"
            )
