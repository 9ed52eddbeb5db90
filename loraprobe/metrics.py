"""How good a probe is: AUROC, TPR at a small FPR and calibration, with intervals that respect
groups.

The steps or rounds of one client share a data set and a starting point, so they are not independent
samples. Every interval here counts groups (a client, a run), never rows: the AUROC by resampling
whole groups, the two rates by an exact binomial interval on the effective number of groups.

Conventions: label 1 is malicious and 0 benign; a higher score is more suspicious; a row is flagged
when score >= threshold (the rule of the paper's step level).
"""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

import numpy as np
from numpy.typing import ArrayLike, NDArray

from .errors import FitError, NonFiniteError

Floats: TypeAlias = NDArray[np.float64]
Ints: TypeAlias = NDArray[np.int64]
Bools: TypeAlias = NDArray[np.bool_]
Groups: TypeAlias = Sequence[Hashable] | NDArray[Any]

FPR_LEVELS = (0.01, 0.05)
# of one (rows, resamples) work array: 4 MB of int64 stay in the cache, and memory stays flat
_BLOCK_CELLS = 500_000


def auroc(labels: ArrayLike, scores: ArrayLike) -> float:
    """Return P(a malicious row scores above a benign one), a tie counting one half (the
    Mann-Whitney U over its maximum).

    labels (n,) in {0, 1}; scores (n,) any finite reals. Exact: an integer count of half-pairs,
    divided once.

    Raises FitError if lengths or labels are wrong or a class is missing, NonFiniteError for NaN or
    infinite scores.
    Source: Hanley and McNeil 1982, Radiology 143:29, Eq. 1.
    """
    y, s = _two_classes(labels, scores)
    return float(_weighted_auroc(_pair_index(y, s), np.ones((len(y), 1), dtype=np.int64))[0])


def auroc_ci(
    labels: ArrayLike,
    scores: ArrayLike,
    groups: Groups | None,
    *,
    resamples: int = 2000,
    level: float = 0.95,
    seed: int = 0,
) -> tuple[float, float]:
    """Return the (low, high) cluster-bootstrap percentile interval of the AUROC.

    labels, scores and groups are (n,); groups are strings, integers or tuples, None makes each row
    its own group. One resample draws as many groups as there are, with replacement, and takes all
    rows of each, as often as it was drawn; the draw is not stratified, so the share of malicious
    rows varies too. A resample left with one class has no AUROC and is left out. A group whose rows
    carry both labels stays together. Equal seeds give equal intervals.

    Two cases in which the bootstrap would overstate certainty are answered otherwise:

    - **An AUROC of exactly 1 (or 0)** stays 1 in every resample, so the interval would collapse to
      a point. Pair m groups
      of one class with m distinct groups of the other: m independent trials, all won, in each of
      which a random malicious row meets a random benign row of another group. The Clopper-Pearson
      interval for m of m is returned: ((1 - level) / 2) ** (1 / m) to 1. m is the number of groups
      of the smaller class (at most half of all groups, when groups are mixed): 20 groups give
      [0.83, 1]. The trials weigh groups equally, the AUROC weighs rows.
    - **A class with a single group** cannot show how groups differ: the interval is (0, 1).

    With few groups the percentile interval is somewhat short, most of all for an AUROC just below
    1: in simulations (normal scores, half of their variance shared within the group, 10 rows a
    group) the 95 % interval held the true AUROC in 88 % of 500 trials with 10 groups and in 92 %
    with 20 or 40, the row bootstrap in 57 %. More rows of the same groups do not help, more groups
    do.

    Raises FitError if lengths, labels, groups, resamples or level are wrong or a class is missing,
    NonFiniteError for NaN or infinite scores.
    Source: Field and Welsh 2007, J. R. Stat. Soc. B 69:369 (cluster bootstrap); Clopper and Pearson
    1934, Biometrika 26:404, and Hanley and Lippman-Hand 1983, JAMA 249:1743 (no failures seen).
    """
    y, s = _two_classes(labels, scores)
    codes = _group_codes(groups, len(y))
    if isinstance(resamples, bool) or not isinstance(resamples, int) or resamples < 1:
        raise FitError(
            f"resamples is {resamples!r}; expected an integer of at least 1; 2000 is usual"
        )
    if not 0.0 < level < 1.0:
        raise FitError(
            f"level is {level!r}; expected a number between 0 and 1 exclusive; 0.95 is usual"
        )
    point = auroc(y, s)
    malicious, benign = np.unique(codes[y]), np.unique(codes[~y])
    if min(len(malicious), len(benign)) < 2:
        return 0.0, 1.0
    if point in (0.0, 1.0):
        pairs = min(len(malicious), len(benign), (codes.max() + 1) // 2)
        bound = float(((1.0 - level) / 2.0) ** (1.0 / pairs))
        return (bound, 1.0) if point == 1.0 else (0.0, 1.0 - bound)
    values = _resampled_aurocs(y, s, codes, resamples, seed)
    if np.isnan(values).all():
        return 0.0, 1.0  # only a handful of resamples gets here, and nothing was learnt from them
    low, high = np.nanquantile(values, [(1.0 - level) / 2.0, (1.0 + level) / 2.0])
    return float(low), float(high)


def tpr_at_fpr(labels: ArrayLike, scores: ArrayLike, max_fpr: float) -> float:
    """Return the highest TPR of any threshold whose FPR on these rows is at most max_fpr.

    labels and scores are (n,). No interpolation between thresholds: with 40 benign rows the
    possible FPRs are multiples of 1/40, so the TPR at 1 % FPR is the TPR at no false positive at
    all. Picking the threshold on the rows it is judged on flatters it; a threshold fixed before is
    judged by EvalReport.tpr and .fpr.

    Raises FitError if lengths or labels are wrong, a class is missing or max_fpr lies outside [0,
    1], NonFiniteError for NaN or infinite scores.
    """
    y, s = _two_classes(labels, scores)
    if not 0.0 <= max_fpr <= 1.0:
        raise FitError(f"max_fpr is {max_fpr!r}; expected a rate in [0, 1], such as 0.01 for 1 %")
    benign = np.sort(s[~y])[::-1]
    # Compare k / n with max_fpr itself: floor(max_fpr * n) loses one, as 0.29 * 100 is 28.999...
    allowed = (
        int(np.searchsorted(np.arange(len(benign) + 1) / len(benign), max_fpr, side="right")) - 1
    )
    if allowed == len(benign):
        return 1.0
    return float(
        np.mean(s[y] > benign[allowed])
    )  # above the first benign score that may not be flagged, ties included


def ece(labels: ArrayLike, probabilities: ArrayLike, bins: int = 10) -> float:
    """Return the expected calibration error of P(malicious).

    Sum over bins of n_b / n * |mean label - mean probability|.

    labels (n,) in {0, 1}; probabilities (n,) in [0, 1]; equal-width bins [k / bins, (k + 1) /
    bins), the last one closed. The mean is over all rows, so it depends on their share of malicious
    rows; with few rows a bin it is biased upwards.

    Raises FitError if lengths, labels, range or bins are wrong, NonFiniteError for NaN or infinity.
    Source: Naeini et al. 2015 (AAAI), Sec. "Calibration metrics"; Guo et al., arXiv:1706.04599, Eq.
        3.
    """
    y, p = _probabilities(labels, probabilities)
    if isinstance(bins, bool) or not isinstance(bins, int) or bins < 1:
        raise FitError(f"bins is {bins!r}; expected an integer of at least 1; 10 is usual")
    index = np.minimum((p * bins).astype(np.int64), bins - 1)
    return float(np.abs(np.bincount(index, weights=y - p, minlength=bins)).sum() / len(p))


def brier(labels: ArrayLike, probabilities: ArrayLike) -> float:
    """Return the mean squared difference of P(malicious) (n,) and label (n,).

    0 is perfect, always saying 0.5 gives 0.25.

    Raises FitError if lengths, labels or range are wrong, NonFiniteError for NaN or infinity.
    Source: Brier 1950, Mon. Weather Rev. 78:1.
    """
    y, p = _probabilities(labels, probabilities)
    return float(np.mean((p - y) ** 2))


@dataclass(frozen=True)
class GroupRow:
    """One line of the table "by source", "by attack", ...: the rows that share a name."""

    name: str
    """The name given in `by`."""
    label: int | None
    """1 malicious, 0 benign, None if rows of both carry this name."""
    n: int
    """Number of rows."""
    n_groups: int
    """Number of groups that have a row of this name."""
    flagged: float
    """Share of the rows with score >= threshold.

    A TPR for malicious names, an FPR for benign ones.
    """
    mean_score: float
    """Mean of the scores, in [0, 1]."""
    auroc: float | None
    """AUROC of these rows against all rows of the opposite class.

    None if the name carries both labels.
    """


@dataclass(frozen=True)
class EvalReport:
    """What a probe did on labelled rows that it was not fitted on.

    Intervals are at 95 % and count groups, not rows.
    """

    auroc: float
    """Probability that a malicious row scores above a benign one."""
    auroc_ci: tuple[float, float]
    """Cluster-bootstrap interval of the AUROC.

    For what it is at an AUROC of exactly 0 or 1 see the function auroc_ci.
    """
    tpr_at_fpr: dict[float, float]
    """Highest FPR allowed -> highest TPR reached, thresholds picked on these rows, without
    interpolation.
    """
    tpr: float
    """Share of malicious rows with score >= threshold."""
    fpr: float
    """Share of benign rows with score >= threshold."""
    tpr_ci: tuple[float, float]
    """Clopper-Pearson interval of tpr on the effective number of malicious groups."""
    fpr_ci: tuple[float, float]
    """Clopper-Pearson interval of fpr on the effective number of benign groups."""
    ece: float
    """Expected calibration error of the scores in 10 equal-width bins."""
    brier: float
    """Mean squared difference of score and label."""
    n: int
    """Number of rows."""
    n_malicious: int
    """Number of rows with label 1."""
    n_groups: int
    """Number of groups (clients, runs): the sample size that counts."""
    threshold: float
    """The probe's threshold; a score that reaches it is flagged."""
    by: tuple[GroupRow, ...] = ()
    """One row per name, benign names first; empty if no names were given."""

    def to_dict(self) -> dict[str, Any]:
        """Return plain dicts, lists, numbers and None only.

        Json.dumps(..., allow_nan=False) takes it.
        """
        facts = dict(vars(self))
        facts["tpr_at_fpr"] = {f"{level:g}": rate for level, rate in self.tpr_at_fpr.items()}
        facts |= {name: list(facts[name]) for name in ("auroc_ci", "tpr_ci", "fpr_ci")}
        facts["by"] = [dict(vars(row)) for row in self.by]
        return facts

    def table(self) -> str:
        """Return the report as aligned plain text."""
        head = (
            f"{self.n} rows ({self.n_malicious} malicious) in {self.n_groups} groups; [95 %"
            " intervals] count groups"
        )
        lines = [["AUROC", f"{self.auroc:.3f}", _interval(self.auroc_ci)]]
        lines += [
            [f"TPR at FPR <= {level:g}", f"{rate:.3f}", ""]
            for level, rate in self.tpr_at_fpr.items()
        ]
        lines += [
            [f"TPR at score >= {self.threshold:g}", f"{self.tpr:.3f}", _interval(self.tpr_ci)],
            [f"FPR at score >= {self.threshold:g}", f"{self.fpr:.3f}", _interval(self.fpr_ci)],
            ["calibration error (ECE)", f"{self.ece:.3f}", ""],
            ["Brier score", f"{self.brier:.3f}", ""],
        ]
        text = head + "\n" + _aligned(lines, left=1)
        if not self.by:
            return text
        kinds = {0: "benign", 1: "malicious", None: "both"}
        rows = [["name", "label", "rows", "groups", "flagged", "mean score", "AUROC"]]
        for row in self.by:
            area = "-" if row.auroc is None else f"{row.auroc:.3f}"
            counts = [str(row.n), str(row.n_groups), f"{row.flagged:.3f}", f"{row.mean_score:.3f}"]
            rows.append([row.name, kinds[row.label], *counts, area])
        return text + "\n\n" + _aligned(rows, left=2)

    def __str__(self) -> str:
        return self.table()


def report(
    labels: ArrayLike,
    scores: ArrayLike,
    groups: Groups | None,
    *,
    threshold: float,
    by: Sequence[str] | None = None,
    resamples: int = 2000,
    seed: int = 0,
) -> EvalReport:
    """Evaluate P(malicious) against labels.

    labels (n,) in {0, 1}; scores (n,) in [0, 1]; groups (n,) strings, integers or tuples, None for
    each row its own group (right only if no two rows share a client or run); by (n,) optional names
    (data source, attack) for one table line each. A group may hold rows of both labels, as a client
    that turns malicious does; it is resampled as one and counts in both.

    Raises FitError if lengths, labels, range, groups or threshold are wrong or a class is missing,
    NonFiniteError for NaN or infinite scores.
    """
    y, s = _two_classes(labels, scores)
    _probabilities(y, s)
    if not np.isfinite(threshold):
        raise FitError(
            f"threshold is {threshold!r}; expected a finite number; pass the probe's threshold"
        )
    codes = _group_codes(groups, len(y))
    flagged = s >= threshold
    return EvalReport(
        auroc=auroc(y, s),
        auroc_ci=auroc_ci(y, s, codes, resamples=resamples, seed=seed),
        tpr_at_fpr={level: tpr_at_fpr(y, s, level) for level in FPR_LEVELS},
        tpr=float(flagged[y].mean()),
        fpr=float(flagged[~y].mean()),
        tpr_ci=_rate_ci(flagged[y], codes[y]),
        fpr_ci=_rate_ci(flagged[~y], codes[~y]),
        ece=ece(y, s),
        brier=brier(y, s),
        n=len(y),
        n_malicious=int(y.sum()),
        n_groups=int(codes.max()) + 1,
        threshold=float(threshold),
        by=() if by is None else _group_rows(y, s, codes, flagged, by),
    )


def _group_rows(
    y: Bools, s: Floats, codes: Ints, flagged: Bools, by: Sequence[str]
) -> tuple[GroupRow, ...]:
    if len(by) != len(y):
        raise FitError(f"got {len(by)} names in by for {len(y)} rows; expected one name a row")
    names = np.array([str(name) for name in by])
    rows = []
    for name in np.unique(names):
        mine = names == name
        pure = bool(y[mine].all() or not y[mine].any())
        label = int(y[mine][0]) if pure else None
        against = mine | (y != y[mine][0])
        rows.append(
            GroupRow(
                name=str(name),
                label=label,
                n=int(mine.sum()),
                n_groups=len(np.unique(codes[mine])),
                flagged=float(flagged[mine].mean()),
                mean_score=float(s[mine].mean()),
                auroc=auroc(y[against], s[against]) if pure else None,
            )
        )
    return tuple(sorted(rows, key=lambda row: (2 if row.label is None else row.label, row.name)))


def _rate_ci(flagged: Bools, codes: Ints, level: float = 0.95) -> tuple[float, float]:
    """Return a Clopper-Pearson interval of the mean of flagged (m,) for rows that are alike within
    their group.

    The sample size is Kish's effective number of groups, m**2 / sum(group size**2), which is the
    number of groups if they
    are equally large and the number of rows if each is its own group: the worst case, in which a
    group's rows all agree, so wider than needed where they do not. The count of flagged groups need
    not be whole; the beta quantiles that define the interval do not ask for that.

    Source: Korn and Graubard 1998, Survey Methodology 24:193, Sec. 2.
    """
    from scipy.special import betaincinv  # 0.3 s to import, and only a full report needs it

    rate = float(flagged.mean())
    sizes = np.bincount(codes)
    size = float(sizes.sum() ** 2 / (sizes**2).sum())
    hits, tail = rate * size, (1.0 - level) / 2.0
    low = 0.0 if rate == 0.0 else float(betaincinv(hits, size - hits + 1.0, tail))
    high = 1.0 if rate == 1.0 else float(betaincinv(hits + 1.0, size - hits, 1.0 - tail))
    return low, high


@dataclass(frozen=True)
class _PairIndex:
    """Row numbers of the malicious and of the benign rows (sorted by score), and per malicious row
    how many benign ones
    score below it (`left`) and not above it (`right`): left + right counts half-pairs won, a tie
    being one half."""

    malicious: Ints
    benign: Ints
    left: Ints
    right: Ints


def _pair_index(y: Bools, s: Floats) -> _PairIndex:
    malicious, benign = np.flatnonzero(y), np.flatnonzero(~y)
    benign = benign[np.argsort(s[benign], kind="stable")]
    left = np.searchsorted(s[benign], s[malicious], side="left")
    return _PairIndex(
        malicious, benign, left, np.searchsorted(s[benign], s[malicious], side="right")
    )


def _weighted_auroc(index: _PairIndex, weights: Ints) -> Floats:
    """Return the AUROC (b,) of each column of integer row weights (n, b).

    NaN where a class weighs nothing.

    One prefix sum over the sorted benign rows says for every threshold how much benign weight lies
    below, so a column costs O(n). Integers keep it exact: every column equals the sum over all
    pairs, to the last bit.
    """
    positive = weights[index.malicious]  # (n_malicious, b)
    below = np.zeros((len(index.benign) + 1, weights.shape[1]), dtype=np.int64)
    np.cumsum(weights[index.benign], axis=0, out=below[1:])
    halves = (positive * (below[index.left] + below[index.right])).sum(axis=0)
    pairs = positive.sum(axis=0) * below[-1]
    values: Floats = np.divide(halves, 2 * pairs, out=np.full(len(pairs), np.nan), where=pairs > 0)
    return values


def _resampled_aurocs(y: Bools, s: Floats, codes: Ints, resamples: int, seed: int) -> Floats:
    """Return the AUROC (resamples,) of each resample of the groups.

    Rows are weighted by the draws of their group.
    """
    rng, index, n_groups = np.random.default_rng(seed), _pair_index(y, s), int(codes.max()) + 1
    block = max(1, _BLOCK_CELLS // len(y))
    values = []
    for start in range(0, resamples, block):
        size = min(block, resamples - start)
        drawn = rng.integers(n_groups, size=(size, n_groups))
        cells = (
            drawn + n_groups * np.arange(size)[:, None]
        )  # one row of n_groups counters per resample
        counts = np.bincount(cells.ravel(), minlength=size * n_groups).reshape(size, n_groups)
        # (n, size): rows along the first axis make every gather a copy of contiguous memory
        values.append(_weighted_auroc(index, np.ascontiguousarray(counts.T)[codes]))
    return np.concatenate(values)


def _labelled(labels: ArrayLike, scores: ArrayLike) -> tuple[Bools, Floats]:
    """Return labels as (n,) bool and scores as (n,) float64, or raise."""
    y, s = np.asarray(labels), np.asarray(scores)
    if y.ndim != 1 or y.shape != s.shape or not len(y):
        raise FitError(
            f"got labels of shape {y.shape} and scores of shape {s.shape}; expected one label and"
            " one score a row"
        )
    if y.dtype.kind not in "biuf" or not np.isin(y, (0, 1)).all():
        some = ", ".join(repr(value) for value in np.unique(y[:1000].astype(str))[:4].tolist())
        raise FitError(f"got labels such as {some}; expected only 0 (benign) and 1 (malicious)")
    if s.dtype.kind not in "biuf":
        raise FitError(f"got scores of dtype {s.dtype}; expected numbers")
    s = s.astype(np.float64)
    if not np.isfinite(s).all():
        bad = int((~np.isfinite(s)).sum())
        raise NonFiniteError(
            f"{bad} of {len(s)} scores are NaN or infinite; expected finite ones; drop or fix these"
            " rows"
        )
    return y.astype(bool), s


def _two_classes(labels: ArrayLike, scores: ArrayLike) -> tuple[Bools, Floats]:
    y, s = _labelled(labels, scores)
    if y.all() or not y.any():
        kind = "malicious" if y.all() else "benign"
        raise FitError(
            f"all {len(y)} rows are {kind}; expected rows of both classes; add some of the other"
        )
    return y, s


def _probabilities(labels: ArrayLike, probabilities: ArrayLike) -> tuple[Bools, Floats]:
    y, p = _labelled(labels, probabilities)
    if p.min() < 0.0 or p.max() > 1.0:
        raise FitError(
            f"got scores from {p.min():g} to {p.max():g}; expected probabilities in [0, 1]; pass"
            " P(malicious), not logits"
        )
    return y, p


def _group_codes(groups: Groups | None, n: int) -> Ints:
    """Return group numbers (n,) that run from 0 without gaps.

    Sorted by name, so the order of rows does not matter.
    """
    if groups is None:
        return np.arange(n, dtype=np.int64)
    names = (
        groups.tolist() if hasattr(groups, "tolist") else list(groups)
    )  # plain values: two equal tensors hash differently
    if len(names) != n:
        raise FitError(
            f"got {len(names)} groups for {n} rows; expected one group a row, such as the client id"
        )
    if any(name is None or isinstance(name, list) or name != name for name in names):
        raise FitError(
            "got a group that is None, NaN or a list; expected a string, integer or tuple for each"
            " row, none missing"
        )
    distinct = set(names)
    try:
        ordered = sorted(distinct)
    except TypeError:  # names of several types
        ordered = sorted(distinct, key=repr)
    codes = {name: code for code, name in enumerate(ordered)}
    return np.array([codes[name] for name in names], dtype=np.int64)


def _interval(ends: tuple[float, float]) -> str:
    return f"[{ends[0]:.3f}, {ends[1]:.3f}]"


def _aligned(rows: list[list[str]], left: int) -> str:
    """Pad cells to columns: the first `left` columns to the left, numbers to the right."""
    widths = [max(len(cell) for cell in column) for column in zip(*rows, strict=True)]
    formats = [f"{{:{'<' if i < left else '>'}{width}}}" for i, width in enumerate(widths)]
    return "\n".join("  ".join(formats).format(*row).rstrip() for row in rows)
