"""A Flower deployment on 127.0.0.1 for the tests.

A server and sites in processes of their own, with TLS and node keys.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from fedloop.config import Config
from fedloop.flower.deploy.app import write_app
from fedloop.flower.deploy.keys import make_certificates, make_node_key
from fedloop.flower.deploy.launch import wait_for_port
from fedloop.flower.deploy.processes import Processes, free_port
from fedloop.run.build import build_clients
from tests.helpers.federated import toml
from tests.helpers.flowered import records

PATIENCE = 300.0
FEDLOOP = [sys.executable, "-m", "fedloop.cli.main"]
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
        command = [
            *FEDLOOP,
            "flower",
            "node",
            "--superlink",
            f"127.0.0.1:{self.port}",
            "--ca",
            self.authority,
        ]
        self.group.start(
            self.name,
            [
                *command,
                "--key",
                self.place / "keys" / self.name,
                "--data",
                self.place / f"{self.name}.jsonl",
            ],
            **THREADS,
        )

    def log(self) -> str:
        path = self.place / "logs" / f"{self.name}.log"
        return path.read_text(errors="replace") if path.exists() else ""

    def connected(self) -> bool:
        """Whether it reaches the server, as far as its log says."""
        log = self.log()
        return log.rfind("Connection successful") >= log.rfind("Connection attempt failed")

    def trainer(self) -> int:
        """The process that trains: the head of the group."""
        return self.group._children[self.name].pid

    def kill(self) -> None:
        """SIGKILL to everything of the site at once."""
        for pid in self.group.running():
            os.kill(pid, signal.SIGKILL)
        self.group.stop()
        assert not self.group.running()

    def ended(self) -> str:
        """What a node printed that was not let in."""
        assert self.group._children[self.name].wait(PATIENCE) == 2
        self.group.stop()
        return self.log()

    def keep_up(self) -> bool:
        """What systemd's Restart=always does: start it again if it has ended.

        Whether it is up and connected.
        """
        if self.group._children[self.name].poll() is not None:
            self.group.stop()
            self.start()
        return self.log().count("SuperNode ID") == 2


class Deployment:
    """A server, and sites with data of their own.

    The same clients as the in-process engine would make.
    """

    def __init__(self, place: Path, values: dict[str, Any]) -> None:
        self.place, self.port = place, free_port()
        self.address, self.authority = f"127.0.0.1:{self.port}", place / "certificates" / "ca.crt"
        make_certificates(place / "certificates")
        self.server = Processes(place / "home", place / "logs")
        self.sites: dict[str, Site] = {}
        for client in build_clients(Config.of(values)):
            rows = [
                {"instruction": one.instruction, "response": one.response, "context": one.context}
                for one in client.examples
            ]
            (place / f"{client.client_id}.jsonl").write_text("\n".join(map(json.dumps, rows)))
            make_node_key(place / "keys" / client.client_id)
            self.sites[client.client_id] = Site(place, client.client_id, self.port)

    def serve(self) -> None:
        """Start the server, anew after it was killed."""
        self.server = Processes(self.place / "home", self.place / "logs")
        command = [
            *FEDLOOP,
            *"flower superlink --host 127.0.0.1 --port".split(),
            str(self.port),
            "--certificates",
            self.place / "certificates",
        ]
        self.server.start("superlink", [*command, "--database", self.place / "state.db"], **THREADS)
        wait_for_port(self.port, self.server.check)

    def app(self, name: str, values: dict[str, Any], round_timeout: float) -> Path:
        """An app's folder with this experiment."""
        folder = self.place / name
        write_app(folder)
        (folder / "config.toml").write_text(toml(values))
        project = (folder / "pyproject.toml").read_text()
        (folder / "pyproject.toml").write_text(
            project.replace("round-timeout = 600.0", f"round-timeout = {round_timeout}")
        )
        return folder

    def start(self, folder: Path) -> Started:
        """`fedloop flower start`."""
        command = [
            *FEDLOOP,
            "flower",
            "start",
            folder,
            "--out",
            folder / "run",
            "--ca",
            self.authority,
            "--superlink",
            self.address,
        ]
        return Started(command, folder / "shown.txt")

    def unwelcome(self, name: str, authority: Path) -> Site:
        """A node that should not be let in, started."""
        make_node_key(self.place / "keys" / name)
        site = Site(self.place, name, self.port, authority)
        (self.place / f"{name}.jsonl").write_text('{"instruction": "a", "response": "b"}')
        site.start()
        return site

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
            self.process = subprocess.Popen(
                [*map(str, command)],
                env={**os.environ, **THREADS, "COLUMNS": "200"},
                stdout=file,
                stderr=file,
            )

    def shown(self) -> str:
        return self._shown.read_text(errors="replace")

    def code(self) -> int:
        return self.process.wait(PATIENCE)

    def until(self, folder: Path, rounds: int) -> None:
        """Wait until the run in a folder has finished so many rounds."""
        wait(
            lambda: finished(folder) >= rounds or self.process.poll() is not None, f"round {rounds}"
        )
        assert self.process.poll() is None, self.shown()


def finished(folder: Path) -> int:
    return len(records(folder)) if (folder / "records.jsonl").exists() else 0
