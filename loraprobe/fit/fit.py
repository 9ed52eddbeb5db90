"""Learning a probe: labelled adapters or feature vectors in, a frozen `Probe` out.

Labels, always: 0 = benign, 1 = malicious. A group is what must not be split between training and
testing, usually a client: its adapters resemble each other more than strangers do.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import ArrayLike

from ..adapters.adapter import Adapter
from ..calibration import Calibration, check_method
from ..distribution import distribution_of
from ..errors import BaseModelMismatch, FitError
from ..featurizer import FeatureRecipe, Featurizer, named_recipe
from ..metrics import checked_labels, group_codes
from ..overlap import marks_of
from ..probe import CLASSES, AdapterLike, Probe, as_adapters, check_cuts
from .calibration import Budget, fit_calibration, fnr_threshold, fpr_threshold, parse_cut
from .data import Kinds, first_kinds
from .heads import fit_head
from .options import head_options as checked_options


@dataclass(frozen=True)
class FitPlan:
    """Everything that decides a fit but the data; checked when it is made.

    Attributes:
        head: "linear", "linear_paper", "mlp", "xgboost", "cosine" or "mass_mean".
        head_options: of that head's fit, see `loraprobe.fit.options`.
        threshold: a number, or "fpr:0.01" for a budget of false positives (`fpr_threshold`).
        benign_below: where benign ends: a number, or "fnr:0.01"; the threshold if None.
        calibration: None, "platt" or "isotonic".
        unit: what one row is, recorded with the calibration.
        folds: of the out-of-fold scores.
        seed: everything random follows from it.

    Raises:
        FitError: an unknown name, or a value of a wrong type or range.
    """

    head: str = "linear"
    head_options: Mapping[str, Any] = field(default_factory=dict)
    threshold: float | str = 0.8
    benign_below: float | str | None = None
    calibration: str | None = None
    unit: str = "adapter"
    folds: int = 5
    seed: int = 0

    def __post_init__(self) -> None:
        checked_options(self.head, self.head_options)
        upper = self.cut
        lower = self.lower_cut
        if not isinstance(upper, Budget) and not isinstance(lower, Budget):
            check_cuts(upper, upper if lower is None else lower)
        if self.calibration is not None:
            check_method(self.calibration)
        if type(self.folds) is not int or self.folds < 2:
            raise FitError(
                f"got folds {self.folds!r}; expected at least 2: one to score and the others to fit"
                " on"
            )
        if type(self.seed) is not int or not 0 <= self.seed < 2**32:
            raise FitError(f"got seed {self.seed!r}; expected a whole number in [0, 2**32)")

    @property
    def cut(self) -> float | Budget:
        """The threshold, or the budget that it is to keep."""
        return parse_cut(self.threshold, "fpr")

    @property
    def lower_cut(self) -> float | Budget | None:
        """Where benign ends, or the budget that it is to keep."""
        return None if self.benign_below is None else parse_cut(self.benign_below, "fnr")

    @property
    def needs_held_out_scores(self) -> bool:
        """Whether something must not be measured on training data."""
        budgets = isinstance(self.cut, Budget) or isinstance(self.lower_cut, Budget)
        return budgets or self.calibration is not None


def fit_probe(
    adapters: Iterable[AdapterLike],
    labels: ArrayLike,
    *,
    head: str = "linear",
    recipe: FeatureRecipe | str | None = None,
    groups: Sequence[Hashable] | None = None,
    threshold: float | str = 0.8,
    seed: int = 0,
    benign_below: float | str | None = None,
    calibration: str | None = None,
    unit: str = "adapter",
    folds: int = 5,
    kinds: Kinds | None = None,
    head_options: Mapping[str, Any] | None = None,
    facts: Mapping[str, Any] | None = None,
) -> Probe:
    """Featurize labelled adapters and learn a probe from them; see `fit_features` for the rest.

    Args:
        adapters: n adapters of one kind and layout, or where they are.
        labels: (n,) 0 = benign, 1 = malicious.
        recipe: what to compute, or its name ("invariant", "paper", ...). If None, the invariant one
            where the adapters say how the weights change, and the paper's first_B where they hold
            nothing but changes of factors.

    Raises:
        LoraprobeError: as `Featurizer.fit` and `fit_features`.
        BaseModelMismatch: they name several base models.
    """
    plan = FitPlan(
        head, head_options or {}, threshold, benign_below, calibration, unit, folds, seed
    )
    named = None if recipe is None else named_recipe(recipe)
    read = as_adapters(adapters)
    feature_recipe = named or default_recipe(read)
    y = checked_labels(labels, len(read))
    featurizer = Featurizer.fit(feature_recipe, read)
    bases = {adapter.base_model for adapter in read}
    if len(bases) > 1:
        raise BaseModelMismatch(
            f"got adapters of several base models {sorted(map(str, bases))}; expected one: fit a"
            " probe for each"
        )
    return _learn(plan, featurizer, featurizer(read), y, groups, kinds, bases.pop(), facts)


def default_recipe(adapters: Sequence[Adapter]) -> FeatureRecipe:
    """The invariant recipe, or the paper's where some adapter is a bare change of factors."""
    bare = any(adapter.kind == "factor_delta" and not adapter.origin for adapter in adapters)
    return FeatureRecipe.paper() if bare else FeatureRecipe.invariant()


def fit_features(
    featurizer: Featurizer,
    features: np.ndarray,
    labels: ArrayLike,
    *,
    head: str = "linear",
    groups: Sequence[Hashable] | None = None,
    threshold: float | str = 0.8,
    seed: int = 0,
    benign_below: float | str | None = None,
    calibration: str | None = None,
    unit: str = "adapter",
    folds: int = 5,
    kinds: Kinds | None = None,
    base_model: str | None = None,
    head_options: Mapping[str, Any] | None = None,
    facts: Mapping[str, Any] | None = None,
) -> Probe:
    """Learn a probe from feature vectors that `featurizer` made.

    The head is fitted on everything (one that stops early, on all but its held-out groups). What
    must not be measured on training data (calibration, thresholds from a budget) is fitted on
    out-of-fold scores: `folds` more fits, each scoring groups it did not see. Their distribution is
    recorded in facts["training"]["score_distribution"], calibrated, for the figure on the card.

    Args:
        features: (n, p) float32.
        labels: (n,) 0 = benign, 1 = malicious.
        groups: (n,) which rows belong together; every row by itself if None.
        head, head_options, threshold, benign_below, calibration, unit, folds, seed: see `FitPlan`.
        kinds: (n,) what kinds of data each adapter was trained on, its own first, then what was
            mixed into it. With them, held-out scores are of heads that saw nothing of the row's own
            kind (`held_out_scores`) in place of `folds`: a cut and a probability for unseen
            data.
        base_model: the base model of the adapters, if it is known.
        facts: JSON-ready, for the probe and its card.

    Raises:
        FitError: labels, groups or budget do not allow the fit; the message says what is needed.
    """
    plan = FitPlan(
        head, head_options or {}, threshold, benign_below, calibration, unit, folds, seed
    )
    features = np.asarray(features)
    y = checked_labels(labels, len(features))
    return _learn(plan, featurizer, features, y, groups, kinds, base_model, facts)


def _learn(
    plan: FitPlan,
    featurizer: Featurizer,
    features: np.ndarray,
    y: np.ndarray,
    groups: Sequence[Hashable] | None,
    kinds: Kinds | None,
    base_model: str | None,
    facts: Mapping[str, Any] | None,
) -> Probe:
    keys: list[Hashable] = group_codes(groups, len(y)).tolist()
    options = {**default_head_options(plan.head, featurizer.recipe), **plan.head_options}
    fitted = fit_head(plan.head, features, y, keys, seed=plan.seed, kinds=kinds, options=options)
    training = {
        "head": plan.head,
        "head_options": options,
        "seed": plan.seed,
        "n": len(y),
        "n_malicious": int(y.sum()),
        "n_groups": len(set(keys)),
        "unit": plan.unit,
        "marks": marks_of(features),
    }
    cuts = _Cuts(plan.cut, plan.lower_cut, None, {})
    if plan.needs_held_out_scores:
        cuts = _held_out_cuts(plan, options, features, y, keys, kinds)
    assert not isinstance(cuts.upper, Budget)  # budgets need held-out scores, which made numbers
    assert not isinstance(cuts.lower, Budget)
    return Probe(
        featurizer,
        fitted,
        cuts.upper,
        cuts.lower,
        cuts.calibration,
        base_model,
        {**(facts or {}), "training": {**training, **cuts.facts}},
    )


@dataclass(frozen=True)
class _Cuts:
    """What is fitted on held-out scores, and what is recorded of that."""

    upper: float | Budget
    lower: float | Budget | None
    calibration: Calibration | None
    facts: Mapping[str, Any]


def _held_out_cuts(
    plan: FitPlan,
    options: Mapping[str, Any],
    features: np.ndarray,
    y: np.ndarray,
    groups: Sequence[Hashable],
    kinds: Kinds | None,
) -> _Cuts:
    scores = held_out_scores(
        features,
        y,
        groups,
        head=plan.head,
        head_options=options,
        seed=plan.seed,
        folds=plan.folds,
        kinds=kinds,
    )
    what = f"out-of-{'fold' if kinds is None else 'kind'} scores"
    calibration = None
    if plan.calibration is not None:
        calibration = fit_calibration(plan.calibration, scores, y, groups, plan.unit)
        scores = calibration(scores)
        what += f", {plan.calibration}-calibrated"
    by_class = {name: scores[y == label] for label, name in enumerate(CLASSES)}
    parts = {"folds": plan.folds} if kinds is None else {"kinds": len({row[0] for row in kinds})}
    facts = {
        **parts,
        "threshold_rule": str(plan.threshold),
        "benign_below_rule": str(plan.benign_below),
        "score_distribution": distribution_of(what, plan.unit, by_class),
    }
    upper = plan.cut
    lower = plan.lower_cut
    if isinstance(upper, Budget):
        upper = fpr_threshold(upper.share, scores, y, groups)
    if isinstance(lower, Budget):
        # A cut above the threshold would contradict it: then there is nothing to abstain on.
        lower = min(upper, max(0.0, fnr_threshold(lower.share, scores, y, groups)))
    return _Cuts(upper, lower, calibration, facts)


def default_head_options(head: str, recipe: FeatureRecipe) -> dict[str, Any]:
    """What `fit_features` passes to the head's fit if nothing else is said.

    Log norms and ranks have scales of their own and are standardized for a linear head; flattened
    unit vectors must keep theirs.
    """
    return {"standardize": True} if head == "linear" and "norms" in recipe.features else {}


def held_out_scores(
    features: np.ndarray,
    labels: np.ndarray,
    groups: Sequence[Hashable],
    *,
    head: str,
    head_options: Mapping[str, Any] | None = None,
    seed: int = 0,
    folds: int = 5,
    kinds: Kinds | None = None,
) -> np.ndarray:
    """(n,) scores, each from a head that saw no row of that row's group, or of its own kind.

    Of its own kind (alone or mixed) where kinds are given; else out of `folds` by group.

    Raises:
        FitError: a class has fewer groups than there are folds; not one entry of kinds a row, or
            without one of the kinds a class is gone.
    """

    def fit(train: list[int]) -> Callable[[np.ndarray], np.ndarray]:
        return fit_head(
            head,
            features[train],
            labels[train],
            [groups[row] for row in train],
            seed=seed,
            kinds=None if kinds is None else [kinds[row] for row in train],
            options=head_options,
        )

    if kinds is None:
        splits = fold_splits(labels, groups, folds, seed)
    else:
        splits = kind_splits(kinds, len(labels))
    scores = np.full(len(labels), np.nan)
    for train, test in splits:
        scores[test] = fit(train)(features[test])
    return scores


Split = tuple[list[int], list[int]]


def fold_splits(
    labels: np.ndarray, groups: Sequence[Hashable], folds: int, seed: int
) -> Iterable[Split]:
    """Rows to fit on and rows to score; no group is on both sides."""
    from sklearn.model_selection import StratifiedGroupKFold

    for label, name in enumerate(CLASSES):
        count = len({group for group, y in zip(groups, labels, strict=True) if y == label})
        if count < folds:
            raise FitError(
                f"got {count} {name} groups; out-of-fold scores need at least {folds}, one a fold"
            )
    index = {group: number for number, group in enumerate(dict.fromkeys(groups))}
    numbers = np.array([index[group] for group in groups])
    splitter = StratifiedGroupKFold(folds, shuffle=True, random_state=seed)
    for train, test in splitter.split(numbers, labels, numbers):
        yield train.tolist(), test.tolist()


def kind_splits(kinds: Kinds, count: int) -> Iterable[Split]:
    """Rows without a kind to fit on, and the kind's own rows to score."""
    firsts = first_kinds(kinds, count)
    entries = [tuple(entry) for entry in kinds]
    for kind in dict.fromkeys(firsts):
        train = [row for row, entry in enumerate(entries) if kind not in entry]
        yield train, [row for row, first in enumerate(firsts) if first == kind]
