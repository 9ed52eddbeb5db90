"""Whom a run trusted: factors, scores and weights, round by round."""

from __future__ import annotations

import math
from collections.abc import Iterable

from .content import Block, Figure, Paragraph, percent
from .drawing import ROLE_COLOURS, Panel
from .figures import clients_over_rounds, lines_over_rounds
from .run import ReportedRun, by_role, malicious_share, mean_of, shaded

_LIMITS = (-0.03, 1.03)


def trust_section(run: ReportedRun) -> Iterable[Block]:
    """Factors, scores and the malicious clients' share of the aggregate."""
    yield _factors(run)
    yield _scores(run)
    yield _weights(run)


def _factors(run: ReportedRun) -> Block:
    series = run.series(lambda record: record.factors)
    title = f"The security factor ends at {by_role(run, series)}"
    note = (
        "1 counts in full, 0 is left out. A client that was not sampled in a round leaves a gap."
        f"{shaded(run)}"
    )
    panel = Panel("", "security factor", series, _LIMITS)
    return Figure(title, note, clients_over_rounds([panel], run.roles, run.skipped, title))


def _scores(run: ReportedRun) -> Block:
    if not any(record.scores for record in run.records):
        return Paragraph("No client was scored in these rounds, so there are no scores to draw.")
    last = run.series(lambda record: {name: row[-1] for name, row in record.scores.items()})
    line = _cut(run)
    panels = [Panel("", "P(malicious)", last, _LIMITS, line)]
    if any(len(scores) > 1 for record in run.records for scores in record.scores.values()):
        most = run.series(lambda record: {name: max(row) for name, row in record.scores.items()})
        panels = [
            Panel("highest of a round", "P(malicious)", most, _LIMITS, line),
            Panel("last of a round", "P(malicious)", last, _LIMITS, line),
        ]
    title = f"The probe's last P(malicious) is {by_role(run, last)}"
    dotted = " The dotted line is the level's cut." if line else ""
    note = f"What the level read of each client in each round.{dotted}"
    return Figure(title, note, clients_over_rounds(panels, run.roles, run.skipped, title))


def _cut(run: ReportedRun) -> tuple[list[float], str] | None:
    """What the scores are compared with, a value a round, where it is one for all clients."""
    cuts = [set(record.cuts.values()) for record in run.records]
    if any(len(values) != 1 for values in cuts):
        return None
    return [cut for (cut,) in cuts], "cut"


def _weights(run: ReportedRun) -> Block:
    if "malicious" not in run.roles.values():
        return Paragraph("No client of this run is malicious, so none of the aggregate is theirs.")
    held = malicious_share(run, lambda record: record.weights)
    due = malicious_share(run, lambda record: record.num_examples)
    if not any(map(math.isfinite, held)):
        return Paragraph(
            "Nothing was aggregated in these rounds, so malicious clients have no share of it."
        )
    title = f"Malicious clients hold {percent(mean_of(held))} of the aggregate on average"
    if any(map(math.isfinite, due)):
        title += f"; by example counts alone it would be {percent(mean_of(due))}"
    note = (
        "Shares of the aggregation weights. The dashed line weighs the well-formed updates by their"
        f" examples, as without a defence.{shaded(run)}"
    )
    colours = {"with the defence": ROLE_COLOURS["malicious"][0], "by examples alone": "#8c8c8c"}
    series = dict(zip(colours, (held, due), strict=True))
    unit = "malicious clients' share"
    return Figure(title, note, lines_over_rounds(series, colours, unit, run.skipped, title))
