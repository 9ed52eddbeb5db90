"""The rules that Safe-FedLLM is compared with: FoolsGold, residual, DnC, FLAME and LASA.

As published, which is what Safe-FedLLM's code computes too, up to the differences named in each.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ..checks import Checked, Validity, integer, number
from ..errors import AggregationError
from .rows import Votes, check_f, combine, inner_products, vector

COLUMNS = 1 << 12  # of residual reweighting, which needs n x n numbers for each
ALIKE = 1e-9  # cosines closer to 1 than this are equal to it up to rounding

_VALID: Mapping[str, Validity] = {
    "f": integer(0),
    "confidence": number(above=0),
    "threshold": number(at_least=0),
    "floor": number(above=0),
    "coordinates": integer(1),
    "iterations": integer(1),
    "removed": number(at_least=0),
    "noise": number(at_least=0),
    "sparsity": number(at_least=0, below=1),
    "norm_bound": number(above=0),
    "sign_bound": number(above=0),
}


class _Options(Checked):
    valid = _VALID


@dataclass(frozen=True)
class FoolsGold(_Options):
    """The mean weighted by how unlike all others a client's direction is.

    Sybils that push the same way share one voice. Cosines are those of each client's accumulated
    updates (`Votes.history`), or of this round's alone without a history, which is the official
    variant. The learning rates are divided by their sum, so that the result stays on the scale of
    one delta (as published, they are only summed).

    Source: Fung et al. 2020 (arXiv:1808.04866), Algorithm 1, without its feature weights,
        confidence 1.
    """

    f: int = 0

    def aggregate(self, votes: Votes) -> Tensor:
        """One delta (d,).

        Raises:
            AggregationError: every client's direction is some other's too, so that all would
                count 0.
        """
        sums = votes.rows if votes.history is None else votes.history
        cosines = _cosines(inner_products(sums))
        np.fill_diagonal(cosines, 0.0)
        highest = cosines.max(axis=1)
        pardoned = np.where(
            highest[:, None] < highest[None, :],
            highest[:, None] / np.maximum(highest[None, :], ALIKE),
            1.0,
        )
        trust = np.clip(1 - (cosines * pardoned).max(axis=1), 0.0, 1.0)
        trust[trust < ALIKE] = 0.0
        if not trust.any():
            raise AggregationError(
                f"got {len(sums)} clients each of which points the same way as another; FoolsGold"
                " would count all of them 0. Skip the round or use another rule."
            )
        trust = np.clip(trust / trust.max(), 0.0, 0.99)
        with np.errstate(divide="ignore"):
            rates = np.clip(np.log(trust / (1 - trust)) + 0.5, 0.0, 1.0)
        return combine(votes.rows, rates / rates.sum())


@dataclass(frozen=True)
class Residual(_Options):
    """Residual-based reweighting: values far from a line through the sorted values count less.

    In each coordinate a repeated-median line is fitted to the sorted values against their ranks,
    and every value gets the IRLS weight of its residual. Values of a weight below `threshold` are
    replaced by the line's. A client's weight is the square of its summed weights, each times the
    deviation of the weights in its coordinate. One or two clients are averaged: a line through two
    points has no residual.

    Attributes:
        confidence: lambda; residuals beyond lambda sqrt(2 / n) deviations are weighted down.
        threshold: least weight of a value that is used as it is.
        floor: added to the scale of the residuals, in the units of the deltas.

    Source: Fu et al. 2019 (arXiv:1912.11464); constants of Safe-FedLLM's scripts.
    """

    f: int = 0
    confidence: float = 2.0
    threshold: float = 0.05
    floor: float = 1e-7

    def aggregate(self, votes: Votes) -> Tensor:
        """One delta (d,)."""
        rows = votes.rows
        n, d = rows.shape
        if n < 3:
            return combine(rows, np.full(n, 1 / n))
        restricted = torch.empty_like(rows)
        total = np.zeros(n)
        for start in range(0, d, COLUMNS):
            values = rows[:, start : start + COLUMNS].double().numpy().T  # (columns, n)
            line, scores = _line_and_weights(values, self.confidence, self.floor)
            total += (scores * scores.std(axis=1, ddof=1, keepdims=True)).sum(axis=0)
            restricted[:, start : start + COLUMNS] = torch.from_numpy(
                np.where(scores >= self.threshold, values, line).T
            )
        if not total.any():
            total = np.ones(n)  # nobody is off any line by more than another
        shares = np.square(total / total.max())
        return combine(restricted, shares / shares.sum())


@dataclass(frozen=True)
class DnC(_Options):
    """Divide and conquer: the mean without the rows that stand out along the most variance.

    Attributes:
        coordinates: how many `Votes.rng` draws anew in every iteration; without a generator all
            are used (the official variant).
        iterations: a row has to be kept by each; useful with a generator only.
        removed: rows that an iteration leaves out, in units of f (the paper's c).

    Source: Shejwalkar & Houmansadr 2021 (NDSS); constants of Safe-FedLLM's scripts. Exact: the
    direction is the first singular vector of the centred rows, here from their n x n inner
    products.
    """

    f: int
    coordinates: int = 10_000
    iterations: int = 1
    removed: float = 1.0

    def aggregate(self, votes: Votes) -> Tensor:
        """One delta (d,).

        Raises:
            AggregationError: an iteration would keep nobody, or nobody is kept by every one.
        """
        n, d = votes.rows.shape
        left_out = int(self.removed * check_f(self.f, n))
        if left_out >= n:
            raise AggregationError(f"got removed={self.removed}; expected {n} > c f >= 0")
        centring = np.eye(n) - 1 / n
        mask = np.ones(n, dtype=bool)
        for _ in range(self.iterations):
            sample = votes.rows
            if votes.rng is not None and self.coordinates < d:
                drawn = np.sort(votes.rng.choice(d, self.coordinates, replace=False))
                sample = votes.rows[:, torch.from_numpy(drawn)]
            _, axes = np.linalg.eigh(centring @ inner_products(sample) @ centring)
            outlying = np.square(axes[:, -1])
            mask[np.argsort(outlying, kind="stable")[n - left_out :]] = False
        if not mask.any():
            raise AggregationError(
                f"got no row that all of {self.iterations} iterations keep; expected at least one."
                " Use fewer iterations or a smaller f."
            )
        return combine(votes.rows, mask / mask.sum())


@dataclass(frozen=True)
class Flame(_Options):
    """FLAME: the mean of the majority cluster of directions, each row clipped to the median length.

    Clusters are HDBSCAN's on cosine distances, of at least n // 2 + 1 rows; the median length is
    that of all rows. Directions are those of the deltas, which tell clients apart better, or with
    `Votes.start` of the clients' parameters, as published and as the official variant needs.

    Attributes:
        noise: deviation of the noise to add, as a multiple of the median length; published is
            0.001. None is added unless it is asked for; it needs a generator.

    Source: Nguyen et al. 2022 (arXiv:2101.02281); constants of Safe-FedLLM's scripts.
    """

    f: int = 0
    noise: float = 0.0

    def aggregate(self, votes: Votes) -> Tensor:
        """One delta (d,).

        Raises:
            AggregationError: no cluster holds a majority, or noise without a generator.
        """
        rows = votes.rows
        if self.noise and votes.rng is None:
            raise AggregationError(
                f"got noise={self.noise} and no generator; give rng=, a numpy.random.Generator"
            )
        products = inner_products(rows)
        lengths = np.sqrt(np.diag(products))
        if votes.start is not None:
            products = inner_products(rows, vector(votes.start, rows.shape[1], "start"))
        admitted = _majority(np.maximum(1 - _cosines(products), 0.0))
        bound = float(np.median(lengths))
        shares = np.where(admitted, _clipped(lengths, bound), 0.0) / admitted.sum()
        result = combine(rows, shares)
        if not self.noise or votes.rng is None:
            return result
        noise = self.noise * bound * votes.rng.standard_normal(len(result))
        return result + torch.from_numpy(noise).to(result.dtype)


@dataclass(frozen=True)
class Lasa(_Options):
    """LASA: rows clipped and sparsified, then in every layer the mean of those that fit in.

    They are clipped to the median length. A row fits in where the length of its part and the share
    of positive signs in it are both within so many standard deviations of the median. Where no row
    does, all are averaged, as the authors do. Without `Votes.sizes` the whole row is one layer.

    Attributes:
        sparsity: share of each row's smallest numbers that are set to zero.
        norm_bound: deviations allowed to the length (lambda_n).
        sign_bound: deviations allowed to the signs (lambda_s).

    Source: Xu et al. 2025 (arXiv:2409.01435), and the authors' code (JiiahaoXU/LASA, MIT) for the
    threshold, which is one for the whole row; constants of Safe-FedLLM's scripts.
    """

    f: int = 0
    sparsity: float = 0.3
    norm_bound: float = 1.0
    sign_bound: float = 1.0

    def aggregate(self, votes: Votes) -> Tensor:
        """One delta (d,).

        Raises:
            AggregationError: sizes that do not sum to d.
        """
        d = votes.rows.shape[1]
        layers = [d] if votes.sizes is None else [int(size) for size in votes.sizes]
        if sum(layers) != d or min(layers, default=0) < 1:
            raise AggregationError(
                f"got {len(layers)} sizes summing to {sum(layers)}; expected sizes of at least 1"
                f" that sum to {d}, the length of a delta"
            )
        parts = torch.split_with_sizes(_sparsified(votes.rows, self.sparsity), layers, dim=1)
        return torch.cat(
            [combine(part, _fitting(part, self.norm_bound, self.sign_bound)) for part in parts]
        )


def _cosines(products: NDArray[np.float64]) -> NDArray[np.float64]:
    """(n, n) from inner products; a zero row has cosine 0 with every other."""
    lengths = np.sqrt(np.diag(products))
    scale = np.divide(1.0, lengths, out=np.zeros_like(lengths), where=lengths > 0)
    cosines: NDArray[np.float64] = np.clip(products * scale[:, None] * scale[None, :], -1.0, 1.0)
    np.fill_diagonal(cosines, 1.0)
    return cosines


def _clipped(lengths: NDArray[np.float64], bound: float) -> NDArray[np.float64]:
    """(n,): the factor that shortens a row of each length to `bound`; 1 for shorter ones."""
    return np.divide(bound, lengths, out=np.ones_like(lengths), where=lengths > bound)


def _majority(distances: NDArray[np.float64]) -> NDArray[np.bool_]:
    """(n,): whether each row is in HDBSCAN's cluster of more than half of the rows."""
    from sklearn.cluster import HDBSCAN

    n = len(distances)
    if n == 1:
        return np.ones(1, dtype=bool)
    clustering = HDBSCAN(
        metric="precomputed",
        min_cluster_size=n // 2 + 1,
        min_samples=1,
        allow_single_cluster=True,
        copy=True,
    )
    # No second cluster could be as large.
    members: NDArray[np.bool_] = clustering.fit_predict(distances) == 0
    if not members.any():
        raise AggregationError(
            f"got {n} rows of which no {n // 2 + 1} form a cluster; expected a majority that"
            " agrees. Skip the round."
        )
    return members


def _line_and_weights(
    values: NDArray[np.float64], confidence: float, floor: float
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """The repeated-median line at each value's rank, and each value's IRLS weight.

    All three (columns, n).
    """
    n = values.shape[1]
    ranks = np.argsort(np.argsort(values, axis=1, kind="stable"), axis=1, kind="stable")
    ordered = np.sort(values, axis=1)
    positions = np.arange(n)
    others = ~np.eye(n, dtype=bool)
    runs = (positions[:, None] - positions[None, :])[others].reshape(n, n - 1)
    rises = (ordered[:, :, None] - ordered[:, None, :])[:, others].reshape(-1, n, n - 1)
    slope = np.median(np.median(rises / runs, axis=2), axis=1, keepdims=True)
    line = np.median(ordered, axis=1, keepdims=True) + slope * (ranks - (n - 1) / 2)
    errors = np.abs(values - line)
    typical = np.median(np.sort(errors, axis=1)[:, 1:], axis=1, keepdims=True)
    spread = 1.4826 * (1 + 5 / (n - 1)) * typical + floor
    # One minus the hat matrix's diagonal, of a regression on the ranks.
    leverage = np.sqrt(1 - 1 / n - np.square(positions - (n - 1) / 2) / (n * (n * n - 1) / 12))
    allowed = confidence * np.sqrt(2 / n) * spread * leverage[ranks]
    return line, np.divide(allowed, errors, out=np.ones_like(errors), where=errors > allowed)


def _sparsified(rows: Tensor, sparsity: float) -> Tensor:
    """(n, d): rows clipped to the median length, each one's smallest numbers set to zero."""
    lengths = np.sqrt(np.diag(inner_products(rows)))
    result = torch.empty_like(rows)
    counted = max(1, int(rows.shape[1] * (1 - sparsity)))
    for index, scale in enumerate(_clipped(lengths, float(np.median(lengths)))):
        row = (rows[index].double() * scale).numpy()
        magnitudes: NDArray[Any] = np.abs(row)
        if sparsity > 0:
            # Not larger: the threshold itself goes too.
            row[magnitudes <= np.partition(magnitudes, -counted)[-counted]] = 0.0
        result[index] = torch.from_numpy(row)
    return result


def _fitting(part: Tensor, norm_bound: float, sign_bound: float) -> NDArray[np.float64]:
    """(n,) coefficients of the mean of the rows whose length and signs are near the median."""
    lengths = np.array([float(torch.linalg.vector_norm(row, dtype=torch.float64)) for row in part])
    positive = (part > 0).sum(dim=1).numpy()
    used = (part != 0).sum(dim=1).numpy()
    purity = np.divide(positive, used, out=np.full(len(part), 0.5), where=used > 0)
    fits = (_deviations(lengths) < norm_bound) & (_deviations(purity) < sign_bound)
    if not fits.any():
        fits[:] = True
    coefficients: NDArray[np.float64] = fits / fits.sum()
    return coefficients


def _deviations(values: NDArray[Any]) -> NDArray[np.float64]:
    """(n,): how many standard deviations each value is from the median; 0 if all are equal."""
    spread = values.std()
    distances: NDArray[np.float64] = np.abs(values - np.median(values))
    return distances / spread if spread > 0 else distances
