"""What a run cost: seconds, bytes, training losses."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any

from ..defense.types import RoundRecord
from .drawing import Panel
from .figures import clients_over_rounds, seconds_by_round
from .html import figure, paragraph, percent, table
from .run import ReportedRun, mean_of, shaded

PHASES = ("train", "evidence", "assess", "aggregate", "evaluate")


def ledger(records: Iterable[RoundRecord]) -> dict[str, Any]:
    """What a run cost in all.

    {"rounds", "seconds", "bytes", "evidence_to_train", "assess_aggregate_to_train"}.

    `seconds` has phase -> total wall-clock seconds, PHASES first and 0.0 where nothing was
    recorded; `bytes` has kind -> total bytes sent, "update" and "evidence" first. The ratios
    compare seconds with those of training; None without training time.
    """
    records = list(records)
    phases = [
        *PHASES,
        *sorted({phase for record in records for phase in record.seconds} - set(PHASES)),
    ]
    kinds = [
        "update",
        "evidence",
        *sorted({kind for record in records for kind in record.bytes} - {"update", "evidence"}),
    ]
    seconds = {
        phase: math.fsum(record.seconds.get(phase, 0.0) for record in records) for phase in phases
    }
    train = seconds["train"]
    return {
        "rounds": len(records),
        "seconds": seconds,
        "bytes": {kind: sum(record.bytes.get(kind, 0) for record in records) for kind in kinds},
        "evidence_to_train": seconds["evidence"] / train if train else None,
        "assess_aggregate_to_train": (
            (seconds["assess"] + seconds["aggregate"]) / train if train else None
        ),
    }


def losses_section(run: ReportedRun) -> str:
    """The clients' training losses over the rounds."""
    series = run.series(lambda record: record.losses)
    means = [mean_of(record.losses.values()) for record in run.records if record.losses]
    if not means:
        return paragraph("No training loss is recorded.")
    title = f"The clients' mean training loss is {means[0]:.3g} in the first round" + (
        f" and {means[-1]:.3g} in the last" if len(means) > 1 else ""
    )
    note = (
        "Mean over a client's local steps of a round, in nats per answer token. Clients with other"
        " data have other losses." + shaded(run)
    )
    return figure(
        title,
        note,
        clients_over_rounds(
            [Panel("", "training loss, nats per token", series)], run.roles, run.skipped, title
        ),
    )


def overhead_section(run: ReportedRun) -> str:
    """Seconds and bytes by phase, and what of them is the defence."""
    spent, n = ledger(run.records), len(run.records)
    seconds, train = spent["seconds"], spent["seconds"]["train"]
    if not any(seconds.values()):
        return paragraph("No seconds are recorded.")
    rows = [
        (phase, f"{one:,.3f}", f"{one / n:,.3f}", percent(one / train) if train else "")
        for phase, one in seconds.items()
    ]
    sent = [(kind, f"{one:,}", f"{one / n:,.0f}") for kind, one in spent["bytes"].items()]
    title = "Seconds by phase"
    if train:
        evidence, rest = (
            percent(spent[name]) for name in ("evidence_to_train", "assess_aggregate_to_train")
        )
        title = (
            f"Evidence takes {evidence} of the time that training takes, assessment and aggregation"
            f" {rest}"
        )
    note = (
        "Wall-clock time of one process that plays all clients in turn. Aggregation is needed"
        " without a defence, too."
    )
    drawn = seconds_by_round(
        [record.seconds for record in run.records],
        list(seconds),
        ("evidence", "assess", "aggregate"),
        title,
    )
    times = table("lrrr", ("phase", "seconds", "seconds a round", "of training time"), rows)
    return (
        figure(title, note, drawn)
        + times
        + table("lrr", ("sent by clients", "bytes", "bytes a round"), sent)
    )
