"""The parts of a Flower deployment.

Settings, the nodes file, keys, the app that is sent out, who may command a SuperLink, and
processes.
"""

from __future__ import annotations

import asyncio
import io
import os
import re
import signal
import ssl
import subprocess
import sys
import time
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import fedloop.cli.flower  # noqa: F401  # it joins the app
from fedloop.config import Config
from fedloop.errors import ConfigError, EngineError
from fedloop.flower import QUIET
from fedloop.flower.deploy.app import FILES, write_app
from fedloop.flower.deploy.control import Control
from fedloop.flower.deploy.enrol import enrol, strike
from fedloop.flower.deploy.keys import make_certificates, make_node_key
from fedloop.flower.deploy.launch import ended_by_signals, run_on_loopback
from fedloop.flower.deploy.processes import Processes, child_environment, flower_command
from fedloop.flower.deploy.superlink import LocalCommand
from fedloop.flower.nodes import Node, read_nodes, write_nodes
from fedloop.flower.settings import EngineSettings
from tests.helpers.boxed import fed as invoke
from tests.helpers.federated import Files, experiment, settings
from tests.helpers.flowered import handshake

ROOT = Path(__file__).resolve().parents[3]


# --- settings and nodes


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"round_timeout": 0}, "round-timeout: got 0; expected a number of seconds above 0"),
        ({"round_timeout": "60"}, "round-timeout: got '60'"),
        ({"connect_timeout": float("inf")}, "connect-timeout: got inf"),
        ({"connect_timeout": True}, "connect-timeout: got True"),
        ({"wire": "bfloat16"}, "wire: got 'bfloat16'; expected one of float32, float16"),
        ({"max_empty_rounds": 0}, "max-empty-rounds: got 0"),
        ({"max_empty_rounds": 2.0}, "max-empty-rounds: got 2.0"),
    ],
)
def test_settings_out_of_range_are_told(wrong: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError) as raised:
        EngineSettings(**wrong)
    assert message in str(raised.value)


def test_nodes_come_back_in_the_order_of_their_names(tmp_path: Path) -> None:
    nodes = {"site-b": Node(2**63 + 5, "key b", 30), "site-a": Node(7, "key a", 10)}
    write_nodes(tmp_path / "nodes.json", nodes)
    assert list(read_nodes(tmp_path / "nodes.json").items()) == sorted(nodes.items())
    write_nodes(tmp_path / "nodes.json", {"one": Node(1, "key")})
    assert read_nodes(tmp_path / "nodes.json") == {"one": Node(1, "key", None)}


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (None, "cannot read"),
        ("[]", "cannot read"),
        ("{", "cannot read"),
        ('{"a": {"node": "1"}}', "cannot read"),
        ("{}", "names no node"),
        ('{"a": {"node": 1, KEY}, "b": {"node": "1", KEY}}', "names a node twice"),
        ('{"a": {"node": 1, KEY, "examples": 5}, "b": {"node": 2, KEY}}', "every client, or for"),
        ('{"a": {"node": 1, KEY, "examples": 0}}', "above 0"),
        ('{"a": {"node": 1, KEY, "examples": "5"}}', "whole number"),
    ],
)
def test_a_nodes_file_that_cannot_be_meant_is_refused(
    text: str | None, message: str, tmp_path: Path
) -> None:
    if text is not None:
        (tmp_path / "nodes.json").write_text(text.replace("KEY", '"key": "x"'))
    with pytest.raises(ConfigError, match=message):
        read_nodes(tmp_path / "nodes.json")


# --- keys


def test_certificates_are_for_this_machine_and_nobody_elses_eyes(tmp_path: Path) -> None:
    make_certificates(tmp_path)
    assert all(path.stat().st_mode & 0o777 == 0o600 for path in tmp_path.iterdir())
    server = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    server.load_cert_chain(tmp_path / "server.pem", tmp_path / "server.key")
    make_certificates(tmp_path / "other")
    ours, others = (
        ssl.create_default_context(cafile=folder / "ca.crt")
        for folder in (tmp_path, tmp_path / "other")
    )
    assert handshake(server, ours, "127.0.0.1")
    assert handshake(server, ours, "localhost")
    assert not handshake(server, ours, "example.org")
    assert not handshake(server, others, "127.0.0.1")


# --- the app


def test_an_app_is_written_whole_and_only_where_there_is_nothing(tmp_path: Path) -> None:
    folder = tmp_path / "federation"
    shown = invoke("flower", "init", folder).stdout
    assert shown.splitlines() == [f"wrote {folder / name}" for name in FILES]
    written = [str(path.relative_to(folder)) for path in folder.rglob("*.*")]
    assert sorted(written) == sorted(FILES)
    assert "is not empty" in invoke("flower", "init", folder, code=2).stderr
    values = (folder / "config.toml").read_text()
    experiment = values.replace('probe = "org/probe"', f'probe = "{ROOT / "zoo/probes/linear"}"')
    (tmp_path / "config.toml").write_text(experiment)
    assert Config.read(tmp_path / "config.toml").clients.count == 2


@pytest.mark.filterwarnings("ignore:GitWildMatchPattern:DeprecationWarning")  # in Flower
def test_nodes_are_sent_the_two_apps_and_nothing_else(tmp_path: Path) -> None:
    """Flower would send every .py, .toml, .json, .jsonl and .md of the folder to every node."""
    from flwr.cli.build import build_fab_from_disk

    app = tmp_path / "app"
    write_app(app)
    secrets = "nodes.json data.jsonl notes.md run/config.json server.key secrets.py"
    for name in (*secrets.split(), "fedloop_app/more.toml"):
        (app / name).parent.mkdir(exist_ok=True)
        (app / name).write_text("a secret")
    with zipfile.ZipFile(io.BytesIO(build_fab_from_disk(app))) as bundle:
        names = {name for name in bundle.namelist() if not name.startswith(".info/")}
        apps = {f"fedloop_app/{name}.py" for name in ("__init__", "server_app", "client_app")}
        assert names == {"pyproject.toml", *apps}
        assert not any(b"a secret" in bundle.read(name) for name in bundle.namelist())


# --- who may command a SuperLink


def asked(path: str, peer: str | None, kind: str = "http") -> Any:
    """What a request from this address gets: "passed", a status, or a close code."""
    events: list[Any] = []

    async def app(scope: Any, receive: Any, send: Any) -> None:
        events.append("passed")

    async def send(event: Any) -> None:
        events.append(event.get("status", event.get("code", "body")))

    async def receive() -> Any:
        raise AssertionError("nobody reads the body of a refused request")

    scope = {"type": kind, "path": path, "client": None if peer is None else (peer, 5000)}
    asyncio.run(LocalCommand(app)(scope, receive, send))
    return events[0]


COMMANDS = (
    "/v1/control/start-run /v1/control/register-node /v1/runtime/acquire-task /docs /health /"
)
ALIKE = "/v1/fleet /v1/fleets/x //v1/fleet/x /V1/fleet/x /v1/control/v1/fleet/"


def test_only_the_servers_own_machine_commands_it_and_nodes_reach_the_fleet_api() -> None:
    for path in COMMANDS.split():
        assert asked(path, "127.0.0.1") == asked(path, "::1") == "passed"
        for peer in ("10.0.0.7", "fe80::1", "127.0.0.1.example.org", "unix", None):
            assert asked(path, peer) == 403
    assert asked("/v1/fleet/pull-messages", "10.0.0.7") == "passed"
    for path in (*ALIKE.split(), " /v1/fleet/x"):
        assert asked(path, "10.0.0.7") == 403
    assert asked("/v1/fleet/x", "10.0.0.7", "websocket") == 1008
    assert asked("", None, "lifespan") == "passed"


def test_no_route_of_the_fleet_api_leads_elsewhere() -> None:
    """What nodes may reach, as this version of Flower serves it; a new route is to be looked at."""
    from flwr.superlink.routers.fleet.router import router

    names = (
        "activate deactivate heartbeat register unregister pull-messages push-messages pull-object"
        " push-object get-run get-fab confirm"
    )
    assert all(any(name in route.path for name in names.split()) for route in router.routes)


def until(condition: Callable[[], bool], patience: float = 60) -> None:
    deadline = time.monotonic() + patience
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.05)


# --- processes

DETACHING = (
    "import subprocess, sys, time; subprocess.Popen([sys.executable, '-c', 'import time;"
    " time.sleep(600)'], start_new_session=True); "
)
STUBBORN = "import signal; signal.signal(signal.SIGTERM, signal.SIG_IGN); "
STAYING = "print('up', flush=True); time.sleep(600)"


def up(log: Path) -> None:
    until(lambda: log.exists() and "up" in log.read_text())


@pytest.mark.skipif(sys.platform != "linux", reason="looks for processes in /proc")
def test_nothing_that_was_started_outlives_the_block(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("fedloop.flower.deploy.processes._GRACE", 1.0)
    scripts = {"detaching": DETACHING + STAYING, "stubborn": "import time; " + STUBBORN + STAYING}
    with Processes(tmp_path / "home", tmp_path / "logs") as group:
        for name, script in scripts.items():
            group.start(name, [sys.executable, "-c", script])
        for name in scripts:
            up(tmp_path / "logs" / f"{name}.log")
        assert len(group.running()) == 3
        group.check()
    until(lambda: not group.running(), 10)


HEAD = """
import sys, time
from pathlib import Path
from fedloop.flower.deploy.processes import Processes
group = Processes(Path(sys.argv[1]) / "home", Path(sys.argv[1]))
code = "import time; print('up', flush=True); time.sleep(600)"
child = group.start("child", [sys.executable, "-c", code])
print(child.pid, flush=True)
time.sleep(600)
"""


@pytest.mark.skipif(
    sys.platform != "linux", reason="the kernel tells children of their parent's death"
)
def test_nothing_that_was_started_outlives_a_killed_parent(tmp_path: Path) -> None:
    command = [sys.executable, "-c", HEAD, str(tmp_path)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, cwd=ROOT) as head:
        assert head.stdout is not None
        process = Path("/proc", head.stdout.readline().strip())
        up(tmp_path / "child.log")
        # it has become the command
        assert (process / "cmdline").read_bytes().split(b"\0")[1] == b"-c"
        head.send_signal(signal.SIGKILL)
    until(lambda: not process.exists() or b"State:\tZ" in (process / "status").read_bytes(), 20)


class Interrupted:
    """Its finaliser is where a signal arrives: Python prints and drops what is raised there."""

    def __init__(self, number: int) -> None:
        self.number = number

    def __del__(self) -> None:
        signal.raise_signal(self.number)


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
@pytest.mark.parametrize(
    ("number", "error"), [(signal.SIGINT, KeyboardInterrupt), (signal.SIGTERM, SystemExit)]
)
def test_a_signal_whose_exception_python_drops_still_ends_a_run(
    number: int, error: type[BaseException]
) -> None:
    before = signal.getsignal(number)
    with ended_by_signals() as raise_caught:
        raise_caught()  # nothing has been caught
        last = Interrupted(number)
        del last
        with pytest.raises(error):
            raise_caught()
    assert signal.getsignal(number) is before


def test_every_process_is_started_quiet(tmp_path: Path) -> None:
    environment = child_environment(tmp_path)
    assert environment["FLWR_HOME"] == str(tmp_path)
    assert QUIET == {
        "FLWR_TELEMETRY_ENABLED": "0",
        "FLWR_DISABLE_UPDATE_CHECK": "1",
        "RAY_USAGE_STATS_ENABLED": "0",
    }
    assert QUIET.items() <= environment.items()
    assert environment["PATH"].split(os.pathsep)[0] == str(Path(sys.executable).parent)
    assert flower_command("flower-supernode").is_file()
    with pytest.raises(EngineError, match="cannot find flower-nothing"):
        flower_command("flower-nothing")
    script = "import os, fedloop.flower; from flwr.supercore import telemetry; "
    script += "print(telemetry.FLWR_TELEMETRY_ENABLED, os.environ['FLWR_DISABLE_UPDATE_CHECK'])"
    loud = {**os.environ, "FLWR_TELEMETRY_ENABLED": "1", "FLWR_DISABLE_UPDATE_CHECK": "0"}
    command = [sys.executable, "-c", script]
    shown = subprocess.check_output(command, env=loud, cwd=ROOT, text=True, timeout=240)
    assert shown.split() == ["0", "1"]


def test_without_flower_the_pip_line_is_told(
    monkeypatch: pytest.MonkeyPatch, tiny_files: Files, tmp_path: Path
) -> None:
    monkeypatch.setitem(sys.modules, "flwr", None)
    config = experiment(tmp_path / "one.toml", settings(tiny_files, rounds=1))
    result = invoke("run", config, "--out", tmp_path / "out", "--engine", "flower", code=2)
    assert "needs flwr, which is not installed: pip install 'loraprobe[flower-deploy]'" in (
        result.stderr
    )
    assert not (tmp_path / "out").exists()


# --- what is wrong is told


LINK = "--superlink 127.0.0.1:1 --ca ca.crt"
WRONG = {
    "run one.toml --engine flower": "output.folder is missing",
    "run one.toml --engine flower --wire int8 -o out": "wire: got 'int8'",
    "run one.toml --engine flower --round-timeout 0 -o out": "round-timeout: got 0",
    "flower superlink --certificates . --database db": (
        "cannot find .*server.pem, .*server.key; expected ca.crt"
    ),
    f"flower node {LINK} --key absent --data x": "cannot find .*absent",
    f"flower register app a% key.pub {LINK}": "got the client name 'a%'",
    f"flower register app a no.pub {LINK}": "cannot read .*no.pub",
    "flower register app a key.pub --ca damaged.crt": ".* not a certificate",
    f"flower unregister app a {LINK}": "cannot read .*nodes.json",
    f"flower start empty --out run {LINK}": "cannot read .*config.toml",
}


def test_what_is_wrong_on_the_command_line_exits_with_2(
    tiny_files: Files, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    experiment(tmp_path / "one.toml", settings(tiny_files, rounds=1))
    make_node_key(tmp_path / "key")
    make_certificates(tmp_path / "certificates")
    (tmp_path / "ca.crt").write_bytes((tmp_path / "certificates" / "ca.crt").read_bytes())
    (tmp_path / "damaged.crt").write_text("x")
    write_app(tmp_path / "app")
    for command, message in WRONG.items():
        result = invoke(*command.split(), code=2)
        assert re.search(f"ConfigError: {message}", result.stderr), (command, result.stderr)
    assert not (tmp_path / "out").exists()


def test_a_name_is_given_once_and_an_unknown_one_cannot_be_struck(tmp_path: Path) -> None:
    nodes, where = tmp_path / "nodes.json", ("127.0.0.1:1", tmp_path / "ca.crt")
    make_certificates(tmp_path)
    write_nodes(nodes, {"site-a": Node(1, "key")})
    with pytest.raises(ConfigError, match="has a client site-a already"):
        enrol(nodes, "site-a", tmp_path / "key.pub", None, *where)
    with pytest.raises(ConfigError, match="has no client 'site-b'; expected one of site-a"):
        strike(nodes, "site-b", *where)


@pytest.mark.enable_socket
@pytest.mark.filterwarnings("ignore:GitWildMatchPattern:DeprecationWarning")
def test_a_superlink_that_is_not_there_and_keys_of_another_kind_are_told(tmp_path: Path) -> None:
    make_certificates(tmp_path)
    public = make_node_key(tmp_path / "key")
    with Control("127.0.0.1:1", tmp_path / "ca.crt") as control:
        with pytest.raises(EngineError, match=r"cannot reach the SuperLink at 127.0.0.1:1"):
            control.register(public)
        public.write_text(
            "ssh-ed25519 AAAAC3NzaC1lZDI1NTE5AAAAIGOJbQ0pRzIv5nPVc4cJr3vj5oH8gY2m0m2k0v8T0mYx me"
        )
        with pytest.raises(ConfigError, match="a key of another kind"):
            control.register(public)
        public.write_text("no key")
        with pytest.raises(ConfigError, match="is not a public key"):
            control.register(public)
        with pytest.raises(EngineError, match="is not a Flower app"):
            control.start(tmp_path, {})


def test_a_run_on_loopback_respects_what_is_in_its_folder(
    tiny_files: Files, tmp_path: Path
) -> None:
    (tmp_path / "mine").write_text("x")
    config = Config.of(settings(tiny_files, output={"folder": str(tmp_path)}))
    with pytest.raises(ValueError, match="is not empty and holds no run"):
        run_on_loopback(config, EngineSettings())
    assert [path.name for path in tmp_path.iterdir()] == ["mine"]
