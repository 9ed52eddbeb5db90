"""What the probes have to beat: sizes, spectra, raw factors.

Factors of different ranks are padded with zeros to one shape. Features wider than there are
adapters are given as coordinates with the same inner products: a linear head fits the same there.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from fedloop.kit.features import coordinates
from loraprobe import Adapter

_LEAVES = ("q_proj", "v_proj")  # what every adapter has
_FOUR = ("q_proj", "k_proj", "v_proj", "o_proj")


def attention(adapter: Adapter) -> Adapter:
    """Queries and values alone: what every adapter has."""
    kept = {name: pair for name, pair in adapter.items() if name.endswith(_LEAVES)}
    return Adapter(kept, base_model=adapter.base_model, kind=adapter.kind)


def norms(adapters: Sequence[Adapter]) -> np.ndarray:
    """log ||B A|| of q and v, mean and deviation over layers: how large the change is, (n, 4)."""
    rows = []
    for adapter in adapters:
        logs = [np.log(_sizes(adapter, leaf)[:, 0]) for leaf in _LEAVES]
        rows.append([number for values in logs for number in (values.mean(), values.std())])
    return np.array(rows)


def norm_spread(adapters: Sequence[Adapter]) -> np.ndarray:
    """How unevenly the change is spread over layers, whatever its size: (n, 6).

    Of q and v each: deviation over mean of the layers' norms, largest over mean, and the share of
    the later half. Our reading of the norm spread of arXiv:2605.30189.
    """
    rows = []
    for adapter in adapters:
        row = []
        for leaf in _LEAVES:
            sizes = _sizes(adapter, leaf)[:, 0]
            mean = sizes.mean()
            later = sizes[len(sizes) // 2 :].sum() / sizes.sum()
            row += [sizes.std() / mean, sizes.max() / mean, later]
        rows.append(row)
    return np.array(rows)


def spectral(adapters: Sequence[Adapter], leaves: Sequence[str] = _FOUR) -> np.ndarray:
    """Five spectral numbers of every module name, means over layers: (n, 5 * names).

    Largest singular value, Frobenius norm, energy of the largest, entropy and kurtosis of the
    singular values of B A. With q, k, v and o the 20 numbers of arXiv:2602.15195, of which we take
    means over layers. NaN where an adapter has no such module.
    """
    rows = []
    for adapter in adapters:
        row: list[float] = []
        for leaf in leaves:
            names = [name for name in adapter if name.endswith(leaf)]
            found = np.array([_five(adapter, name) for name in names])
            row += found.mean(axis=0).tolist() if len(found) else [np.nan] * 5
        rows.append(row)
    return np.array(rows)


def factors(adapters: Sequence[Adapter], factor: str, first: bool = False) -> np.ndarray:
    """The factors A or B of q and v, flattened, of norm 1, as coordinates: (n, n).

    Args:
        first: of the first layer alone, as the paper's recipe (arXiv:2601.07177).
    """
    total = np.zeros((len(adapters),) * 2)
    names = sorted(name for name in adapters[0] if name.rsplit(".", 1)[-1] in _LEAVES)
    if first:
        names = [name for name in names if ".layers.0." in name]
    for name in names:
        matrices = [np.asarray(getattr(adapter[name], factor), np.float32) for adapter in adapters]
        side = 1 if factor == "B" else 0
        widest = max(matrix.shape[side] for matrix in matrices)
        flat = np.array([_padded(matrix, side, widest).reshape(-1) for matrix in matrices])
        total += flat.astype(np.float64) @ flat.T.astype(np.float64)
    sizes = np.sqrt(np.diag(total))
    return coordinates(total / np.outer(sizes, sizes))


def standardised(features: np.ndarray, train: np.ndarray) -> np.ndarray:
    """Columns of mean 0 and deviation 1 over the training rows: (n, p) float32."""
    mean, deviation = features[train].mean(axis=0), features[train].std(axis=0)
    found: np.ndarray = (features - mean) / np.maximum(deviation, 1e-9)
    return found.astype(np.float32)


def _padded(matrix: np.ndarray, side: int, widest: int) -> np.ndarray:
    missing = [(0, 0), (0, 0)]
    missing[side] = (0, widest - matrix.shape[side])
    return np.pad(matrix, missing)


def _values(adapter: Adapter, name: str) -> np.ndarray:
    return np.asarray(adapter[name].svdvals(), np.float64)


def _five(adapter: Adapter, name: str) -> list[float]:
    values = _values(adapter, name)
    share = values / values.sum()
    energy = np.square(values)
    entropy = -(share * np.log(np.maximum(share, 1e-12))).sum()
    centred = values - values.mean()
    variance = np.square(centred).mean()
    kurtosis = (centred**4).mean() / max(variance**2, 1e-24)
    return [values[0], np.sqrt(energy.sum()), energy[0] / energy.sum(), entropy, kurtosis]


def _sizes(adapter: Adapter, leaf: str) -> np.ndarray:
    """||B A|| and its largest singular value, layer by layer: (layers, 2)."""
    names = [name for name in adapter if name.endswith(leaf)]
    values = [_values(adapter, name) for name in names]
    return np.array([[np.sqrt(np.square(v).sum()), v[0]] for v in values])
