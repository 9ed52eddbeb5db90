"""Damaged files: no loader fails a few dozen cases, and every planted bug is found and named.

A night's worth of cases: pytest -m nightly tests/test_fuzz.py, or python -m fuzz.
"""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from fuzz import __main__ as program
from fuzz import corpus, reread
from fuzz.cases import run, run_child, target_of
from fuzz.oracle import OUTCOMES
from fuzz.targets import TARGETS

CHECKED = ("config", "head-arrays", "head-trees")  # a checksum covers all of these files


@pytest.mark.parametrize("name", TARGETS)
def test_no_loader_fails(name: str, tmp_path: Path) -> None:
    counts = run(TARGETS[name], 60, 1, tmp_path)
    assert counts.total() >= 60
    assert counts["refused"] > 10
    if name in CHECKED:  # what is loaded is the undamaged probe
        assert counts["valid"] == counts["as in the file"] == 0


@pytest.mark.nightly
@pytest.mark.parametrize("name", TARGETS)
def test_no_loader_fails_many_cases(name: str, tmp_path: Path) -> None:
    ending = run_child(name, 5_000, 2, tmp_path)
    assert ending.kind == "ok", ending.text
    if name not in CHECKED:  # the cases reach what is behind the first check
        assert ending.outcomes["valid"] + ending.outcomes["as in the file"] > 0


# --- negative controls

PLANTED = {
    "NO_DIGEST": (80, "a damaged probe was loaded"),
    "NO_SHA": (80, "a damaged probe was loaded"),
    "KEY_ERROR": (20, "KeyError|threshold"),
    "EXIT": (20, "0"),
    "WARNS": (20, "something is odd"),
    "COLOURS": (20, "a message that cannot be shown, of 4 characters"),
    "ESSAY": (20, "a message that cannot be shown, of 5000 characters"),
    "TOO_CERTAIN": (80, r"scores \[1\."),
    "SAVED_OTHERWISE": (80, "a probe that is another one after it was saved"),
    "ROUNDING": (80, "other numbers than the file holds"),
    "OTHER_SCALING": (80, r"scaling (?P<sign>-?)4\.0, the file says (?P=sign)2\.0"),
}
FATAL = {
    "HARD_EXIT": ("crash", "exit code 0"),
    "SEGFAULT": ("crash", "SIGSEGV"),
    "HANG": ("hang", "Timeout"),
    "FLOOD": ("failure", "MemoryError"),
}


@pytest.mark.parametrize("bug", PLANTED)
def test_a_planted_bug_is_found_and_named(bug: str, tmp_path: Path) -> None:
    cases, says = PLANTED[bug]
    with pytest.raises((Exception, SystemExit), match=says):
        run(target_of(f"tests.helpers.planted:{bug}"), cases, 0, tmp_path)
    assert (tmp_path / "damaged").is_dir()  # the files of the case are kept


@pytest.mark.parametrize("bug", FATAL)
def test_a_bug_that_ends_the_process_is_told_from_a_good_end(bug: str, tmp_path: Path) -> None:
    kind, says = FATAL[bug]
    ending = run_child(f"tests.helpers.planted:{bug}", 20, 0, tmp_path, seconds=2)
    assert (ending.kind, says in ending.text) == (kind, True), ending.text[-500:]
    assert (tmp_path / "damaged").is_dir()


def test_the_second_reader_refuses_a_key_twice() -> None:
    with pytest.raises(ValueError, match="twice"):
        reread.unambiguous(rb'{"a": 1, "\u0061": 2}')


# --- the cases


def test_xgboost_reads_the_trees_of_the_corpus_as_its_own() -> None:
    xgboost = pytest.importorskip("xgboost")
    for width in (3, 40):
        document = corpus.model(width, trees=5)
        booster = xgboost.Booster()
        booster.load_model(bytearray(json.dumps(document).encode()))
        assert json.loads(bytes(booster.save_raw("json"))) == document
        rows = np.random.default_rng(0).normal(size=(50, width)).astype(np.float32)
        assert np.std(booster.inplace_predict(rows)) > 0.01


# --- the report


def test_a_failure_ends_with_code_1_and_the_folder_of_its_files(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    name = "tests.helpers.planted:KEY_ERROR"
    monkeypatch.setitem(TARGETS, name, target_of(name))
    assert program.main(["--target", name, "--cases", "20"]) == 1
    assert "/damaged" in capsys.readouterr().out
    with pytest.raises(SystemExit):
        program.main(["--target", "config", "--write"])


def test_the_readme_shows_the_committed_report() -> None:
    report = json.loads(program.RESULTS.read_text(encoding="utf-8"))
    assert set(report["outcomes"]) == set(TARGETS)
    assert all(set(counts) <= set(OUTCOMES) for counts in report["outcomes"].values())
    assert all(sum(counts.values()) >= report["cases"] for counts in report["outcomes"].values())
    assert program.page(report) == program.README.read_text(encoding="utf-8")
