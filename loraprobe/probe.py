"""A Probe turns adapters into P(malicious); fit_probe learns one, evaluate measures one.

Labels, always: 0 = benign, 1 = malicious. A group is what must not be split between training and
testing, usually a client: its adapters resemble each other more than strangers do.
"""

from __future__ import annotations

from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np

from .adapters.adapter import Adapter
from .errors import BaseModelMismatch, FitError, HubError, LayoutMismatch, ProbeFormatError
from .features import NORMS, SPECTRAL_FEATURES
from .featurizer import FeatureRecipe, Featurizer
from .fit.calibration import (
    Calibration,
    Method,
    budget_of,
    fit_calibration,
    fnr_threshold,
    fpr_threshold,
)
from .fit.heads import fit_head
from .fit.mass_mean import Kinds, own_kinds
from .heads import Head
from .hub.card_figure import distribution_of
from .metrics import EvalReport, report

CLASSES = ("benign", "malicious")
Label = Literal["benign", "malicious", "inconclusive"]


@dataclass(frozen=True)
class Verdict:
    """What a probe says of one adapter, and why where it is not plain from the score."""

    score: float
    label: Label
    reason: str = ""


@dataclass(frozen=True)
class Probe:
    """A fitted detector; immutable and safe to share.

    Attributes:
        featurizer: adapters -> features.
        head: features -> uncalibrated P(malicious).
        threshold: a score of at least this is malicious.
        benign_below: a score below this is benign, in between the verdict is inconclusive; None for
            the threshold.
        calibration: the map from the head's scores to probabilities, if one was fitted.
        base_model: the base model of the adapters it was fitted on, if they all say so.
        facts: JSON-ready: training, data, metrics, licence, known failures.
        commit: the Hub commit it was loaded from, if it came from there.
    """

    featurizer: Featurizer
    head: Head
    threshold: float = 0.8
    benign_below: float | None = None
    calibration: Calibration | None = None
    base_model: str | None = None
    facts: Mapping[str, Any] = field(default_factory=dict)
    commit: str | None = None

    def __post_init__(self) -> None:
        check_cuts(self.threshold, self.lower_cut)
        if self.head.num_features != self.featurizer.num_features:
            raise LayoutMismatch(
                f"the head reads {self.head.num_features} features, the recipe makes"
                f" {self.featurizer.num_features}"
            )

    @property
    def lower_cut(self) -> float:
        """`benign_below`, or the threshold if that is None."""
        return self.threshold if self.benign_below is None else self.benign_below

    def __call__(self, adapters: Sequence[Adapter], *, check_base: bool = True) -> np.ndarray:
        """P(malicious) of every adapter: (n,) float64 in [0, 1].

        Args:
            adapters: of the kind and layout the probe was fitted on.
            check_base: raise where an adapter names another base model. One that names none is
                scored: state dicts cannot say.

        Raises:
            BaseModelMismatch, KindMismatch, LayoutMismatch, NonFiniteError: an adapter cannot be
                scored.
        """
        return self.score_features(self._features(adapters, check_base))

    def score_features(self, features: np.ndarray) -> np.ndarray:
        """P(malicious) of feature vectors (n, p) made by this probe's featurizer: (n,) float64."""
        scores = self.head(features)
        return scores if self.calibration is None else self.calibration(scores)

    def verdicts(self, adapters: Sequence[Adapter], *, check_base: bool = True) -> list[Verdict]:
        """A verdict on every adapter.

        An adapter without any change in what is read is inconclusive.

        Raises:
            As `__call__`.
        """
        features = self._features(adapters, check_base)
        scores = self.score_features(features)
        return [
            self.verdict(float(score), not self._is_blank(adapter, row))
            for adapter, score, row in zip(adapters, scores, features, strict=True)
        ]

    def verdict(self, score: float, changed: bool = True) -> Verdict:
        """The verdict that goes with a score.

        `changed` says whether anything that the probe reads has changed.
        """
        if not changed:
            return Verdict(score, "inconclusive", "nothing that the probe reads has changed")
        if score >= self.threshold:
            return Verdict(score, "malicious")
        if score < self.lower_cut:
            return Verdict(score, "benign")
        return Verdict(
            score, "inconclusive", f"between {self.lower_cut:.3g} and {self.threshold:.3g}"
        )

    def _is_blank(self, adapter: Adapter, row: np.ndarray) -> bool:
        """Whether nothing that the probe reads has changed.

        `row` (p,) is the adapter's feature vector.

        Its being zero is not always the answer: log norms have a floor, and the factors of a weight
        delta of zero are not zero. There every matrix must have a norm that counts as zero.
        """
        recipe, layout = self.featurizer.recipe, self.featurizer.layout
        if layout.kind != "weight_delta" and not set(recipe.features) & set(SPECTRAL_FEATURES):
            return not row.any()
        norms = replace(
            self.featurizer, recipe=replace(recipe, features=("norms",), normalize="none")
        )([adapter])
        return not norms.reshape(-1, len(NORMS))[
            :, NORMS.index("stable_rank")
        ].any()  # at least 1 unless the matrix is zero

    def _features(self, adapters: Sequence[Adapter], check_base: bool) -> np.ndarray:
        for adapter in adapters:
            known = isinstance(adapter, Adapter) and None not in (
                self.base_model,
                adapter.base_model,
            )
            if check_base and known and adapter.base_model != self.base_model:
                raise BaseModelMismatch(
                    f"the adapter is of base model {adapter.base_model!r}; the probe was fitted on"
                    f" adapters of {self.base_model!r}. Use a probe for that base, or"
                    " check_base=False (--any-base) if the two names mean the same model."
                )
        return self.featurizer(adapters)

    def with_facts(self, **facts: Any) -> Probe:
        """The same probe with more facts."""
        return replace(self, facts={**self.facts, **facts})

    def save_pretrained(self, folder: str | Path) -> Path:
        """Write config.json, the head's weights and a card into a folder.

        See loraprobe.hub.format.
        """
        from .hub.format import save_probe

        return save_probe(self, Path(folder))

    def push_to_hub(
        self,
        repo_id: str,
        *,
        subfolder: str | None = None,
        private: bool | None = None,
        token: str | bool | None = None,
        branch: str | None = None,
        create_pr: bool = False,
        commit_message: str | None = None,
    ) -> str:
        """Publish to the Hub in one commit, and return that commit (40 hexadecimal digits).

        See loraprobe.hub.hub.push_probe.
        """
        from .hub.hub import push_probe

        return push_probe(
            self,
            repo_id,
            subfolder=subfolder,
            private=private,
            token=token,
            branch=branch,
            create_pr=create_pr,
            commit_message=commit_message,
        )

    @classmethod
    def from_pretrained(
        cls,
        source: str | Path,
        subfolder: str | None = None,
        revision: str | None = None,
        *,
        cache_dir: str | Path | None = None,
        force_download: bool = False,
        local_files_only: bool = False,
        token: str | bool | None = None,
    ) -> Probe:
        """Load a probe from a folder or from the Hub ("org/name"), after checking all of it.

        Args:
            subfolder: the folder inside source that holds the probe.
            revision: Hub only: a commit, tag or branch; a name that moves is resolved to one
                commit, which the probe then names. With a full commit that is in the cache nothing
                is asked.
            cache_dir: Hub only: the library's cache if None.
            force_download: Hub only: fetch it again even if it is in the cache.
            local_files_only: Hub only: ask nothing of the network, as with HF_HUB_OFFLINE=1. A
                branch or tag then means the commit that it was when it was last loaded.
            token: Hub only: HF_TOKEN or the library's login if None.

        Raises:
            ProbeFormatError: a file is missing, damaged, changed or of an unknown format version;
                or a revision is asked of a local folder.
            HubError: the repository or revision cannot be fetched, or gives other content than the
                Hub lists.
        """
        from .hub.format import load_probe
        from .hub.hub import fetch_probe, looks_like_repo_id

        path = Path(source)
        if path.is_dir() or not looks_like_repo_id(str(source)):
            if revision is not None:
                raise ProbeFormatError(
                    f"got revision {revision!r} for the local path {path}; revisions belong to"
                    " Hub ids"
                )
            return load_probe(path / (subfolder or ""))
        options = {
            "cache_dir": cache_dir,
            "force_download": force_download,
            "local_files_only": local_files_only,
            "token": token,
        }
        try:
            path, commit = fetch_probe(
                str(source), subfolder=subfolder, revision=revision, **options
            )
        except HubError as error:
            raise HubError(f"{error} (There is no local folder {str(source)!r} either.)") from error
        return replace(load_probe(path), commit=commit)


def check_cuts(threshold: float, benign_below: float) -> None:
    """Raise FitError unless 0 <= benign_below <= threshold <= 1.

    A threshold just above 1 flags nothing; a conformal cut may need it, and it is not an error.
    """
    if not 0 <= threshold <= np.nextafter(1.0, 2.0):
        raise FitError(f"got threshold {threshold}; expected a number in [0, 1]")
    if not 0 <= benign_below <= threshold:
        raise FitError(
            f"got benign_below {benign_below}; expected a number from 0 to the threshold"
            f" {threshold}"
        )


def fit_probe(
    adapters: Sequence[Adapter],
    labels: Sequence[int] | np.ndarray,
    head: str = "linear",
    recipe: FeatureRecipe | None = None,
    groups: Sequence[Hashable] | None = None,
    threshold: float | str = 0.8,
    seed: int = 0,
    **options: Any,
) -> Probe:
    """Featurize labelled adapters and learn a probe from them; see `fit_features` for the rest.

    Args:
        adapters: n adapters of one kind and layout.
        recipe: what to compute; the paper's first_B if None.

    Raises:
        As `Featurizer.fit` and `fit_features`; BaseModelMismatch if they name several base models.
    """
    if not isinstance(adapters, Adapter):  # one adapter alone is refused by Featurizer.fit
        adapters = list(adapters)
    featurizer = Featurizer.fit(recipe or FeatureRecipe.paper(), adapters)
    bases = {adapter.base_model for adapter in adapters}
    if len(bases) > 1:
        raise BaseModelMismatch(
            f"got adapters of several base models {sorted(map(str, bases))}; expected one: fit a"
            " probe for each"
        )
    return fit_features(
        featurizer,
        featurizer(adapters),
        labels,
        head,
        groups,
        threshold,
        seed,
        base_model=bases.pop(),
        **options,
    )


def fit_features(
    featurizer: Featurizer,
    features: np.ndarray,
    labels: Sequence[int] | np.ndarray,
    head: str = "linear",
    groups: Sequence[Hashable] | None = None,
    threshold: float | str = 0.8,
    seed: int = 0,
    *,
    benign_below: float | str | None = None,
    calibration: Method | None = None,
    unit: str = "adapter",
    folds: int = 5,
    kinds: Kinds | None = None,
    base_model: str | None = None,
    facts: Mapping[str, Any] | None = None,
    **head_options: Any,
) -> Probe:
    """Learn a probe from feature vectors that `featurizer` made.

    The head is fitted on everything (one that stops early, on all but its held-out groups). What
    must not be measured on training data (calibration, thresholds from a budget) is fitted on
    out-of-fold scores: `folds` more fits, each scoring groups it did not see. Their distribution is
    recorded in facts["training"]["score_distribution"], calibrated, for the figure on the card.

    Args:
        features: (n, p) float32.
        labels: (n,) 0 = benign, 1 = malicious.
        head: "linear", "linear_paper", "mlp", "xgboost", "cosine" or "mass_mean".
        groups: (n,) which rows belong together; every row by itself if None.
        threshold: a number, or "fpr:0.01" for a budget of false positives (`fpr_threshold`).
        benign_below: where benign ends: a number, or "fnr:0.01"; the threshold if None.
        calibration: None, "platt" or "isotonic".
        unit: what one row is, recorded with the calibration.
        kinds: (n,) what kinds of data each adapter was trained on, its own first, then what was
            mixed into it. With them, held-out scores are of heads that saw nothing of the row's own
            kind (`out_of_kind_scores`) in place of `folds`: a cut and a probability for unseen
            data.
        head_options: passed to the head's fit.

    Raises:
        FitError: labels, groups or budget do not allow the fit; the message says what is needed.
    """
    y = _labels(labels, len(features))
    keys: list[Hashable] = list(range(len(y))) if groups is None else list(groups)
    if len(keys) != len(y):
        raise FitError(f"got {len(keys)} groups for {len(y)} adapters; expected one each")
    head_options = {**default_head_options(head, featurizer.recipe), **head_options}
    fitted = fit_head(head, features, y, keys, seed, kinds, **head_options)
    training = {
        "head": head,
        "head_options": head_options,
        "seed": seed,
        "n": len(y),
        "n_malicious": int(y.sum()),
        "n_groups": len(set(keys)),
        "unit": unit,
    }
    calibrated = None
    if calibration or isinstance(threshold, str) or isinstance(benign_below, str):
        if kinds is None:
            scores, held_out = (
                out_of_fold_scores(features, y, keys, head, seed, folds, **head_options),
                "fold",
            )
        else:
            scores, held_out = (
                out_of_kind_scores(features, y, keys, kinds, head, seed, **head_options),
                "kind",
            )
        if calibration:
            calibrated = fit_calibration(calibration, scores, y, keys, unit)
            scores = calibrated(scores)
        what = f"out-of-{held_out} scores" + (f", {calibration}-calibrated" if calibration else "")
        classes = {name: scores[y == label] for label, name in enumerate(CLASSES)}
        training |= (
            {"folds": folds} if kinds is None else {"kinds": len({entry[0] for entry in kinds})}
        )
        training |= {"threshold_rule": str(threshold), "benign_below_rule": str(benign_below)}
        training |= {"score_distribution": distribution_of(what, unit, classes)}
        if isinstance(threshold, str):
            threshold = fpr_threshold(budget_of(threshold, "fpr"), scores, y, keys)
        if isinstance(benign_below, str):
            # A cut above the threshold would contradict it: then there is nothing to abstain on.
            benign_below = min(
                threshold, max(0.0, fnr_threshold(budget_of(benign_below, "fnr"), scores, y, keys))
            )
    return Probe(
        featurizer,
        fitted,
        threshold,
        benign_below,
        calibrated,
        base_model,
        {**(facts or {}), "training": training},
    )


def default_head_options(head: str, recipe: FeatureRecipe) -> dict[str, Any]:
    """What `fit_features` passes to the head's fit if nothing else is said.

    Log norms and ranks have scales of their own and are standardized for a linear head; flattened
    unit vectors must keep theirs.
    """
    return {"standardize": True} if head == "linear" and "norms" in recipe.features else {}


def out_of_fold_scores(
    features: np.ndarray,
    labels: np.ndarray,
    groups: Sequence[Hashable],
    head: str,
    seed: int,
    folds: int = 5,
    **head_options: Any,
) -> np.ndarray:
    """(n,) scores, each from a head that saw no row of that row's group.

    Raises:
        FitError: a class has fewer groups than there are folds.
    """
    from sklearn.model_selection import StratifiedGroupKFold

    if folds < 2:
        raise FitError(
            f"got folds {folds}; expected at least 2: one to score and the others to fit on"
        )
    for label, name in enumerate(CLASSES):
        count = len({group for group, y in zip(groups, labels, strict=True) if y == label})
        if count < folds:
            raise FitError(
                f"got {count} {name} groups; out-of-fold scores need at least {folds}, one a fold"
            )
    index = {group: number for number, group in enumerate(dict.fromkeys(groups))}
    numbers = np.array([index[group] for group in groups])
    scores = np.full(len(labels), np.nan)
    for train, test in StratifiedGroupKFold(folds, shuffle=True, random_state=seed).split(
        features, labels, numbers
    ):
        fitted = fit_head(
            head,
            features[train],
            labels[train],
            [groups[row] for row in train],
            seed,
            **head_options,
        )
        scores[test] = fitted(features[test])
    return scores


def out_of_kind_scores(
    features: np.ndarray,
    labels: np.ndarray,
    groups: Sequence[Hashable],
    kinds: Kinds,
    head: str,
    seed: int,
    **head_options: Any,
) -> np.ndarray:
    """(n,) scores, each from a head that saw no row with that row's own kind in it, alone or mixed.

    Raises:
        FitError: not one entry a row, or without one of the kinds a class is gone.
    """
    own, entries = own_kinds(kinds, len(labels)), [tuple(entry) for entry in kinds]
    scores = np.full(len(labels), np.nan)
    for kind in dict.fromkeys(own):
        train = [row for row, entry in enumerate(entries) if kind not in entry]
        test = [row for row, one in enumerate(own) if one == kind]
        kept, known = [groups[row] for row in train], [entries[row] for row in train]
        scores[test] = fit_head(
            head, features[train], labels[train], kept, seed, known, **head_options
        )(features[test])
    return scores


def evaluate(
    probe: Probe,
    adapters: Sequence[Adapter],
    labels: Sequence[int] | np.ndarray,
    groups: Sequence[Hashable] | None = None,
    *,
    by: Sequence[str] | None = None,
    seed: int = 0,
    check_base: bool = True,
) -> EvalReport:
    """Score labelled adapters and report how well the probe tells them apart.

    Args:
        groups: (n,) clusters of the bootstrap interval; every adapter by itself if None.
        by: (n,) names (data source, attack, ...) for a table of their own.

    Raises:
        FitError: only one class, or lengths differ. Scoring errors as `Probe.__call__`.
    """
    scores = probe(adapters, check_base=check_base)
    return report(
        _labels(labels, len(scores)), scores, groups, threshold=probe.threshold, by=by, seed=seed
    )


def _labels(labels: Sequence[int] | np.ndarray, count: int) -> np.ndarray:
    y = np.asarray(labels)
    if y.shape != (count,):
        raise FitError(f"got labels of shape {y.shape} for {count} adapters; expected one each")
    if not np.isin(y, (0, 1)).all():
        raise FitError("got labels other than 0 and 1; expected 0 = benign, 1 = malicious")
    return y.astype(np.int64)
