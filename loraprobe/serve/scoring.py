"""From the bytes of a body and what was asked of them to the answer, without any HTTP."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np

from ..adapters.adapter import Adapter, Kind
from ..adapters.deltas import factor_delta, weight_delta
from ..adapters.pair import Factor
from ..adapters.safetensors import TensorFile, read_safetensors
from ..errors import DataError, KindMismatch, LoraprobeError
from ..features import spectra
from ..probe import Probe, Verdict
from .header_cache import HeaderCache
from .results import Result, Unchecked
from .settings import Detail, Settings
from .slices import SLICE, read_slice, read_whole, slice_factors, stated

MAX_SPECTRA = 256
"""Modules whose singular values are returned, in sorted order."""
MAX_RANK = 512
"""Ranks that spectra are computed of.

The time grows with the third power, and a stranger chooses the rank of what no probe reads.
"""
MAX_VALUES = 64
"""Singular values of one matrix that are returned, the largest first."""
_BOTH: tuple[Factor, ...] = ("A", "B")


@dataclass(frozen=True)
class Question:
    """What a request asks of its body.

    Attributes:
        probes: names, in the order of the answer.
        kind: what kind of adapter the body is said to be.
        alpha: PEFT's lora_alpha, of a file that does not hold its scalings.
        base_model: likewise.
        spectra: whether the answer has singular values too.
    """

    probes: tuple[str, ...]
    kind: Kind = "weights"
    alpha: float | None = None
    base_model: str | None = None
    spectra: bool = False

    @property
    def is_plain(self) -> bool:
        """Whether nothing is said or asked that a known slice would have to be read for."""
        return self.alpha is None and self.base_model is None and not self.spectra


class Answered(NamedTuple):
    """A result of every probe that was asked, and the spectra if they were."""

    results: list[Result]
    spectra: dict[str, Any] | None = None


class Scorer:
    """Scores bodies with the probes of a service. Safe to call from several threads."""

    def __init__(self, settings: Settings) -> None:
        self._probes = settings.probes
        self._base = settings.base
        self._checks_base = not settings.any_base
        self._detail: Detail = settings.detail
        self._caches = {name: HeaderCache(probe) for name, probe in self._probes.items()}
        for name, probe in self._probes.items():
            _check_start(name, probe, self._base)
            # Now rather than in the first request: a head's library is imported, or found missing.
            probe.head(np.zeros((1, probe.head.num_features), np.float32))

    def __call__(self, data: bytes, question: Question) -> Answered:
        """A result of every probe that was asked for.

        One probe that cannot score the body is an error of the whole request: no verdict is left
        out without a word.

        Raises:
            LoraprobeError: the body is no adapter, or not one that a probe can score.
        """
        if question.is_plain and (cached := self._cached(data, question)) is not None:
            return Answered(cached)
        body = _Body(read_safetensors(data), question, self._base)
        results = [self._scored(name, body) for name in question.probes]
        if body.is_slice:
            for name in question.probes:
                named = None not in (body.stated_base, self._probes[name].base_model)
                if named or not self._checks_base:
                    self._caches[name].remember(data, body.stated_base)
        if not question.spectra:
            return Answered(results)
        return Answered(results, body.spectra(self._probes[question.probes[0]]))

    def _cached(self, data: bytes, question: Question) -> list[Result] | None:
        """The results of a slice whose header every probe knows, None if one does not."""
        results = []
        for name in question.probes:
            try:
                remembered = self._caches[name].verdict(data, question.kind)
            except LoraprobeError as error:
                raise _named(name, error) from None
            if remembered is None:
                return None
            verdict, base_model = remembered
            results.append(self._result(name, verdict, question.kind, base_model, is_slice=True))
        return results

    def _scored(self, name: str, body: _Body) -> Result:
        probe = self._probes[name]
        try:
            adapter = body.adapter_for(probe)
            # A slice holds no A to compare: its sender did that (`save_slice`), or vouches for it.
            [verdict] = probe.verdicts(
                [adapter], check_base=self._checks_base, check_start=not body.is_slice
            )
        except LoraprobeError as error:
            raise _named(name, error) from None
        return self._result(name, verdict, body.kind, adapter.base_model, body.is_slice)

    def _result(
        self, name: str, verdict: Verdict, kind: Kind, base_model: str | None, is_slice: bool
    ) -> Result:
        probe = self._probes[name]
        unchecked: list[Unchecked] = ["config"]
        if base_model is None or probe.base_model is None or not self._checks_base:
            unchecked.append("base_model")
        if is_slice:
            unchecked.append("other_modules")
        if kind != "weights":
            unchecked.append("start")
        exact = self._detail == "scores"
        score = verdict.score if exact else round(verdict.score, 1)
        between_cuts = verdict.label == "inconclusive" and verdict.reason.startswith("between")
        return Result(
            probe=name,
            commit=probe.commit,
            score=None if self._detail == "verdicts" else score,
            verdict=verdict.label,
            reason=verdict.reason if exact or not between_cuts else "between the cuts",
            threshold=probe.threshold if exact else None,
            unchecked=tuple(unchecked),
        )


def _check_start(name: str, probe: Probe, base: Adapter | str | None) -> None:
    """A probe of products is sent weights, whose change is counted from a B of zero.

    Raises:
        DataError: the service's base is another start than that.
    """
    if not isinstance(base, Adapter) or not probe.featurizer.recipe.reads_product:
        return
    if any(np.asarray(pair.B).any() for pair in base.values()):
        raise DataError(
            f"got a --base whose B is not zero with the probe {name!r}, which reads the product"
            " B A of the weights that are sent; expected none. Serve that probe by itself"
        )


def _named(probe: str, error: LoraprobeError) -> LoraprobeError:
    return type(error)(f"probe {probe!r}: {error}")


class _Body:
    """A body that was parsed once, seen as what each probe needs it to be."""

    def __init__(self, file: TensorFile, question: Question, base: Adapter | str | None) -> None:
        self._file = file
        self._question = question
        self._base = base
        self._statement = stated(file)
        self._deltas: dict[str, Adapter] = {}
        self.kind: Kind = question.kind
        self.is_slice = self._statement is not None and self._statement.form == SLICE
        self.stated_base = None if self._statement is None else self._statement.base_model
        self._whole: Adapter | None = None
        if not self.is_slice:
            self._whole = read_whole(
                file, question.kind, alpha=question.alpha, base_model=question.base_model
            )

    def adapter_for(self, probe: Probe) -> Adapter:
        """The body as the kind that a probe scores.

        Raises:
            LoraprobeError: it is not that and cannot be made that.
        """
        whole = self._whole
        kind = probe.featurizer.layout.kind
        if whole is None:
            return self._slice_for(probe)
        if kind == whole.kind or whole.kind != "weights":
            return whole  # of another kind than the probe's: the probe refuses it, and says so
        if kind not in self._deltas:
            self._deltas[kind] = self._delta(whole, kind)
        return self._deltas[kind]

    def _slice_for(self, probe: Probe) -> Adapter:
        statement = self._statement
        question = self._question
        if statement is not None and statement.kind != question.kind:
            raise KindMismatch(
                f"got a slice of a {statement.kind}, and a request that says {question.kind!r}:"
                f" ask with ?kind={statement.kind}"
            )
        if question.alpha is not None or question.base_model is not None:
            raise DataError(
                "got alpha or base_model beside a slice, which holds its scalings and its base"
                " model; leave them out"
            )
        return read_slice(self._file, probe.featurizer)

    def _delta(self, whole: Adapter, kind: Kind) -> Adapter:
        if self._base is None:
            raise DataError(
                f"the probe scores a {kind}, and this service does not know the adapter that"
                f" training started from: send the {kind} itself (?kind={kind}), or have the"
                " service started with --base"
            )
        if isinstance(self._base, Adapter):
            if kind == "factor_delta":
                return factor_delta(whole, self._base)
            return weight_delta(whole, self._base)
        if kind == "weight_delta":
            raise DataError(
                "the probe scores a weight_delta, and this service knows no adapter that training"
                " started from, only that its B was zero"
            )
        return factor_delta(whole, None)

    def spectra(self, probe: Probe) -> dict[str, Any]:
        """Singular values of the weight change B @ A where both factors are known, else of the
        changes of the factors.
        """
        adapter, factors = self._displayed(probe)
        modules = list(adapter)[:MAX_SPECTRA]
        rank = max(adapter[module].rank for module in modules)
        if rank > MAX_RANK:
            raise DataError(
                f"got a module of rank {rank}; expected at most {MAX_RANK} for spectra. Ask without"
                " spectra=true"
            )
        rows = [
            {"module": module, "matrix": matrix, "values": _rounded(row.tolist())}
            for (module, matrix), row in spectra(adapter, modules, factors).items()
        ]
        return {"of": adapter.kind, "modules": len(adapter), "rows": rows}

    def _displayed(self, probe: Probe) -> tuple[Adapter, tuple[Factor, ...]]:
        if self._whole is None:
            factors = slice_factors(probe.featurizer)
            adapter = self._slice_for(probe)
            if len(factors) == 2:
                return adapter, factors
            # One factor alone has no product: it is shown like the change of a factor.
            return Adapter(dict(adapter), kind="factor_delta"), factors
        if self._whole.kind == "weights" and self._deltas and isinstance(self._base, Adapter):
            return weight_delta(self._whole, self._base), _BOTH
        return self._whole, _BOTH


def _rounded(values: list[float]) -> list[float]:
    return [float(f"{value:.6g}") for value in values[:MAX_VALUES]]
