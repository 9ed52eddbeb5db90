"""The fuzz harness: no loader fails a few hundred cases, every planted bug is found and named, and
the report adds up.
"""

from __future__ import annotations

import hashlib
import json
import re
import subprocess
import sys
from collections import Counter
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest

from fuzz import corpus, report
from fuzz.__main__ import main
from fuzz.oracle import OUTCOMES
from fuzz.runner import Limits, Tally, run
from fuzz.targets import TARGETS

ROOT = Path(__file__).resolve().parents[1]
SEED = 1_000  # of no run of the report


def outcomes(tally: Tally) -> Counter[str]:
    return sum(
        (Counter({outcome: cases}) for (_, outcome), cases in tally.outcomes.items()), Counter()
    )


# ---- the loaders ----


@pytest.mark.parametrize("name", TARGETS)
def test_no_loader_fails(name: str) -> None:
    tally = run(name, SEED, 0, 200)
    assert tally.failures == []
    counts = outcomes(tally)
    assert counts.total() == tally.cases == 200
    assert counts["refused"] > 100
    if name in (
        "config",
        "head-arrays",
        "head-trees",
    ):  # a checksum covers all of it: what is loaded is the undamaged probe
        assert counts["valid"] == counts["as in the file"] == 0
    else:  # the cases reach what is behind the first check
        assert counts["valid"] + counts["as in the file"] > 0
    assert {mutation for mutation, _ in tally.outcomes} == set(TARGETS[name].mutations)


# ---- negative controls ----

PLANTED = {
    "NO_DIGEST": (60, "failure", "a damaged probe was loaded"),
    "NO_SHA": (60, "failure", "a damaged probe was loaded"),
    "KEY_ERROR": (20, "failure", r"KeyError at planted\.py"),
    "EXIT": (20, "failure", r"SystemExit at planted\.py"),
    "HARD_EXIT": (2, "crash", "exit code 0"),
    "SEGFAULT": (2, "crash", "SIGSEGV"),
    "KILLED": (2, "crash", "SIGKILL"),
    "HANG": (1, "hang", "no answer within 3 s"),
    "FLOOD": (20, "memory", "more memory than the limit"),
    "WARNS": (20, "failure", r"RuntimeWarning at planted\.py.*something is odd"),
    "COLOURS": (20, "failure", "a message that cannot be shown, of 4 characters"),
    "ESSAY": (20, "failure", "a message that cannot be shown, of 5000 characters"),
    "TOO_CERTAIN": (60, "failure", r"scores \[1\."),
    "SAVED_OTHERWISE": (60, "failure", "a probe that is another one after it was saved"),
    "TWICE": (300, "failure", "loaded although a key occurs twice"),
    "ROUNDING": (60, "failure", "other numbers than the file holds"),
    "OTHER_SCALING": (60, "failure", "scaling 4.0, the file says 2.0"),
}


@pytest.mark.parametrize("bug", PLANTED)
def test_a_planted_bug_is_found_and_named(bug: str) -> None:
    cases, kind, says = PLANTED[bug]
    tally = run(f"planted:{bug}", 0, 0, cases, Limits(seconds=3.0))
    found = [failure for failure in tally.failures if failure[1] == kind]
    assert found
    assert {failure[1] for failure in tally.failures} == {kind}
    numbers = [number for number, *_ in tally.failures]
    assert numbers == sorted(set(numbers))
    assert set(numbers) <= set(range(cases))
    assert any(re.search(says, what) for *_, what in found), found[0]
    assert (
        tally.cases == outcomes(tally).total() == cases
    )  # those after the one that was fatal were run too


def test_a_crash_is_blamed_on_the_case_that_crashed() -> None:
    """Where the whole loader refuses, the one that crashes instead of refusing crashes.

    Case by case, in children of their own.
    """
    refused = {number for number in range(8) if _outcome("config", number) == "refused"}
    assert 0 < len(refused) < 8
    tally = run("planted:KILLED", 0, 0, 8)
    assert {number for number, *_ in tally.failures} == refused


def _outcome(target: str, number: int) -> str:
    [(_, outcome)] = run(target, 0, number, 1).outcomes
    return outcome


# ---- cases ----


def test_a_case_is_the_same_in_another_process_and_nearly_always_damaged() -> None:
    def digests() -> list[str]:
        return [
            hashlib.sha256(repr(TARGETS[name].case(5, number)).encode()).hexdigest()
            for name in TARGETS
            for number in range(25)
        ]

    code = (
        "import hashlib; from fuzz.targets import"
        " TARGETS;print(*[hashlib.sha256(repr(TARGETS[n].case(5, i)).encode()).hexdigest() for n in"
        " TARGETS for i in range(25)])"
    )
    other = subprocess.run(
        [sys.executable, "-c", code],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=120,
        check=True,
    ).stdout.split()
    assert digests() == other
    assert len(set(other)) > 0.95 * len(other)
    for target in TARGETS.values():
        samples = target.undamaged()
        cases = [target.case(6, number) for number in range(40)]
        assert (
            sum(files[target.file] == samples[sample][target.file] for sample, _, files in cases)
            < 8
        )


def test_a_sealed_folder_passes_the_checksums() -> None:
    for name in ("config-sealed", "head-arrays-sealed", "head-trees-sealed"):
        target = TARGETS[name]
        for number in range(60):
            _, _, files = target.case(0, number)
            head = next(data for file, data in files.items() if file.startswith("head."))
            try:
                config = json.loads(files["config.json"])
                rest = {key: value for key, value in config.items() if key != "digest"}
                said, right = (
                    config["digest"],
                    hashlib.sha256(
                        json.dumps(rest, sort_keys=True, separators=(",", ":")).encode()
                    ).hexdigest(),
                )
            except (ValueError, KeyError, AttributeError, RecursionError):
                assert name == "config-sealed"  # config.json itself was damaged beyond that
                continue
            if name != "config-sealed":
                assert config["head"]["sha256"] == hashlib.sha256(head).hexdigest()
                assert config["head"]["bytes"] == len(head)
                assert said == right


def test_xgboost_reads_the_trees_of_the_corpus_as_its_own() -> None:
    xgboost = pytest.importorskip("xgboost")
    for width in (3, 40):
        document = corpus.model(width, trees=5)
        booster = xgboost.Booster()
        booster.load_model(bytearray(json.dumps(document).encode()))
        assert json.loads(bytes(booster.save_raw("json"))) == document
        scores = booster.inplace_predict(
            np.random.default_rng(0).normal(size=(50, width)).astype(np.float32)
        )
        assert np.std(scores) > 0.01


# ---- the report ----


def test_runs_add_up_go_on_where_they_ended_and_are_not_counted_twice(tmp_path: Path) -> None:
    arguments = ["--target", "head-arrays", "--cases", "15", "--seed", "3", "--out", str(tmp_path)]
    assert main(arguments) == main(arguments) == 0
    found = report.load(tmp_path)
    assert [(run["first"], run["cases"]) for run in found["runs"]] == [(0, 15), (15, 15)]
    assert report.of_target(found, "head-arrays").total() == 30
    with pytest.raises(SystemExit, match="some of these cases"):
        main([*arguments, "--first", "29"])
    assert main([*arguments, "--first", "30"]) == 0
    assert report.next_number(report.load(tmp_path), "head-arrays", 3) == 45


def test_a_failure_is_in_the_report_with_the_command_that_repeats_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(TARGETS, "planted:KEY_ERROR", TARGETS["config"])
    assert main(["--target", "planted:KEY_ERROR", "--cases", "5", "--out", str(tmp_path)]) == 1
    failure = report.load(tmp_path)["failures"][-1]
    assert failure["again"] in capsys.readouterr().out
    words = failure["again"].split()
    assert words[:3] == ["python", "-m", "fuzz"]
    assert main([*words[3:-1], str(tmp_path / "again")]) == 1
    assert report.load(tmp_path / "again")["failures"] == [failure]


def test_the_committed_report_adds_up_and_names_no_failure() -> None:
    found = report.load(report.RESULTS)
    assert found["failures"] == []
    assert set(found["outcomes"]) == set(TARGETS)
    for target, mutations in found["outcomes"].items():
        assert set(mutations) == set(TARGETS[target].mutations)
        assert all(set(counts) <= set(OUTCOMES) for counts in mutations.values())
        runs = sorted(
            (run["seed"], run["first"], run["cases"])
            for run in found["runs"]
            if run["target"] == target
        )
        assert report.of_target(found, target).total() == sum(cases for *_, cases in runs)
        assert all(a[0] < b[0] or a[1] + a[2] <= b[1] for a, b in pairwise(runs))  # no case twice
    assert report.of_target(found, "head-trees-sealed").total() >= 6_000
    assert sum(report.of_target(found, target).total() for target in TARGETS) >= 40_000


def test_the_readme_shows_the_committed_report() -> None:
    text = report.README.read_text(encoding="utf-8")
    assert text.partition(report.START)[2].partition(report.END)[0].strip() == report.table(
        report.load(report.RESULTS)
    )
