"""What a run cost: seconds, bytes, training losses."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from typing import Any

from ..defense.types import RoundRecord
from .content import Block, Figure, Paragraph, Table, percent
from .drawing import Panel
from .figures import clients_over_rounds, seconds_by_round
from .run import ReportedRun, mean_of, shaded

PHASES = ("train", "evidence", "assess", "aggregate", "evaluate")
KINDS = ("update", "evidence")


def ledger(records: Iterable[RoundRecord]) -> dict[str, Any]:
    """What a run cost in all.

    {"rounds", "seconds", "bytes", "evidence_to_train", "assess_aggregate_to_train"}.

    `seconds` has phase -> total wall-clock seconds, PHASES first and 0.0 where nothing was
    recorded; `bytes` has kind -> total bytes sent, KINDS first. The ratios compare seconds with
    those of training; None without training time.
    """
    records = list(records)
    seconds = _sums([record.seconds for record in records], PHASES)
    sent = _sums([record.bytes for record in records], KINDS)
    train = seconds["train"]
    server = seconds["assess"] + seconds["aggregate"]
    return {
        "rounds": len(records),
        "seconds": seconds,
        "bytes": {kind: int(total) for kind, total in sent.items()},
        "evidence_to_train": seconds["evidence"] / train if train else None,
        "assess_aggregate_to_train": server / train if train else None,
    }


def _sums(rows: list[Mapping[str, Any]], first: tuple[str, ...]) -> dict[str, float]:
    """The sum of every name over rows, some names first."""
    names = [*first, *sorted({name for row in rows for name in row} - set(first))]
    return {name: math.fsum(row.get(name, 0) for row in rows) for name in names}


def losses_section(run: ReportedRun) -> Iterable[Block]:
    """The clients' training losses over the rounds."""
    series = run.series(lambda record: record.losses)
    means = [mean_of(record.losses.values()) for record in run.records if record.losses]
    if not means:
        yield Paragraph("No training loss is recorded.")
        return
    last = f" and {means[-1]:.3g} in the last" if len(means) > 1 else ""
    title = f"The clients' mean training loss is {means[0]:.3g} in the first round{last}"
    note = (
        "Mean over a client's local steps of a round, in nats per answer token. Clients with other"
        f" data have other losses.{shaded(run)}"
    )
    panel = Panel("", "training loss, nats per token", series)
    yield Figure(title, note, clients_over_rounds([panel], run.roles, run.skipped, title))


def overhead_section(run: ReportedRun) -> Iterable[Block]:
    """Seconds and bytes by phase, and what of them is the defence."""
    spent, n = ledger(run.records), len(run.records)
    seconds, train = spent["seconds"], spent["seconds"]["train"]
    if not any(seconds.values()):
        yield Paragraph("No seconds are recorded.")
        return
    title = "Seconds by phase"
    if train:
        title = (
            f"Evidence takes {percent(spent['evidence_to_train'])} of the time that training takes,"
            f" assessment and aggregation {percent(spent['assess_aggregate_to_train'])}"
        )
    drawn = seconds_by_round(
        [record.seconds for record in run.records],
        list(seconds),
        ("evidence", "assess", "aggregate"),
        title,
    )
    note = (
        "Wall-clock time of one process that plays all clients in turn. Aggregation is needed"
        " without a defence, too."
    )
    yield Figure(title, note, drawn)
    rows = [
        (phase, f"{total:,.3f}", f"{total / n:,.3f}", percent(total / train) if train else "")
        for phase, total in seconds.items()
    ]
    yield Table("lrrr", ("phase", "seconds", "seconds a round", "of training time"), rows)
    sent = [(kind, f"{total:,}", f"{total / n:,.0f}") for kind, total in spent["bytes"].items()]
    yield Table("lrr", ("sent by clients", "bytes", "bytes a round"), sent)
