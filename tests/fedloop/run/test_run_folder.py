"""A run's folder survives a kill at any moment, and is never taken for another run's."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

from fedloop.config import Config
from fedloop.defense.audit import AuditLog
from fedloop.defense.types import RoundRecord
from fedloop.errors import AuditError, StateError
from fedloop.run.folder import RunFolder, read_config, read_run
from fedloop.run.logs import audit_run
from fedloop.run.simulate import continued, flagged
from tests.helpers.federated import same_tree

ROLES: dict[str, dict[str, Any]] = {
    "client-00": {"role": "benign", "source": "builtin:benign", "share": 1.0}
}


def config(**changes: Any) -> Config:
    clients = {"benign": ["builtin:benign"]}
    return Config.of({"model": {"base": "org/base"}, "clients": clients, "rounds": 9, **changes})


def record(round: int, **changes: Any) -> RoundRecord:
    one = {"client-00": 1.0}
    counts = {"client-00": 3}
    scores = {"client-00": (0.1, 0.2)}
    return RoundRecord(round, scores, {"client-00": 0.9}, one, num_examples=counts, **changes)


def state(round: int) -> dict[str, Any]:
    return {"lora": torch.full((3,), float(round)), "round": round}


def opened(path: Path, *, changing: Sequence[str] = (), **changes: Any) -> RunFolder:
    return RunFolder.create(path, config(**changes), ROLES, changing=changing)


def run(path: Path, rounds: int) -> None:
    """A folder in which so many rounds were played."""
    with opened(path) as folder:
        folder.load()
        for number in range(1, rounds + 1):
            folder.save(record(number), state(number))
            folder.log([record(one) for one in range(1, number + 1)])


def reopened(path: Path) -> tuple[dict[str, Any] | None, list[RoundRecord]]:
    """What a run that goes on finds; the log is as it should be afterwards."""
    with opened(path) as folder:
        found, records = folder.load()
        folder.log(records)
    return found, records


def log(path: Path) -> Path:
    return path / "records.jsonl"


def lines(path: Path) -> list[str]:
    return log(path).read_text().splitlines()


def test_a_new_folder_has_no_state_and_an_old_one_has_its_last(tmp_path: Path) -> None:
    path = tmp_path / "new" / "folder"
    hurt = record(2, reasons={"client-00": "ü\n"})
    with opened(path, name="first") as folder:
        assert folder.load() == (None, [])
        folder.save(record(1), state(1))
        folder.save(hurt, state(2))
        folder.log([record(1), hurt])
    found, records = reopened(path)
    assert same_tree(found, state(2))
    assert records == [record(1), hurt]
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


def test_a_log_that_a_kill_left_behind_is_mended_by_the_checkpoint(tmp_path: Path) -> None:
    run(tmp_path, 1)
    log(tmp_path).unlink()  # killed between the first checkpoint and the first line
    assert reopened(tmp_path)[1] == [record(1)]
    assert lines(tmp_path) == [record(1).to_json()]
    with log(tmp_path).open("a") as file:
        file.write(record(1).to_json() + "\n")  # the last round twice
    assert reopened(tmp_path)[1] == [record(1)]
    assert len(lines(tmp_path)) == 1


IMPOSSIBLE: list[tuple[Callable[[list[str]], list[str]], str]] = [
    (lambda rows: [rows[0], *rows], r"rounds \[1, 1, 2, 3\]; expected 1 to 3, one each"),
    (lambda rows: rows[1:], r"rounds \[2, 3\]"),
    (lambda rows: [rows[1], rows[0], rows[2]], r"rounds \[2, 1, 3\]"),
    (lambda rows: [rows[0][:-3], *rows[1:]], "not a round record"),
    (lambda rows: ["", *rows], "not a round record"),
    (lambda rows: ["[]", *rows], "not a round record"),
    (lambda rows: ['{"round": 1}', *rows[1:]], "not a round record"),
    (lambda rows: ["\udcff\udcfe"], "cannot read"),
]


@pytest.mark.parametrize(("change", "message"), IMPOSSIBLE)
def test_a_log_that_a_kill_cannot_leave_is_refused(
    tmp_path: Path, change: Any, message: str
) -> None:
    run(tmp_path, 3)
    whole = log(tmp_path).read_bytes()
    rows = change(lines(tmp_path))
    log(tmp_path).write_bytes("".join(row + "\n" for row in rows).encode(errors="surrogateescape"))
    with pytest.raises(StateError, match=message):
        reopened(tmp_path)
    log(tmp_path).write_bytes(whole)
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
            opened(tmp_path, **changes)
    opened(tmp_path, name="renamed", output={"folder": "elsewhere", "tensorboard": True}).close()
    assert read_config(tmp_path).name == "renamed"
    assert reopened(tmp_path)[1] == [record(1)]


def test_before_the_first_round_the_configuration_may_be_corrected(tmp_path: Path) -> None:
    """A run that ended because its model was not found left a folder without a round."""
    opened(tmp_path).close()
    with opened(tmp_path, seed=1) as folder:
        folder.save(record(1), state(1))
    with pytest.raises(StateError, match="another configuration"):
        opened(tmp_path)


def test_a_folder_of_something_else_is_refused_and_left_alone(tmp_path: Path) -> None:
    (tmp_path / "thesis.tex").write_text("important")
    with pytest.raises(StateError, match="not empty and holds no run"):
        opened(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.tex"]
    with pytest.raises(StateError, match="cannot make the folder"):
        opened(tmp_path / "thesis.tex")
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "config.json").write_text('{"model_type": "llama"}')
    with pytest.raises(StateError, match="is not the folder of a run"):
        opened(tmp_path / "model")
    assert (tmp_path / "model" / "config.json").read_text() == '{"model_type": "llama"}'
    (tmp_path / "killed").mkdir()
    # killed while the first file was written
    (tmp_path / "killed" / "config.json.part").write_text("{")
    assert opened(tmp_path / "killed").load() == (None, [])


def test_a_folder_that_is_no_runs_is_said_to_be_none(tmp_path: Path) -> None:
    for read in (read_config, read_run):
        with pytest.raises(StateError, match="not the folder of a run"):
            read(tmp_path)
    for text in ("", "[]", '{"model": 3}', '{"unknown": 1}'):
        (tmp_path / "config.json").write_text(text)
        with pytest.raises(StateError, match="not the folder of a run"):
            read_config(tmp_path)
    opened(tmp_path / "run").close()
    (tmp_path / "run" / "clients.json").write_text("[")
    with pytest.raises(StateError, match=r"cannot read .*clients\.json"):
        read_run(tmp_path / "run")


def test_no_line_stands_in_the_log_whose_state_is_lost(tmp_path: Path) -> None:
    run(tmp_path, 1)
    with opened(tmp_path) as folder:
        folder.load()
        folder.save(record(2), state(2))  # killed before the log
    assert [RoundRecord.from_json(line).round for line in lines(tmp_path)] == [1]
    measured = record(2, metrics={"loss": 1.0})
    with opened(tmp_path) as folder:
        assert folder.load()[1] == [record(1), record(2)]
        assert not folder.is_logged
        folder.log([record(1), measured])  # what is measured belongs to the log
    assert reopened(tmp_path)[1] == [record(1), measured]


def test_rounds_without_their_checkpoint_are_not_played_over(tmp_path: Path) -> None:
    run(tmp_path, 2)
    shutil.rmtree(tmp_path / "checkpoint")
    former = log(tmp_path).read_bytes()
    with pytest.raises(StateError, match="no checkpoint of them; expected checkpoint/"):
        reopened(tmp_path)
    assert log(tmp_path).read_bytes() == former


def test_a_record_that_is_not_its_checkpoints_is_noticed(tmp_path: Path) -> None:
    run(tmp_path, 2)
    with opened(tmp_path) as folder:
        folder.save(record(4), state(4))
    with pytest.raises(StateError, match=r"rounds \[1, 2, 4\]"):
        reopened(tmp_path)


def test_one_process_at_a_time_and_a_killed_one_leaves_no_lock(tmp_path: Path) -> None:
    code = (
        "import sys, time; from pathlib import Path; from fedloop.run.lock import lock;"
        "taken = lock(Path(sys.argv[1])); print('taken', flush=True); time.sleep(600)"
    )
    run(tmp_path, 1)
    other = subprocess.Popen([sys.executable, "-c", code, str(tmp_path)], stdout=subprocess.PIPE)
    try:
        assert other.stdout is not None
        other.stdout.readline()
        with pytest.raises(StateError, match="in use by another process"):
            opened(tmp_path)
    finally:
        other.kill()
        other.communicate()
    assert reopened(tmp_path)[1] == [record(1)]


def test_rounds_and_evaluation_are_changed_by_a_flag_and_that_is_recorded(tmp_path: Path) -> None:
    run(tmp_path, 2)
    with pytest.raises(StateError, match=r"rounds: 20, was 9\).*--rounds N"):
        opened(tmp_path, rounds=20)
    with pytest.raises(StateError, match="seed: 3, was 0"):
        opened(tmp_path, rounds=20, seed=3, changing=["rounds"])
    with pytest.raises(StateError, match="rounds: 20, was 9"):  # its own flag
        opened(tmp_path, rounds=20, changing=["evaluation"])
    assert read_config(tmp_path).rounds == 9
    opened(tmp_path, rounds=20, changing=["rounds"]).close()
    with opened(tmp_path, rounds=20) as folder:
        assert same_tree(folder.load()[0], state(2))
        fields = {"rounds": [9, 20]}
        assert folder.about["changes"] == [{"after": 2, "fields": fields}]
    [change] = [one for one in audit_run(tmp_path) if one["what"] == "change"]
    assert change["fields"] == fields
    values = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**values, "seed": 7}))
    with pytest.raises(StateError, match="seed: 7, was 0"):  # an edited file is not believed
        RunFolder.create(tmp_path, read_config(tmp_path), ROLES)
    (tmp_path / "config.json").write_text(json.dumps({**values, "rounds": 7}))
    with pytest.raises(StateError, match="rounds: 7, was 20"):
        RunFolder.create(tmp_path, continued(tmp_path), ROLES, changing=flagged(None, None))


def test_a_run_is_known_by_content_wherever_that_lies(tmp_path: Path) -> None:
    digests = {"base": "b", "probe": None, "data": "d"}
    with opened(tmp_path) as folder:
        folder.check(digests)
        folder.save(record(1), state(1))
    moved = {"base": "/elsewhere/base"}
    with opened(tmp_path, model=moved) as folder:
        folder.load()
        with pytest.raises(StateError, match="the clients' data changed"):
            folder.check({**digests, "data": "other"})
        folder.check({"base": "b", "probe": "p", "data": None})
        assert folder.about["content"] == {"base": "b", "probe": "p", "data": "d"}
    assert read_config(tmp_path).model.base == "/elsewhere/base"


def test_as_many_checkpoints_are_kept_as_asked(tmp_path: Path) -> None:
    with opened(tmp_path, output={"keep": 2}) as folder:
        for number in range(1, 5):
            folder.save(record(number), state(number))
    kept = {path.name for path in (tmp_path / "checkpoint").iterdir()}
    assert kept == {"round-000003", "round-000004"}


def test_a_run_is_audited_against_its_checkpoint_and_its_records(tmp_path: Path) -> None:
    run(tmp_path, 3)
    assert [one["round"] for one in audit_run(tmp_path) if one["what"] == "round"] == [1, 2, 3]
    audit = tmp_path / "audit.jsonl"
    whole = audit.read_bytes()
    audit.write_bytes(b"".join(whole.splitlines(keepends=True)[:-1]))
    with pytest.raises(AuditError, match="missing at the end"):
        audit_run(tmp_path)
    with opened(tmp_path) as folder, pytest.raises(AuditError, match="missing at the end"):
        folder.write_audit("allow", client="c")
    audit.write_bytes(whole)
    text = log(tmp_path).read_text()
    log(tmp_path).write_text(text.replace('"factors": {"client-00": 0.9}', '"factors": {}', 1))
    with pytest.raises(AuditError, match="the record of round 1 is not the one"):
        audit_run(tmp_path)
    first, *rest = text.splitlines(keepends=True)
    for kept in ([first, rest[1]], [*rest, first], [first, first, *rest], [first], []):
        log(tmp_path).write_text("".join(kept))
        with pytest.raises(AuditError, match="expected 1 to 3, one each"):
            audit_run(tmp_path)
    log(tmp_path).write_text("".join([first, rest[0]]))  # the checkpoint has the third
    audit_run(tmp_path)


def test_what_a_killed_round_left_in_the_audit_log_is_said_to_be_void(tmp_path: Path) -> None:
    run(tmp_path, 1)
    with (tmp_path / "audit.jsonl").open("ab") as file:
        file.write(b'{"half": ')
    AuditLog(tmp_path / "audit.jsonl")(record(2))  # killed before the checkpoint
    with opened(tmp_path) as folder:
        folder.load()
        folder.save(record(2), state(2))
    whats = [one["what"] for one in audit_run(tmp_path)]
    assert whats == ["client", "round", "client", "round", "resumed", "client", "round"]
