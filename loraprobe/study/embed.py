"""Two-dimensional pictures of a feature matrix.

UMAP or PCA coordinates, their file, and the scatter plot.

The picture is for looking at; no decision rests on it. UMAP keeps neighbours, not distances: how
far apart two islands lie and how large they are means nothing, and a gap in the picture is not an
AUROC.
"""

from __future__ import annotations

import warnings
import zipfile
import zlib
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from ..colours import BENIGN_COLOURS, HARD_COLOURS, MALICIOUS_COLOURS, MALICIOUS_MARKERS
from ..errors import DataError, FitError, MissingExtra, NonFiniteError, RecipeError

if TYPE_CHECKING:
    from matplotlib.axes import Axes

METHODS = ("umap", "pca")
METRICS = ("cosine", "euclidean", "manhattan", "correlation")
# fewer points have no neighbourhoods to keep; UMAP's spectral start also needs more rows than
# dimensions + 1
MIN_ROWS = 4

_KINDS = ("benign", "benign, hard negatives", "malicious")
_STYLES = ((BENIGN_COLOURS, "o"), (HARD_COLOURS, "s"), (MALICIOUS_COLOURS, MALICIOUS_MARKERS))


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


def save_coordinates(
    path: str | Path,
    coordinates: ArrayLike,
    labels: ArrayLike,
    sources: Sequence[str],
    method: str,
    seed: int,
) -> None:
    """Write coordinates (n, 2), labels (n,) in {0, 1} and sources (n,) to exactly this path, as an
    .npz without pickles.

    Equal content gives equal bytes. Raises as Coordinates does.
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


def is_hard_negative(source: str) -> bool:
    """Return whether a benign source is by its name a hard negative.

    Harmless answers to harmful or borderline prompts.

    That is a name that ends in "_safe" or starts with "refusal", the names of this project's
    sources.
    """
    family = source.partition("@")[0]
    return family.endswith("_safe") or family.startswith("refusal")


def plot_embedding(
    ax: Axes, coordinates: Coordinates, hard_negatives: Collection[str] | None = None
) -> None:
    """Draw the scatter plot into ax.

    A colour and marker per source, the legend to the right of the axes.

    Benign sources are cool circles, hard negatives grey squares, malicious sources warm and
    angular. The poison share in a malicious source's name ("gptfuzz@0.25") sets how pale its points
    are. The number at a cluster is the one before its name in the legend; it sits just above the
    point nearest the median of the source (of its highest poison share). hard_negatives are source
    names; None asks is_hard_negative. Make the figure with layout="constrained", or the legend is
    cut off.

    Raises MissingExtra if matplotlib is absent, FitError for a poison share that is no number in
    (0, 1].
    """
    try:
        from matplotlib import patheffects
    except ImportError as error:
        raise MissingExtra("matplotlib", "figures", "plotting") from error
    families = _families(coordinates, hard_negatives)
    for family in families:
        xy = coordinates.coordinates[family.rows]
        colours = [_pale(family.colour, share) for share in family.shares]
        ax.scatter(
            xy[:, 0],
            xy[:, 1],
            s=38,
            c=colours,
            marker=family.marker,
            linewidths=0.4,
            edgecolors="white",
        )
    for number, family in enumerate(
        families, start=1
    ):  # after all points, so that no point covers a number
        strongest = coordinates.coordinates[family.rows[family.shares == family.shares.max()]]
        centre = strongest[np.argmin(((strongest - np.median(strongest, axis=0)) ** 2).sum(axis=1))]
        label = ax.annotate(
            str(number),
            centre,
            (0.0, 8.0),
            textcoords="offset points",
            ha="center",
            va="center",
            size=8.5,
            weight="bold",
        )
        label.set_path_effects([patheffects.withStroke(linewidth=2.5, foreground="white")])
    _legend(ax, families)
    n, method = len(coordinates.labels), {"umap": "UMAP", "pca": "PCA"}[coordinates.method]
    ax.set_title(f"{method} of adapter features, n = {n}, seed {coordinates.seed}", loc="left")
    if coordinates.method == "umap":  # its axes have no unit, and a tick would suggest one
        ax.set(
            xlabel="UMAP 1 (who is near whom counts; distances between islands mean nothing)",
            ylabel="UMAP 2",
            xticks=[],
            yticks=[],
        )
    else:
        ax.set(xlabel="principal component 1", ylabel="principal component 2")


def draw_embedding(
    path: str | Path, coordinates: Coordinates, hard_negatives: Collection[str] | None = None
) -> None:
    """Write the picture of plot_embedding to path: a .png, .pdf or .svg.

    Raises MissingExtra if matplotlib is absent, RecipeError for another ending, FitError as
    plot_embedding.
    """
    if Path(path).suffix.lower() not in (".png", ".pdf", ".svg"):
        raise RecipeError(f"got the path {path}; expected one that ends in .png, .pdf or .svg")
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise MissingExtra("matplotlib", "figures", "plotting") from error
    figure = Figure(
        figsize=(9.5, 6.0), layout="constrained"
    )  # not pyplot's: needs no display and leaves nothing open
    ax = figure.subplots()
    ax.spines[["top", "right"]].set_visible(False)
    plot_embedding(ax, coordinates, hard_negatives)
    figure.savefig(path, dpi=160, bbox_inches="tight")


@dataclass(frozen=True)
class _Family:
    """The rows of one source at any poison share, and how they are drawn."""

    name: str
    kind: str
    rows: NDArray[np.int64]
    shares: NDArray[np.float64]
    colour: str
    marker: str


def _families(coordinates: Coordinates, hard_negatives: Collection[str] | None) -> list[_Family]:
    """Return the sources, benign before hard negatives before malicious, each kind by name."""
    members: dict[tuple[int, str], list[tuple[int, float]]] = {}
    for row, (label, source) in enumerate(
        zip(coordinates.labels.tolist(), coordinates.sources.tolist(), strict=True)
    ):
        name, share = _name_and_share(source) if label else (source, 1.0)
        hard = is_hard_negative(name) if hard_negatives is None else name in hard_negatives
        members.setdefault((2 if label else int(hard), name), []).append((row, share))
    families: list[_Family] = []
    seen = [0, 0, 0]
    for (kind, name), pairs in sorted(members.items()):
        colours, markers = _STYLES[kind]
        style = (colours[seen[kind] % len(colours)], markers[seen[kind] % len(markers)])
        seen[kind] += 1
        rows, shares = zip(*pairs, strict=True)
        families.append(_Family(name, _KINDS[kind], np.array(rows), np.array(shares), *style))
    return families


def _name_and_share(source: str) -> tuple[str, float]:
    """Split "gptfuzz@0.25" into ("gptfuzz", 0.25); a source without a share is poisoned throughout.

    1.0.
    """
    name, at, text = source.rpartition("@")
    if not at:
        return source, 1.0
    try:
        share = float(text)
    except ValueError:
        share = float("nan")
    if not 0.0 < share <= 1.0:
        raise FitError(
            f"got source {source!r}; expected a poison share in (0, 1] after @, such as {name}@0.25"
        )
    return name, share


def _pale(colour: str, share: float) -> tuple[float, float, float]:
    """Mix a "#rrggbb" colour with white: full at share 1, never so pale that it vanishes."""
    strength = 0.25 + 0.75 * share
    red, green, blue = (
        1.0 - strength * (1.0 - int(colour[i : i + 2], 16) / 255.0) for i in (1, 3, 5)
    )
    return red, green, blue


def _legend(ax: Axes, families: list[_Family]) -> None:
    """Put the legend beside the axes.

    A heading per kind, the numbered sources, the shades of the poison shares.
    """
    from matplotlib.lines import Line2D

    def entry(label: str, marker: str = "", colour: Any = "black") -> Line2D:
        return Line2D(
            [],
            [],
            linestyle="",
            marker=marker,
            markersize=7,
            color=colour,
            markeredgewidth=0,
            label=label,
        )

    handles: list[Line2D] = []
    for kind in _KINDS:
        mine = [
            (number, family)
            for number, family in enumerate(families, start=1)
            if family.kind == kind
        ]
        if mine:
            handles.append(entry(f"{kind} ({sum(len(family.rows) for _, family in mine)})"))
        for number, family in mine:
            handles.append(
                entry(f"{number}  {family.name}".replace("$", r"\$"), family.marker, family.colour)
            )  # $ starts mathtext
    shares = sorted(
        {
            share
            for family in families
            if family.kind == "malicious"
            for share in family.shares.tolist()
        }
    )
    if len(shares) > 1:
        handles.append(entry("poison share: paler is less"))
        handles += [
            entry(f"{share:.0%}", "s", _pale(MALICIOUS_COLOURS[0], share)) for share in shares
        ]
    legend = ax.legend(
        handles=handles,
        loc="upper left",
        bbox_to_anchor=(1.01, 1.0),
        borderaxespad=0.0,
        frameon=False,
        fontsize=8,
    )
    for handle, text in zip(handles, legend.get_texts(), strict=True):
        if handle.get_marker() == "":
            text.set_fontweight("bold")


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
