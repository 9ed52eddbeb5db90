"""Whom a run trusted: factors, scores and weights, round by round."""

from __future__ import annotations

import math

from .drawing import ROLE_COLOURS, Panel
from .figures import clients_over_rounds, lines_over_rounds
from .html import figure, paragraph, percent
from .run import ReportedRun, by_role, malicious_share, mean_of, shaded


def factors_figure(run: ReportedRun) -> str:
    """The security factors over the rounds."""
    series = run.series(lambda record: record.factors)
    title = f"The security factor ends at {by_role(run, series)}"
    note = (
        "1 counts in full, 0 is left out. A client that was not sampled in a round leaves a gap."
        + shaded(run)
    )
    return figure(
        title,
        note,
        clients_over_rounds(
            [Panel("", "security factor", series, (-0.03, 1.03))], run.roles, run.skipped, title
        ),
    )


def scores_figure(run: ReportedRun) -> str:
    """The probe's scores over the rounds."""
    if not any(record.scores for record in run.records):
        return paragraph("No client was scored in these rounds, so there are no scores to draw.")
    most = run.series(
        lambda record: {client: max(scores) for client, scores in record.scores.items()}
    )
    last = run.series(
        lambda record: {client: scores[-1] for client, scores in record.scores.items()}
    )
    line, limits = _cut(run), (-0.03, 1.03)
    panels = [Panel("", "P(malicious)", last, limits, line)]
    if any(len(scores) > 1 for record in run.records for scores in record.scores.values()):
        panels = [
            Panel("highest of a round", "P(malicious)", most, limits, line),
            Panel("last of a round", "P(malicious)", last, limits, line),
        ]
    title = f"The probe's last P(malicious) is {by_role(run, last)}"
    note = "What the level read of each client in each round." + (
        " The dotted line is the level's cut." if line else ""
    )
    return figure(title, note, clients_over_rounds(panels, run.roles, run.skipped, title))


def _cut(run: ReportedRun) -> tuple[list[float], str] | None:
    """What the scores are compared with, a value a round, where it is one for all clients."""
    cuts = [set(record.cuts.values()) for record in run.records]
    if any(len(values) != 1 for values in cuts):
        return None
    return [cut for (cut,) in cuts], "cut"


def weights_figure(run: ReportedRun) -> str:
    """Malicious clients' share of the aggregate over the rounds."""
    if "malicious" not in run.roles.values():
        return paragraph("No client of this run is malicious, so none of the aggregate is theirs.")
    held, due = (
        malicious_share(run, lambda record: record.weights),
        malicious_share(run, lambda record: record.num_examples),
    )
    if not any(map(math.isfinite, held)):
        return paragraph(
            "Nothing was aggregated in these rounds, so malicious clients have no share of it."
        )
    title = f"Malicious clients hold {percent(mean_of(held))} of the aggregate on average"
    if any(map(math.isfinite, due)):
        title += f"; by example counts alone it would be {percent(mean_of(due))}"
    note = (
        "Shares of the aggregation weights. The dashed line weighs the well-formed updates by their"
        " examples, as without a defence." + shaded(run)
    )
    colours = {"with the defence": ROLE_COLOURS["malicious"][0], "by examples alone": "#8c8c8c"}
    series = dict(zip(colours, (held, due), strict=True))
    return figure(
        title,
        note,
        lines_over_rounds(series, colours, "malicious clients' share", run.skipped, title),
    )
