"""One adapted module: the two factors of a low-rank change, and what can be said of their product.

A LoRA module adds scaling * B @ A to a frozen weight, with A (r, d_in) and B (d_out, r)
(arXiv:2106.09685). Nothing here ever builds that (d_out, d_in) product unless asked to: spectra and
norms come from the r x r core. Matrices may be lazy, so asking for one layer reads one layer. All
of it is NumPy: a torch tensor is taken where one is given, and torch itself is never imported.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from ..errors import AdapterFormatError, NonFiniteError

if TYPE_CHECKING:
    from torch import Tensor

Factor = Literal["A", "B"]
Array = np.ndarray[Any, np.dtype[Any]]
_BLOCK = 1 << 16  # numbers that are made float64 at once: 512 KiB
_SMALL = 64  # d_in + d_out per rank, from which Gram matrices are an eighth of 16-bit factors


@dataclass(frozen=True)
class LazyTensor:
    """A matrix that is read when it is needed; the shape is known before."""

    shape: tuple[int, ...]
    load: Callable[[], Array | Tensor]


class LoRAPair:
    """The two factors of one adapted module; immutable.

    Args:
        A: (r, d_in), an array, a torch tensor or a LazyTensor.
        B: (d_out, r), likewise.
        scaling: what B @ A is multiplied with: alpha / r, or alpha / sqrt(r) for rsLoRA.

    Raises:
        AdapterFormatError: the factors are not two matrices of one rank, or scaling is not a
            finite number other than 0.
    """

    __slots__ = ("_a", "_b", "_grams", "_scaling")

    def __init__(
        self, A: Array | Tensor | LazyTensor, B: Array | Tensor | LazyTensor, scaling: float = 1.0
    ) -> None:
        a, b = tuple(A.shape), tuple(B.shape)
        if len(a) != 2 or len(b) != 2 or a[0] != b[1] or 0 in a or 0 in b:
            raise AdapterFormatError(
                f"got A of shape {a} and B of shape {b}; expected A (r, d_in) and B (d_out, r) of"
                " one rank r >= 1"
            )
        if not (-float("inf") < scaling < float("inf")) or scaling == 0:
            raise AdapterFormatError(
                f"got scaling {scaling}; expected a finite number other than 0 (alpha / r)"
            )
        self._a = A if isinstance(A, LazyTensor) else as_array(A)
        self._b = B if isinstance(B, LazyTensor) else as_array(B)
        self._scaling = float(scaling)
        self._grams: tuple[Array, Array] | None = None

    @property
    def A(self) -> Array:
        """(r, d_in), float32 or float64; read from disk now if it is lazy."""
        return as_array(self._a.load()) if isinstance(self._a, LazyTensor) else self._a

    @property
    def B(self) -> Array:
        """(d_out, r), float32 or float64; read from disk now if it is lazy."""
        return as_array(self._b.load()) if isinstance(self._b, LazyTensor) else self._b

    def factor(self, factor: Factor) -> Array:
        """A or B by name."""
        return self.A if factor == "A" else self.B

    def lazy(self, factor: Factor) -> Array | LazyTensor:
        """A or B by name, still unread if it is lazy."""
        return self._a if factor == "A" else self._b

    def shape_of(self, factor: Factor) -> tuple[int, int]:
        """The shape of A or B, without reading it."""
        rows, columns = self.lazy(factor).shape
        return rows, columns

    @property
    def scaling(self) -> float:
        """What B @ A is multiplied with."""
        return self._scaling

    @property
    def rank(self) -> int:
        """r, the number of rows of A."""
        return int(self._a.shape[0])

    @property
    def shape(self) -> tuple[int, int]:
        """(d_out, d_in), the shape of the weight that is adapted."""
        return self._b.shape[0], self._a.shape[1]

    def svdvals(self) -> Array:
        """Singular values of scaling * B @ A, descending: (min(r, d_out, d_in),) float64.

        With B = Q_B R_B and A^T = Q_A R_A they are those of the core R_B R_A^T, which is at most r
        x r. Invariant under (B G, G^-1 A) for every invertible G.

        Raises:
            NonFiniteError: see `core`.
        """
        return np.linalg.svd(self.core(), compute_uv=False)

    def core(self) -> Array:
        """A small float64 matrix with the singular values of scaling * B @ A.

        (min(d_out, r), min(d_in, r)).

        Raises:
            NonFiniteError: a factor is not finite, or the product overflows.
        """
        grams = self._grams or self._remember_grams(_gram(self.B), _gram(self.A.T))
        right, left = _triangles(grams, lambda index: self.A.T if index else self.B)
        return _finite_core(right, left, self._scaling)

    def wide(self) -> tuple[Array, Array, Array, Array]:
        """B, A, B^T B and A A^T in float64, the factors read once; not checked for NaN."""
        b, a = self.B.astype(np.float64), self.A.astype(np.float64)
        with np.errstate(over="ignore", invalid="ignore"):
            return b, a, *(self._grams or self._remember_grams(b.T @ b, a @ a.T))

    def _remember_grams(self, *grams: Array) -> tuple[Array, Array]:
        """The Gram matrices, kept where they are small beside the factors: `core` needs no more."""
        of_b, of_a = grams
        if _SMALL * self.rank <= sum(self.shape):
            self._grams = (of_b, of_a)
        return of_b, of_a

    def norm(self, kind: Literal["frobenius", "spectral", "nuclear"] = "frobenius") -> float:
        """A norm of scaling * B @ A, from the r x r core in float64."""
        values = self.svdvals()
        if kind == "frobenius":
            return float(np.sqrt(np.square(values).sum()))
        if kind == "spectral":
            return float(values[0])
        if kind == "nuclear":
            return float(values.sum())
        raise ValueError(f"got norm {kind!r}; expected frobenius, spectral or nuclear")

    def canonical(self) -> LoRAPair:
        """The same product in the one gauge that (B G, G^-1 A) cannot change.

        From the SVD of the core: B = U sqrt(S), A = sqrt(S) V^T with scaling 1; the sign of each
        component is fixed so that the entry of U of largest magnitude is positive. Unique where the
        singular values are distinct. Shapes (k, d_in) and (d_out, k) with k = min(r, d_out, d_in).

        Raises:
            NonFiniteError: a factor is not finite, or the product overflows.
        """
        q_b, r_b = np.linalg.qr(self.B.astype(np.float64))
        q_a, r_a = np.linalg.qr(self.A.astype(np.float64).T)
        u, s, vt = np.linalg.svd(_finite_core(r_b, r_a, self._scaling))
        u, v = q_b @ u[:, : len(s)], q_a @ vt[: len(s)].T
        largest = np.take_along_axis(u, np.abs(u).argmax(axis=0)[None], axis=0)
        root = np.sqrt(s) * np.where(largest < 0, -1.0, 1.0)
        return LoRAPair((root * v).T.astype(np.float32), (u * root).astype(np.float32), 1.0)

    def dense(self) -> Array:
        """scaling * B @ A as one (d_out, d_in) matrix, in the factors' precision."""
        product: Array = self._scaling * (self.B @ self.A)
        return product

    def __repr__(self) -> str:
        return f"LoRAPair(rank={self.rank}, shape={self.shape}, scaling={self._scaling:g})"


def as_array(tensor: Array | Tensor) -> Array:
    """A NumPy array of float32 or float64, of the same memory where that is possible.

    Half precision is only a way of storing: arithmetic on it loses what deltas consist of.
    """
    if not isinstance(tensor, np.ndarray):
        tensor = tensor.detach().cpu()  # wherever the model is: the arithmetic here is small
        wide = "float64" in str(tensor.dtype)
        return (tensor if wide else tensor.float()).numpy()
    return tensor if tensor.dtype in (np.float32, np.float64) else tensor.astype(np.float32)


def triangular_factors(matrices: Sequence[Array]) -> list[Array]:
    """For every matrix M (m, n) a float64 matrix R (at most n, n) with R^T R = M^T M.

    R has M's singular values. It is the Cholesky factor of the Gram matrix, which is one fast pass
    over M; that squares the condition number, so where it exceeds 3,000 R comes from a QR instead.

    Raises:
        NonFiniteError: a matrix holds NaN or infinity.
    """
    return _triangles([_gram(matrix) for matrix in matrices], lambda index: matrices[index])


def _triangles(grams: Sequence[Array], matrix: Callable[[int], Array]) -> list[Array]:
    """R of every matrix, given its M^T M; `matrix` reads the one of an index, where that is needed.

    Raises:
        NonFiniteError: see `triangular_factors`.
    """
    by_size: dict[int, list[int]] = {}
    for index, gram in enumerate(grams):
        by_size.setdefault(len(gram), []).append(index)
    factors: dict[int, Array] = {}
    for indices in by_size.values():
        stacked = np.stack([grams[index] for index in indices])
        if not np.isfinite(stacked).all():
            raise NonFiniteError(
                "a factor holds NaN or infinity, or overflows; expected finite numbers. Do not use"
                " this adapter."
            )
        eigenvalues = np.linalg.eigvalsh(stacked)  # ascending
        well_conditioned = eigenvalues[:, 0] > 1e-7 * eigenvalues[:, -1]
        for index in np.array(indices)[~well_conditioned]:
            triangle: Any = np.linalg.qr(matrix(index).astype(np.float64), mode="r")
            factors[index] = triangle
        lower = np.linalg.cholesky(stacked[well_conditioned])
        factors.update(
            zip(np.array(indices)[well_conditioned], lower.transpose(0, 2, 1), strict=True)
        )
    return [factors[index] for index in range(len(grams))]


def _gram(matrix: Array) -> Array:
    """M^T M in float64: (n, n). Wide copies are of as many rows as fit a processor's cache."""
    rows, columns = matrix.shape
    step = max(_BLOCK // columns, 1)
    gram: Array = np.zeros((columns, columns))
    with np.errstate(over="ignore", invalid="ignore"):  # the caller refuses what is not finite
        for start in range(0, rows, step):
            wide = matrix[start : start + step].astype(np.float64)
            gram += wide.T @ wide
    return gram


def all_finite(array: Array) -> bool:
    """Whether no number of an array is NaN or infinite."""
    return bool(np.isfinite(array).all())


def _finite_core(right: Array, left: Array, scaling: float) -> Array:
    """scaling * right @ left^T."""
    with np.errstate(over="ignore", invalid="ignore"):
        core: Array = scaling * right @ left.T
    if not all_finite(core):
        raise NonFiniteError(
            "B @ A times its scaling holds NaN or infinity; expected finite numbers. Do not use"
            " this adapter."
        )
    return core
