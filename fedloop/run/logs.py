"""What a run's folder says of itself in text: its records, its roles and its audit log.

Reads without torch and without writing anything, so that whoever audits a run needs nothing of what
ran it.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from loraprobe.limits import RUN_CLIENTS, RUN_LOG, read_limited

from ..defense.audit import Head, read_audit, record_digest
from ..defense.types import RoundRecord
from ..errors import AuditError, StateError
from .checkpoint import read_checkpoint

AUDIT = "audit.jsonl"
CONFIG = "config.json"
RECORDS = "records.jsonl"
ROLES = "clients.json"


def read_records(path: Path) -> list[RoundRecord]:
    """The records of a run, as far as they are logged.

    A kill can leave half a line at the end, whose round the checkpoint holds.

    Raises:
        StateError: it is not a run's folder, or the log is damaged.
    """
    log = path / RECORDS
    if not log.exists():
        _check_is_run(path)
        return []
    try:
        lines = read_limited(log, RUN_LOG, StateError).decode().split("\n")
    except (OSError, ValueError) as error:
        raise StateError(
            f"cannot read {log}: {error}. Expected the records that `fedloop run` wrote."
        ) from error
    return [RoundRecord.from_json(line) for line in lines[:-1]]


def read_roles(path: Path) -> dict[str, dict[str, Any]]:
    """Client -> its role in a run.

    Raises:
        StateError: it is not a run's folder, or the file is damaged.
    """
    _check_is_run(path)
    try:
        roles: dict[str, dict[str, Any]] = json.loads(
            read_limited(path / ROLES, RUN_CLIENTS, StateError)
        )
    except (OSError, ValueError) as error:
        raise StateError(
            f"cannot read {path / ROLES}: {error}. Expected the file that `fedloop run` wrote."
        ) from error
    return roles


def audit_run(path: Path) -> list[dict[str, Any]]:
    """The decisions of a run, seen to be those that its checkpoint and its records know of.

    Raises:
        AuditError: a line is changed, missing or too many, or a record is not the one that was
            decided.
        StateError: it is not a run's folder, or a file of it is damaged.
    """
    _check_is_run(path)
    records = read_records(path)
    checkpoint = read_checkpoint(path / "checkpoint")
    about = (checkpoint.tree.get("about") or {}) if checkpoint else {}
    decisions = read_audit(path / AUDIT, Head(*about.get("audit", Head())))
    digests = {entry["round"]: entry["record"] for entry in decisions if entry["what"] == "round"}
    numbers = [record.round for record in records]
    least = checkpoint.round - 1 if checkpoint else 0  # the last one may not be logged yet
    if numbers != list(range(1, max(len(numbers), least) + 1)):
        raise AuditError(
            f"{path / RECORDS}: got records of rounds {str(numbers)[:200]}; expected 1 to"
            f" {checkpoint.round if checkpoint else len(numbers)}, one each"
        )
    for record in records:
        if digests.get(record.round) != record_digest(record):
            raise AuditError(
                f"{path / RECORDS}: the record of round {record.round} is not the one that"
                f" {AUDIT} has; one of them was changed"
            )
    return decisions


def _check_is_run(path: Path) -> None:
    if not (path / CONFIG).is_file():
        raise StateError(
            f"{path} is not the folder of a run: it has no {CONFIG}. Expected one that"
            " `fedloop run` wrote."
        )
