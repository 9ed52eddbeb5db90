"""What became of every client, and why."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any

from ..defense.explain import explanation, rejected
from .content import Block, Paragraph, Table, cut, number, percent
from .drawing import ROLE_COLOURS, ROLE_WORDS
from .run import ReportedRun, fits, is_refused, last_of, mean_of

_NAME = 48  # characters of a client's id


def clients_section(run: ReportedRun) -> Iterable[Block]:
    """Every client in a row: its part in the rounds, and where it ended."""
    factors = run.series(lambda record: record.factors)
    weights = run.series(lambda record: record.weights)
    scores = run.series(lambda record: {name: row[-1] for name, row in record.scores.items()})
    judged = any(record.status for record in run.records)
    rows = []
    for client, role in run.roles.items():
        row = [
            cut(client, _NAME),
            ROLE_WORDS[role],
            _source(run.about.get(client, {}), role),
            str(sum(map(math.isfinite, factors[client]))),
            number(last_of(factors[client])),
            number(mean_of(weights[client])),
            number(last_of(scores[client])),
            str(sum(is_refused(record, client) for record in run.records) or ""),
        ]
        rows.append([*row, run.records[-1].status.get(client, "")] if judged else row)
    head = ["client", "role", "trained on", "rounds"]
    head += ["last factor", "mean weight", "last score", "refused"] + ["verdict"] * judged
    colours = [ROLE_COLOURS[role][0] for role in run.roles.values()]
    yield Table("lnlrrrrr" + "n" * judged, head, rows, colours)


def _source(about: Any, role: str) -> str:
    share = about.get("share")
    shown = f", {percent(share)}" if role == "malicious" and fits("share", share) else ""
    return f"{about.get('source', '')}{shown}"


def refusals_section(run: ReportedRun) -> Iterable[Block]:
    """Rounds that were skipped, and what was refused with a reason."""
    notable = [
        (
            str(record.round),
            record.note or f"skipped: mean factor {number(mean_of(record.factors.values()))}",
        )
        for record in run.records
        if record.skipped or record.note
    ]
    if notable:
        yield Table("nl", ("round", "what happened"), notable)
    rows = [
        (
            str(record.round),
            cut(client, _NAME),
            ROLE_WORDS[run.roles[client]],
            number(record.factors.get(client, 0.0)),
            reason,
        )
        for record in run.records
        for client, reason in sorted(record.reasons.items())
    ]
    if rows:
        yield Table("lnnrl", ("round", "client", "role", "factor", "reason"), rows)
    else:
        yield Paragraph(
            "Every update of these rounds was well-formed, and every client that had to be scored"
            " was.",
            "plain",
        )


def decisions_section(run: ReportedRun) -> Iterable[Block]:
    """Every client that counted nothing in a round: how often, and the last time why."""
    last = {client: record for record in run.records for client in rejected(record)}
    if not last:
        yield Paragraph("Every client counted in every round that it took part in.", "plain")
        return
    rows = []
    for client in filter(last.__contains__, run.roles):
        decided = explanation(last[client], client)
        times = sum(client in rejected(record) for record in run.records)
        score = number(decided.scores[-1]) if decided.scores else ""
        cut_at = "" if decided.cut is None else number(decided.cut)
        shown = (str(times), str(decided.round), decided.level, decided.evidence, score, cut_at)
        rows.append((cut(client, _NAME), ROLE_WORDS[run.roles[client]], *shown, decided.reason))
    head = ("client", "role", "rounds", "last", "level", "evidence", "score", "cut", "why")
    yield Table("nnrrllrrl", head, rows)
    yield Paragraph(
        "Rounds in which a client counted nothing, and by what in the last of them."
        " The command fedloop explain RUN CLIENT has every round; fedloop allow RUN CLIENT --why"
        " REASON overrules the level, and stands in the records and the audit log."
    )
