"""Heads: arrays in, probabilities out, by NumPy alone.

A head is the small frozen thing that a probe publishes: it maps features (n, p) to P(malicious)
(n,). It knows nothing of adapters, of files or of training (see `loraprobe.fit.heads`). What it
holds is checked when it is constructed, so a head that exists can score.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any, ClassVar

import numpy as np
from numpy.typing import NDArray

from ..errors import LayoutMismatch, NonFiniteError, ProbeFormatError, quoted

FloatArray = NDArray[np.float32]
IntArray = NDArray[np.int32]
Probabilities = NDArray[np.float64]

MAX_NODES = 1 << 22  # of all trees; a probe of 300 shallow ones has a few thousand
MAX_DEPTH = 64
_MAX_WALKS = 1 << 18  # rows times trees that are walked at once
_TREE_ARRAYS = ("roots", "feature", "value", "left", "right")


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
        object.__setattr__(self, "intercept", _float32("intercept", self.intercept))

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
        # In float64: with 40,960 columns the rounding of a float32 sum is visible in the third
        # digit of the logit. Row by row, and by einsum, which widens a few thousand numbers at a
        # time: a wide copy costs more than the product, and BLAS wakes threads.
        products = [np.einsum("p,p->", row, self._wide_coef) for row in x]
        logits = np.array(products, np.float64)  # (n,)
        if not np.isfinite(logits).all():  # as wherever a feature is not, whatever its coefficient
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
    """A perceptron: P(malicious) = sigmoid(W_L relu(... relu(W_1 x + b_1) ...) + b_L).

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
                f"MLP head: got {len(self.weights)} weights and {len(self.biases)} biases; expected"
                " one bias for each of 1 or more weights"
            )
        weights = tuple(_frozen(f"weight_{i}", w, ndim=2) for i, w in enumerate(self.weights))
        biases = tuple(_frozen(f"bias_{i}", b, ndim=1) for i, b in enumerate(self.biases))
        object.__setattr__(self, "weights", weights)
        object.__setattr__(self, "biases", biases)
        outputs = [*(w.shape[1] for w in weights[1:]), 1]  # layer i makes what layer i + 1 reads
        for i, (weight, bias, out) in enumerate(zip(weights, biases, outputs, strict=True)):
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
        # An overflow is reported once, by _probabilities.
        with np.errstate(over="ignore", invalid="ignore"):
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
    """Boosted trees, P(malicious) = sigmoid(intercept + one leaf of every tree), as XGBoost fits.

    The nodes of all trees stand in one row of m; scoring walks them and needs no XGBoost. A child
    has a higher number than its parent, which is what makes every walk end.

    Attributes:
        roots: (t,) int32, the first node of every tree.
        feature: (m,) int32, the column that a node splits on; 0 at a leaf.
        value: (m,) float32, where it splits: a row goes left if its number is smaller; at a leaf,
            what it adds to the logit.
        left, right: (m,) int32, the children; both -1 at a leaf.
        intercept: the logit of no tree at all, at float32 precision.
        num_features: p, the width of a feature row.

    Raises:
        ProbeFormatError: the arrays are not such trees.
    """

    name: ClassVar[str] = "xgboost"

    roots: IntArray
    feature: IntArray
    value: FloatArray
    left: IntArray
    right: IntArray
    intercept: float
    num_features: int

    def __post_init__(self) -> None:
        for name in ("roots", "feature", "left", "right"):
            frozen = _frozen(name, getattr(self, name), 1, np.dtype(np.int32))
            object.__setattr__(self, name, frozen)
        object.__setattr__(self, "value", _frozen("value", self.value, ndim=1))
        object.__setattr__(self, "intercept", _float32("intercept", self.intercept))
        nodes = len(self.value)
        if nodes > MAX_NODES:
            raise ProbeFormatError(f"trees: got {nodes} nodes; expected at most {MAX_NODES}")
        for name in ("feature", "left", "right"):
            _expect_shape(name, getattr(self, name).shape, (nodes,))
        self._check_nodes(nodes)

    def _check_nodes(self, nodes: int) -> None:
        leaf = self.left == -1
        number = np.arange(nodes)
        _in_range("roots", self.roots, 0, nodes - 1)
        _in_range("feature", self.feature, 0, self.num_features - 1)
        for name, child in (("left", self.left), ("right", self.right)):
            _in_range(name, child, -1, nodes - 1)
            if not (leaf | (child > number)).all() or (child[leaf] != -1).any():
                raise ProbeFormatError(
                    f"head array {name!r}: got a child that does not come after its node; expected"
                    " a higher number, or -1 on both sides of a leaf. Download the probe again"
                )
        _ = self._steps  # refuses trees that are too deep

    def __call__(self, x: FloatArray) -> Probabilities:
        """P(malicious) of each row: (n, p) -> (n,) float64.

        Raises:
            LayoutMismatch: x is not a numeric (n, p) array.
            NonFiniteError: x holds NaN or infinity.
        """
        rows = check_features(x, self.num_features)  # (n, p)
        block = max(1, _MAX_WALKS // len(self.roots))  # rows at a time, so that memory stays flat
        logits = [self._logits(rows[start : start + block]) for start in range(0, len(rows), block)]
        return _probabilities(np.concatenate([np.empty(0), *logits]))

    def _logits(self, rows: FloatArray) -> Probabilities:
        """Logits (n,) of rows (n, p): all walk down all trees at once, a level a step."""
        left, right, depth = self._steps
        at = np.broadcast_to(self.roots, (len(rows), len(self.roots)))  # (n, t)
        for _ in range(depth):
            smaller = np.take_along_axis(rows, self.feature[at], axis=1) < self.value[at]
            at = np.where(smaller, left[at], right[at])
        return np.asarray(self.value[at].sum(axis=1, dtype=np.float64) + self.intercept)

    @cached_property
    def _steps(self) -> tuple[IntArray, IntArray, int]:
        """Where a step left and right leads from every node (a leaf to itself), and the depth."""
        leaf = self.left == -1
        number = np.arange(len(leaf), dtype=np.int32)
        left = np.where(leaf, number, self.left)
        right = np.where(leaf, number, self.right)
        level = np.unique(self.roots[~leaf[self.roots]])
        depth = 0
        while len(level):
            if depth == MAX_DEPTH:
                raise ProbeFormatError(
                    f"trees: got more than {MAX_DEPTH} levels of splits; expected at most that"
                )
            depth += 1
            below = np.unique(np.concatenate([left[level], right[level]]))
            level = below[~leaf[below]]
        return left, right, depth

    def arrays(self) -> dict[str, np.ndarray]:
        """What to save: the arrays above, and ``intercept`` (1,) float32."""
        named = {name: getattr(self, name) for name in _TREE_ARRAYS}
        return named | {"intercept": np.array([self.intercept], np.float32)}

    @classmethod
    def from_arrays(cls, arrays: Mapping[str, np.ndarray], num_features: int) -> XGBoostHead:
        """The inverse of :meth:`arrays`, checked.

        Raises:
            ProbeFormatError: naming the array at fault.
        """
        _check_names(arrays, (*_TREE_ARRAYS, "intercept"))
        _expect_shape("intercept", arrays["intercept"].shape, (1,))
        intercept = _frozen("intercept", arrays["intercept"], ndim=1)
        named = {name: arrays[name] for name in _TREE_ARRAYS}
        return cls(**named, intercept=float(intercept[0]), num_features=num_features)


Head = LinearHead | MLPHead | XGBoostHead

HEADS: dict[str, type[LinearHead] | type[MLPHead] | type[XGBoostHead]] = {
    "linear": LinearHead,
    "mlp": MLPHead,
    "xgboost": XGBoostHead,
}
"""Head classes by the name that a saved probe carries."""


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
            f" {bad[0]}; expected finite numbers. Leave those adapters out and treat them as"
            " rejected"
        )
    return array


def _as_rows(x: Any, num_features: int) -> FloatArray:
    """``x`` as a float32 array of shape (n, num_features), finite or not."""
    array = np.asarray(x)
    if array.dtype.kind not in "fiu":
        raise LayoutMismatch(
            f"features: got dtype {array.dtype}; expected float32. Pass the array that a Featurizer"
            " returns"
        )
    if array.ndim != 2 or array.shape[1] != num_features:
        raise LayoutMismatch(
            f"features: got shape {array.shape}; expected (n, {num_features}). The rows come from"
            " another recipe, base model, rank or layer set than the head was trained on; use the"
            " probe's own featurizer"
        )
    if array.dtype == np.float32:
        return array
    with np.errstate(over="ignore"):  # beyond float32 becomes inf, which is refused
        return array.astype(np.float32)


def sigmoid(logits: Probabilities) -> Probabilities:
    """1 / (1 + exp(-x)) of (n,) logits: (n,) float64."""
    with np.errstate(over="ignore"):  # exp(-x) is infinite below -709, and the quotient 0
        return np.asarray(1.0 / (1.0 + np.exp(-np.asarray(logits, np.float64))))


def _probabilities(logits: Probabilities) -> Probabilities:
    """Sigmoid of (n,) logits; a logit that overflowed has no probability."""
    if not np.isfinite(logits).all():
        raise NonFiniteError(
            f"head: got {int((~np.isfinite(logits)).sum())} non-finite logits; expected finite"
            " ones. The features are far outside the range of the training data; treat those"
            " adapters as rejected"
        )
    return sigmoid(logits)


def _frozen(name: str, array: Any, ndim: int, dtype: Any = np.float32) -> Any:
    """A read-only copy, so that nobody edits a published head through the array it was made of."""
    array = np.asarray(array)
    if array.dtype != dtype or array.ndim != ndim or array.size == 0:
        raise ProbeFormatError(
            f"head array {name!r}: got dtype {array.dtype} and shape {array.shape}; expected"
            f" {np.dtype(dtype)} with {ndim} non-empty dimensions. Fit the head anew or download"
            " the probe again"
        )
    if not np.isfinite(array).all():
        raise ProbeFormatError(
            f"head array {name!r}: got NaN or infinity; expected finite numbers. Fit it anew or"
            " download it again"
        )
    copy = np.array(array, dtype=dtype, order="C")
    copy.setflags(write=False)
    return copy


def _float32(name: str, number: float) -> float:
    """A number at float32 precision, so that a saved head scores as the fitted one did."""
    with np.errstate(over="ignore"):  # beyond float32 becomes inf, which _frozen refuses
        array = np.array([number], dtype=np.float32)
    return float(_frozen(name, array, ndim=1)[0])


def _in_range(name: str, array: IntArray, low: int, high: int) -> None:
    if array.min() < low or array.max() > high:
        raise ProbeFormatError(
            f"head array {name!r}: got numbers from {array.min()} to {array.max()}; expected {low}"
            f" to {high}. The file is of another layout or damaged; download it again"
        )


def _check_names(arrays: Mapping[str, np.ndarray], expected: list[str] | tuple[str, ...]) -> None:
    if set(arrays) != set(expected):
        raise ProbeFormatError(
            f"head arrays: got the names {quoted(sorted(arrays))}; expected"
            f" {sorted(expected)}. The file belongs to another kind of head or is damaged; download"
            " the probe again"
        )


def _expect_shape(name: str, got: tuple[int, ...], expected: tuple[int, ...]) -> None:
    if got != expected:
        raise ProbeFormatError(
            f"head array {name!r}: got shape {got}; expected {expected}. The file is of another"
            " layout or damaged; download it again"
        )
