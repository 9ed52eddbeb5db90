"""An audit log that was changed says so: whatever line, and whatever was done to it."""

from __future__ import annotations

from collections.abc import Callable
from multiprocessing.pool import ThreadPool
from pathlib import Path
from typing import Any

import pytest

from fedloop.callbacks import Alerts
from fedloop.defense.audit import AuditLog, Head, read_audit
from fedloop.defense.types import RoundRecord
from fedloop.errors import AuditError, StateError

RECORD = RoundRecord(
    1,
    {"a": (0.1,), "m": (0.97,)},
    {"a": 1.0, "m": 0.0, "x": 0.0},
    {"a": 1.0, "m": 0.0, "x": 0.0},
    {"x": "missing: asked and sent nothing"},
    cuts={"a": 0.8, "m": 0.8},
    level="cumulative",
    evidence="update_features",
    rule="mean",
)


def written(path: Path) -> Head:
    log = AuditLog(path)
    log(RECORD)
    log.write("allow", client="m", until=9, why="checked by hand")
    AuditLog(path)(RECORD)  # another process goes on
    return Head.of(path)


def test_every_decision_has_a_line_that_says_who_judged_by_what(tmp_path: Path) -> None:
    head = written(tmp_path / "log")
    decisions = read_audit(tmp_path / "log", head)
    assert len(decisions) == head.count == 9
    [found] = [one for one in decisions[:4] if one.get("client") == "m"]
    assert (found["level"], found["evidence"], found["score"], found["cut"]) == (
        "cumulative",
        "update_features",
        0.97,
        0.8,
    )
    assert found["why"].startswith("judged malicious by level 'cumulative' on update_features")
    assert decisions[3]["rule"] == "mean"
    assert Head.parse(str(head)) == head
    with pytest.raises(StateError, match="expected COUNT:SHA256"):
        Head.parse("9:abc")


TAMPERED: dict[str, Callable[[list[bytes]], list[bytes]]] = {
    "changed": lambda lines: [*lines[:2], lines[2].replace(b"0.0", b"1.0"), *lines[3:]],
    "first changed": lambda lines: [lines[0].replace(b"1.0", b"0.5"), *lines[1:]],
    "removed": lambda lines: [*lines[:3], *lines[4:]],
    "first removed": lambda lines: lines[1:],
    "put in between": lambda lines: [*lines[:3], lines[2], *lines[3:]],
    "exchanged": lambda lines: [lines[1], lines[0], *lines[2:]],
    "no JSON": lambda lines: [*lines[:3], b"{\n", *lines[4:]],
    "no object": lambda lines: [*lines[:3], b"[]\n", *lines[4:]],
    "cut at the end": lambda lines: lines[:-1],
    "last changed": lambda lines: [*lines[:-1], lines[-1].replace(b"mean", b"krum")],
    "half a line": lambda lines: [*lines[:-1], lines[-1][:-9]],
}


@pytest.mark.parametrize("case", TAMPERED)
def test_what_was_done_to_a_log_shows(case: str, tmp_path: Path) -> None:
    path = tmp_path / "log"
    head = written(path)
    lines = path.read_bytes().splitlines(keepends=True)
    changed = TAMPERED[case](lines)
    assert changed != lines
    path.write_bytes(b"".join(changed))
    with pytest.raises(AuditError):
        read_audit(path, head)
    if case == "cut at the end":  # nothing but the head shows it
        assert len(read_audit(path)) == 8


def test_half_a_line_of_a_crash_is_dropped_and_the_log_goes_on(tmp_path: Path) -> None:
    head = written(tmp_path / "log")
    with (tmp_path / "log").open("ab") as file:
        file.write(b'{"n": 10, "prev')
    log = AuditLog(tmp_path / "log")
    assert log.head == head
    log(RECORD)
    assert len(read_audit(tmp_path / "log", head)) == 13
    with pytest.raises(StateError, match="cannot read"):
        read_audit(tmp_path / "nowhere")


@pytest.mark.parametrize("facts", [{"n": 7}, {"time": "now"}, {"x": {1}}, {"x": float("nan")}])
def test_a_fact_that_would_spoil_the_log_is_refused(facts: dict[str, Any], tmp_path: Path) -> None:
    log = AuditLog(tmp_path / "log")
    with pytest.raises(AuditError, match="got facts"):
        log.write("allow", **facts)
    with ThreadPool(4) as pool:
        pool.map(lambda number: log.write("allow", number=number), range(40))
    assert len(read_audit(tmp_path / "log", log.head)) == 40
    with pytest.raises(OSError, match="nowhere"):
        AuditLog(tmp_path / "nowhere" / "log")


def test_alerts_tell_what_is_new() -> None:
    heard: list[str] = []
    alert = Alerts(heard.append)
    alert(RECORD)
    alert(RECORD)
    assert [line.partition(" counts")[0] for line in heard] == ["round 1: m", "round 1: x"]
    alert(RoundRecord(2, {}, {"m": 1.0}, {}, skipped=True, note="skipped by the safety gate"))
    assert heard[2:] == ["round 2: skipped by the safety gate", "round 2: m counts again"]
