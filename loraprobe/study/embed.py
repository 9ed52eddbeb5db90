"""Two-dimensional coordinates of a feature matrix, by UMAP or PCA, and their file.

They are for looking at (`loraprobe.study.picture`); no decision rests on them. UMAP keeps
neighbours, not distances: how far apart two islands lie and how large they are means nothing, and a
gap in the picture is not an AUROC.
"""

from __future__ import annotations

import warnings
import zipfile
import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import ArrayLike, NDArray

from ..errors import DataError, FitError, MissingExtra, NonFiniteError, RecipeError

METHODS = ("umap", "pca")
METRICS = ("cosine", "euclidean", "manhattan", "correlation")
MIN_ROWS = 4  # fewer have no neighbourhoods, and UMAP's start needs more rows than dimensions + 1


@dataclass(frozen=True, eq=False)
class Coordinates:
    """The 2-D coordinates of labelled rows and how they were made.

    Checked when constructed, hence also when loaded.

    Raises FitError if shapes, labels or sources are wrong, NonFiniteError for NaN or infinite
    coordinates, RecipeError for an unknown method or a seed outside [0, 2**32).
    """

    coordinates: NDArray[np.float32]
    """(n, 2), finite."""
    labels: NDArray[np.int8]
    """(n,): 1 malicious, 0 benign."""
    sources: NDArray[np.str_]
    """(n,): the data source of each row, such as "gsm8k".

    "gptfuzz@0.25" is gptfuzz at a poison share of 25 %.
    """
    method: str
    """One of METHODS."""
    seed: int
    """The seed given to embed()."""

    def __post_init__(self) -> None:
        _check_method_and_seed(self.method, self.seed)
        n = self.coordinates.shape[0] if self.coordinates.ndim else 0
        if self.coordinates.dtype != np.float32 or self.coordinates.shape != (n, 2) or n == 0:
            got = f"{self.coordinates.dtype} {self.coordinates.shape}"
            raise FitError(
                f"got coordinates {got}; expected float32 (n, 2) with n >= 1; pass what embed()"
                " returns"
            )
        if not np.isfinite(self.coordinates).all():
            raise NonFiniteError(
                "coordinates hold NaN or infinity; expected finite numbers; embed the features"
                " again"
            )
        if (
            self.labels.shape != (n,)
            or self.labels.dtype.kind not in "biu"
            or not np.isin(self.labels, (0, 1)).all()
        ):
            raise FitError(
                f"got labels {self.labels.dtype} {self.labels.shape}; expected {n} labels, each 0"
                " (benign) or 1 (malicious)"
            )
        if self.sources.shape != (n,) or self.sources.dtype.kind != "U":
            raise FitError(
                f"got sources {self.sources.dtype} {self.sources.shape}; expected {n} strings, the"
                " data source of each row"
            )


def embed(
    features: ArrayLike,
    method: str = "umap",
    *,
    seed: int = 0,
    n_neighbors: int = 15,
    min_dist: float = 0.1,
    metric: str = "cosine",
) -> NDArray[np.float32]:
    """Return 2-D coordinates (n, 2) float32 of features (n, p).

    Equal arguments give equal coordinates, bit for bit.

    "pca" takes the two directions of largest variance of the centred features (full SVD in float64,
    sign fixed by the largest loading) and has no use for the other arguments. "umap" draws from
    `seed` and runs on one thread, the price of repeatability; n_neighbors is capped at n - 1, as a
    row has no more neighbours than that; metric is one of METRICS.

    Raises FitError for a wrong shape or fewer than 4 rows, NonFiniteError for NaN, infinity or
    values beyond float32, RecipeError for an unknown method or metric or an impossible setting,
    MissingExtra if umap-learn is needed and absent.
    Source: McInnes, Healy and Melville, arXiv:1802.03426 (UMAP); defaults are umap-learn's, metric
        apart.
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
    if metric not in METRICS:
        raise RecipeError(f"got metric {metric!r}; expected one of {', '.join(METRICS)}")
    if n_neighbors < 2 or not 0.0 <= min_dist <= 1.0:
        raise RecipeError(
            f"got n_neighbors={n_neighbors}, min_dist={min_dist}; expected n_neighbors >= 2 and"
            " min_dist in [0, 1]"
        )
    return _umap(x, seed, min(n_neighbors, len(x) - 1), min_dist, metric)


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
    return _umap(matrix, seed, min(15, len(matrix) - 1), 0.1, "precomputed")


def save_coordinates(
    path: str | Path,
    coordinates: ArrayLike,
    labels: ArrayLike,
    sources: Sequence[str],
    method: str,
    seed: int,
) -> None:
    """Write coordinates (n, 2), labels (n,) in {0, 1} and sources (n,) as an .npz without pickles.

    The path is taken as it is. Equal content gives equal bytes. Raises as Coordinates does.
    """
    made = Coordinates(
        coordinates=np.asarray(coordinates, dtype=np.float32),
        labels=np.asarray(labels),
        sources=np.array(
            [str(source) for source in sources], dtype=np.str_
        ),  # never an object array, which would be pickled
        method=method,
        seed=seed,
    )
    with open(path, "wb") as file:  # given a name, savez would append .npz to it
        np.savez(
            file,
            coordinates=made.coordinates,
            labels=made.labels.astype(np.int8),
            sources=made.sources,
            method=np.array(made.method),
            seed=np.array(made.seed, dtype=np.int64),
        )


def load_coordinates(path: str | Path) -> Coordinates:
    """Read what save_coordinates wrote; no pickle in the file is ever executed.

    Raises DataError if the file is missing, damaged, not such an .npz or holds what Coordinates
    refuses.
    """
    fields = ("coordinates", "labels", "sources", "method", "seed")
    try:
        with (
            zipfile.ZipFile(path),
            np.load(path, allow_pickle=False) as file,
        ):  # ZipFile first: np.load takes .npy files, too
            if sorted(file.files) != sorted(fields):
                raise ValueError(f"it does not hold exactly the arrays {', '.join(fields)}")
            arrays = {name: file[name] for name in fields}
        if arrays["method"].shape or arrays["seed"].shape or arrays["seed"].dtype.kind not in "iu":
            raise ValueError("method is not one string or seed is not one integer")
        return Coordinates(
            coordinates=arrays["coordinates"],
            labels=arrays["labels"],
            sources=arrays["sources"],
            method=str(arrays["method"]),
            seed=int(arrays["seed"]),
        )
    except (
        OSError,
        ValueError,
        EOFError,
        RuntimeError,
        MemoryError,
        zipfile.BadZipFile,
        zlib.error,
    ) as error:
        # RuntimeError: zipfile on a bit that claims encryption or an unknown compression;
        # MemoryError: a header that claims terabytes
        raise DataError(
            f"cannot read {path}: {error}; expected coordinates that save_coordinates wrote; make"
            " the file again"
        ) from error


def _check_method_and_seed(method: str, seed: int) -> None:
    if method not in METHODS:
        raise RecipeError(f"got method {method!r}; expected one of {', '.join(METHODS)}")
    if isinstance(seed, bool) or not isinstance(seed, int) or not 0 <= seed < 2**32:
        raise RecipeError(f"got seed {seed!r}; expected an integer in [0, 2**32)")


def _pca(x: NDArray[np.float32]) -> NDArray[np.float32]:
    from sklearn.decomposition import PCA

    with np.errstate(
        invalid="ignore"
    ):  # identical rows: sklearn divides 0 by 0 for a variance ratio that nobody reads
        coordinates = PCA(n_components=2, svd_solver="full").fit_transform(x.astype(np.float64))
    result: NDArray[np.float32] = coordinates.astype(np.float32)
    return result


def _umap(
    x: NDArray[np.float32], seed: int, n_neighbors: int, min_dist: float, metric: str
) -> NDArray[np.float32]:
    with warnings.catch_warnings():
        # Importing umap warns that TensorFlow is absent, and numba of what it will drop one day:
        # neither is the caller's.
        warnings.simplefilter("ignore")
        try:
            from umap import UMAP
        except ImportError as error:
            raise MissingExtra("umap-learn", "figures", "UMAP coordinates") from error
    # random_state makes umap use one thread; saying n_jobs=1 as well keeps it from warning that it
    # does.
    model = UMAP(
        n_neighbors=n_neighbors, min_dist=min_dist, metric=metric, random_state=seed, n_jobs=1
    )
    with warnings.catch_warnings():
        # "Spectral initialisation failed", "graph is not fully connected": umap then starts from
        # random or per-part
        # coordinates, which changes the look of the picture and not what may be read from it.
        warnings.filterwarnings("ignore", category=UserWarning, module=r"umap|sklearn")
        result: NDArray[np.float32] = np.asarray(model.fit_transform(x), dtype=np.float32)
    return result
