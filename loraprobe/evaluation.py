"""Measuring a probe on labelled adapters that it was not fitted on."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import ArrayLike

from .errors import FitError
from .metrics import (
    Bools,
    Floats,
    Groups,
    Ints,
    auroc,
    auroc_ci,
    brier,
    ece,
    group_codes,
    probabilities_of,
    rate_ci,
    tpr_at_fpr,
    two_classes,
)
from .overlap import fitted_on

if TYPE_CHECKING:
    from .probe import AdapterLike, Probe

FPR_LEVELS = (0.01, 0.05)


def evaluate(
    probe: Probe,
    adapters: AdapterLike | Iterable[AdapterLike],
    labels: ArrayLike,
    groups: Groups | None = None,
    *,
    by: Sequence[str] | None = None,
    seed: int = 0,
    check_base: bool = True,
) -> EvalReport:
    """Score labelled adapters and report how well the probe tells them apart.

    Args:
        adapters: n adapters, or where they are.
        labels: (n,) 0 = benign, 1 = malicious.
        groups: (n,) clusters of the bootstrap interval; every adapter by itself if None.
        by: (n,) names (data source, attack, ...) for a table of their own.

    Raises:
        FitError: only one class, or lengths differ. Scoring errors as `Probe.__call__`.
    """
    features = probe.features(adapters, check_base=check_base)
    scores = probe.score_features(features)
    measured = report(labels, scores, groups, threshold=probe.threshold, by=by, seed=seed)
    return replace(measured, n_fitted=fitted_on(probe.facts.get("training"), features))


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
    n_fitted: int | None = None
    """Number of rows that the probe was fitted on; None if it does not say on which."""

    def to_dict(self) -> dict[str, Any]:
        """Return dicts, lists, numbers and None only: json.dumps(..., allow_nan=False) takes it."""
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
        text = "\n".join([head, *self._overlap(), _aligned(lines, left=1)])
        if not self.by:
            return text
        kinds = {0: "benign", 1: "malicious", None: "both"}
        rows = [["name", "label", "rows", "groups", "flagged", "mean score", "AUROC"]]
        for row in self.by:
            area = "-" if row.auroc is None else f"{row.auroc:.3f}"
            counts = [str(row.n), str(row.n_groups), f"{row.flagged:.3f}", f"{row.mean_score:.3f}"]
            rows.append([row.name, kinds[row.label], *counts, area])
        return text + "\n\n" + _aligned(rows, left=2)

    def _overlap(self) -> list[str]:
        """Whether the figures are of adapters that the probe had not seen."""
        if self.n_fitted is None:
            return ["the probe does not say what it was fitted on: see to it that these are others"]
        if self.n_fitted == 0:
            return []
        return [
            f"WARNING: the probe was fitted on {self.n_fitted} of these {self.n} adapters; the"
            " figures flatter it. Measure it on others"
        ]

    def __str__(self) -> str:
        return self.table()

    def __repr__(self) -> str:
        low, high = self.auroc_ci
        return (
            f"EvalReport(auroc={self.auroc:.3f} [{low:.3f}, {high:.3f}], n={self.n},"
            f" n_malicious={self.n_malicious}, n_groups={self.n_groups})"
        )


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
    y, s = two_classes(labels, scores)
    probabilities_of(y, s)
    if not np.isfinite(threshold):
        raise FitError(
            f"threshold is {threshold!r}; expected a finite number; pass the probe's threshold"
        )
    codes = group_codes(groups, len(y))
    flagged = s >= threshold
    return EvalReport(
        auroc=auroc(y, s),
        auroc_ci=auroc_ci(y, s, codes, resamples=resamples, seed=seed),
        tpr_at_fpr={level: tpr_at_fpr(y, s, level) for level in FPR_LEVELS},
        tpr=float(flagged[y].mean()),
        fpr=float(flagged[~y].mean()),
        tpr_ci=rate_ci(flagged[y], codes[y]),
        fpr_ci=rate_ci(flagged[~y], codes[~y]),
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


def _interval(ends: tuple[float, float]) -> str:
    return f"[{ends[0]:.3f}, {ends[1]:.3f}]"


def _aligned(rows: list[list[str]], left: int) -> str:
    """Pad cells to columns: the first `left` columns to the left, numbers to the right."""
    widths = [max(len(cell) for cell in column) for column in zip(*rows, strict=True)]
    formats = [f"{{:{'<' if i < left else '>'}{width}}}" for i, width in enumerate(widths)]
    return "\n".join("  ".join(formats).format(*row).rstrip() for row in rows)
