"""Flower for real, on 127.0.0.1: SuperLink, SuperNodes and trainers in processes of their own, TLS, node keys, and what goes wrong with them.

Processes take long to start. So one deployment lives through everything first (`story`), and the tests look at what came of it."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
from federated import Files, defended, settings
from flowered import Deployment as FakeDeployment
from flowered import records, telling_probe
from flwr.app import Message
from test_resume import toml

from fedloop.config import Config
from fedloop.flower.app import write_app
from fedloop.flower.enrol import enrol
from fedloop.flower.keys import make_certificates, make_node_key
from fedloop.flower.launch import wait_for_port
from fedloop.flower.processes import Processes, free_port
from fedloop.report import write_report
from fedloop.rounds import RunResult, build_clients, resume, simulate
from fedloop.run_folder import read_run
from loraprobe.adapter import pack
from loraprobe.peft_io import load_adapter

pytestmark = [pytest.mark.slow, pytest.mark.enable_socket]

PATIENCE = 150.0
FEDLOOP = [sys.executable, "-m", "fedloop.cli"]
THREADS = {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}


def wait(condition: Callable[[], Any], what: str, patience: float = PATIENCE) -> Any:
    deadline = time.monotonic() + patience
    while not (found := condition()):
        assert time.monotonic() < deadline, f"{what}: nothing happened for {patience} s"
        time.sleep(0.1)
    return found


class Site:
    """One `fedloop flower node` that can be stopped, killed and started again with the same key."""

    def __init__(self, place: Path, name: str, port: int, authority: Path | None = None) -> None:
        self.place, self.name, self.port = place, name, port
        self.authority = authority or place / "certificates" / "ca.crt"
        self.group = Processes(place / "home", place / "logs")

    def start(self) -> None:
        self.group = Processes(self.place / "home", self.place / "logs")
        command = [*FEDLOOP, "flower", "node", "--superlink", f"127.0.0.1:{self.port}", "--ca", self.authority]
        self.group.start(self.name, [*command, "--key", self.place / "keys" / self.name, "--data", self.place / f"{self.name}.jsonl"], **THREADS)

    def log(self) -> str:
        path = self.place / "logs" / f"{self.name}.log"
        return path.read_text(errors="replace") if path.exists() else ""

    def trainer(self) -> int:
        """The process that trains: the head of the group."""
        return self.group._children[self.name].pid

    def kill(self) -> None:
        """SIGKILL to everything of the site at once."""
        for pid in self.group.running():
            os.kill(pid, signal.SIGKILL)
        self.group.stop()
        assert not self.group.running()

    def keep_up(self) -> bool:
        """What systemd's Restart=always does: start it again if it has ended. Whether it is up and connected."""
        if self.group._children[self.name].poll() is not None:
            self.group.stop()
            self.start()
        return self.log().count("SuperNode ID") == 2


class Deployment:
    """A server, and sites with data of their own; the same clients as the in-process engine would make."""

    def __init__(self, place: Path, values: dict[str, Any]) -> None:
        self.place, self.port = place, free_port()
        self.address, self.authority = f"127.0.0.1:{self.port}", place / "certificates" / "ca.crt"
        make_certificates(place / "certificates")
        self.server = Processes(place / "home", place / "logs")
        self.sites: dict[str, Site] = {}
        for client in build_clients(Config.of(values)):
            rows = [{"instruction": one.instruction, "response": one.response, "context": one.context} for one in client.examples]
            (place / f"{client.client_id}.jsonl").write_text("\n".join(map(json.dumps, rows)))
            make_node_key(place / "keys" / client.client_id)
            self.sites[client.client_id] = Site(place, client.client_id, self.port)

    def serve(self) -> None:
        """Start the server, anew after it was killed."""
        self.server = Processes(self.place / "home", self.place / "logs")
        command = [*FEDLOOP, "flower", "superlink", "--host", "127.0.0.1", "--port", str(self.port), "--certificates", self.place / "certificates"]
        self.server.start("superlink", [*command, "--database", self.place / "state.db"], **THREADS)
        wait_for_port(self.port, self.server.check)

    def app(self, name: str, values: dict[str, Any], round_timeout: float) -> Path:
        """An app's folder with this experiment."""
        folder = self.place / name
        write_app(folder)
        (folder / "config.toml").write_text(toml(values))
        project = (folder / "pyproject.toml").read_text()
        (folder / "pyproject.toml").write_text(project.replace("round-timeout = 600.0", f"round-timeout = {round_timeout}"))
        return folder

    def start(self, folder: Path) -> Started:
        """`fedloop flower start`."""
        command = [*FEDLOOP, "flower", "start", folder, "--out", folder / "run", "--ca", self.authority, "--superlink", self.address]
        return Started(command, folder / "shown.txt")

    def refused(self, name: str, authority: Path) -> str:
        """What a node prints that is not let in."""
        make_node_key(self.place / "keys" / name)
        site = Site(self.place, name, self.port, authority)
        (self.place / f"{name}.jsonl").write_text('{"instruction": "a", "response": "b"}')
        site.start()
        assert site.group._children[name].wait(PATIENCE) == 2
        site.group.stop()
        return site.log()

    def close(self) -> None:
        for site in self.sites.values():
            site.kill()
        self.server.stop()
        assert not self.server.running()


class Started:
    """A command that was started, and what it prints."""

    def __init__(self, command: list[Any], shown: Path) -> None:
        self._shown = shown
        with shown.open("ab") as file:
            self.process = subprocess.Popen([*map(str, command)], env={**os.environ, **THREADS, "COLUMNS": "200"}, stdout=file, stderr=file)

    def shown(self) -> str:
        return self._shown.read_text(errors="replace")

    def code(self) -> int:
        return self.process.wait(PATIENCE)

    def until(self, folder: Path, rounds: int) -> None:
        """Wait until the run in a folder has finished so many rounds."""
        wait(lambda: finished(folder) >= rounds or self.process.poll() is not None, f"round {rounds}")
        assert self.process.poll() is None, self.shown()


def finished(folder: Path) -> int:
    return len(records(folder)) if (folder / "records.jsonl").exists() else 0


@dataclass
class Story:
    """What happened.

    Attributes:
        folder: of the run.
        bad: the number of the round that went wrong.
        twin: the same experiment with the same absences on a fake grid, which nobody interrupted.
        killed: how many processes the server had when it was killed, and how many rounds were finished then.
        shown: what the run that was interrupted and the one that went on printed, with their exit codes.
        refused: what nodes printed that were not let in.
        node_ids: client -> Flower's node id, whenever its node came up.
    """

    folder: Path
    bad: int = 0
    twin: RunResult | None = None
    killed: tuple[int, int] = (0, 0)
    shown: list[tuple[int, str]] = field(default_factory=list)
    refused: dict[str, str] = field(default_factory=dict)
    node_ids: dict[str, list[str]] = field(default_factory=dict)


@pytest.fixture(scope="module")
def story(tiny_files: Files, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Story]:
    """A good round, a bad one in which one straggles and one is killed, then all of the server is killed, and everybody comes back."""
    values = settings(tiny_files, rounds=4, clients={"count": 3}, defense=defended(tiny_files, "step"))
    made = Deployment(tmp_path_factory.mktemp("deployment"), values)
    told = Story(made.place / "federation" / "run")
    try:
        made.serve()
        federation = made.app("federation", values, round_timeout=15.0)
        for name, site in made.sites.items():
            enrol(federation / "nodes.json", name, made.place / "keys" / f"{name}.pub", None, made.address, made.authority)
            site.start()
        faults(made, federation, told)
        everybody_returns(made, federation, told)
        told.twin = uninterrupted(values, tmp_path_factory.mktemp("twin"), str(told.bad))
        yield told
    finally:
        made.close()


def uninterrupted(values: dict[str, Any], place: Path, bad: str) -> RunResult:
    """What the story has to end in."""

    def absent(asked: Message, reply: Message) -> Sequence[Message]:
        return [] if asked.metadata.group_id == bad else [reply]

    return FakeDeployment(place, values, **{"round-timeout": 1.0}).serve({"client-01": absent, "client-02": absent})


def faults(made: Deployment, folder: Path, told: Story) -> None:
    """A good round, a bad one, and the end of the server."""
    _, straggler, victim = made.sites.values()
    run = made.start(folder)
    run.until(told.folder, 1)
    for site in (straggler, victim):
        os.kill(site.trainer(), signal.SIGSTOP)  # its SuperNode goes on fetching messages
    wait(lambda: victim.log().count("Received successfully") > victim.log().count("Sent successfully"), "a message in the victim's hands")
    victim.kill()
    wait(lambda: bad_round(told.folder), "a bad round")
    told.bad = bad_round(told.folder)
    doomed = made.server.running()
    for pid in doomed:
        os.kill(pid, signal.SIGKILL)
    told.shown.append((run.code(), run.shown()))
    told.killed = len(doomed), finished(told.folder)
    os.kill(straggler.trainer(), signal.SIGCONT)
    made.server.stop()


def bad_round(folder: Path) -> int:
    """The number of the first round in which somebody was refused; 0 if there is none yet."""
    return next((int(one["round"]) for one in records(folder) if one["reasons"]), 0)


def everybody_returns(made: Deployment, folder: Path, told: Story) -> None:
    """A server with the same database, sites with the same keys; and two that are not let in."""
    victim = made.sites["client-02"]
    made.serve()
    victim.start()
    make_certificates(made.place / "elsewhere")
    told.refused["unregistered"] = made.refused("stranger", made.authority)
    told.refused["another authority"] = made.refused("astray", made.place / "elsewhere" / "ca.crt")
    wait(victim.keep_up, "the killed node to be let in again")
    run = made.start(folder)
    told.shown.append((run.code(), run.shown()))
    told.node_ids = {name: re.findall(r"SuperNode ID: (\d+)", site.log()) for name, site in made.sites.items()}


# --- what came of it ---------------------------------------------------------------------------------------------------------------------


def test_a_run_whose_server_is_killed_whole_ends_where_an_uninterrupted_one_does(story: Story) -> None:
    processes, rounds = story.killed
    assert processes >= 3  # the SuperLink, Flower's process that starts others, and the ServerApp
    assert story.bad <= rounds < 4
    (code, shown), (code_later, all_shown) = story.shown
    assert code == 2
    assert "EngineError: cannot reach the SuperLink" in shown
    assert code_later == 0, all_shown
    later = all_shown.removeprefix(shown)
    assert "round 4 of 4: mean factor" in later
    assert "round 1 of 4" not in later
    assert story.twin is not None
    same(story.folder, story.twin)


def same(folder: Path, expected: RunResult) -> None:
    """The folder holds the expected run, to 1e-6 and with the same factors; the in-process engine and the report take it for their own."""
    _, _, found = read_run(folder)
    assert [record.factors for record in found] == [record.factors for record in expected.records]
    assert torch.allclose(pack(load_adapter(folder / "adapter"))[0], pack(expected.adapter)[0], rtol=0, atol=1e-6)
    assert list(resume(folder).records) == found
    assert all(client in write_report(folder).read_text() for client in expected.roles)


def test_a_killed_node_and_a_straggler_are_missing_and_the_round_goes_on(story: Story) -> None:
    found = read_run(story.folder)[2]
    bad = found[story.bad - 1]
    assert story.bad in (2, 3)
    assert bad.reasons.keys() == {"client-01", "client-02"}
    assert all(why.startswith("missing: ") for why in bad.reasons.values())
    assert bad.weights == {"client-00": 1.0, "client-01": 0.0, "client-02": 0.0}
    assert not bad.skipped
    assert bad.seconds["exchange"] == pytest.approx(15, abs=4)
    assert 0 < found[0].seconds["train"] < found[0].seconds["exchange"] < 15


def test_a_node_that_returns_with_its_key_is_the_same_client_with_the_same_trust(story: Story) -> None:
    found = read_run(story.folder)[2]
    trust = [record.factors["client-00"] for record in found]
    assert trust == sorted(set(trust))  # it grows with every round that was good
    assert found[0].factors == dict.fromkeys(found[0].factors, trust[0])
    assert not found[-1].reasons
    assert found[-1].factors == {"client-00": trust[3], "client-01": trust[2], "client-02": trust[2]}  # of their third good round, not of a first
    assert len(story.node_ids["client-02"]) == 2
    assert {len(set(ids)) for ids in story.node_ids.values()} == {1}


def test_who_has_no_registered_key_or_does_not_know_the_server_is_not_let_in(story: Story) -> None:
    assert "Failed to activate SuperNode" in story.refused["unregistered"]
    assert "CERTIFICATE_VERIFY_FAILED" in story.refused["another authority"]
    assert all("SuperNode ID" not in log and "EngineError: the SuperNode ended" in log for log in story.refused.values())


# --- everything on this machine with one command ---------------------------------------------------------------------------------------


def belonging_to(folder: Path) -> list[str]:
    """The command lines of all processes that have Flower's home in this folder."""
    found = []
    for entry in Path("/proc").glob("[0-9]*"):
        with suppress(OSError):
            if f"FLWR_HOME={folder}".encode() in (entry / "environ").read_bytes():
                found.append((entry / "cmdline").read_bytes().decode(errors="replace"))
    return found


@pytest.fixture(scope="module")
def values(tiny_files: Files, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """An experiment whose probe tells its malicious client."""
    probe = telling_probe(tiny_files).save_pretrained(tmp_path_factory.mktemp("probe") / "telling")
    defense = {"level": "cumulative", "probe": str(probe), "threshold": 0.5}
    return settings(tiny_files, training={"steps": 4, "batch_size": 4}, clients={"count": 3, "examples": 12}, defense=defense)


def test_one_command_runs_a_federation_as_one_process_would_and_leaves_nothing_behind(values: dict[str, Any], tmp_path: Path) -> None:
    expected, folder = simulate(values), tmp_path / "run"
    (tmp_path / "one.toml").write_text(toml(values))
    run = Started([*FEDLOOP, "run", tmp_path / "one.toml", "--out", folder, "--engine", "flower"], tmp_path / "shown.txt")
    run.until(folder, 1)
    assert len(belonging_to(folder)) >= 7  # SuperLink, SuperExec, ServerApp, three SuperNodes, the trainer
    run.process.send_signal(signal.SIGINT)
    assert run.code() not in (0, 2)
    assert belonging_to(folder) == []
    again = Started([*FEDLOOP, "resume", folder, "--engine", "flower"], tmp_path / "shown.txt")
    assert again.code() == 0, again.shown()
    assert belonging_to(folder) == []
    assert "3 SuperNodes, and one process that trains for all of them" in again.shown()
    same(folder, expected)
    malicious = next(client for client, role in expected.roles.items() if role["role"] == "malicious")
    for record in read_run(folder)[2]:
        assert record.weights[malicious] == 0.0
        assert sorted(record.weights.values()) == [0.0, 0.5, 0.5]
        assert record.bytes["update"] == 3 * 4 * pack(expected.adapter)[0].numel()
