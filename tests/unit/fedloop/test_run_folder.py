"""A run's folder survives a kill at any moment, and is never taken for another run's."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from fedloop.config import Config
from fedloop.defense.types import RoundRecord
from fedloop.errors import StateError
from fedloop.run.checkpoint import load_checkpoint
from fedloop.run.folder import RunFolder, read_config, read_run
from tests.helpers.federated import same_tree

ROLES: dict[str, dict[str, Any]] = {
    "client-00": {"role": "benign", "source": "builtin:benign", "share": 1.0}
}


def config(**changes: Any) -> Config:
    return Config.of(
        {
            "model": {"base": "org/base"},
            "clients": {"benign": ["builtin:benign"]},
            "rounds": 9,
            **changes,
        }
    )


def record(round: int, **changes: Any) -> RoundRecord:
    return RoundRecord(
        round,
        {"client-00": (0.1, 0.2)},
        {"client-00": 0.9},
        {"client-00": 1.0},
        num_examples={"client-00": 3},
        **changes,
    )


def state(round: int) -> dict[str, Any]:
    return {"lora": torch.full((3,), float(round)), "round": round}


def run(path: Path, rounds: int) -> RunFolder:
    """A folder in which so many rounds were played."""
    folder = RunFolder.create(path, config(), ROLES)
    folder.load()
    for number in range(1, rounds + 1):
        folder.save(record(number), state(number))
    return folder


def reopened(path: Path) -> tuple[dict[str, Any] | None, list[RoundRecord]]:
    return RunFolder.create(path, config(), ROLES).load()


def log(path: Path) -> Path:
    return path / "records.jsonl"


def lines(path: Path) -> list[str]:
    return log(path).read_text().splitlines()


def test_a_new_folder_has_no_state_and_an_old_one_has_its_last(tmp_path: Path) -> None:
    path = tmp_path / "new" / "folder"
    folder = RunFolder.create(path, config(name="first"), ROLES)
    assert folder.load() == (None, [])
    folder.save(record(1), state(1))
    folder.save(record(2, reasons={"client-00": "ü\n"}), state(2))
    found, records = reopened(path)
    assert same_tree(found, state(2))
    assert records == [record(1), record(2, reasons={"client-00": "ü\n"})]
    assert [RoundRecord.from_json(line) for line in lines(path)] == records
    assert read_run(path) == (config(), ROLES, records)
    assert json.loads((path / "clients.json").read_text()) == ROLES


@pytest.mark.parametrize("keep", [0, 1, 25, -1])
def test_half_a_line_at_the_end_is_mended(tmp_path: Path, keep: int) -> None:
    """Killed while the last record was appended: the checkpoint has it."""
    run(tmp_path, 3)
    text = log(tmp_path).read_text()
    last = lines(tmp_path)[-1] + "\n"
    log(tmp_path).write_text(text[: -len(last)] + last[:keep])
    assert len(read_run(tmp_path)[2]) == 2  # reading alone mends nothing
    assert log(tmp_path).read_text() == text[: -len(last)] + last[:keep]
    found, records = reopened(tmp_path)
    assert same_tree(found, state(3))
    assert records == [record(1), record(2), record(3)]
    assert log(tmp_path).read_text() == text


def test_a_record_that_is_only_in_the_checkpoint_is_appended(tmp_path: Path) -> None:
    run(tmp_path, 1)
    log(tmp_path).unlink()  # killed between the first checkpoint and the first line
    assert reopened(tmp_path)[1] == [record(1)]
    assert lines(tmp_path) == [record(1).to_json()]


def test_a_round_that_is_in_the_log_twice_counts_once_if_it_is_the_last(tmp_path: Path) -> None:
    run(tmp_path, 2)
    with log(tmp_path).open("a") as file:
        file.write(record(2).to_json() + "\n")
    assert reopened(tmp_path)[1] == [record(1), record(2)]
    assert len(lines(tmp_path)) == 2


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            lambda rows: [rows[0], rows[0], *rows[1:]],
            r"rounds \[1, 1, 2, 3\]; expected 1 to 3, one each",
        ),
        (lambda rows: rows[1:], r"rounds \[2, 3\]"),
        (lambda rows: [rows[1], rows[0], rows[2]], r"rounds \[2, 1, 3\]"),
        (lambda rows: [rows[0][:-3], *rows[1:]], "not a round record"),
        (lambda rows: ["", *rows], "not a round record"),
        (lambda rows: ["[]", *rows], "not a round record"),
        (lambda rows: ['{"round": 1}', *rows[1:]], "not a round record"),
    ],
)
def test_a_log_that_a_kill_cannot_leave_is_refused(
    tmp_path: Path, change: Any, message: str
) -> None:
    run(tmp_path, 3)
    rows = lines(tmp_path)
    log(tmp_path).write_text("".join(row + "\n" for row in change(rows)))
    with pytest.raises(StateError, match=message):
        reopened(tmp_path)
    log(tmp_path).write_text("".join(row + "\n" for row in rows))
    assert len(reopened(tmp_path)[1]) == 3  # negative control


def test_another_configuration_is_refused_and_another_name_is_not(tmp_path: Path) -> None:
    run(tmp_path, 1)
    for changes in (
        {"seed": 1},
        {"rounds": 8},
        {"training": {"lr": 1e-3}},
        {"model": {"base": "org/other"}},
    ):
        with pytest.raises(StateError, match="another configuration"):
            RunFolder.create(tmp_path, config(**changes), ROLES)
    RunFolder.create(
        tmp_path,
        config(name="renamed", output={"folder": str(tmp_path), "tensorboard": True}),
        ROLES,
    )
    assert read_config(tmp_path).name == "renamed"
    assert reopened(tmp_path)[1] == [record(1)]


def test_before_the_first_round_the_configuration_may_be_corrected(tmp_path: Path) -> None:
    """A run that ended because its model was not found left a folder without a round."""
    RunFolder.create(tmp_path, config(), ROLES).load()
    RunFolder.create(tmp_path, config(seed=1), ROLES).save(record(1), state(1))
    with pytest.raises(StateError, match="another configuration"):
        RunFolder.create(tmp_path, config(), ROLES)


def test_a_folder_of_something_else_is_refused_and_left_alone(tmp_path: Path) -> None:
    (tmp_path / "thesis.tex").write_text("important")
    with pytest.raises(StateError, match="not empty and holds no run"):
        RunFolder.create(tmp_path, config(), ROLES)
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.tex"]
    with pytest.raises(StateError, match="cannot make the folder"):
        RunFolder.create(tmp_path / "thesis.tex", config(), ROLES)
    (tmp_path / "killed").mkdir()
    # killed while the first file was written
    (tmp_path / "killed" / "config.json.part").write_text("{")
    assert RunFolder.create(tmp_path / "killed", config(), ROLES).load() == (None, [])


def test_a_folder_that_is_no_runs_is_said_to_be_none(tmp_path: Path) -> None:
    for read in (read_config, read_run):
        with pytest.raises(StateError, match="not the folder of a run"):
            read(tmp_path)
    for text in ("", "[]", '{"model": 3}', '{"unknown": 1}'):
        (tmp_path / "config.json").write_text(text)
        with pytest.raises(StateError, match="not the folder of a run"):
            read_config(tmp_path)
    RunFolder.create(tmp_path / "run", config(), ROLES)
    (tmp_path / "run" / "clients.json").write_text("[")
    with pytest.raises(StateError, match=r"cannot read .*clients\.json"):
        read_run(tmp_path / "run")


def test_the_checkpoint_comes_before_the_log(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """So that no line stands in the log whose state is lost."""
    folder = run(tmp_path, 1)

    def killed(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(Path, "open", killed)  # of everything that is written
    with pytest.raises(KeyboardInterrupt):
        folder.save(record(2), state(2))
    monkeypatch.undo()
    assert [RoundRecord.from_json(line).round for line in lines(tmp_path)] == [1]
    found = load_checkpoint(tmp_path / "checkpoint")
    assert found is not None
    assert found[0] == 1
    monkeypatch.setattr(RunFolder, "_log", property(killed))  # of the log alone
    with pytest.raises(KeyboardInterrupt):
        folder.save(record(2), state(2))
    monkeypatch.undo()
    assert reopened(tmp_path)[1] == [record(1), record(2)]


def test_a_log_that_is_no_text_is_refused(tmp_path: Path) -> None:
    run(tmp_path, 2)
    log(tmp_path).write_bytes(b"\xff\xfe\n")
    with pytest.raises(StateError, match="cannot read"):
        reopened(tmp_path)
