"""An append-only log of decisions, one JSON line each, chained by hashes.

    audit = AuditLog("audit.jsonl")
    audit(record)                                  # a round: a line a client, and one for the round
    audit.write("allow", client="c7", why="...")   # whatever else was decided

Every line holds the SHA-256 of the one before it: a line that was changed, removed or put in
between shows when the log is read. What was cut off at the end shows in comparison with a head
that was kept elsewhere: a run's checkpoint holds one. Whoever can write the log, the checkpoint and
every copy of a head can write another history.
"""

from __future__ import annotations

import hashlib
import json
import threading
from collections.abc import Iterator, Mapping
from dataclasses import replace
from datetime import UTC, datetime
from io import BytesIO
from pathlib import Path
from typing import Any, NamedTuple

from loraprobe.limits import RUN_LOG, read_limited

from ..errors import AuditError, StateError
from ..files import write_synced
from .explain import why
from .types import RoundRecord

START = "0" * 64  # in place of the hash of a line before the first


class Head(NamedTuple):
    """How long a log is, and the SHA-256 of its last line: who has it notices a shorter log."""

    count: int = 0  # type: ignore[assignment]  # hides tuple.count
    sha256: str = START

    def __str__(self) -> str:
        return f"{self.count}:{self.sha256}"

    @classmethod
    def parse(cls, text: str) -> Head:
        """The inverse of `str`.

        Raises:
            StateError: it is no head.
        """
        count, _, sha256 = text.partition(":")
        if not count.isdecimal() or len(sha256) != len(START):
            raise StateError(
                f"got the head {text!r}; expected COUNT:SHA256, as `fedloop audit` says"
            )
        return cls(int(count), sha256)

    @classmethod
    def of(cls, path: str | Path) -> Head:
        """Of a log as it is now.

        Raises:
            AuditError: it is not whole. StateError: it is too large. OSError: it cannot be read.
        """
        head = cls()
        for line_head, _ in _lines(Path(path)):
            head = line_head
        return head


class AuditLog:
    """Writes a log, or goes on with one. One process writes at a time.

    A last line that a crash cut in half is dropped; nothing else is ever removed.

    Attributes:
        head: of the log as it is now.

    Raises:
        AuditError: the log that is there is not whole.
        StateError: it is too large.
        OSError: it cannot be read or written: said now, not after the first round.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        self.head = Head()
        self._lock = threading.Lock()
        self.path.open("ab").close()
        if self.path.stat().st_size:
            whole = read_limited(self.path, RUN_LOG, StateError).rpartition(b"\n")
            if whole[2]:
                with self.path.open("r+b") as file:
                    file.truncate(len(whole[0]) + len(whole[1]))
            self.head = Head.of(self.path)

    def __call__(self, record: RoundRecord) -> None:
        """Write down every decision of a round."""
        self._append([*_decisions(record)])

    def write(self, what: str, **facts: Any) -> None:
        """Write down one more decision: JSON data.

        Raises:
            AuditError: a fact has a name that every line has, or is no JSON data.
        """
        try:
            json.dumps(facts, allow_nan=False)
        except (TypeError, ValueError) as error:
            raise AuditError(
                f"got facts that no log can hold ({error}); expected JSON data"
            ) from None
        if taken := facts.keys() & {"n", "previous", "time"}:
            raise AuditError(f"got facts named {sorted(taken)}, which the log writes itself")
        self._append([{"what": what, **facts}])

    def _append(self, decisions: list[dict[str, Any]]) -> None:
        now = datetime.now(UTC).isoformat(timespec="seconds")
        with self._lock:
            head, text = self.head, b""
            for decision in decisions:
                plain = {"n": head.count + 1, "previous": head.sha256, "time": now, **decision}
                line = json.dumps(plain, allow_nan=False).encode()
                head = Head(head.count + 1, hashlib.sha256(line).hexdigest())
                text += line + b"\n"
            write_synced(self.path, text, "ab")
            self.head = head


def read_audit(path: str | Path, known: Head | None = None) -> list[dict[str, Any]]:
    """The decisions of a log, once its chain is seen to be whole.

    Args:
        known: a former head; the log has to contain the line it is of.

    Raises:
        AuditError: a line was changed, removed or put in between, or is missing at the end.
        StateError: it cannot be read.
    """
    try:
        heads, decisions = [Head()], []
        for head, decision in _lines(Path(path)):
            heads.append(head)
            decisions.append(decision)
    except OSError as error:
        raise StateError(f"cannot read {path}: {error}. Expected an audit log.") from error
    if known is not None and known.count >= len(heads):
        raise AuditError(
            f"{path}: got {len(decisions)} lines; expected at least {known.count}: lines are"
            " missing at the end"
        )
    if known is not None and heads[known.count] != known:
        raise AuditError(
            f"{path}, line {known.count}: its SHA-256 is {heads[known.count].sha256}; expected"
            f" {known.sha256}: this line, or an earlier one with all after it, was written anew"
        )
    return decisions


def record_digest(record: RoundRecord) -> str:
    """The SHA-256 of what was decided in a round; what was measured does not count."""
    decided = replace(record, metrics={}, seconds={})
    return hashlib.sha256(decided.to_json().encode()).hexdigest()


def _decisions(record: RoundRecord) -> Iterator[dict[str, Any]]:
    for client, factor in record.factors.items():
        scores = record.scores.get(client, ())
        yield {
            "what": "client",
            "round": record.round,
            "client": client,
            "factor": factor,
            "weight": record.weights.get(client, 0.0),
            "examples": record.num_examples.get(client),
            "level": record.level,
            "evidence": record.evidence,
            "score": scores[-1] if scores else None,
            "cut": record.cuts.get(client),
            "status": record.status.get(client, ""),
            "why": why(record, client),
        }
    yield {
        "what": "round",
        "round": record.round,
        "rule": record.rule,
        "skipped": record.skipped,
        "note": record.note,
        "record": record_digest(record),
    }


def _lines(path: Path) -> Iterator[tuple[Head, dict[str, Any]]]:
    head = Head()
    for number, line in enumerate(BytesIO(read_limited(path, RUN_LOG, StateError)), start=1):
        if not line.endswith(b"\n"):
            raise AuditError(f"{path}, line {number}: half a line; expected a line feed")
        decision = _decision(path, number, line)
        if decision.get("n") != number or decision.get("previous") != head.sha256:
            raise AuditError(
                f"{path}, line {number}: it does not follow the line before it: one of the two"
                " was changed, or lines were removed or put in between"
            )
        head = Head(number, hashlib.sha256(line[:-1]).hexdigest())
        yield head, decision


def _decision(path: Path, number: int, line: bytes) -> dict[str, Any]:
    try:
        decision = json.loads(line)
    except ValueError:
        decision = None
    if not isinstance(decision, Mapping):
        raise AuditError(f"{path}, line {number}: no JSON object; expected one decision a line")
    return dict(decision)
