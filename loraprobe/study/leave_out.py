"""Leave-one-out evaluation.

What a probe does on a kind of data, attack or training that it has never seen.

`leave_one_out` fits every head on every recipe, and the trivial baselines of every recipe, once a
fold of `loraprobe.study.folds`, and measures it on rows whose kind, group and (where it is cut into
parts) other class it did not see. A cut from a budget is fitted as `fit_features` would: on
out-of-fold scores of the fold's own training rows.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, TypeAlias

import numpy as np
from numpy.typing import NDArray

from ..adapters.adapter import Adapter
from ..calibration import check_method
from ..errors import FitError, LayoutMismatch, LoraprobeError
from ..featurizer import FeatureRecipe, Featurizer
from ..fit.baselines import baseline_recipes
from ..fit.calibration import Budget, budget_of, fit_calibration, fpr_threshold, parse_cut
from ..fit.fit import default_head_options, held_out_scores
from ..fit.heads import HEAD_FITTERS, fit_head
from ..manifest import Row
from .folds import Fold, Part, kind_of, pair_folds, value_folds, values_of
from .report import CutResult, LeaveOneOutReport, Outcome, Tested

Floats: TypeAlias = NDArray[np.float64]
Job: TypeAlias = "tuple[Detector, Fold]"
_Cuts: TypeAlias = dict[
    str | float, float | str
]  # as asked for -> the number, or why there is none
_Scored: TypeAlias = tuple[Floats, _Cuts]
CUT_FOLDS = 3  # of the out-of-fold scores that a cut or a calibration is fitted on
HEADS = ("linear", "linear_paper")  # the two that take well under a second a fit
RECIPES = {
    "all_b": FeatureRecipe.all_b(),
    "paper": FeatureRecipe.paper(),
    "spectral": FeatureRecipe.spectral(),
}


@dataclass(frozen=True)
class Detector:
    """A head on a recipe; `name` is the head's, or the baseline's."""

    name: str
    recipe_name: str
    head: str
    recipe: FeatureRecipe
    is_baseline: bool = False


def detectors_of(
    heads: Sequence[str] = HEADS, recipes: Mapping[str, FeatureRecipe] = RECIPES
) -> tuple[Detector, ...]:
    """Every head on every recipe, then the baselines of every recipe.

    Those that two recipes share come once.

    A cosine head needs rows of norm 1, so it is a baseline only, of the recipe's slices.

    Raises:
        FitError: a head is unknown, or there is none, or no recipe.
    """
    if not heads or not recipes or not set(heads) <= set(HEAD_FITTERS):
        raise FitError(
            f"got the heads {list(heads)} and {len(recipes)} recipes; expected at least one each,"
            f" heads among {', '.join(HEAD_FITTERS)}"
        )
    detectors = [
        Detector(head, name, head, recipe)
        for name, recipe in recipes.items()
        for head in dict.fromkeys(heads)
    ]
    for name, recipe in recipes.items():
        for baseline, (part, head) in baseline_recipes(recipe).items():
            alike = [other for other in detectors if (other.recipe, other.head) == (part, head)]
            if not any(other.is_baseline for other in alike):
                detectors.append(Detector(baseline, name, head, part, is_baseline=True))
    return tuple(detectors)


def leave_one_out(
    adapters: Sequence[Adapter],
    rows: Sequence[Row],
    field: str,
    detectors: Sequence[Detector] | None = None,
    *,
    pairs: bool = False,
    folds: int = 5,
    cuts: Sequence[str | float] = ("fpr:0.01", 0.8),
    calibration: str | None = None,
    bins: int = 4,
    edges: Sequence[float] | None = None,
    keep_twins: bool = False,
    seed: int = 0,
    progress: Callable[[Sequence[Job]], Iterable[Job]] = iter,
) -> LeaveOneOutReport:
    """Leave out every value of a field in turn; the order of the rows changes nothing.

    Args:
        adapters: (n,) of one kind; layouts may differ, and where a detector cannot read what was
            left out, the report says so.
        rows: (n,) their rows of a manifest.
        field: "source", "attack", "recipe", "rank", "lr", "base" or "seed"; see
            `loraprobe.study.folds` for what a fold is.
        detectors: `detectors_of()` if None.
        pairs: with "source": every malicious and every benign source out together, the full grid.
        folds: into how many parts the other class of a one-class value is cut.
        cuts: thresholds to report error rates at: numbers, and "fpr:B" for the conformal cut of
            budget B.
        calibration: "platt" or "isotonic", as in `fit_features`; fixed cuts and the calibration
            error are of calibrated scores then.
        bins, edges: of learning rates, see `values_of`.
        keep_twins: leave safe twins of unseen malicious sources in training.
        seed: of parts, fits and intervals.
        progress: wraps the jobs, one a detector and fold, for a progress bar.

    Returns:
        One outcome a detector and fold, measured or with the typed error that says why not; and a
        summary.

    Raises:
        FitError, DataError: the field, its values, the labels or the options do not allow it, or
            nothing at all could be measured.
    """
    adapters, rows = list(adapters), list(rows)
    _check(rows, adapters, field, pairs, folds)
    order = sorted(
        range(len(rows)), key=lambda row: (rows[row].group, str(rows[row].path), repr(rows[row]))
    )
    rows, adapters = [rows[row] for row in order], [adapters[row] for row in order]
    cut_numbers = tuple(_number_or_budget(cut) for cut in cuts)
    if calibration is not None:
        check_method(calibration)
    values = values_of(rows, adapters, field, bins, edges)
    if pairs:
        left_out_folds = pair_folds(rows, keep_twins)
    else:
        left_out_folds = value_folds(rows, values, field == "source", folds, seed, keep_twins)
    study = _Study(adapters, rows, cut_numbers, calibration, seed)
    jobs = [
        (detector, fold)
        for detector in (detectors_of() if detectors is None else detectors)
        for fold in left_out_folds
    ]
    if not jobs:
        raise FitError(f"got no detector, or no {field} to leave out; expected at least one")
    outcomes = tuple(study.outcome(detector, fold) for detector, fold in progress(jobs))
    if all(outcome.error for outcome in outcomes):
        raise FitError(
            f"nothing could be measured in {len(outcomes)} fits with one {field} left out at a"
            f" time; the first: {outcomes[0].error}"
        )
    labels = [row.label for row in rows]
    protocol = {
        "leave_out": field,
        "pairs": pairs,
        "folds": folds,
        "cut_folds": CUT_FOLDS,
        "cuts": [str(cut) for cut in cut_numbers],
        "calibration": calibration,
        "keep_twins": keep_twins,
        "seed": seed,
        "kind": adapters[0].kind,
        "n": len(rows),
        "n_malicious": sum(labels),
        "n_hard_negative": sum(row.is_hard_negative for row in rows),
        "n_groups": len({row.group for row in rows}),
    }
    return LeaveOneOutReport(protocol, outcomes)


def _number_or_budget(cut: str | float) -> str | float:
    number = parse_cut(cut, "fpr")
    return str(cut) if isinstance(number, Budget) else number


def _check(
    rows: Sequence[Row],
    adapters: Sequence[Adapter],
    field: str,
    pairs: bool,
    folds: int,
) -> None:
    if len(rows) != len(adapters) or len({row.label for row in rows}) != 2:
        raise FitError(
            f"got {len(adapters)} adapters and {len(rows)} rows of"
            f" {len({row.label for row in rows})} classes; expected one each, of both classes"
        )
    if pairs and field != "source":
        raise FitError(
            f"got pairs with {field}; expected them with source alone: one malicious and one benign"
            " source are left out together"
        )
    if folds < 2:
        raise FitError(
            f"got folds {folds}; expected at least 2: one to test and the others to train on"
        )


@dataclass
class _Study:
    """What all fits share; features are made once a recipe where all adapters have one layout."""

    adapters: Sequence[Adapter]
    rows: Sequence[Row]
    cuts: tuple[str | float, ...]
    calibration: str | None
    seed: int

    def __post_init__(self) -> None:
        self.labels = np.array([row.label for row in self.rows])
        self.groups = [row.group for row in self.rows]
        self.kinds = [kind_of(row) for row in self.rows]
        self.hard = np.array([row.is_hard_negative for row in self.rows])
        self._recipe: FeatureRecipe | None = None
        self._features: np.ndarray | None = None

    def outcome(self, detector: Detector, fold: Fold) -> Outcome:
        """The measures of one detector on one fold, or the error that stood in the way."""
        counts = [len(part.train) for part in fold.parts]
        which = (detector.name, detector.recipe_name, detector.is_baseline)
        same = Outcome(*which, fold.left_out, fold.side, fold.withheld, (min(counts), max(counts)))
        try:
            parts = [self._scored(detector, part) for part in fold.parts]
            test = np.concatenate([part.test for part in fold.parts])
            tested = Tested(
                np.concatenate([scores for scores, _ in parts]),
                self.labels[test],
                [self.groups[row] for row in test],
                [self.kinds[row] for row in test],
                self.hard[test],
                fold.kinds,
            )
            cuts = [_at_cut(tested, cut, parts) for cut in self.cuts]
            return tested.measured(same, cuts, self.seed)
        except LoraprobeError as error:
            return replace(same, error=f"{type(error).__name__}: {error}")

    def _scored(self, detector: Detector, part: Part) -> _Scored:
        """Scores (m,) of a part's test rows, and the cuts of the probe, or why it has none."""
        x, x_test = self._read(detector.recipe, part)
        y, groups = self.labels[part.train], [self.groups[row] for row in part.train]
        options = default_head_options(detector.head, detector.recipe)
        if len(set(y.tolist())) < 2:
            raise FitError(
                f"all {len(y)} rows left for training are"
                f" {('benign', 'malicious')[int(y.max(initial=0))]}; expected both classes"
            )
        fitted = fit_head(detector.head, x, y, groups, seed=self.seed, options=options)
        scores = np.asarray(fitted(x_test), dtype=np.float64)
        cuts: _Cuts = {cut: cut for cut in self.cuts if not isinstance(cut, str)}
        budgets, calibrated = [cut for cut in self.cuts if isinstance(cut, str)], None
        if not budgets and self.calibration is None:
            return scores, cuts
        try:
            how: dict[str, Any] = {
                "head": detector.head,
                "head_options": options,
                "folds": CUT_FOLDS,
            }
            held_out = held_out_scores(x, y, groups, seed=self.seed, **how)
            if self.calibration is not None:
                calibrated = fit_calibration(self.calibration, held_out, y, groups, "adapter")
                held_out = calibrated(held_out)
        except FitError as error:
            if self.calibration is not None:
                raise
            return scores, cuts | dict.fromkeys(budgets, f"FitError: {error}")
        for cut in budgets:
            try:
                cuts[cut] = fpr_threshold(budget_of(cut, "fpr"), held_out, y, groups)
            except FitError as error:
                cuts[cut] = f"FitError: {error}"
        return scores if calibrated is None else calibrated(scores), cuts

    def _read(self, recipe: FeatureRecipe, part: Part) -> tuple[np.ndarray, np.ndarray]:
        """Features of a part's training and test rows, by a featurizer of the training rows.

        Raises:
            LayoutMismatch: the training rows differ among themselves, or the test rows from them;
                other errors as `Featurizer`.
        """
        if recipe != self._recipe:
            self._recipe, self._features = recipe, self._all_features(recipe)
        if self._features is not None:
            return self._features[part.train], self._features[part.test]
        train, test = ([self.adapters[row] for row in rows] for rows in (part.train, part.test))
        featurizer = Featurizer.fit(recipe, train)
        return featurizer(train), featurizer(test)

    def _all_features(self, recipe: FeatureRecipe) -> np.ndarray | None:
        """(n, p), or None where layouts differ, or where bases are learnt from the rows.

        Else nothing is learnt from rows but their layout, so one featurizer serves all folds.
        """
        if recipe.reads_product:
            return None
        try:
            return Featurizer.fit(recipe, self.adapters)(self.adapters)
        except LayoutMismatch:
            return None


def _at_cut(tested: Tested, cut: str | float, parts: Sequence[_Scored]) -> CutResult:
    """Rates at a cut of every part's own probe, or why one of the probes has none."""
    by_part = [cuts[cut] for _, cuts in parts]
    numbers = [number for number in by_part if not isinstance(number, str)]
    if len(numbers) < len(by_part):
        return CutResult(str(cut), error=next(entry for entry in by_part if isinstance(entry, str)))
    flagged = [scores >= number for (scores, _), number in zip(parts, numbers, strict=True)]
    return tested.at_cut(str(cut), np.concatenate(flagged), (min(numbers), max(numbers)))
