"""Two-dimensional coordinates of a feature matrix, by UMAP or PCA.

They are for looking at; no decision rests on them. UMAP keeps neighbours, not distances: how far
apart two islands lie and how large they are means nothing, and a gap in the picture is not an
AUROC.
"""

from __future__ import annotations

import warnings

import numpy as np
from numpy.typing import ArrayLike, NDArray

from ..errors import FitError, MissingExtra, NonFiniteError, RecipeError

METHODS = ("umap", "pca")
NEIGHBOURS = 15
MIN_ROWS = 4  # fewer have no neighbourhoods, and UMAP's start needs more rows than dimensions + 1


def embed(
    features: ArrayLike, method: str = "umap", *, seed: int = 0, n_neighbors: int = NEIGHBOURS
) -> NDArray[np.float32]:
    """Return 2-D coordinates (n, 2) float32 of features (n, p).

    Equal arguments give equal coordinates, bit for bit.

    "pca" takes the two directions of largest variance of the centred features (full SVD in float64,
    sign fixed by the largest loading) and has no use for the other arguments. "umap" compares
    cosines, draws from `seed` and runs on one thread, the price of repeatability; n_neighbors is
    capped at n - 1, as a row has no more neighbours than that.

    Raises:
        FitError: a wrong shape, or fewer than 4 rows.
        NonFiniteError: NaN, infinity or values beyond float32.
        RecipeError: an unknown method, or a seed or number of neighbours that cannot be.
        MissingExtra: umap-learn is needed and not installed.

    Source: McInnes, Healy and Melville, arXiv:1802.03426 (UMAP).
    """
    _check_method_and_seed(method, seed)
    with np.errstate(over="ignore"):  # a value beyond float32 becomes infinite and is refused below
        x = np.asarray(features).astype(np.float32)
    if x.ndim != 2 or x.shape[0] < MIN_ROWS or x.shape[1] < 2:
        raise FitError(
            f"got features of shape {x.shape}; expected (n, p) with n >= {MIN_ROWS} rows and p >= 2"
            " columns; add adapters"
        )
    if not np.isfinite(x).all():
        bad = int((~np.isfinite(x).all(axis=1)).sum())
        raise NonFiniteError(
            f"{bad} of {len(x)} rows hold NaN, infinity or values beyond float32; expected finite"
            " ones; drop these rows"
        )
    if method == "pca":
        return _pca(x)
    if n_neighbors < 2:
        raise RecipeError(f"got n_neighbors={n_neighbors}; expected at least 2")
    return _umap(x, seed, n_neighbors, "cosine")


def umap_of_distances(distances: ArrayLike, seed: int = 0) -> NDArray[np.float32]:
    """UMAP coordinates (n, 2) of things of which only the distances (n, n) are known.

    Raises:
        FitError: fewer than 4 rows, no square matrix, or a distance that is no number.
        MissingExtra: umap-learn is not installed.
    """
    _check_method_and_seed("umap", seed)
    matrix = np.maximum(np.asarray(distances, np.float32), 0)  # rounding may leave -1e-7
    square = matrix.ndim == 2 and matrix.shape[0] == matrix.shape[1] >= MIN_ROWS
    if not square or not np.isfinite(matrix).all():
        raise FitError(
            f"got distances of shape {matrix.shape}; expected finite ones (n, n), n >= {MIN_ROWS}"
        )
    return _umap(matrix, seed, NEIGHBOURS, "precomputed")


def _check_method_and_seed(method: str, seed: int) -> None:
    if method not in METHODS:
        raise RecipeError(f"got method {method!r}; expected one of {', '.join(METHODS)}")
    if isinstance(seed, bool) or not isinstance(seed, int) or not 0 <= seed < 2**32:
        raise RecipeError(f"got seed {seed!r}; expected an integer in [0, 2**32)")


def _pca(x: NDArray[np.float32]) -> NDArray[np.float32]:
    from sklearn.decomposition import PCA

    # Of identical rows sklearn divides 0 by 0, for a variance ratio that nobody reads.
    with np.errstate(invalid="ignore"):
        coordinates = PCA(n_components=2, svd_solver="full").fit_transform(x.astype(np.float64))
    return np.asarray(coordinates, np.float32)


def _umap(x: NDArray[np.float32], seed: int, n_neighbors: int, metric: str) -> NDArray[np.float32]:
    with warnings.catch_warnings():
        # Importing umap warns that TensorFlow is absent, and numba of what it will drop one day:
        # neither is the caller's.
        warnings.simplefilter("ignore")
        try:
            from umap import UMAP
        except ImportError as error:
            raise MissingExtra("umap-learn", "figures", "UMAP coordinates") from error
    # random_state makes umap use one thread; said as well, or it warns that it does.
    neighbours = min(n_neighbors, len(x) - 1)
    model = UMAP(n_neighbors=neighbours, metric=metric, random_state=seed, n_jobs=1)
    with warnings.catch_warnings():
        # "Spectral initialisation failed", "graph is not fully connected": umap then starts from
        # random or per-part coordinates, which changes the look and not what may be read from it.
        warnings.filterwarnings("ignore", category=UserWarning, module=r"umap|sklearn")
        return np.asarray(model.fit_transform(x), dtype=np.float32)
