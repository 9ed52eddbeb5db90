"""The first rows of the leaderboard: our probes and what they have to beat."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np

from loraprobe import Adapter, FeatureRecipe, Featurizer
from loraprobe.fit.heads import fit_head
from loraprobe.heads import Head, LinearHead
from zoo.smollm2 import baselines
from zoo.smollm2.cohorts import direction_scores

_LEAVES = ("q_proj", "v_proj")


def _logit(head: Head, x: np.ndarray) -> float:
    """Of one row; what the probability would round to 0 or 1 stays apart."""
    assert isinstance(head, LinearHead)
    return float(x[0].astype(np.float64) @ head.coef + head.intercept)


class MassMean:
    """Invariant features of q and v, mass-mean direction: this project's default."""

    head = "mass_mean"

    def fit(self, adapters: Sequence[Adapter], labels: np.ndarray) -> None:
        """Learn bases and head."""
        own = [baselines.attention(adapter) for adapter in adapters]
        self.featurizer = Featurizer.fit(FeatureRecipe.invariant(k=8), own)
        groups = [str(row) for row in range(len(own))]
        self.fitted = fit_head(self.head, self.featurizer(own), labels, groups, seed=0)

    def score(self, adapter: Adapter) -> float:
        """The head's logit."""
        return _logit(self.fitted, self.featurizer([baselines.attention(adapter)]))


class Linear(MassMean):
    """Invariant features, logistic regression."""

    head = "linear"


class HarmfulDirection:
    """The rival's: cosine of the change's product with one harmful fine-tune's, summed over layers.

    The reference is the first malicious adapter it is given.
    """

    def fit(self, adapters: Sequence[Adapter], labels: np.ndarray) -> None:
        """Keep the reference."""
        self.reference = adapters[int(np.argmax(labels))]

    def score(self, adapter: Adapter) -> float:
        """Sum of cosines."""
        return float(direction_scores([adapter, self.reference], 1)[0])


class _Numbers:
    """A logistic regression on a few numbers an adapter."""

    numbers: Callable[[Sequence[Adapter]], np.ndarray]  # adapters -> (n, p)

    def fit(self, adapters: Sequence[Adapter], labels: np.ndarray) -> None:
        """Standardise, and fit."""
        rows = np.nan_to_num(self.numbers(adapters))
        self.mean = rows.mean(axis=0)
        self.scale = np.maximum(rows.std(axis=0), 1e-12)
        groups = [str(row) for row in range(len(adapters))]
        self.fitted = fit_head("linear", self._scaled(rows), labels, groups, seed=0)

    def _scaled(self, rows: np.ndarray) -> np.ndarray:
        scaled: np.ndarray = ((rows - self.mean) / self.scale).astype(np.float32)
        return scaled

    def score(self, adapter: Adapter) -> float:
        """The head's logit."""
        rows = np.nan_to_num(self.numbers([adapter]))
        return _logit(self.fitted, self._scaled(rows))


class Spectral20(_Numbers):
    """The 20 spectral numbers of q, k, v, o (arXiv:2602.15195); zero where there is no module."""

    numbers = staticmethod(baselines.spectral)


class Norm(_Numbers):
    """How large the change is: mean and deviation over layers of log norms of q and v."""

    numbers = staticmethod(baselines.norms)


class FirstLayerB:
    """B of the first layer's q and v, logistic regression: the published recipe."""

    def fit(self, adapters: Sequence[Adapter], labels: np.ndarray) -> None:
        """Fit, on factors padded to one rank."""
        self.rank = max(pair.B.shape[1] for adapter in adapters for pair in adapter.values())
        groups = [str(row) for row in range(len(adapters))]
        rows = np.stack([self._row(adapter) for adapter in adapters])
        self.fitted = fit_head("linear", rows, labels, groups, seed=0)

    def _row(self, adapter: Adapter) -> np.ndarray:
        parts = []
        for leaf in _LEAVES:
            B = np.asarray(next(p.B for name, p in adapter.items() if name.endswith(leaf)))
            kept = np.zeros((len(B), self.rank), np.float32)
            kept[:, : B.shape[1]] = B[:, : self.rank]
            parts.append(kept.ravel())
        return np.concatenate(parts)

    def score(self, adapter: Adapter) -> float:
        """The head's logit."""
        return _logit(self.fitted, self._row(adapter)[None])
