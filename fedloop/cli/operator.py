"""The operator's `fedloop` sub-commands: explain, allow, deny, audit."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from .run import app, errors_shown, say

Run = Annotated[Path, typer.Argument(help="The folder of a run, finished or not.")]
Client = Annotated[str, typer.Argument(help="A client's id, as the records have it.")]
Until = Annotated[int | None, typer.Option(help="The last round for which it holds.", min=1)]
Why = Annotated[str, typer.Option(help="Goes into the records and the audit log.")]


@app.command()
def explain(
    folder: Run,
    client: Client,
    number: Annotated[
        int | None, typer.Option("--round", help="Of this round; of all, if not given.", min=1)
    ] = None,
) -> None:
    """Say why a client counted as it did: evidence, score, cut, level, rule."""
    with errors_shown():
        from ..defense.explain import explanation
        from ..errors import EvidenceError
        from ..run.logs import read_records

        records = [record for record in read_records(folder) if number in (None, record.round)]
        lines = [str(explanation(record, client)) for record in records if client in record.factors]
        if not lines:
            taken = {name for record in records for name in record.factors}
            raise EvidenceError(
                f"got client {client!r}; expected one of"
                f" {f'round {number}' if number else f'the {len(records)} finished rounds'}:"
                f" {', '.join(sorted(taken))[:500] or 'nobody took part'}"
            )
    for line in lines:
        say(line)


@app.command()
def allow(folder: Run, client: Client, why: Why, until: Until = None) -> None:
    """Trust a client's well-formed updates from the next round on, whatever the level says."""
    _say_word(folder, client, True, until, why)


@app.command()
def deny(folder: Run, client: Client, why: Why, until: Until = None) -> None:
    """Refuse a client from the next round on, whatever it sends."""
    _say_word(folder, client, False, until, why)


def _say_word(folder: Path, client: str, allowed: bool, until: int | None, why: str) -> None:
    with errors_shown():
        from ..errors import EvidenceError
        from ..run.logs import read_records, read_roles
        from ..run.words import Word, say_word

        roles, records = read_roles(folder), read_records(folder)
        names = {*roles, *(name for record in records for name in record.factors)}
        if client not in names:
            raise EvidenceError(
                f"got client {client!r}; expected one of this run: {', '.join(sorted(names))[:500]}"
            )
        if until is not None and until <= len(records):
            raise EvidenceError(
                f"got until {until}; expected a round after {len(records)}, the last finished one"
            )
        say_word(folder, Word(client, allowed, until, why))
    say(f"from the next round on {client} {'counts' if allowed else 'counts nothing'}: {why}")


@app.command()
def audit(
    log: Annotated[Path, typer.Argument(help="The folder of a run, or an audit log.")],
    client: Annotated[str | None, typer.Option(help="Print this client's decisions only.")] = None,
    head: Annotated[
        str | None, typer.Option(help="COUNT:SHA256, a head that was printed before.")
    ] = None,
    quiet: Annotated[bool, typer.Option("--quiet", "-q", help="Print the head alone.")] = False,
) -> None:
    """Print a log of decisions, one JSON line each, once it is seen to be whole.

    A run's is compared with its checkpoint and its records. Exit code 1: it is not the one that was
    written.
    """
    from ..errors import AuditError, EvidenceError

    with errors_shown():
        try:
            from ..defense.audit import Head, read_audit
            from ..run.logs import AUDIT, audit_run

            path = log / AUDIT if log.is_dir() else log
            decisions = audit_run(log) if log.is_dir() else read_audit(log)
            if head is not None:
                read_audit(path, Head.parse(head))
            now = Head.of(path)
        except AuditError as error:
            say(f"AuditError: {error}", Console(stderr=True))
            raise typer.Exit(1) from None
        if client is not None and client not in {one.get("client") for one in decisions}:
            raise EvidenceError(f"got client {client!r}; the log has no decision on it")
    for decision in decisions:
        if not quiet and client in (None, decision.get("client")):
            say(json.dumps(decision))
    if quiet:
        say(str(now))
    else:
        say(f"{now.count} decisions, whole; head {now}", Console(stderr=True))
