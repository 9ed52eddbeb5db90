"""What became of every client, and why."""

from __future__ import annotations

import math
from typing import Any

from ..defense.explain import explanation, rejected
from .drawing import ROLE_COLOURS, ROLE_WORDS
from .html import cut, number, paragraph, percent, table
from .run import ReportedRun, fits, is_refused, last_of, mean_of


def clients_section(run: ReportedRun) -> str:
    """Every client in a row: its part in the rounds, and where it ended."""
    factors, weights = (
        run.series(lambda record: record.factors),
        run.series(lambda record: record.weights),
    )
    scores = run.series(
        lambda record: {client: values[-1] for client, values in record.scores.items()}
    )
    rows = []
    for client, role in run.roles.items():
        about = run.about.get(client, {})
        share: Any = about.get("share")
        source = str(about.get("source", "")) + (
            f", {percent(share)}" if role == "malicious" and fits("share", share) else ""
        )
        refused = sum(is_refused(record, client) for record in run.records)
        taken = sum(map(math.isfinite, factors[client]))
        numbers = [
            number(last_of(factors[client])),
            number(mean_of(weights[client])),
            number(last_of(scores[client])),
        ]
        verdict = run.records[-1].status.get(client, "")
        rows.append(
            (
                cut(client, 48),
                ROLE_WORDS[role],
                source,
                str(taken),
                *numbers,
                str(refused or ""),
                *([verdict] if _verdicts(run) else []),
            )
        )
    head = (
        "client",
        "role",
        "trained on",
        "rounds",
        "last factor",
        "mean weight",
        "last score",
        "refused",
        *(["verdict"] if _verdicts(run) else []),
    )
    return table(
        "lnlrrrrr" + "n" * _verdicts(run),
        head,
        rows,
        [ROLE_COLOURS[role][0] for role in run.roles.values()],
    )


def _verdicts(run: ReportedRun) -> bool:
    return any(record.status for record in run.records)


def refusals_section(run: ReportedRun) -> str:
    """Rounds that were skipped, and what was refused with a reason."""
    rows = [
        (
            str(record.round),
            cut(client, 48),
            ROLE_WORDS[run.roles[client]],
            number(record.factors.get(client, 0.0)),
            reason,
        )
        for record in run.records
        for client, reason in sorted(record.reasons.items())
    ]
    kept = [
        (
            str(record.round),
            record.note or f"skipped: mean factor {number(mean_of(record.factors.values()))}",
        )
        for record in run.records
        if record.skipped or record.note
    ]
    above = table("nl", ("round", "what happened"), kept) if kept else ""
    if not rows:
        return above + paragraph(
            "Every update of these rounds was well-formed, and every client that had to be scored"
            " was.",
            "plain",
        )
    return above + table("llnrl", ("round", "client", "role", "factor", "reason"), rows)


def decisions_section(run: ReportedRun) -> str:
    """Every client that counted nothing in a round: how often, and the last time why."""
    last = {client: record for record in run.records for client in rejected(record)}
    if not last:
        return paragraph("Every client counted in every round that it took part in.", "plain")
    rows = []
    for client in [one for one in run.roles if one in last]:
        one = explanation(last[client], client)
        times = sum(client in rejected(record) for record in run.records)
        score = number(one.scores[-1]) if one.scores else ""
        cut_at = "" if one.cut is None else number(one.cut)
        shown = (str(times), str(one.round), one.level, one.evidence, score, cut_at)
        rows.append((cut(client, 48), ROLE_WORDS[run.roles[client]], *shown, one.reason))
    head = ("client", "role", "rounds", "last", "level", "evidence", "score", "cut", "why")
    note = (
        "Rounds in which a client counted nothing, and by what in the last of them."
        " `fedloop explain RUN CLIENT` has every round; `fedloop allow RUN CLIENT --why REASON`"
        " overrules the level, and stands in the records and the audit log."
    )
    return table("lnrrllrrl", head, rows) + paragraph(note)
