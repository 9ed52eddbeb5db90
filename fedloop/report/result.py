"""What came out of a run."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping

from .content import Block, Figure, Paragraph, Table, percent
from .figures import metrics_over_rounds
from .metrics import METRIC_WORDS, sample_size, share_with_interval, words_of
from .run import ReportedRun, is_refused, malicious_share, mean_of

_PANELS = 3  # metrics with axes of their own; more would leave none of them wide enough to read


def tiles_of(run: ReportedRun) -> list[tuple[str, str]]:
    """The numbers at the top of the page, each with what it is."""
    taken = [factor for record in run.records for factor in record.factors.values()]
    refused = sum(is_refused(record, client) for record in run.records for client in record.reasons)
    tiles = [
        (f"{len(run.records)} of {run.config.rounds}", "rounds recorded"),
        (str(len(run.skipped)), "rounds skipped"),
        (
            f"{taken.count(0.0)} of {len(taken)}",
            f"updates rejected (factor 0); {refused} of them refused with a reason",
        ),
    ]
    if "malicious" in run.roles.values():
        held = mean_of(malicious_share(run, lambda record: record.weights))
        tiles.append((percent(held), "of the aggregate from malicious clients, mean over rounds"))
    measured = _measured(run)
    share = share_with_interval(measured[-1][1], "refusal_strict") if measured else None
    if share:
        value, low, high = map(percent, share)
        words = f"{METRIC_WORDS['refusal_strict']}; 95 % interval {low} to {high}"
        tiles.append((value, words))
    return tiles


def _measured(run: ReportedRun) -> list[tuple[int, Mapping[str, float]]]:
    """Round -> metrics, where they were measured."""
    return [(record.round, record.metrics) for record in run.records if record.metrics]


def metrics_section(run: ReportedRun) -> Iterable[Block]:
    """What was measured of the global model."""
    measured = _measured(run)
    if not measured:
        yield Paragraph("Nothing was measured of the global model in these rounds.", "plain")
        return
    last, metrics = measured[-1]
    rows = []
    for name in metrics:
        if not name.startswith("n_"):
            share, n = share_with_interval(metrics, name), sample_size(metrics, name)
            value, low, high = map(percent, share) if share else (f"{metrics[name]:.4g}", "", "")
            interval = f"{low} to {high}" if share else ""
            rows.append((words_of(name), value, interval, str(n or "")))
    yield Table("lrrr", ("metric", "value", "95 % interval", "n"), rows)
    yield Paragraph(
        f"The global model after round {last}. Intervals are Wilson's for the prompts sampled; they"
        " do not cover what another seed of the run would change. Rule counts an answer that holds"
        " any of 35 published strings, strict one that declines in its first two sentences."
    )
    if len(measured) > 1:
        yield from _over_rounds(measured)


def _over_rounds(measured: list[tuple[int, Mapping[str, float]]]) -> Iterable[Block]:
    """The metrics' figure."""
    names = dict.fromkeys(name for _, metrics in measured for name in metrics)
    shares: dict[str, list[tuple[float, float, float]]] = {}
    others: dict[str, list[float]] = {}
    for name in names:
        if name.startswith("n_"):
            continue
        intervals = [share_with_interval(metrics, name) for _, metrics in measured]
        values = [metrics.get(name, math.nan) for _, metrics in measured]
        if all(share or math.isnan(value) for share, value in zip(intervals, values, strict=True)):
            shares[words_of(name)] = [share or (math.nan,) * 3 for share in intervals]
        else:
            others[words_of(name)] = values
    if not shares and not others:
        return
    (began, first), (ended, last) = measured[0], measured[-1]
    title = f"The global model was measured {len(measured)} times"
    if "refusal_strict" in first and "refusal_strict" in last:
        title = (
            "The share of harmful prompts refused (strict) is"
            f" {percent(first['refusal_strict'])} after round {began} and"
            f" {percent(last['refusal_strict'])} after round {ended}"
        )
    note = "Bars are 95 % Wilson intervals; points of one round stand beside each other."
    if len(others) > _PANELS:
        note += f" Not drawn: {', '.join([*others][_PANELS:])}."
    drawn = {name: others[name] for name in [*others][:_PANELS]}
    rounds = [number for number, _ in measured]
    yield Figure(title, note, metrics_over_rounds(shares, drawn, rounds, title))
