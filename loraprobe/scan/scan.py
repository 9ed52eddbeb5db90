"""One adapter against a policy: read it, judge it, say why."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from ..adapters.adapter import Adapter
from ..adapters.files import start_of
from ..adapters.formats import WEIGHTS_NAME, is_pickle
from ..adapters.load import load_adapter
from ..errors import LoraprobeError, UnsupportedAdapterError
from ..hub.names import named_revision
from ..probe import Probe, Verdict
from ..trust import check_trusted
from .facts import Facts, Reference
from .findings import Decision, Finding, gravest
from .policy import Policy
from .targets import first_line

WEIGHTS_SUFFIX = ".safetensors"
OTHER_WEIGHTS = (".safetensors", ".gguf", ".npz", ".h5", ".onnx")
FRESH = "fresh"


@dataclass(frozen=True)
class ScanResult:
    """What a scan says of one adapter.

    Attributes:
        target: as it was named.
        decision: "allow", "review" or "block": the gravest of the findings.
        findings: the reasons; none is no finding.
        scores: one entry a probe: probe, score, verdict, coverage.
        facts: what was measured (see `Facts`); None if it could not be read.
        base_model: as the adapter's config names it.
        commit: on the Hub.
        digest: SHA-256 over the files that were judged; None for what could not be read.
    """

    target: str
    decision: Decision
    findings: tuple[Finding, ...]
    scores: tuple[dict[str, Any], ...] = ()
    facts: Facts | None = None
    base_model: str | None = None
    commit: str | None = None
    digest: str | None = None

    @property
    def unreadable(self) -> bool:
        """Whether nothing could be said because it could not be read."""
        return any(finding.rule == "unreadable" for finding in self.findings)

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready; docs/schemas/scan.schema.json has its schema."""
        return json.loads(json.dumps(asdict(self)))  # type: ignore[no-any-return]

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> ScanResult:
        """The inverse of `to_dict`."""
        facts = values["facts"]
        if facts is not None:
            lists = {name: tuple(facts[name]) for name in ("ranks", "leaves")}
            facts = Facts(**{**facts, **lists})
        findings = tuple(Finding(**finding) for finding in values["findings"])
        scores = tuple(values["scores"])
        return cls(**{**values, "facts": facts, "findings": findings, "scores": scores})


class Scanner:
    """A policy with its probes and its reference loaded, for many adapters.

    Args:
        policy: what is allowed.
        base: the adapter that training started from, for probes that score deltas: a path, a Hub
            id, or "fresh" if its B was zero.
        commits: name of a probe or of the base -> its commit on the Hub, as `commits` of another
            scanner has them: a branch may have moved since.

    Raises:
        PolicyError, ProbeFormatError, HubError, TrustError: what the policy names cannot be had.
    """

    def __init__(
        self, policy: Policy, base: str | None = None, commits: Mapping[str, str] | None = None
    ) -> None:
        policy.check_base()
        pinned = commits or {}
        self.policy = policy
        self.probes = {name: _probe(name, pinned.get(name), policy) for name in policy.probes}
        self.reference = self._reference()
        self._before = base if base in (None, FRESH) else _adapter(str(base), pinned.get(str(base)))
        loaded = {**self.probes, str(base): self._before}
        by_name = {name: getattr(source, "commit", None) for name, source in loaded.items()}
        self.commits = {name: commit for name, commit in by_name.items() if commit}

    def __call__(self, target: str) -> ScanResult:
        """Scan one adapter; whatever is wrong with it becomes a finding."""
        try:
            adapter = _adapter(target)
            digest = _digest(Path(target))
            # A probe of products reads what the facts need too: they come after it.
            judged = [self._judged(name, probe, adapter) for name, probe in self.probes.items()]
            facts = Facts.of(adapter)
        except UnsupportedAdapterError as error:
            return self._failed(target, "refused", error)
        except (LoraprobeError, OSError, MemoryError) as error:
            return self._failed(target, "unreadable", error)
        findings = [*self._beside(Path(target)), *self._structure(adapter, facts)]
        findings += [finding for _, finding in judged if finding]
        if not self.probes:
            findings.append(self._finding("not-scored", "no probe was given: use --probe"))
        return ScanResult(
            target,
            gravest(findings),
            tuple(findings),
            tuple(score for score, _ in judged),
            facts,
            adapter.base_model,
            adapter.commit,
            digest,
        )

    def _reference(self) -> Reference | None:
        """The policy's, or else the first that a probe brings along."""
        if self.policy.reference:
            return Reference.load(self.policy.reference)
        brought = map(Reference.of_probe, self.probes.values())
        return next((reference for reference in brought if reference is not None), None)

    def _finding(self, rule: str, message: str) -> Finding:
        return Finding(rule, self.policy.level(rule), message)

    def _failed(self, target: str, rule: str, error: Exception) -> ScanResult:
        findings = [*self._beside(Path(target)), self._finding(rule, first_line(error))]
        return ScanResult(target, gravest(findings), tuple(findings))

    def _beside(self, folder: Path) -> list[Finding]:
        """What lies beside the weights and would run, or be loaded too."""
        if not folder.is_dir():
            return []
        names = sorted(path.name for path in folder.iterdir() if path.is_file())
        kinds = {
            "pickle": [name for name in names if is_pickle(start_of(folder / name), name)],
            "code": [name for name in names if name.endswith(".py")],
            "weights": [name for name in names if name.endswith(OTHER_WEIGHTS)],
        }
        if WEIGHTS_NAME in kinds["weights"]:
            kinds["weights"].remove(WEIGHTS_NAME)
        else:
            kinds["weights"] = []  # none to lie beside: the error says what there is
        return [
            self._finding(rule, f"beside the weights: {', '.join(files)}")
            for rule, files in kinds.items()
            if files
        ]

    def _structure(self, adapter: Adapter, facts: Facts) -> list[Finding]:
        policy = self.policy
        findings = []
        if policy.base_models and adapter.base_model not in policy.base_models:
            expected = " or ".join(repr(name) for name in policy.base_models)
            message = f"it names the base model {adapter.base_model!r}; expected {expected}"
            findings.append(self._finding("base", message))
        stated = adapter.base_revision
        if policy.base_revision and stated and stated != policy.base_revision:
            message = f"it names the base's revision {stated!r}; expected {policy.base_revision!r}"
            findings.append(self._finding("base", message))
        if policy.modules is not None and (other := set(facts.leaves) - set(policy.modules)):
            findings.append(self._finding("module", f"it changes {', '.join(sorted(other))}"))
        if policy.max_rank is not None and max(facts.ranks) > policy.max_rank:
            message = f"rank {max(facts.ranks)}; expected at most {policy.max_rank}"
            findings.append(self._finding("rank", message))
        if policy.max_norm is not None and facts.norm > policy.max_norm:
            message = f"norm {facts.norm:.4g}; expected at most {policy.max_norm:.4g}"
            findings.append(self._finding("norm", message))
        if facts.norm == 0:
            findings.append(self._finding("no-effect", "BA is zero in every module"))
        elif self.reference is not None:
            findings += self._outliers(adapter, facts, self.reference)
        return findings

    def _outliers(self, adapter: Adapter, facts: Facts, reference: Reference) -> list[Finding]:
        if reference.base_model != adapter.base_model:
            if not self.policy.reference:
                return []  # the probe brought it along; that the base is another it says itself
            message = (
                f"the reference is of base model {reference.base_model!r}, the adapter of"
                f" {adapter.base_model!r}: not compared"
            )
            return [self._finding("outlier", message)]
        outliers = reference.outliers(facts, self.policy.max_deviation)
        return [
            self._finding(
                "outlier",
                f"{name} is {apart:+.1f} deviations from the median of {reference.size} adapters",
            )
            for name, apart in outliers.items()
        ]

    def _judged(
        self, name: str, probe: Probe, adapter: Adapter
    ) -> tuple[dict[str, Any], Finding | None]:
        """A probe's entry among the scores, and what it finds."""
        entry: dict[str, Any] = {"probe": name, "commit": probe.commit, "score": None}
        try:
            verdict = self._verdict(probe, adapter)
        except LoraprobeError as error:
            return {**entry, "verdict": "error"}, self._finding("mismatch", first_line(error))
        entry |= {"score": verdict.score, "verdict": verdict.label}
        coverage = getattr(verdict, "coverage", None)
        entry["coverage"] = None if coverage is None else str(coverage)
        if verdict.label == "malicious":
            message = f"{name}: P(malicious) {verdict.score:.3f}, threshold {probe.threshold:.3f}"
            return entry, self._finding("malicious", message)
        if verdict.label == "inconclusive":
            return entry, self._finding("inconclusive", f"{name}: {verdict.reason}")
        return entry, None

    def _verdict(self, probe: Probe, adapter: Adapter) -> Verdict:
        from ..adapters.kinds import as_kind

        if not self.policy.any_base:
            probe.check_base_model(adapter)  # before anything that follows from another base
        change = as_kind(adapter, probe.featurizer.kind_since(self._before), self._before)
        return probe.verdicts([change], check_base=not self.policy.any_base)[0]


def _adapter(name: str, commit: str | None = None) -> Adapter:
    source, revision = named_revision(name)
    return load_adapter(source, revision=commit or revision)


def _probe(name: str, commit: str | None, policy: Policy) -> Probe:
    source, revision = named_revision(name)
    probe = Probe.from_pretrained(source, revision=commit or revision)
    check_trusted(policy.trusted, source, probe.commit, probe.digest)
    return probe


def _digest(path: Path) -> str | None:
    """SHA-256 over an adapter's config and weights; None for what is not on this disk."""
    files: Iterable[Path] = [path]
    if path.is_dir():
        files = sorted(
            file
            for file in path.iterdir()
            if file.name == "adapter_config.json" or file.suffix == WEIGHTS_SUFFIX
        )
    elif not path.is_file():
        return None
    digest = hashlib.sha256()
    for file in files:
        with file.open("rb") as opened:
            digest.update(hashlib.file_digest(opened, "sha256").digest())
    return digest.hexdigest()


def renamed(result: ScanResult, target: str) -> ScanResult:
    """The same result for another name of the same files."""
    return replace(result, target=target)
