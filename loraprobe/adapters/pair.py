"""One adapted module: the two factors of a low-rank change, and what can be said of their product.

A LoRA module adds scaling * B @ A to a frozen weight, with A (r, d_in) and B (d_out, r)
(arXiv:2106.09685). Nothing here ever builds that (d_out, d_in) product unless asked to: spectra and
norms come from the r x r core. Tensors may be lazy, so asking for one layer reads one layer.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from ..errors import AdapterFormatError, NonFiniteError

Factor = Literal["A", "B"]


@dataclass(frozen=True)
class LazyTensor:
    """A matrix that is read when it is needed; the shape is known before."""

    shape: tuple[int, ...]
    load: Callable[[], Tensor]


class LoRAPair:
    """The two factors of one adapted module; immutable.

    Args:
        A: (r, d_in), a tensor or a LazyTensor.
        B: (d_out, r), likewise.
        scaling: what B @ A is multiplied with: alpha / r, or alpha / sqrt(r) for rsLoRA.

    Raises:
        AdapterFormatError: the factors are not two matrices of one rank, or scaling is not a
            finite number other than 0.
    """

    __slots__ = ("_a", "_b", "_scaling")

    def __init__(
        self, A: Tensor | LazyTensor, B: Tensor | LazyTensor, scaling: float = 1.0
    ) -> None:
        if (
            len(A.shape) != 2
            or len(B.shape) != 2
            or A.shape[0] != B.shape[1]
            or 0 in A.shape
            or 0 in B.shape
        ):
            raise AdapterFormatError(
                f"got A of shape {tuple(A.shape)} and B of shape {tuple(B.shape)}; expected A (r,"
                " d_in) and B (d_out, r) of one rank r >= 1"
            )
        if not (-float("inf") < scaling < float("inf")) or scaling == 0:
            raise AdapterFormatError(
                f"got scaling {scaling}; expected a finite number other than 0 (alpha / r)"
            )
        self._a, self._b, self._scaling = A, B, float(scaling)

    @property
    def A(self) -> Tensor:
        """(r, d_in), float32 or wider; read from disk now if it is lazy."""
        return _tensor(self._a)

    @property
    def B(self) -> Tensor:
        """(d_out, r), float32 or wider; read from disk now if it is lazy."""
        return _tensor(self._b)

    def factor(self, factor: Factor) -> Tensor:
        """A or B by name."""
        return self.A if factor == "A" else self.B

    def lazy(self, factor: Factor) -> Tensor | LazyTensor:
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
        return self._a.shape[0]

    @property
    def shape(self) -> tuple[int, int]:
        """(d_out, d_in), the shape of the weight that is adapted."""
        return self._b.shape[0], self._a.shape[1]

    def svdvals(self) -> Tensor:
        """Singular values of scaling * B @ A, descending: (min(r, d_out, d_in),) float64.

        With B = Q_B R_B and A^T = Q_A R_A they are those of the core R_B R_A^T, which is at most r
        x r. Invariant under (B G, G^-1 A) for every invertible G.

        Raises:
            NonFiniteError: see `core`.
        """
        values: Tensor = torch.linalg.svdvals(self.core())
        return values

    def core(self) -> Tensor:
        """A small float64 matrix with the singular values of scaling * B @ A.

        (min(d_out, r), min(d_in, r)).

        Raises:
            NonFiniteError: a factor is not finite, or the product overflows.
        """
        right, left = triangular_factors([self.B, self.A.T])
        return _finite_core(self._scaling * right @ left.T)

    def norm(self, kind: Literal["frobenius", "spectral", "nuclear"] = "frobenius") -> float:
        """A norm of scaling * B @ A, from the r x r core in float64."""
        values = self.svdvals()
        if kind == "frobenius":
            return float(values.square().sum().sqrt())
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
        q_b, r_b = torch.linalg.qr(self.B.double())
        q_a, r_a = torch.linalg.qr(self.A.double().T)
        u, s, vt = torch.linalg.svd(_finite_core(r_b @ r_a.T * self._scaling))
        rank = s.shape[0]
        u, v = q_b @ u[:, :rank], q_a @ vt[:rank].T
        signs = torch.sign(torch.gather(u, 0, u.abs().argmax(dim=0, keepdim=True)))
        signs[signs == 0] = 1.0
        root = s.sqrt() * signs
        return LoRAPair((root * v).T.float(), (u * root).float(), 1.0)

    def dense(self) -> Tensor:
        """scaling * B @ A as one (d_out, d_in) matrix, in the factors' precision."""
        return self._scaling * (self.B @ self.A)

    def __repr__(self) -> str:
        return f"LoRAPair(rank={self.rank}, shape={self.shape}, scaling={self._scaling:g})"


def _tensor(tensor: Tensor | LazyTensor) -> Tensor:
    # On the CPU, wherever the model is: the arithmetic is small, and NumPy does part of it.
    loaded = tensor.load() if isinstance(tensor, LazyTensor) else tensor.detach().cpu()
    # Half precision is only a way of storing: arithmetic on it loses what deltas consist of.
    return loaded if loaded.dtype in (torch.float32, torch.float64) else loaded.float()


def triangular_factors(matrices: Sequence[Tensor]) -> list[Tensor]:
    """For every matrix M (m, n) a float64 matrix R (at most n, n) with R^T R = M^T M.

    R has M's singular values. It is the Cholesky factor of the Gram matrix, which is one fast pass
    over M; that squares the condition number, so where it exceeds 3,000 R comes from a QR instead.

    Raises:
        NonFiniteError: a matrix holds NaN or infinity.
    """
    by_size: dict[int, list[int]] = {}
    for index, matrix in enumerate(matrices):
        by_size.setdefault(matrix.shape[1], []).append(index)
    factors: dict[int, Tensor] = {}
    for indices in by_size.values():
        grams = np.stack([_gram(matrices[index]) for index in indices])
        if not np.isfinite(grams).all():
            raise NonFiniteError(
                "a factor holds NaN or infinity, or overflows; expected finite numbers. Do not use"
                " this adapter."
            )
        eigenvalues = np.linalg.eigvalsh(grams)  # ascending
        well_conditioned = eigenvalues[:, 0] > 1e-7 * eigenvalues[:, -1]
        factors.update(
            (index, torch.linalg.qr(matrices[index].double(), mode="r").R)
            for index in np.array(indices)[~well_conditioned]
        )
        lower = np.linalg.cholesky(grams[well_conditioned])
        factors.update(
            zip(np.array(indices)[well_conditioned], torch.from_numpy(lower).mT, strict=True)
        )
    return [factors[index] for index in range(len(matrices))]


def _gram(matrix: Tensor) -> np.ndarray:
    """M^T M in float64: (n, n). The wide copy lives for one matrix only."""
    wide = matrix.double().numpy()
    with np.errstate(
        over="ignore", invalid="ignore"
    ):  # what is not finite is refused by the caller
        gram: np.ndarray = wide.T @ wide
    return gram


def all_finite(tensor: Tensor) -> bool:
    """Whether no number of a CPU tensor is NaN or infinite. NumPy.

    Torch would wake its threads for it.
    """
    return bool(np.isfinite(tensor.numpy()).all())


def _finite_core(core: Tensor) -> Tensor:
    if not all_finite(core):
        raise NonFiniteError(
            "B @ A times its scaling holds NaN or infinity; expected finite numbers. Do not use"
            " this adapter."
        )
    return core
