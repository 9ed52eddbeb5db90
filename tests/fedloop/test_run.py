"""A run as its operator needs it: nothing lost, nothing hidden, stopped and changed on purpose."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from fedloop.callbacks import Alerts
from fedloop.config import Config
from fedloop.defense.types import RoundRecord
from fedloop.errors import ConfigError, RunError
from fedloop.run.folder import read_run
from fedloop.run.logs import audit_run
from fedloop.run.simulate import resume, simulate
from fedloop.run.words import Word, say_word
from loraprobe import load_adapter
from loraprobe.errors import LoraprobeError
from tests.helpers.federated import Files, defended, settings, untimed, vector

HELD_OUT = "builtin:heldout_benign"


def written(files: Files, folder: Path, **changes: Any) -> dict[str, Any]:
    return settings(files, output={"folder": str(folder)}, **changes)


def measured(**changes: Any) -> dict[str, Any]:
    return {"utility": HELD_OUT, "limit": 2, "max_new_tokens": 2, "every": 1, **changes}


def test_a_failure_in_the_last_evaluation_loses_no_training(
    tiny_files: Files, tmp_path: Path
) -> None:
    out = tmp_path / "run"
    judged = {"harmful": "builtin:harmful_prompts", "judge": "/nowhere", "limit": 2}
    with pytest.raises((LoraprobeError, RunError)):
        simulate(written(tiny_files, out, evaluation=judged))
    whole = simulate(settings(tiny_files))
    assert torch.equal(vector(load_adapter(out / "adapter")), vector(whole.adapter))
    (tmp_path / "other.toml").write_text(f'[evaluation]\nutility = "{HELD_OUT}"\nlimit = 2\n')
    result = resume(out, evaluation=tmp_path / "other.toml")
    assert set(result.metrics) == {"loss", "rouge_l", "n_utility"}
    assert len(read_run(out)[2]) == 2
    assert [one["what"] for one in audit_run(out)].count("change") == 1


def test_more_rounds_by_a_flag_are_played_and_recorded(tiny_files: Files, tmp_path: Path) -> None:
    constant = {"schedule": "constant"}
    simulate(written(tiny_files, tmp_path, training=constant, rounds=1))
    result = resume(tmp_path, rounds=3)
    whole = simulate(settings(tiny_files, training=constant, rounds=3))
    assert torch.equal(vector(result.adapter), vector(whole.adapter))
    assert result.records[1].note == "rounds is now 3, was 1"
    assert resume(tmp_path).config.rounds == 3
    with pytest.raises(ConfigError, match="at least the 3 finished ones"):
        resume(tmp_path, rounds=2)


def test_a_run_that_trained_nothing_says_why(tiny_files: Files) -> None:
    result = simulate(settings(tiny_files, training={"lr": 1e30}))
    assert result.problem.startswith("nothing was trained: all 2 rounds were skipped")
    assert "NonFiniteError" in result.problem
    assert simulate(settings(tiny_files, rounds=1)).problem == ""


@pytest.mark.parametrize("error", [MemoryError("8 GB"), RuntimeError("CUDA out of memory")])
def test_out_of_memory_is_said_with_what_is_saved(
    error: Exception, tiny_files: Files, tmp_path: Path
) -> None:
    def watch(what: str, number: int, client: str, value: float) -> None:
        if (what, number) == ("client", 2):
            raise error

    with pytest.raises(RunError, match=r"rounds 1 to 1 are saved in .*; `fedloop resume"):
        simulate(written(tiny_files, tmp_path), watch=watch)
    assert [untimed(one) for one in resume(tmp_path).records] == [
        untimed(one) for one in simulate(settings(tiny_files)).records
    ]

    def full(record: RoundRecord) -> None:
        raise error

    with pytest.raises(RunError, match="rounds 1 to 1 are saved"):  # it was, before it is told
        simulate(written(tiny_files, tmp_path / "told"), callbacks=[full])
    for wrong in (full, [full, 3], "told"):  # said before anything runs
        with pytest.raises(ConfigError, match="callbacks: got"):
            simulate(written(tiny_files, tmp_path / "never"), callbacks=wrong)  # type: ignore[arg-type]
    assert not (tmp_path / "never").exists()
    (tmp_path / "typo.toml").write_text("[evaluatoin]")
    with pytest.raises(ConfigError, match=r"no table \[evaluation\]"):
        resume(tmp_path, evaluation=tmp_path / "typo.toml")
    with pytest.raises(ConfigError, match="rounds: got '3'"):
        resume(tmp_path, rounds="3")  # type: ignore[arg-type]
    with pytest.raises(RunError, match="nothing is saved: the run has no folder"):
        simulate(settings(tiny_files), watch=watch)


def test_an_error_that_is_not_the_machines_stays_itself(tiny_files: Files) -> None:
    def watch(what: str, number: int, client: str, value: float) -> None:
        raise RuntimeError("a mistake")

    with pytest.raises(RuntimeError, match="a mistake"):
        simulate(settings(tiny_files), watch=watch)


FULL = """
import json, resource, sys
from fedloop.run.simulate import simulate
def watch(what, number, client, value):
    if (what, number) == ("round", 1):  # from now on no file may grow beyond this
        resource.setrlimit(resource.RLIMIT_FSIZE, (2000, 2000))
simulate(json.loads(sys.argv[1]), watch=watch)
"""


def test_a_full_disk_is_said_with_what_is_saved(tiny_files: Files, tmp_path: Path) -> None:
    values = written(tiny_files, tmp_path)
    done = subprocess.run(
        [sys.executable, "-c", FULL, json.dumps(values)], capture_output=True, text=True
    )
    assert "RunError: the run cannot go on: OSError" in done.stderr
    assert "rounds 1 to 1 are saved" in done.stderr
    assert [untimed(one) for one in resume(tmp_path).records] == [
        untimed(one) for one in simulate(settings(tiny_files)).records
    ]


def test_the_best_adapter_is_kept_and_a_run_that_gets_no_better_stops(
    tiny_files: Files, tmp_path: Path
) -> None:
    """By the loss, taken for something that should be high: it falls."""
    evaluation = measured(best="loss", patience=2)
    result = simulate(written(tiny_files, tmp_path, rounds=9, evaluation=evaluation))
    losses = [record.metrics["loss"] for record in result.records]
    assert losses.index(max(losses)) == len(losses) - 3 < 6
    kept = vector(load_adapter(tmp_path / "best"))
    assert not torch.equal(kept, vector(result.adapter))
    assert len(resume(tmp_path).records) == len(losses)


def test_a_metric_that_is_not_measured_is_said_before_anything_is_trained(
    tiny_files: Files,
) -> None:
    with pytest.raises(ConfigError, match=r"evaluation.best: got '-los'; expected one of loss, "):
        simulate(settings(tiny_files, evaluation=measured(best="-los")))
    for wrong in ({"patience": 2}, {"best": "loss"}):
        with pytest.raises(ConfigError, match="best"):
            Config.of(settings(tiny_files, evaluation=wrong))


def test_an_operators_word_reaches_a_run_and_its_logs(tiny_files: Files, tmp_path: Path) -> None:
    heard: list[str] = []

    def watch(what: str, number: int, client: str, value: float) -> None:
        if (what, number) == ("round", 1):
            say_word(tmp_path, Word("client-01", False, 2, "left the project"))
            say_word(tmp_path, Word("client-02", True, 1, "too late"))

    values = written(tiny_files, tmp_path, rounds=3, defense=defended(tiny_files))
    result = simulate(values, watch=watch, callbacks=[Alerts(heard.append)])
    why = "denied until round 2: left the project"
    assert [record.reasons.get("client-01") for record in result.records] == [None, why, None]
    said = [one for one in audit_run(tmp_path) if one["what"] in ("allow", "deny")]
    assert [(one["client"], bool(one["ignored"])) for one in said] == [
        ("client-01", False),
        ("client-02", True),
    ]
    assert f"round 2: client-01 counts nothing: {why}" in heard
    assert "round 3: client-01 counts again" in heard
