"""Flower for real, on 127.0.0.1: SuperLink, SuperNodes and trainers in processes of their own, TLS, node keys, and what goes wrong with them.

Processes take long to start. So one deployment lives through everything first (`story`), and the tests look at what came of it."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
from federated import Files, settings
from flowered import records, telling_probe
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
        equal, faults: run folders.
        expected: what the in-process engine makes of the experiment of `equal`.
        killed: how many processes the server had when it was killed, and how many rounds were finished then.
        told: what `fedloop flower start` printed, by what happened to it.
        refused: what nodes printed that were not let in.
        node_ids: client -> Flower's node id, whenever its node came up.
    """

    equal: Path
    faults: Path
    expected: RunResult
    killed: tuple[int, int] = (0, 0)
    told: dict[str, tuple[int, str]] = field(default_factory=dict)
    refused: dict[str, str] = field(default_factory=dict)
    node_ids: dict[str, list[str]] = field(default_factory=dict)


@pytest.fixture(scope="module")
def values(tiny_files: Files, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """An experiment whose probe tells its malicious client."""
    probe = telling_probe(tiny_files).save_pretrained(tmp_path_factory.mktemp("probe") / "telling")
    defense = {"level": "cumulative", "probe": str(probe), "threshold": 0.5}
    return settings(tiny_files, rounds=3, training={"steps": 4, "batch_size": 4}, clients={"count": 3, "examples": 12}, defense=defense)


@pytest.fixture(scope="module")
def story(values: dict[str, Any], tiny_files: Files, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Story]:
    made = Deployment(tmp_path_factory.mktemp("deployment"), values)
    trusting = {**values, "defense": {"level": "step", "probe": str(tiny_files.probe)}}
    equal, faults = made.app("equal", values, 60.0), made.app("faults", trusting, 15.0)
    told = Story(equal / "run", faults / "run", simulate(values))
    try:
        made.serve()
        for name, site in made.sites.items():
            enrol(equal / "nodes.json", name, made.place / "keys" / f"{name}.pub", None, made.address, made.authority)
            site.start()
        shutil.copy(equal / "nodes.json", faults / "nodes.json")
        part_with_faults(made, faults, told)
        part_with_the_server_killed(made, equal, told)
        goes_on = made.start(faults)
        told.told["went on"] = (goes_on.code(), goes_on.shown())
        told.node_ids = {name: re.findall(r"SuperNode ID: (\d+)", site.log()) for name, site in made.sites.items()}
        yield told
    finally:
        made.close()


def part_with_faults(made: Deployment, folder: Path, told: Story) -> None:
    """Round 1: everybody. Round 2: the second client is a straggler, the third is killed with the message in its hands. Then a stop."""
    _, straggler, victim = made.sites.values()
    run = made.start(folder)
    run.until(folder / "run", 1)
    for site in (straggler, victim):
        os.kill(site.trainer(), signal.SIGSTOP)  # its SuperNode goes on fetching messages
    wait(lambda: victim.log().count("Received successfully") == 2, "the second message")
    victim.kill()
    run.until(folder / "run", 2)
    run.process.send_signal(signal.SIGINT)
    told.told["stopped"] = (run.code(), run.shown())
    os.kill(straggler.trainer(), signal.SIGCONT)


def part_with_the_server_killed(made: Deployment, folder: Path, told: Story) -> None:
    """Once the victim is let in again: a run that loses all of the server after its first round, and goes on."""
    victim = list(made.sites.values())[2]
    victim.start()
    make_certificates(made.place / "elsewhere")
    told.refused["unregistered"] = made.refused("stranger", made.authority)
    told.refused["another authority"] = made.refused("astray", made.place / "elsewhere" / "ca.crt")
    wait(victim.keep_up, "the killed node to be let in again")
    first = made.start(folder)
    first.until(folder / "run", 1)
    doomed = made.server.running()
    for pid in doomed:
        os.kill(pid, signal.SIGKILL)
    told.told["server killed"] = (first.code(), first.shown())
    told.killed = len(doomed), finished(folder / "run")
    made.server.stop()
    made.serve()  # the same database, so that keys and node ids are still known; the sites were not touched
    second = made.start(folder)
    told.told["resumed"] = (second.code(), second.shown())


# --- what came of it ---------------------------------------------------------------------------------------------------------------------


def test_the_same_experiment_ends_as_in_one_process_though_all_of_the_server_was_killed(story: Story) -> None:
    processes, rounds = story.killed
    assert processes >= 3  # the SuperLink, Flower's process that starts others, and the ServerApp
    assert 1 <= rounds < 3
    code, shown = story.told["server killed"]
    assert code == 2
    assert "EngineError: cannot reach the SuperLink" in shown
    code, shown = story.told["resumed"]
    assert code == 0, shown
    assert "round 3 of 3: mean factor 0.67" in shown
    same(story.equal, story.expected)


def same(folder: Path, expected: RunResult) -> None:
    """The folder holds the run that the in-process engine computes, and that engine and the report read it as their own."""
    _, _, found = read_run(folder)
    assert [record.factors for record in found] == [record.factors for record in expected.records]
    assert torch.allclose(pack(load_adapter(folder / "adapter"))[0], pack(expected.adapter)[0], rtol=0, atol=1e-6)
    assert list(resume(folder).records) == found
    assert all(client in write_report(folder).read_text() for client in expected.roles)


def test_the_malicious_client_has_no_weight(story: Story) -> None:
    malicious = next(client for client, role in story.expected.roles.items() if role["role"] == "malicious")
    for record in read_run(story.equal)[2]:
        assert record.weights[malicious] == 0.0
        assert sorted(record.weights.values()) == [0.0, 0.5, 0.5]
        assert record.bytes["update"] == 3 * 4 * pack(story.expected.adapter)[0].numel()
        assert 0 < record.seconds["train"] < record.seconds["exchange"]


def test_a_killed_node_and_a_straggler_are_missing_and_the_round_goes_on(story: Story) -> None:
    one, two, _ = read_run(story.faults)[2]
    assert not one.reasons
    assert two.reasons.keys() == {"client-01", "client-02"}
    assert all(why.startswith("missing: ") for why in two.reasons.values())
    assert two.weights == {"client-00": 1.0, "client-01": 0.0, "client-02": 0.0}
    assert not two.skipped
    assert two.seconds["exchange"] == pytest.approx(15, abs=4)


def test_a_node_that_returns_with_its_key_is_the_same_client_with_the_same_trust(story: Story) -> None:
    code, shown = story.told["went on"]
    assert code == 0, shown
    one, two, three = read_run(story.faults)[2]
    assert not three.reasons
    first, second, third = one.factors["client-00"], two.factors["client-00"], three.factors["client-00"]
    assert first < second < third  # trust grows with every round that was good
    assert one.factors == dict.fromkeys(one.factors, first)
    assert three.factors == {"client-00": third, "client-01": second, "client-02": second}  # it is their second one, not their first
    assert len(story.node_ids["client-02"]) == 2
    assert {len(set(ids)) for ids in story.node_ids.values()} == {1}


def test_a_run_that_is_stopped_goes_on_later(story: Story) -> None:
    code, shown = story.told["stopped"]
    assert code not in (0, 2)
    assert "round 1 of 3" in shown
    later = story.told["went on"][1].removeprefix(shown)
    assert "round 3 of 3" in later
    assert "round 1 of 3" not in later


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


def test_one_command_runs_a_federation_and_leaves_nothing_behind(values: dict[str, Any], tmp_path: Path) -> None:
    few = {**values, "rounds": 2, "clients": {**values["clients"], "count": 2}}
    (tmp_path / "one.toml").write_text(toml(few))
    folder = tmp_path / "run"
    run = Started([*FEDLOOP, "run", tmp_path / "one.toml", "--out", folder, "--engine", "flower"], tmp_path / "shown.txt")
    run.until(folder, 1)
    assert len(belonging_to(folder)) >= 6  # SuperLink, SuperExec, ServerApp, two SuperNodes, the trainer
    run.process.send_signal(signal.SIGINT)
    assert run.code() not in (0, 2)
    assert belonging_to(folder) == []
    again = Started([*FEDLOOP, "resume", folder, "--engine", "flower"], tmp_path / "shown.txt")
    assert again.code() == 0, again.shown()
    assert belonging_to(folder) == []
    assert "2 SuperNodes, and one process that trains for all of them" in again.shown()
    same(folder, simulate(few))
