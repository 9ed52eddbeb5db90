"""kill -9 at any moment, then resume.

The run ends bit for bit where one that nobody disturbed ends.
"""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch

from fedloop.config import Config
from fedloop.run.checkpoint import load_checkpoint
from fedloop.run.folder import read_run, written_to
from fedloop.run.run import RunResult
from fedloop.run.simulate import resume, simulate
from loraprobe.adapters.layout import pack
from loraprobe.adapters.load import load_adapter
from tests.helpers.federated import Files, defended, settings, toml, untimed

ROOT = Path(__file__).resolve().parents[3]
ENVIRONMENT = {
    **os.environ,
    "PYTHONPATH": str(ROOT),
    "HF_HUB_OFFLINE": "1",
    "OMP_NUM_THREADS": "1",
    "TOKENIZERS_PARALLELISM": "false",
}
PATIENCE = 240.0  # seconds: importing takes long on a busy machine
ROUNDS = 10


def stateful(files: Files) -> dict[str, Any]:
    """Memory wherever there can be one.

    Features of clients, moments of the server, histories of a rule.
    """
    measured = {"utility": "builtin:heldout_benign", "limit": 2, "max_new_tokens": 4, "every": 2}
    return settings(
        files,
        rounds=ROUNDS,
        clients={"sampled": 3},
        defense=defended(files, "cumulative", sketch=64, graded=True),
        aggregation={"rule": "foolsgold", "server": "fedadam", "server_options": {"lr": 0.01}},
        evaluation=measured,
    )


def shadowed(files: Files) -> dict[str, Any]:
    """Verdicts, and control variates of the clients."""
    options = {"min_evidence": 2, "audit_interval": 2}
    return settings(
        files,
        rounds=ROUNDS,
        defense=defended(files, "evidence", **options),
        aggregation={"server": "scaffold"},
    )


def folded(files: Files) -> dict[str, Any]:
    """Residuals on the base, trust over rounds, and attackers that draw at random."""
    clients = {"update_attack": "gaussian", "count": 5}
    return settings(
        files,
        rounds=ROUNDS,
        clients=clients,
        defense=defended(files, "step"),
        aggregation={"lora": "exact"},
    )


def progress(folder: Path) -> int:
    """Rounds that have a line in the log; -1 before there is a folder."""
    if not (folder / "clients.json").exists():
        return -1
    log = folder / "records.jsonl"
    return log.read_bytes().count(b"\n") if log.exists() else 0


def wait(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + PATIENCE
    while not condition():
        assert time.monotonic() < deadline, "nothing happened for too long"
        time.sleep(0.002)


def check(folder: Path, expected: RunResult) -> None:
    """The folder holds the run that was expected, whole."""
    _, roles, records = read_run(folder)
    assert [*map(untimed, records)] == [*map(untimed, expected.records)]
    assert torch.equal(pack(load_adapter(folder / "adapter"))[0], pack(expected.adapter)[0])
    assert roles == expected.roles
    names = sorted(path.name for path in (folder / "checkpoint").iterdir())
    assert names == [f"round-{len(records):06d}"]


# --- processes of their own

# A process that has imported everything and then forks one process for each command: a kill costs
# no import.
FORKING = """
import json, os, sys
import torch, transformers, peft, sklearn.cluster
import fedloop.run.simulate
from fedloop.cli.main import main
torch.set_num_threads(1)
for line in sys.stdin:
    child = os.fork()
    if not child:
        sys.argv = ["fedloop", *json.loads(line)]
        try:
            main()
        except SystemExit as leaving:
            os._exit(leaving.code or 0)
        os._exit(9)
    print(child, file=sys.__stdout__, flush=True)
    print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), file=sys.__stdout__, flush=True)
"""


class Forking:
    """Runs `fedloop` commands in processes that can be killed."""

    def __init__(self, log: Path) -> None:
        script = FORKING.replace("main()", "sys.stdout = sys.stderr; main()")
        with log.open("w") as file:
            self.server = subprocess.Popen(
                [sys.executable, "-c", script],
                env=ENVIRONMENT,
                text=True,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=file,
            )
        self.log = log

    def start(self, *command: object) -> int:
        """The id of a new process with this command."""
        assert self.server.stdin is not None
        self.server.stdin.write(json.dumps([str(part) for part in command]) + "\n")
        self.server.stdin.flush()
        return self.number()

    def number(self) -> int:
        """What it prints next: an id, or an exit code, minus the signal of one that was killed."""
        assert self.server.stdout is not None
        line = self.server.stdout.readline()
        assert line, self.log.read_text()
        return int(line)


@pytest.fixture(scope="module")
def forking(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Forking]:
    made = Forking(tmp_path_factory.mktemp("forking") / "log")
    yield made
    made.server.communicate()
    assert made.server.returncode == 0


@pytest.mark.slow
@pytest.mark.parametrize("of", [stateful, shadowed, folded], ids=lambda of: of.__name__)
def test_many_kills_in_one_run_change_nothing(
    of: Callable[[Files], dict[str, Any]], forking: Forking, tiny_files: Files, tmp_path: Path
) -> None:
    config, out = tmp_path / "one.toml", tmp_path / "out"
    config.write_text(toml(of(tiny_files)))
    expected = simulate(of(tiny_files))
    rng, command, kills = random.Random(of.__name__), ["run", str(config), "--out", str(out)], 0
    for _ in range(40):
        before = progress(out)
        child = forking.start(*command)
        if kills < 5:
            goal = max(0, before + rng.choice((0, 1)))  # while it starts, or once it has got on
            wait(lambda goal=goal: progress(out) >= goal)  # type: ignore[misc]
            time.sleep(rng.uniform(0, 0.1))
            os.kill(child, signal.SIGKILL)  # nobody has waited for it: the id is still its own
        code = forking.number()
        if code == 0:
            break
        assert code == -signal.SIGKILL, forking.log.read_text()
        kills += 1
        if progress(out) >= 0:
            command = ["resume", str(out)]
    assert code == 0
    assert kills >= 3
    check(out, expected)


# --- in this process


class Killed(BaseException):
    """In place of a kill, at a moment of the test's choosing."""


MOMENTS = {
    "after the checkpoint was renamed, before it was forced to the disk": (
        "fedloop.run.checkpoint.sync_folder"
    ),
    "before the checkpoint was renamed": "pathlib.Path.rename",
    "while older checkpoints were removed": "shutil.rmtree",
    "between checkpoint and log": "fedloop.run.folder.RunFolder._log",
    "before the round was saved": "fedloop.run.global_lora.GlobalLoRA.state_dict",
    "in the middle of a round": "fedloop.defense.defense.Defense.assess",
}


@pytest.mark.parametrize("moment", MOMENTS.values(), ids=MOMENTS)
def test_every_step_of_saving_may_be_the_last(
    moment: str, tiny_files: Files, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    values = {**shadowed(tiny_files), "rounds": 3, "output": {"folder": str(tmp_path / "run")}}

    def killed(*_: object, **__: object) -> None:
        raise Killed

    def watch(what: str, number: int, client: str, value: float) -> None:
        if number == 2:  # from the second round on
            monkeypatch.setattr(moment, property(killed) if moment.endswith("_log") else killed)

    with pytest.raises(Killed):
        simulate(values, watch=watch)
    monkeypatch.undo()
    found = load_checkpoint(tmp_path / "run" / "checkpoint")
    assert found is not None
    assert found[0] in (1, 2)
    resume(tmp_path / "run")
    check(tmp_path / "run", undisturbed(tiny_files))


@cache
def undisturbed(files: Files) -> RunResult:
    """What the test above has to end in."""
    return simulate({**shadowed(files), "rounds": 3})


def test_a_run_is_resumed_from_its_folder_wherever_that_is_now(
    tiny_files: Files, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    place = tmp_path / "place"
    place.mkdir()
    (place / "base").symlink_to(tiny_files.base)
    (place / "one.toml").write_text(
        toml({**settings(tiny_files), "model": {"base": "base", "name": "tiny/llama"}})
    )
    monkeypatch.chdir(place)
    config = written_to(Config.read("one.toml"), Path("run"))

    def watch(what: str, number: int, client: str, value: float) -> None:
        if number == 2:
            raise Killed

    with pytest.raises(Killed):
        simulate(config, watch=watch)
    (place / "run").rename(tmp_path / "moved")
    monkeypatch.chdir(tmp_path)
    result = resume("moved")
    assert result.folder == Path("moved")
    check(tmp_path / "moved", simulate(settings(tiny_files)))
