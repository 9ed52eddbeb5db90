"""Heads: arrays in, probabilities out.

A head is the small frozen thing that a probe publishes: it maps features (n, p) to P(malicious)
(n,). It knows nothing of adapters, of files or of training (see :mod:`loraprobe.fit.heads`). What
it holds is checked when it is constructed, so a head that exists can score.
"""

from __future__ import annotations

import json
import reprlib
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from types import ModuleType
from typing import Any, ClassVar

import numpy as np
import scipy.special
from numpy.typing import NDArray

from .errors import LayoutMismatch, MissingExtra, NonFiniteError, ProbeFormatError
from .xgb_json import validate_xgboost_json

FloatArray = NDArray[np.float32]
Probabilities = NDArray[np.float64]


@dataclass(frozen=True, eq=False)
class LinearHead:
    """P(malicious) = sigmoid(coef . x + intercept), the classifier of the paper.

    Source: arXiv:2601.07177, LoRA-Probe.
    """

    name: ClassVar[str] = "linear"

    coef: FloatArray
    """(p,) float32, read-only."""
    intercept: float
    """Held at float32 precision, so that a saved head scores as the fitted one did."""

    def __post_init__(self) -> None:
        object.__setattr__(self, "coef", _frozen("coef", self.coef, ndim=1))
        with np.errstate(over="ignore"):  # beyond float32 becomes inf, which _frozen refuses
            intercept = np.array([self.intercept], dtype=np.float32)
        object.__setattr__(self, "intercept", float(_frozen("intercept", intercept, ndim=1)[0]))

    @property
    def num_features(self) -> int:
        """p, the width of a feature row."""
        return int(self.coef.shape[0])

    def __call__(self, x: FloatArray) -> Probabilities:
        """P(malicious) of each row: (n, p) -> (n,) float64.

        Raises:
            LayoutMismatch: x is not a numeric (n, p) array.
            NonFiniteError: x holds NaN or infinity.
        """
        x = _as_rows(x, self.num_features)  # (n, p)
        # float64: with 40,960 columns the rounding of a float32 sum is visible in the third digit
        # of the logit
        # Row by row, and by einsum, which widens a few thousand numbers at a time: a wide copy
        # costs more than the product, and BLAS wakes threads
        logits = np.array(
            [np.einsum("p,p->", row, self._wide_coef) for row in x], np.float64
        )  # (n,)
        if not np.isfinite(
            logits
        ).all():  # as it is wherever a feature is not finite, whatever its coefficient
            check_features(x, self.num_features)
        return _probabilities(logits + self.intercept)

    @cached_property
    def _wide_coef(self) -> Probabilities:
        return self.coef.astype(np.float64)

    def arrays(self) -> dict[str, FloatArray]:
        """What to save: ``coef`` (p,) and ``intercept`` (1,), float32."""
        return {"coef": self.coef, "intercept": np.array([self.intercept], np.float32)}

    @classmethod
    def from_arrays(cls, arrays: Mapping[str, np.ndarray], num_features: int) -> LinearHead:
        """The inverse of :meth:`arrays`.

        Names, dtypes, shapes and finiteness are checked, and a head that fails a check never
        exists.

        Raises:
            ProbeFormatError: naming the array at fault.
        """
        _check_names(arrays, ("coef", "intercept"))
        _expect_shape("coef", arrays["coef"].shape, (num_features,))
        _expect_shape("intercept", arrays["intercept"].shape, (1,))
        return cls(
            coef=arrays["coef"],
            intercept=float(_frozen("intercept", arrays["intercept"], ndim=1)[0]),
        )


@dataclass(frozen=True, eq=False)
class MLPHead:
    """P(malicious) = sigmoid(W_L relu(... relu(W_1 x + b_1) ...) + b_L).

    A perceptron with one output.

    It has no scaling of its own: the fitter folds standardisation into W_1 and b_1.
    """

    name: ClassVar[str] = "mlp"

    weights: tuple[FloatArray, ...]
    """(out, in) float32 each, read-only; the last one has out = 1."""
    biases: tuple[FloatArray, ...]
    """(out,) float32 each, read-only."""

    def __post_init__(self) -> None:
        if not self.weights or len(self.weights) != len(self.biases):
            raise ProbeFormatError(
                f"MLP head: got {len(self.weights)} weights and {len(self.biases)} biases, expected"
                " one bias for each of 1 or more weights"
            )
        object.__setattr__(
            self,
            "weights",
            tuple(_frozen(f"weight_{i}", w, ndim=2) for i, w in enumerate(self.weights)),
        )
        object.__setattr__(
            self,
            "biases",
            tuple(_frozen(f"bias_{i}", b, ndim=1) for i, b in enumerate(self.biases)),
        )
        outputs = [
            *(w.shape[1] for w in self.weights[1:]),
            1,
        ]  # layer i must produce what layer i + 1 reads
        for i, (weight, bias, out) in enumerate(
            zip(self.weights, self.biases, outputs, strict=True)
        ):
            _expect_shape(f"weight_{i}", weight.shape, (out, weight.shape[1]))
            _expect_shape(f"bias_{i}", bias.shape, (out,))

    @property
    def num_features(self) -> int:
        """p, the width of a feature row."""
        return int(self.weights[0].shape[1])

    def __call__(self, x: FloatArray) -> Probabilities:
        """P(malicious) of each row: (n, p) -> (n,) float64.

        Raises:
            LayoutMismatch: x is not a numeric (n, p) array.
            NonFiniteError: x holds NaN or infinity, or is so large that a hidden unit overflows.
        """
        hidden = check_features(x, self.num_features)  # (n, p)
        with np.errstate(
            over="ignore", invalid="ignore"
        ):  # an overflow is reported once, by _probabilities
            for weight, bias in zip(self.weights[:-1], self.biases[:-1], strict=True):
                hidden = np.maximum(hidden @ weight.T + bias, np.float32(0))  # (n, out)
            logits = hidden @ self.weights[-1].T + self.biases[-1]  # (n, 1)
        return _probabilities(logits[:, 0].astype(np.float64))

    def arrays(self) -> dict[str, FloatArray]:
        """What to save: ``weight_i`` (out, in) and ``bias_i`` (out,) for each layer i, float32."""
        named = {f"weight_{i}": weight for i, weight in enumerate(self.weights)}
        return named | {f"bias_{i}": bias for i, bias in enumerate(self.biases)}

    @classmethod
    def from_arrays(cls, arrays: Mapping[str, np.ndarray], num_features: int) -> MLPHead:
        """The inverse of :meth:`arrays`.

        Names, dtypes, shapes and finiteness are checked, and a head that fails a check never
        exists.

        Raises:
            ProbeFormatError: naming the array at fault.
        """
        layers = max(1, len(arrays) // 2)
        _check_names(arrays, [f"{kind}_{i}" for kind in ("weight", "bias") for i in range(layers)])
        weights = tuple(arrays[f"weight_{i}"] for i in range(layers))
        _expect_shape("weight_0", weights[0].shape, (*weights[0].shape[:1], num_features))
        return cls(weights=weights, biases=tuple(arrays[f"bias_{i}"] for i in range(layers)))


@dataclass(frozen=True, eq=False)
class XGBoostHead:
    """Boosted trees, held as validated JSON text.

    XGBoost is imported and the booster built at the first score.

    The width check is ours: a booster trained on 20 columns scores 19 without a word when handed a
        DMatrix.
    """

    name: ClassVar[str] = "xgboost"

    model_json: bytes
    """The model in canonical form.

    ``json.dumps`` of the validated document, so that XGBoost parses exactly what was checked.
    """
    num_features: int
    """p, the width of a feature row."""

    def __post_init__(self) -> None:
        document = validate_xgboost_json(self.model_json, self.num_features)
        object.__setattr__(
            self, "model_json", json.dumps(document, separators=(",", ":")).encode("ascii")
        )

    @cached_property
    def _booster(self) -> Any:
        xgboost = import_xgboost()
        booster = xgboost.Booster()
        try:
            booster.load_model(bytearray(self.model_json))
            booster.set_param(
                {"nthread": 1}
            )  # a round scores tens of rows: starting a thread pool costs more than the trees
        except xgboost.core.XGBoostError as error:
            raise ProbeFormatError(
                "XGBoost head: got a model that passes our checks and that XGBoost"
                f" {xgboost.__version__} cannot read, expected one written by XGBoost 3.x. Install"
                " the xgboost version named in the probe's card, or fit the probe anew"
            ) from error
        return booster

    def __call__(self, x: FloatArray) -> Probabilities:
        """P(malicious) of each row: (n, p) -> (n,) float64.

        Raises:
            LayoutMismatch: x is not a numeric (n, p) array.
            NonFiniteError: x holds NaN (which XGBoost would read as "missing") or infinity.
            MissingExtra: xgboost is not installed.
            ProbeFormatError: the installed XGBoost cannot read the model.
        """
        x = check_features(x, self.num_features)  # (n, p)
        scores = np.asarray(self._booster.inplace_predict(x), dtype=np.float64)
        if scores.shape != (len(x),) or not np.isfinite(scores).all():
            raise NonFiniteError(
                f"XGBoost head: got scores of shape {scores.shape}, expected ({len(x)},) finite"
                " ones. Fit the probe anew"
            )
        return scores

    def to_json(self) -> bytes:
        """What to save. ``from_json(to_json())`` gives the same bytes again."""
        return self.model_json

    @classmethod
    def from_json(cls, data: bytes, num_features: int) -> XGBoostHead:
        """A head from a published file. The constructor validates before XGBoost sees anything.

        Raises:
            ProbeFormatError: naming the JSON path at fault.
        """
        return cls(model_json=data, num_features=num_features)


Head = LinearHead | MLPHead | XGBoostHead

HEADS: dict[str, type[LinearHead] | type[MLPHead] | type[XGBoostHead]] = {
    "linear": LinearHead,
    "mlp": MLPHead,
    "xgboost": XGBoostHead,
}
"""Head classes by the name that a saved probe carries."""


def import_xgboost() -> ModuleType:
    """The xgboost module.

    Raises:
        MissingExtra: it is not installed.
    """
    try:
        import xgboost
    except ImportError as error:
        raise MissingExtra("xgboost", "xgboost", "an XGBoost head") from error
    return xgboost


def check_features(x: Any, num_features: int) -> FloatArray:
    """``x`` as a finite float32 array of shape (n, num_features).

    Raises:
        LayoutMismatch: x is not numeric, not 2-D or of another width.
        NonFiniteError: x holds NaN or infinity, or a number beyond float32.
    """
    array = _as_rows(x, num_features)
    finite = np.isfinite(array).all(axis=1)
    if not finite.all():
        bad = np.flatnonzero(~finite)
        raise NonFiniteError(
            f"features: got NaN or infinity in {len(bad)} of {len(array)} rows, the first being row"
            f" {bad[0]}, expected finite numbers. Leave those adapters out and treat them as"
            " rejected"
        )
    return array


def _as_rows(x: Any, num_features: int) -> FloatArray:
    """``x`` as a float32 array of shape (n, num_features).

    Whether its numbers are finite is not looked at.
    """
    array = np.asarray(x)
    if array.dtype.kind not in "fiu":
        raise LayoutMismatch(
            f"features: got dtype {array.dtype}, expected float32. Pass the array that a Featurizer"
            " returns"
        )
    if array.ndim != 2 or array.shape[1] != num_features:
        raise LayoutMismatch(
            f"features: got shape {array.shape}, expected (n, {num_features}). The rows come from"
            " another recipe, base model, rank or layer set than the head was trained on; use the"
            " probe's own featurizer"
        )
    if array.dtype == np.float32:
        return array
    with np.errstate(
        over="ignore"
    ):  # a float64 beyond float32 becomes inf, which is refused like any other
        return array.astype(np.float32)


def _probabilities(logits: Probabilities) -> Probabilities:
    """Sigmoid of (n,) logits; a logit that overflowed has no probability."""
    if not np.isfinite(logits).all():
        raise NonFiniteError(
            f"head: got {int((~np.isfinite(logits)).sum())} non-finite logits, expected finite"
            " ones. The features are far outside the range of the training data; treat those"
            " adapters as rejected"
        )
    return np.asarray(scipy.special.expit(logits), dtype=np.float64)


def _frozen(name: str, array: Any, ndim: int) -> FloatArray:
    """A read-only float32 copy, so that nobody edits a published head by way of the array it was
    built from.
    """
    array = np.asarray(array)
    if array.dtype != np.float32 or array.ndim != ndim or array.size == 0:
        raise ProbeFormatError(
            f"head array {name!r}: got dtype {array.dtype} and shape {array.shape}, expected"
            f" float32 with {ndim} non-empty dimensions. Fit the head anew or download the probe"
            " again"
        )
    if not np.isfinite(array).all():
        raise ProbeFormatError(
            f"head array {name!r}: got NaN or infinity, expected finite numbers. Fit it anew or"
            " download it again"
        )
    copy = np.array(array, dtype=np.float32, order="C")
    copy.setflags(write=False)
    return copy


def _check_names(arrays: Mapping[str, np.ndarray], expected: list[str] | tuple[str, ...]) -> None:
    if set(arrays) != set(expected):
        raise ProbeFormatError(
            f"head arrays: got the names {reprlib.repr(sorted(arrays))}, expected"
            f" {sorted(expected)}. The file belongs to another kind of head or is damaged; download"
            " the probe again"
        )


def _expect_shape(name: str, got: tuple[int, ...], expected: tuple[int, ...]) -> None:
    if got != expected:
        raise ProbeFormatError(
            f"head array {name!r}: got shape {got}, expected {expected}. The file is of another"
            " layout or damaged; download it again"
        )
