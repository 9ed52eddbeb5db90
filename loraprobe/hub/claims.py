"""What a card claims, beside what was measured here."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Literal

from ..errors import ProbeFormatError
from ..evaluation import EvalReport

Finding = Literal["holds", "contradicted", "not compared"]


@dataclass(frozen=True)
class Claim:
    """A figure of the card, and the same one on adapters of one's own.

    Attributes:
        protocol, metric, value, low, high, n: of the publisher; the interval may be missing.
        measured: value and 95 % interval here; None where nothing here is comparable.
        finding: "contradicted" if even the ends of both intervals that are nearest are apart, to
            the publisher's favour.
    """

    protocol: str
    metric: str
    value: float
    low: float | None
    high: float | None
    n: int | None
    measured: tuple[float, float, float] | None
    finding: Finding


def claims_of(facts: Mapping[str, Any], report: EvalReport) -> list[Claim]:
    """Every figure of a probe's facts beside the report on other adapters.

    Raises:
        ProbeFormatError: the facts are of another form.
    """
    try:
        return list(_claims(facts.get("metrics", ()), report))
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise ProbeFormatError(
            f"facts.metrics: {error!r}; expected rows of protocol, metric and value"
        ) from None


def _claims(rows: Any, report: EvalReport) -> Iterator[Claim]:
    for row in rows:
        metric = str(row["metric"])
        value = float(row["value"])
        low, high = (None if row.get(end) is None else float(row[end]) for end in ("low", "high"))
        measured = _measured(metric, report)
        finding: Finding = "not compared"
        if measured is not None:
            _, least, most = measured
            is_cost = metric.startswith("FPR")
            too_good = (
                (value if high is None else high) < least
                if is_cost
                else ((value if low is None else low) > most)
            )
            finding = "contradicted" if too_good else "holds"
        n = row.get("n")
        yield Claim(
            *(str(row.get("protocol", "not said")), metric, value, low, high),
            None if n is None else int(n),
            measured,
            finding,
        )


def _measured(metric: str, report: EvalReport) -> tuple[float, float, float] | None:
    if metric.startswith("AUROC"):
        return report.auroc, *report.auroc_ci
    if metric == "TPR at the probe's threshold":
        return report.tpr, *report.tpr_ci
    if metric == "FPR at the probe's threshold":
        return report.fpr, *report.fpr_ci
    return None
