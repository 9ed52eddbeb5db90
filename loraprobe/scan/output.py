"""The results of a scan for people, for programs (JSON) and for code hosts (SARIF 2.1.0)."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from .findings import DECISIONS, RULES, Decision
from .scan import ScanResult

SCHEMA = "loraprobe.scan/1"
SARIF_SCHEMA = "https://json.schemastore.org/sarif-2.1.0.json"
SARIF_LEVELS: dict[Decision, str] = {"allow": "note", "review": "warning", "block": "error"}


def line(result: ScanResult) -> str:
    """One line: decision, target, score, reasons."""
    scores = [f"{entry['score']:.3f}" for entry in result.scores if entry["score"] is not None]
    reasons = "; ".join(finding.message for finding in result.findings)
    parts = [result.decision.upper().ljust(6), result.target, *scores, reasons]
    return "  ".join(part for part in parts if part)


def total(results: Sequence[ScanResult]) -> str:
    """How many of each decision."""
    counts = Counter(result.decision for result in results)
    unreadable = sum(result.unreadable for result in results)
    parts = [f"{counts[decision]} {decision}" for decision in DECISIONS]
    noun = "adapter" if len(results) == 1 else "adapters"
    return f"{len(results)} {noun}: {', '.join(parts)}; {unreadable} unreadable"


def as_json(results: Sequence[ScanResult], exit_code: int) -> dict[str, Any]:
    """All of it; docs/schemas/scan.schema.json has its schema."""
    from .._version import __version__  # looks the distribution up, which takes a while

    counts = Counter(result.decision for result in results)
    return {
        "schema": SCHEMA,
        "version": __version__,
        "exit_code": exit_code,
        "counts": {decision: counts[decision] for decision in DECISIONS},
        "results": [result.to_dict() for result in results],
    }


def as_sarif(results: Sequence[ScanResult]) -> dict[str, Any]:
    """SARIF 2.1.0: one result a finding. Source: the OASIS standard, section 3."""
    from .._version import __version__

    rules = [
        {
            "id": name,
            "shortDescription": {"text": rule.meaning},
            "defaultConfiguration": {"level": SARIF_LEVELS[rule.level]},
        }
        for name, rule in RULES.items()
    ]
    entries = [
        {
            "ruleId": finding.rule,
            "ruleIndex": list(RULES).index(finding.rule),
            "level": SARIF_LEVELS[finding.level],
            "message": {"text": f"{result.target}: {finding.message}"},
            "locations": [{"physicalLocation": {"artifactLocation": {"uri": _uri(result.target)}}}],
            "partialFingerprints": {"adapter/v1": result.digest or result.target},
        }
        for result in results
        for finding in result.findings
    ]
    driver = {"name": "loraprobe", "version": __version__, "rules": rules}
    run = {"tool": {"driver": driver}, "results": entries, "columnKind": "unicodeCodePoints"}
    return {"$schema": SARIF_SCHEMA, "version": "2.1.0", "runs": [run]}


def _uri(target: str) -> str:
    from urllib.parse import quote

    return quote(Path(target).as_posix())
