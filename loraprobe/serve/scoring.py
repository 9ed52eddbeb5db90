"""From the bytes of a body and what was asked of them to the answer, without any HTTP."""

from __future__ import annotations

import math
from collections.abc import Collection
from dataclasses import dataclass
from typing import Any, cast
from urllib.parse import parse_qsl

import numpy as np

from ..adapters.adapter import KINDS, Adapter, Kind
from ..adapters.deltas import factor_delta, weight_delta
from ..adapters.pair import Factor
from ..adapters.safetensors import TensorFile, read_safetensors
from ..adapters.strict_json import quoted
from ..errors import DataError, KindMismatch, LoraprobeError
from ..features import spectra
from ..probe import Probe, Verdict
from .answers import Refusal, Result
from .known import KnownSlices
from .settings import Settings
from .slices import SLICE, read_slice, read_whole, slice_factors, stated

PARAMETERS = ("probe", "kind", "alpha", "base_model", "spectra")
MAX_SPECTRA = 256
"""Modules whose singular values are returned, in sorted order."""
MAX_RANK = 512
"""Ranks that spectra are computed of.

The time grows with the third power, and a stranger chooses the rank of what no probe reads.
"""
MAX_VALUES = 64
"""Singular values of one matrix that are returned, the largest first."""


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


def parse_question(query: bytes, probes: Collection[str]) -> Question:
    """Read a query string; `probes` are the names that are served.

    Raises:
        Refusal: a parameter is unknown, occurs twice or has a value that is not valid.
    """
    if not query:
        return Question(tuple(probes))
    try:
        pairs = parse_qsl(
            query.decode("ascii"),
            keep_blank_values=True,
            strict_parsing=True,
            errors="strict",
            max_num_fields=20,
        )
    except ValueError:
        raise _bad_query(
            "the query string cannot be read", query.decode("ascii", "replace"), "name=value&..."
        ) from None
    values = dict(pairs)
    for name, _ in pairs:
        if name not in PARAMETERS:
            raise _bad_query("unknown parameter", name, ", ".join(PARAMETERS))
    if len(values) < len(pairs):
        raise _bad_query("a parameter occurs twice", query.decode(), "each at most once")
    asked = values.get("probe")
    if asked is not None and asked not in probes:
        raise Refusal(
            422,
            "UnknownProbe",
            "no probe of that name is served",
            got=quoted(asked),
            expected=", ".join(sorted(probes)),
        )
    kind, flag = values.get("kind", "weights"), values.get("spectra", "false")
    if kind not in KINDS:
        raise _bad_query("unknown kind", kind, ", ".join(KINDS))
    if flag not in ("true", "false"):
        raise _bad_query("spectra is a switch", flag, "true or false")
    named = values.get("base_model")
    if named is not None and not (0 < len(named) <= 500 and named.isprintable()):
        raise _bad_query("base_model is no name", named, "1 to 500 printable characters")
    return Question(
        tuple(probes) if asked is None else (asked,),
        cast(Kind, kind),
        _alpha(values.get("alpha")),
        named,
        flag == "true",
    )


def _alpha(text: str | None) -> float | None:
    if text is None:
        return None
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not math.isfinite(value) or value == 0:
        raise _bad_query("alpha is no scaling", text, "a finite number other than 0")
    return value


def _bad_query(message: str, got: str, expected: str) -> Refusal:
    return Refusal(422, "QueryError", message, got=quoted(got), expected=expected)


class Scorer:
    """Scores bodies with the probes of a service. Safe to call from several threads."""

    def __init__(self, settings: Settings) -> None:
        self._probes, self._base, self._check_base = (
            settings.probes,
            settings.base,
            not settings.any_base,
        )
        self._known = {name: KnownSlices(probe) for name, probe in self._probes.items()}
        for probe in self._probes.values():
            # Now rather than in the first request: a head's library is imported, or found missing.
            probe.head(np.zeros((1, probe.head.num_features), np.float32))

    def __call__(
        self, body: bytes, question: Question
    ) -> tuple[list[Result], dict[str, Any] | None]:
        """A result of every probe that was asked for, and the spectra if they were.

        One probe that cannot score the body is an error of the whole request: no verdict is left
            out without a word.

        Raises:
            LoraprobeError: the body is no adapter, or not one that a probe can score.
        """
        if question.is_plain and (known := self._of_known(body, question)) is not None:
            return known, None
        sent = _Sent(read_safetensors(body), question, self._base)
        results = [self._result(name, sent) for name in question.probes]
        if sent.is_slice:
            for name in question.probes:
                self._known[name].remember(body)
        return results, sent.spectra(self._probes[question.probes[0]]) if question.spectra else None

    def _of_known(self, body: bytes, question: Question) -> list[Result] | None:
        """The results of a slice that every probe knows again, None if one does not."""
        results = []
        for name in question.probes:
            try:
                verdict = self._known[name].verdict(body, question.kind)
            except LoraprobeError as error:
                raise _of_probe(name, error) from None
            if verdict is None:
                return None
            results.append(self._shown(name, verdict))
        return results

    def _result(self, name: str, sent: _Sent) -> Result:
        probe = self._probes[name]
        try:
            [verdict] = probe.verdicts([sent.adapter_for(probe)], check_base=self._check_base)
        except LoraprobeError as error:
            raise _of_probe(name, error) from None
        return self._shown(name, verdict)

    def _shown(self, name: str, verdict: Verdict) -> Result:
        probe = self._probes[name]
        return Result(
            name, probe.commit, verdict.score, verdict.label, verdict.reason, probe.threshold
        )


def _of_probe(name: str, error: LoraprobeError) -> LoraprobeError:
    return type(error)(f"probe {name!r}: {error}")


class _Sent:
    """A body that was parsed once, seen as what each probe needs it to be."""

    def __init__(self, file: TensorFile, question: Question, base: Adapter | str | None) -> None:
        self._file, self._question, self._base = file, question, base
        self._said = stated(file)
        self.is_slice = self._said is not None and self._said.form == SLICE
        self._whole = (
            None
            if self.is_slice
            else read_whole(
                file, question.kind, alpha=question.alpha, base_model=question.base_model
            )
        )
        self._deltas: dict[str, Adapter] = {}

    def adapter_for(self, probe: Probe) -> Adapter:
        """The body as the kind that a probe scores.

        Raises:
            LoraprobeError: it is not that and cannot be made that.
        """
        whole, kind = self._whole, probe.featurizer.layout.kind
        if whole is None:
            return self._slice_for(probe)
        if kind == whole.kind or whole.kind != "weights":
            return whole  # of another kind than the probe's: the probe refuses it, and says so
        if kind not in self._deltas:
            self._deltas[kind] = self._delta(whole, kind)
        return self._deltas[kind]

    def _slice_for(self, probe: Probe) -> Adapter:
        said, question = self._said, self._question
        if said is not None and said.kind != question.kind:
            raise KindMismatch(
                f"got a slice of a {said.kind}, and a request that says {question.kind!r}: ask with"
                f" ?kind={said.kind}"
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
            return (
                factor_delta(whole, self._base)
                if kind == "factor_delta"
                else weight_delta(whole, self._base)
            )
        if kind == "weight_delta":
            raise DataError(
                "the probe scores a weight_delta, and this service knows no adapter that training"
                " started from, only that its B was zero"
            )
        return factor_delta(whole, None)

    def spectra(self, probe: Probe) -> dict[str, Any]:
        """Singular values: of the weight change B @ A where both factors are known, of the changes
        of the factors otherwise.
        """
        adapter, factors = self._shown(probe)
        modules = list(adapter)[:MAX_SPECTRA]
        if (rank := max(adapter[module].rank for module in modules)) > MAX_RANK:
            raise DataError(
                f"got a module of rank {rank}; expected at most {MAX_RANK} for spectra. Ask without"
                " spectra=true"
            )
        values = spectra(adapter, modules, factors)
        rows = [
            {"module": module, "matrix": matrix, "values": _rounded(row.tolist())}
            for (module, matrix), row in values.items()
        ]
        return {"of": adapter.kind, "modules": len(adapter), "rows": rows}

    def _shown(self, probe: Probe) -> tuple[Adapter, tuple[Factor, ...]]:
        both: tuple[Factor, ...] = ("A", "B")
        if self._whole is None:
            factors, adapter = slice_factors(probe.featurizer), self._slice_for(probe)
            # One factor alone has no product: it is shown like the change of a factor.
            return (
                adapter if len(factors) == 2 else Adapter(dict(adapter), kind="factor_delta")
            ), factors
        if self._whole.kind == "weights" and self._deltas and isinstance(self._base, Adapter):
            return weight_delta(self._whole, self._base), both
        return self._whole, both


def _rounded(values: list[float]) -> list[float]:
    return [float(f"{value:.6g}") for value in values[:MAX_VALUES]]
