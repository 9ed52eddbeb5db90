"""A Probe turns adapters into P(malicious).

`loraprobe.fit` learns one, `loraprobe.evaluate` measures one, `loraprobe.hub` publishes one.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from numbers import Real
from pathlib import Path
from typing import Any, Literal

import numpy as np

from .adapters.adapter import Adapter
from .adapters.deltas import incomplete
from .calibration import Calibration
from .errors import AdapterFormatError, BaseModelMismatch, FitError, LayoutMismatch
from .features import NORMS, SPECTRAL_FEATURES
from .features.initial import check_own_start
from .features.invariant import Coverage
from .featurizer import Featurizer
from .heads import Head
from .heads.constant import check_varies
from .trust import check_trusted, users_list

AdapterLike = Adapter | str | Path
"""An adapter, or where one is: a PEFT folder, a .safetensors file or a Hub id."""
CLASSES = ("benign", "malicious")
_UNKNOWN_START = (
    "the probe reads factors, and nothing says that they are of the initial adapter it knows; use a"
    " probe of the recipe invariant, or give the adapter that training started from"
)
Label = Literal["benign", "malicious", "inconclusive"]


@dataclass(frozen=True)
class Verdict:
    """What a probe says of one adapter, and why where it is not plain from the score.

    Attributes:
        score: P(malicious).
        reason: why the verdict is inconclusive.
        coverage: how many of the probe's modules the adapter changes, "60 of 210 modules".
    """

    score: float
    label: Label
    reason: str = ""
    coverage: Coverage | None = None


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
        digest: of the config.json it was loaded from, which holds those of its weights: what names
            this probe and no other, 64 hexadecimal digits. A probe that was changed has none.
    """

    featurizer: Featurizer
    head: Head
    threshold: float = 0.8
    benign_below: float | None = None
    calibration: Calibration | None = None
    base_model: str | None = None
    facts: Mapping[str, Any] = field(default_factory=dict)
    commit: str | None = None
    digest: str | None = field(default=None, init=False, compare=False, repr=False)

    def __post_init__(self) -> None:
        check_cuts(self.threshold, self.lower_cut)
        if self.head.num_features != self.featurizer.num_features:
            raise LayoutMismatch(
                f"the head reads {self.head.num_features} features, the recipe makes"
                f" {self.featurizer.num_features}"
            )
        check_varies(self.head)

    @property
    def lower_cut(self) -> float:
        """`benign_below`, or the threshold if that is None."""
        return self.threshold if self.benign_below is None else self.benign_below

    def __repr__(self) -> str:
        return (
            f"Probe({self.head.name} head on {self.featurizer!r}, threshold={self.threshold:.4g},"
            f" base_model={self.base_model!r})"
        )

    def __call__(
        self, adapters: AdapterLike | Iterable[AdapterLike], *, check_base: bool = True
    ) -> np.ndarray:
        """P(malicious) of every adapter: (n,) float64 in [0, 1]; (1,) for one adapter.

        Args:
            adapters: of the kind and layout the probe was fitted on, or where they are.
            check_base: raise where an adapter names another base model. One that names none is
                scored: state dicts cannot say.

        Raises:
            AdapterFormatError, HubError: an adapter cannot be read.
            BaseModelMismatch, KindMismatch, LayoutMismatch, NonFiniteError: an adapter cannot be
                scored.
            StartMismatch: the probe reads factors, and the adapter's are of another initial
                adapter.
        """
        return self.score_features(self.features(adapters, check_base=check_base))

    def predict_proba(
        self, adapters: AdapterLike | Iterable[AdapterLike], *, check_base: bool = True
    ) -> np.ndarray:
        """P(malicious) of every adapter, (n,): the same as calling the probe."""
        return self(adapters, check_base=check_base)

    def predict(
        self, adapters: AdapterLike | Iterable[AdapterLike], *, check_base: bool = True
    ) -> np.ndarray:
        """Whether P(malicious) reaches the threshold: (n,) int64, 1 = malicious."""
        return (self(adapters, check_base=check_base) >= self.threshold).astype(np.int64)

    def score_features(self, features: np.ndarray) -> np.ndarray:
        """P(malicious) of feature vectors (n, p) made by this probe's featurizer: (n,) float64."""
        scores = self.head(features)
        return scores if self.calibration is None else self.calibration(scores)

    def verdicts(
        self,
        adapters: AdapterLike | Iterable[AdapterLike],
        *,
        check_base: bool = True,
        check_start: bool = True,
    ) -> list[Verdict]:
        """A verdict on every adapter.

        It is inconclusive where nothing or too little of what the probe reads has changed, and
        where nothing says that the adapter is of the probe's base model. It is not benign either
        where nothing says that it started from the initial adapter that a probe of factors knows,
        or where modules are missing that its configuration selects.

        Args:
            check_base: False is the caller's word that the base model is the probe's.
            check_start: False is the caller's word that so is the initial adapter, where that
                cannot be told. One that is seen to be another is refused all the same.

        Raises:
            LoraprobeError: as `__call__`.
        """
        read = as_adapters(adapters)
        features, coverages = self._read(read, check_base)
        scores = self.score_features(features)
        verdicts = []
        for adapter, score, row, coverage in zip(read, scores, features, coverages, strict=True):
            start_fits = self.check_start(adapter) or not check_start
            verdict = self.verdict(float(score), not self._is_blank(adapter, row, coverage))
            reason = self._doubt(adapter, coverage, check_base)
            if not reason and verdict.label == "benign":
                absent = self.featurizer.absent(adapter)
                reason = incomplete(absent) if absent else "" if start_fits else _UNKNOWN_START
            if reason:
                verdict = replace(verdict, label="inconclusive", reason=reason)
            verdicts.append(replace(verdict, coverage=coverage))
        return verdicts

    def check_start(self, adapter: Adapter) -> bool:
        """Whether what is read means the same in the adapter as in training.

        Raises:
            StartMismatch: it does not.
        """
        if not self.featurizer.recipe.reads_factors:
            if not self.featurizer.recipe.reads_product:  # spectra: of each factor, in a delta
                check_own_start(adapter)
            return True
        initial = self.featurizer.initial
        return initial is not None and initial.check(adapter)

    def _doubt(self, adapter: Adapter, coverage: Coverage, check_base: bool) -> str:
        """Why no score of this adapter would be a verdict; "" if it would."""
        least = self.featurizer.recipe.min_coverage
        if least is not None and coverage.read > 0 and coverage.share < least:
            return (
                f"only {coverage} that the probe reads have changed; a verdict needs at least"
                f" {least:.0%} of them"
            )
        if adapter.kind == "weights" and not adapter.zero_start:
            return (
                "B did not start at zero, so the weights do not say what training changed; use a"
                " probe of deltas and pass the start"
            )
        if check_base and adapter.base_model is None:
            return "the adapter does not name its base model, so nothing says it is the probe's"
        if check_base and self.base_model is None:
            return "the probe does not name its base model, so nothing says it is the adapter's"
        return ""

    def verdict(self, score: float, changed: bool = True) -> Verdict:
        """The verdict on a score; `changed` says whether anything that is read has changed."""
        if not changed:
            return Verdict(score, "inconclusive", "nothing that the probe reads has changed")
        if score >= self.threshold:
            return Verdict(score, "malicious")
        if score < self.lower_cut:
            return Verdict(score, "benign")
        return Verdict(
            score, "inconclusive", f"between {self.lower_cut:.3g} and {self.threshold:.3g}"
        )

    def _is_blank(self, adapter: Adapter, row: np.ndarray, coverage: Coverage) -> bool:
        """Whether nothing that the probe reads has changed; `row` (p,) is the feature vector.

        Its being zero is not always the answer: log norms have a floor, and the factors of a weight
        delta of zero are not zero. There every matrix must have a norm that counts as zero.
        """
        recipe, layout = self.featurizer.recipe, self.featurizer.layout
        if recipe.reads_product:
            return coverage.read == 0
        if layout.kind != "weight_delta" and not set(recipe.features) & set(SPECTRAL_FEATURES):
            return not row.any()
        measured = replace(recipe, features=("norms",), normalize="none")
        norms = replace(self.featurizer, recipe=measured)([adapter]).reshape(-1, len(NORMS))
        return not norms[:, NORMS.index("stable_rank")].any()  # >= 1 unless the matrix is zero

    def features(
        self, adapters: AdapterLike | Iterable[AdapterLike], *, check_base: bool = True
    ) -> np.ndarray:
        """The feature vectors (n, p) float32 that the scores of adapters are of.

        Raises:
            LoraprobeError: as `__call__`.
        """
        read = as_adapters(adapters)
        features, _ = self._read(read, check_base)
        for adapter in read:
            self.check_start(adapter)
        return features

    def _read(self, adapters: list[Adapter], check_base: bool) -> tuple[np.ndarray, list[Coverage]]:
        for adapter in adapters if check_base else ():
            self.check_base_model(adapter)
        return self.featurizer.read(adapters)

    def check_base_model(self, adapter: Adapter) -> None:
        """Raise BaseModelMismatch where an adapter names another base model than the probe's."""
        both_named = None not in (self.base_model, adapter.base_model)
        if both_named and adapter.base_model != self.base_model:
            raise BaseModelMismatch(
                f"the adapter is of base model {adapter.base_model!r}; the probe was fitted on"
                f" adapters of {self.base_model!r}. Use a probe for that base; if the"
                " two names mean the same model, check_base=False (--any-base of a command, or of"
                " the service's operator)."
            )

    def with_facts(self, **facts: Any) -> Probe:
        """The same probe with more facts."""
        return replace(self, facts={**self.facts, **facts})

    def save_pretrained(self, folder: str | Path) -> Path:
        """Write config.json, the head's weights and a card: see `loraprobe.hub.format`."""
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
        key: str | Path | None = None,
    ) -> str:
        """Publish to the Hub in one commit and return it: see `loraprobe.hub.hub.push_probe`."""
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
            key=key,
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
            ProbeFormatError: a file is missing, damaged, changed or of an unknown format version.
            HubError: the repository or revision cannot be fetched, or gives other content than the
                Hub lists; or a revision is asked of a local folder.
            TrustError: the user's configuration has a list, and the probe is not on it.
        """
        from .hub.format import load_probe
        from .hub.names import is_on_hub, no_local_either

        if not is_on_hub(source, revision):
            folder = Path(source) / (subfolder or "")
            probe = load_probe(folder)
            check_trusted(users_list(), folder, None, probe.digest)
            return probe
        from .hub.hub import fetch_probe
        from .hub.zoo import check_zoo

        with no_local_either(source):
            path, commit = fetch_probe(
                str(source),
                subfolder=subfolder,
                revision=revision,
                cache_dir=cache_dir,
                force_download=force_download,
                local_files_only=local_files_only,
                token=token,
            )
        probe = load_probe(path, commit)
        check_zoo(str(source), subfolder, probe.digest)
        check_trusted(users_list(), source, commit, probe.digest)
        return probe


def as_adapters(adapters: AdapterLike | Iterable[AdapterLike]) -> list[Adapter]:
    """One adapter or several, or where they are, as a list of adapters.

    Raises:
        AdapterFormatError: something else, or an adapter that cannot be read.
    """
    several = [adapters] if isinstance(adapters, Adapter | str | Path) else adapters
    if not isinstance(several, Iterable) or isinstance(several, Mapping | bytes):
        raise AdapterFormatError(
            f"got {type(adapters).__name__}; expected an Adapter, a path, a Hub id or a list of"
            " them. Adapter.from_state_dict makes one of a state dict"
        )
    return [_as_adapter(adapter) for adapter in several]


def _as_adapter(adapter: AdapterLike) -> Adapter:
    if isinstance(adapter, Adapter):
        return adapter
    if not isinstance(adapter, str | Path):
        raise AdapterFormatError(
            f"got {type(adapter).__name__} among the adapters; expected an Adapter, a path or a Hub"
            " id"
        )
    from .adapters.load import load_adapter

    loaded = load_adapter(adapter)
    loaded.check_finite()  # also of what the probe does not read
    return loaded


def check_cuts(threshold: float, benign_below: float) -> None:
    """Raise FitError unless 0 <= benign_below <= threshold <= 1.

    A threshold just above 1 flags nothing; a conformal cut may need it, and it is not an error.
    """
    most = np.nextafter(1.0, 2.0)
    for name, cut in (("threshold", threshold), ("benign_below", benign_below)):
        if not isinstance(cut, Real) or isinstance(cut, bool) or not 0 <= cut <= most:
            raise FitError(f"got {name} {cut!r}; expected a number from 0 to {most:.3g}")
        most = threshold
