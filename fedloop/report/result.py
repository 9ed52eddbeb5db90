"""What came out of a run."""

from __future__ import annotations

import math
from collections.abc import Mapping

from .figures import metrics_over_rounds
from .html import figure, paragraph, percent, table, tiles
from .metrics import METRIC_WORDS, sample_size, share_with_interval
from .run import ReportedRun, is_refused, malicious_share, mean_of

_PANELS = 3  # metrics with axes of their own; more would leave none of them wide enough to read


def tiles_of(run: ReportedRun) -> str:
    """The numbers at the top of the page."""
    taken = [factor for record in run.records for factor in record.factors.values()]
    refused = sum(is_refused(record, client) for record in run.records for client in record.reasons)
    pairs = [
        (f"{len(run.records)} of {run.config.rounds}", "rounds recorded"),
        (str(len(run.skipped)), "rounds skipped"),
        (
            f"{taken.count(0.0)} of {len(taken)}",
            f"updates rejected (factor 0); {refused} of them refused with a reason",
        ),
    ]
    if "malicious" in run.roles.values():
        held = mean_of(malicious_share(run, lambda record: record.weights))
        pairs.append((percent(held), "of the aggregate from malicious clients, mean over rounds"))
    measured = _measured(run)
    share = share_with_interval(measured[-1][1], "refusal_strict") if measured else None
    if share:
        pairs.append(
            (
                percent(share[0]),
                (
                    f"{METRIC_WORDS['refusal_strict']}; 95 % interval {percent(share[1])} to"
                    f" {percent(share[2])}"
                ),
            )
        )
    return tiles(pairs)


def _measured(run: ReportedRun) -> list[tuple[int, Mapping[str, float]]]:
    """Round -> metrics, where they were measured."""
    return [(record.round, record.metrics) for record in run.records if record.metrics]


def metrics_section(run: ReportedRun) -> str:
    """What was measured of the global model."""
    measured = _measured(run)
    if not measured:
        return paragraph("Nothing was measured of the global model in these rounds.", "plain")
    last, metrics = measured[-1]
    rows = []
    for name in metrics:
        if not name.startswith("n_"):
            share, n = share_with_interval(metrics, name), sample_size(metrics, name)
            interval = f"{percent(share[1])} to {percent(share[2])}" if share else ""
            rows.append(
                (
                    METRIC_WORDS.get(name, name),
                    percent(share[0]) if share else f"{metrics[name]:.4g}",
                    interval,
                    str(n or ""),
                )
            )
    note = (
        f"The global model after round {last}. Intervals are Wilson's for the prompts sampled; they"
        " do not cover what another seed of the run would change. Rule counts an answer that holds"
        " any of 35 published strings, strict one that declines in its first two sentences."
    )
    return (
        table("lrrr", ("metric", "value", "95 % interval", "n"), rows)
        + paragraph(note)
        + (_over_rounds(measured) if len(measured) > 1 else "")
    )


def _over_rounds(measured: list[tuple[int, Mapping[str, float]]]) -> str:
    """The metrics' figure."""
    names = [
        name
        for name in dict.fromkeys(name for _, metrics in measured for name in metrics)
        if not name.startswith("n_")
    ]
    found = {
        name: [share_with_interval(metrics, name) for _, metrics in measured] for name in names
    }
    whole = [
        name
        for name in names
        if all(
            share or name not in metrics
            for share, (_, metrics) in zip(found[name], measured, strict=True)
        )
    ]
    shares = {
        METRIC_WORDS.get(name, name): [share or (math.nan,) * 3 for share in found[name]]
        for name in whole
    }
    others = {
        METRIC_WORDS.get(name, name): [metrics.get(name, math.nan) for _, metrics in measured]
        for name in names
        if name not in whole
    }
    if not names:
        return ""
    first, last = measured[0], measured[-1]
    title = f"The global model was measured {len(measured)} times"
    if "refusal_strict" in first[1] and "refusal_strict" in last[1]:
        ends = [
            f"{percent(metrics['refusal_strict'])} after round {at}"
            for at, metrics in (first, last)
        ]
        title = f"The share of harmful prompts refused (strict) is {ends[0]} and {ends[1]}"
    note = "Bars are 95 % Wilson intervals; points of one round stand beside each other."
    if len(others) > _PANELS:
        note += f" Not drawn: {', '.join([*others][_PANELS:])}."
    drawn = {name: others[name] for name in [*others][:_PANELS]}
    return figure(
        title, note, metrics_over_rounds(shares, drawn, [at for at, _ in measured], title)
    )
