"""What leave-one-out evaluation found: one outcome a detector and fold, summaries, plain data."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..evaluation import EvalReport, report
from ..metrics import auroc
from .folds import Mask, Side

_DIGITS = 4  # after the point, of numbers in plain data; in a JSON file more would only take space


@dataclass(frozen=True)
class CutResult:
    """Error rates at one cut; the error instead, where the training rows do not allow the cut.

    Attributes:
        cut: as it was asked for, "fpr:0.01" or "0.8".
        thresholds: lowest and highest of the fold's probes.
        tpr, fpr: share flagged of malicious and of benign rows, hard negatives among the latter.
        tpr_ci, fpr_ci: 95 % Clopper-Pearson intervals on the effective number of groups.
        fpr_hard, fpr_ordinary: of hard negatives and of other benign rows; None where none was
            tested.
        by: kind of row -> share flagged.
    """

    cut: str
    thresholds: tuple[float, float] = (0.0, 0.0)
    tpr: float = 0.0
    fpr: float = 0.0
    tpr_ci: tuple[float, float] = (0.0, 1.0)
    fpr_ci: tuple[float, float] = (0.0, 1.0)
    fpr_hard: float | None = None
    fpr_ordinary: float | None = None
    by: Mapping[str, float] = field(default_factory=dict)
    error: str = ""

    def to_dict(self) -> dict[str, Any]:
        """All but the table by kind, or the cut and its error."""
        if self.error:
            return {"cut": self.cut, "error": self.error}
        return {name: value for name, value in vars(self).items() if name not in ("by", "error")}


@dataclass(frozen=True)
class Outcome:
    """One detector on one fold.

    Attributes:
        detector, recipe, baseline: which.
        left_out, side: see `loraprobe.study.folds.Fold`.
        withheld: rows neither trained on nor tested.
        n_trained: fewest and most training rows of the fold's fits.
        report: the ranking: AUROC with its cluster-bootstrap interval, TPR at 1 % FPR, ECE, AUROC
            by kind of row. Its own tpr and fpr are at 0.5 and not meant to be used: `cuts` has the
            rates.
        n_hard, auroc_hard: the hard negatives tested, and the malicious rows' AUROC against them
            alone.
        error: the typed error instead, if the detector could not be fitted on, or not read, these
            rows.
    """

    detector: str
    recipe: str
    baseline: bool
    left_out: str
    side: Side
    withheld: int
    n_trained: tuple[int, int]
    report: EvalReport | None = None
    n_hard: int = 0
    auroc_hard: float | None = None
    cuts: tuple[CutResult, ...] = ()
    error: str = ""

    def to_dict(self) -> dict[str, Any]:
        """Plain data; a baseline, which is to be beaten as a whole, has no table by kind."""
        names = ("detector", "recipe", "baseline", "left_out", "side", "withheld", "n_trained")
        facts = {name: getattr(self, name) for name in names}
        ranking = self.report
        if ranking is None:
            return facts | {"error": self.error}
        facts |= {
            "n": ranking.n,
            "n_malicious": ranking.n_malicious,
            "n_hard_negative": self.n_hard,
            "n_groups": ranking.n_groups,
            "auroc": ranking.auroc,
            "auroc_ci": ranking.auroc_ci,
            "auroc_hard_negative": self.auroc_hard,
            "tpr_at_fpr": {f"{level:g}": rate for level, rate in ranking.tpr_at_fpr.items()},
            "ece": ranking.ece,
            "cuts": [cut.to_dict() for cut in self.cuts],
        }
        if not self.baseline:
            facts["by"] = {
                row.name: {
                    "n": row.n,
                    "auroc": row.auroc,
                    "flagged": [cut.by.get(row.name) for cut in self.cuts],
                }
                for row in ranking.by
            }
        return facts


@dataclass(frozen=True)
class LeaveOneOutReport:
    """Outcomes in the order of detectors, then of what was left out.

    `protocol` is everything that decides them but the adapters.
    """

    protocol: dict[str, Any]
    outcomes: tuple[Outcome, ...]

    def summary(self) -> list[dict[str, Any]]:
        """A row a detector and side: mean and worst over what was left out, and what was measured.

        The sides are not mixed: a malicious value says whether it is found, a benign one whether it
        is flagged.
        """
        groups: dict[tuple[Any, ...], list[Outcome]] = {}
        for outcome in self.outcomes:
            key = (outcome.detector, outcome.recipe, outcome.baseline, outcome.side)
            groups.setdefault(key, []).append(outcome)
        return [self._summary(mine) for mine in groups.values()]

    def _summary(self, mine: Sequence[Outcome]) -> dict[str, Any]:
        reports = {outcome.left_out: outcome.report for outcome in mine if outcome.report}
        row: dict[str, Any] = {
            "detector": mine[0].detector,
            "recipe": mine[0].recipe,
            "baseline": mine[0].baseline,
            "side": mine[0].side,
            "measured": len(reports),
            "cannot": len(mine) - len(reports),
        }
        if not reports:
            return row | {"error": mine[0].error}
        worst = min(reports, key=lambda name: reports[name].auroc)
        return row | {
            "auroc_mean": _mean([ranking.auroc for ranking in reports.values()]),
            "auroc_worst": reports[worst].auroc,
            "worst": worst,
            "tpr_at_1_fpr_mean": _mean([ranking.tpr_at_fpr[0.01] for ranking in reports.values()]),
            "ece_mean": _mean([ranking.ece for ranking in reports.values()]),
            "cuts": [
                _cut_summary([outcome.cuts[index] for outcome in mine if outcome.report])
                for index in range(len(self.protocol["cuts"]))
            ],
        }

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready: protocol, summary, outcomes; numbers of four digits after the point."""
        outcomes = [outcome.to_dict() for outcome in self.outcomes]
        parts = {"protocol": self.protocol, "summary": self.summary(), "outcomes": outcomes}
        return {name: _plain(part) for name, part in parts.items()}


@dataclass(frozen=True)
class Tested:
    """The n tested rows of a fold.

    Attributes:
        scores, labels, groups, kinds: (n,).
        hard: (n,), which are hard negatives.
        listed: kinds to list apart; the other class's have folds of their own.
    """

    scores: NDArray[np.float64]
    labels: NDArray[np.int64]
    groups: Sequence[str]
    kinds: Sequence[str]
    hard: Mask
    listed: frozenset[str]

    def measured(self, outcome: Outcome, cuts: Sequence[CutResult], seed: int) -> Outcome:
        """The outcome with the measures of these rows filled in.

        Raises:
            FitError: the rows are of one class.
        """
        ranking = report(
            self.labels, self.scores, self.groups, threshold=0.5, by=self.kinds, seed=seed
        )
        against = (self.labels == 1) | self.hard
        has_hard = self.hard.any()
        return replace(
            outcome,
            report=replace(ranking, by=tuple(row for row in ranking.by if row.name in self.listed)),
            n_hard=int(self.hard.sum()),
            auroc_hard=auroc(self.labels[against], self.scores[against]) if has_hard else None,
            cuts=tuple(cuts),
        )

    def at_cut(self, name: str, flagged: Mask, ends: tuple[float, float]) -> CutResult:
        """Error rates of which rows are flagged (n,), each at the cut of the probe that scored it.

        Args:
            ends: the lowest and the highest of those cuts.
        """
        flags = flagged.astype(np.float64)  # for the report's intervals of rates
        rates = report(self.labels, flags, self.groups, threshold=0.5, by=self.kinds, resamples=1)
        ordinary = (self.labels == 0) & ~self.hard
        in_hard, in_ordinary = (
            float(flagged[mask].mean()) if mask.any() else None for mask in (self.hard, ordinary)
        )
        return CutResult(
            name,
            ends,
            *(rates.tpr, rates.fpr, rates.tpr_ci, rates.fpr_ci),
            in_hard,
            in_ordinary,
            {row.name: row.flagged for row in rates.by},
        )


def _cut_summary(cuts: list[CutResult]) -> dict[str, Any]:
    """Means and worst rates over folds.

    Over none of them if any lacks the cut, for a mean over some would flatter.
    """
    if lacking := [cut for cut in cuts if cut.error]:
        return {"cut": cuts[0].cut, "lacking": len(lacking), "error": lacking[0].error}
    hard = [cut.fpr_hard for cut in cuts if cut.fpr_hard is not None]
    return {
        "cut": cuts[0].cut,
        "tpr_mean": _mean([cut.tpr for cut in cuts]),
        "tpr_worst": min(cut.tpr for cut in cuts),
        "fpr_mean": _mean([cut.fpr for cut in cuts]),
        "fpr_worst": max(cut.fpr for cut in cuts),
        "fpr_hard_mean": _mean(hard) if hard else None,
        "fpr_hard_worst": max(hard, default=None),
    }


def _mean(values: Sequence[float]) -> float:
    return float(np.mean(values))


def _plain(value: Any) -> Any:
    if isinstance(value, float):
        return round(value, _DIGITS)
    if isinstance(value, dict):
        return {str(name): _plain(part) for name, part in value.items()}
    return [_plain(part) for part in value] if isinstance(value, list | tuple) else value
