"""What an adapter does to a weight, read so that nothing but the product B A can change it.

The same change of a weight can be written with any rank, any alpha and any invertible G, as
(B G, G^-1 A); and after a few steps B is about -G_W A_0^T, with G_W the gradient of the loss with
respect to the weight: in another initial adapter A_0 it is another vector. A probe that reads B or
A is therefore a probe for one initial adapter. Two things are read here that are functions of
D = s B A alone, for every module that a probe knows:

    product   U^T D V / ||D||               (k, k)
    gram      U^T D D^T U / ||D||^2         (k, k), symmetric: its upper triangle is kept

with ||.|| the Frobenius norm. The columns of U and V are the leading left and right singular
directions of the training adapters' D, each scaled to norm 1. Nothing of the size of D is ever
built: everything goes through factors of rank r and r x r matrices, in float64.

B B^T / ||B||^2 in place of the Gram matrix is unchanged only where G is orthogonal, and not used.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..adapters.adapter import Adapter
from ..errors import KindMismatch, NonFiniteError
from .initial import same_arrays

Float64 = NDArray[np.float64]
Basis = NDArray[np.float16]

PRODUCT_FEATURES = ("product", "gram")
_OVERSAMPLING = 8  # further columns of the subspace that is iterated; they are dropped at its end
_PASSES = 3  # over the training adapters
_NO_DIRECTION = 1e-9  # of the largest eigenvalue: what is below it is no direction of the training
_CANCELLED = 1e-10  # of ||B||^2 ||A||^2: below it ||B A||^2 from Gram matrices is mostly rounding


@dataclass(frozen=True)
class Coverage:
    """How much of what a probe knows an adapter changes.

    Attributes:
        read: modules of the probe that the adapter changes.
        known: modules of the probe.
    """

    read: int
    known: int

    @property
    def share(self) -> float:
        """read / known."""
        return self.read / self.known

    def __str__(self) -> str:
        return f"{self.read} of {self.known} modules"


@dataclass(frozen=True)
class Change:
    """D = left @ right, the change of one weight, in float64.

    Attributes:
        left: (d_out, r).
        right: (r, d_in).
        gram_left: left^T left, (r, r).
        gram_right: right right^T, (r, r).
        norm: of D, Frobenius.
    """

    left: Float64
    right: Float64
    gram_left: Float64
    gram_right: Float64
    norm: float


def change_of(adapter: Adapter, module: str) -> Change:
    """The change that an adapter makes of one weight, and how large it is.

    Of weights it is s B A, training having started from B = 0. Of a factor delta it is
    s (B A - B_0 A_0) = s ([dB, B_0] @ [A_0 + dA; dA]), in which nothing large cancels.

    Raises:
        KindMismatch: a factor delta that does not know what it was taken of.
        NonFiniteError: a factor holds NaN or infinity, or the product overflows.
    """
    with np.errstate(over="ignore", invalid="ignore"):
        left, right, gram_left, gram_right = _factors(adapter, module)
        square = float(np.vdot(gram_left, gram_right))
    if not math.isfinite(square):
        raise NonFiniteError(
            f"{module}: a factor holds NaN or infinity, or B @ A overflows; expected finite"
            " numbers. Training diverged or the file is damaged: do not use this adapter."
        )
    if square <= _CANCELLED * float(np.trace(gram_left) * np.trace(gram_right)):
        core = _triangle(left) @ _triangle(right.T).T
        square = float(np.square(core).sum())
    return Change(left, right, gram_left, gram_right, math.sqrt(square))


def _factors(adapter: Adapter, module: str) -> tuple[Float64, Float64, Float64, Float64]:
    """left (d_out, r), right (r, d_in) of the change of one weight, and their Gram matrices."""
    pair = adapter[module]
    if adapter.kind != "factor_delta":
        left, right, gram_left, gram_right = pair.wide()
        left *= pair.scaling
        return left, right, gram_left * pair.scaling**2, gram_right
    if adapter.origin is None:
        raise KindMismatch(
            "got a factor delta by itself; the change of a product B @ A needs the adapter that"
            " training started from too. Take factor_delta(after, before), or give the weights."
        )
    if adapter.origin.trained:
        return _factors(adapter.origin.adapter, module)
    start = adapter.origin.adapter[module]
    dB, dA = _scaled(pair.B, pair.scaling), np.asarray(pair.A, np.float64)
    B_0, A = _scaled(start.B, start.scaling), np.asarray(start.A, np.float64) + dA
    left, right = dB, A
    if B_0.any():
        left, right = np.concatenate([dB, B_0], axis=1), np.concatenate([A, dA])
    return left, right, left.T @ left, right @ right.T


def _scaled(factor: Any, scaling: float) -> Float64:
    return np.asarray(np.multiply(factor, scaling, dtype=np.float64))


def learn_bases(module: str, adapters: Sequence[Adapter], k: int) -> tuple[Basis, Basis]:
    """The leading left and right directions of the changes that adapters make of one weight.

    They are the leading eigenvectors of sum D D^T / ||D||^2 and sum D^T D / ||D||^2, by subspace
    iteration: (d_out, min(k, d_out)) and (d_in, min(k, d_in)), orthonormal up to float16. Columns
    beyond the rank of the sums are zero.

    Args:
        adapters: those that have the module, of one shape; each is read `_PASSES` times.

    Raises:
        KindMismatch, NonFiniteError: see `change_of`.

    Source: subspace iteration with Rayleigh-Ritz, Halko, Martinsson & Tropp, arXiv:0909.4061,
        Algorithm 4.4.
    """
    rng = np.random.default_rng(0)  # the result does not depend on it but for rounding
    shape = adapters[0][module].shape
    sides = [_orthonormal(rng.standard_normal((d, min(k + _OVERSAMPLING, d)))) for d in shape]
    images = sides
    for number in range(_PASSES):
        if number:
            sides = [_orthonormal(image) for image in images]
        images = [np.zeros_like(side) for side in sides]
        for adapter in adapters:
            change = change_of(adapter, module)
            if change.norm == 0:
                continue
            left, right = change.left / change.norm, change.right / change.norm
            images[0] += left @ (change.gram_right @ (left.T @ sides[0]))
            images[1] += right.T @ (change.gram_left @ (right @ sides[1]))
    left_basis, right_basis = (
        _leading(side, image, k) for side, image in zip(sides, images, strict=True)
    )
    return left_basis, right_basis


def module_features(change: Change, left: Basis, right: Basis, names: Sequence[str]) -> Float64:
    """The chosen features of one change, in the order of `PRODUCT_FEATURES`: (width,).

    Zero where the change is zero. Off-diagonal entries of the Gram matrix are multiplied by the
    square root of 2, so that the triangle has the norm of the matrix.
    """
    if change.norm == 0:
        return np.zeros(width_of(left.shape[1], right.shape[1], names))
    projected = left.astype(np.float64).T @ change.left / change.norm  # (k, r)
    parts = []
    if "product" in names:
        parts.append((projected @ (change.right @ right.astype(np.float64))).reshape(-1))
    if "gram" in names:
        gram = projected @ change.gram_right @ projected.T
        rows, columns = np.triu_indices(len(gram))
        parts.append(gram[rows, columns] * np.where(rows == columns, 1.0, math.sqrt(2)))
    return np.concatenate(parts)


def width_of(k_left: int, k_right: int, names: Sequence[str]) -> int:
    """How many numbers `module_features` makes."""
    widths = {"product": k_left * k_right, "gram": k_left * (k_left + 1) // 2}
    return sum(widths[name] for name in PRODUCT_FEATURES if name in names)


@dataclass(frozen=True, eq=False)
class Bases:
    """The directions that a probe reads changes in, learnt from its training adapters.

    Attributes:
        left: module -> (d_out, k) float16.
        right: module -> (d_in, k) float16, of the same modules in the same order.
        center: (p,) float32, the mean features of the training adapters, module by module over
            those that change it.
    """

    left: Mapping[str, Basis]
    right: Mapping[str, Basis]
    center: NDArray[np.float32]

    def __eq__(self, other: object) -> bool:
        return (
            isinstance(other, Bases)
            and same_arrays(self.left, other.left)
            and same_arrays(self.right, other.right)
            and np.array_equal(self.center, other.center)
        )

    __hash__ = None  # type: ignore[assignment]

    @classmethod
    def learn(
        cls, adapters: Sequence[Adapter], modules: Sequence[str], k: int, names: Sequence[str]
    ) -> Bases:
        """Bases and center of the modules; module by module, so that one is in memory at a time.

        Raises:
            KindMismatch, NonFiniteError: see `change_of`.
        """
        left: dict[str, Basis] = {}
        right: dict[str, Basis] = {}
        centers = []
        for module in modules:
            having = [adapter for adapter in adapters if module in adapter]
            left[module], right[module] = learn_bases(module, having, k)
            total = np.zeros(width_of(left[module].shape[1], right[module].shape[1], names))
            count = 0
            for adapter in having:
                change = change_of(adapter, module)
                total += module_features(change, left[module], right[module], names)
                count += change.norm > 0
            centers.append(total / max(count, 1))
        return cls(left, right, np.concatenate(centers).astype(np.float32))

    def widths(self, names: Sequence[str]) -> dict[str, int]:
        """Module -> how many numbers are computed of it."""
        return {
            module: width_of(basis.shape[1], self.right[module].shape[1], names)
            for module, basis in self.left.items()
        }

    def read(self, adapter: Adapter, names: Sequence[str]) -> tuple[Float64, Coverage]:
        """The features of an adapter, (p,), and how much was read for them.

        A module that the adapter does not change has the mean features of the training adapters,
        which say nothing.

        Raises:
            KindMismatch, NonFiniteError: see `change_of`.
        """
        vector = np.zeros(len(self.center))
        read, start = 0, 0
        for module, width in self.widths(names).items():
            part = slice(start, start + width)
            start += width
            change = change_of(adapter, module) if module in adapter else None
            if change is None or change.norm == 0:
                continue
            features = module_features(change, self.left[module], self.right[module], names)
            vector[part] = features - self.center[part]
            read += 1
        return vector, Coverage(read, len(self.left))


def _triangle(matrix: Float64) -> Float64:
    return np.asarray(np.linalg.qr(matrix, mode="r"))


def _orthonormal(matrix: Float64) -> Float64:
    return np.asarray(np.linalg.qr(matrix).Q)


def _leading(side: Float64, image: Float64, k: int) -> Basis:
    """The k leading Ritz vectors of a symmetric map, whose image of `side` is given."""
    values, vectors = np.linalg.eigh(side.T @ image)
    values, vectors = values[::-1][:k], vectors[:, ::-1][:, :k]
    basis = side @ vectors
    basis *= np.sign(basis[np.abs(basis).argmax(axis=0), np.arange(basis.shape[1])])
    basis[:, values <= _NO_DIRECTION * max(values[0], 0.0)] = 0.0
    return np.asarray(basis, np.float16)
