"""A whole federation on this machine.

SuperLink, one SuperNode a client, one process that trains for all of them, and the run.

It is the deployment of docs/flower.md on 127.0.0.1, TLS and node keys included, so that it
rehearses one. All clients share one base model in memory and train one after the other; the round's
timeout has to be long enough for all of them.
"""

from __future__ import annotations

import shutil
import signal
import sys
import time
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from types import FrameType

from loraprobe.adapters.load import load_adapter

from ...config import Config
from ...errors import ConfigError, EngineError
from ...run.best import Best
from ...run.build import build_clients, roles_of
from ...run.folder import RunFolder, read_run
from ...run.lock import lock
from ...run.run import RunResult, Watch
from .. import require_flower
from ..nodes import Node, write_nodes
from ..settings import EngineSettings, check_experiment
from .app import write_app
from .control import Control
from .keys import make_certificates, make_node_key
from .node import new_secret, supernode, write_node_config
from .processes import Processes, free_port

Say = Callable[[str], None]
# seconds that a SuperLink may take to come up on a busy machine; one that ends is noticed at once
_START = 180.0
_POLL = 0.5


def run_on_loopback(
    config: Config,
    settings: EngineSettings,
    *,
    watch: Watch | None = None,
    say: Say = lambda line: None,
    changing: Collection[str] = (),
) -> RunResult:
    """Run an experiment on Flower, or go on with it if its output folder holds a part of it.

    It ends as `simulate` does.

    Args:
        config: its output folder has to be set; keys, logs and Flower's own files go to `flower/`
            in it.
        say: told what is started, a line at a time.
        changing: as in `simulate`.

    Raises:
        ConfigError: a field is wrong, or there is no output folder.
        EngineError: a process of Flower's does not come up or ends, or the run fails; the message
            says why.
        MissingExtra: flwr is not installed. Otherwise as `fedloop.run.simulate.simulate`.
    """
    require_flower()
    check_experiment(config)
    if config.output.folder is None:
        raise ConfigError(
            "output.folder is missing; the Flower engine needs a folder for its run: name one, or"
            " use --out"
        )
    clients = build_clients(config)
    path = Path(config.output.folder).resolve()
    with RunFolder.create(path, config, roles_of(clients), changing=changing) as run_folder:
        if _is_over(config, run_folder):
            return _result(config, path)
        taken = lock(path, ".flower.lock")  # the folder itself is the server's from here on
    try:
        return _launched(
            config, settings, [client.client_id for client in clients], path, watch, say
        )
    finally:
        taken.release()


def _is_over(config: Config, folder: RunFolder) -> bool:
    """Whether nothing is left to be played, measured or written of a run."""
    records = folder.load()[1]
    evaluation = config.evaluation
    played = len(records) >= config.rounds or Best(evaluation).is_stalled(records)
    wanted = evaluation.harmful or evaluation.safe or evaluation.utility
    measured = not wanted or bool(records and records[-1].metrics)
    return played and measured and folder.is_logged and (folder.path / "adapter").exists()


def _launched(
    config: Config,
    settings: EngineSettings,
    names: list[str],
    path: Path,
    watch: Watch | None,
    say: Say,
) -> RunResult:
    place = path / "flower"
    shutil.rmtree(
        place, ignore_errors=True
    )  # of an interrupted run: keys are made anew, trust goes by the client's name
    make_certificates(place / "certificates")
    write_app(place / "app")
    with ended_by_signals() as raise_caught, Processes(place / "home", place / "logs") as group:

        def check() -> None:
            raise_caught()
            group.check()

        address = _superlink(group, place, say, check)
        with Control(address, place / "certificates" / "ca.crt") as control:
            nodes = {
                name: Node(*control.register(make_node_key(place / "keys" / name)))
                for name in names
            }
            write_nodes(place / "nodes.json", nodes)
            _clients(group, place, path, names, address, say)
            paths = {
                "config": str(path / "config.json"),
                "nodes": str(place / "nodes.json"),
                "folder": str(path),
            }
            run = control.start(place / "app", {**settings.run_config(), **paths})
            say(f"run {run} started; its records: {path / 'records.jsonl'}")
            follow(control, run, path, check, watch)
    return _result(config, path)


def _result(config: Config, folder: Path) -> RunResult:
    """What the server left of a finished run."""
    _, roles, records = read_run(folder)
    return RunResult(
        config, tuple(records), load_adapter(folder / "adapter"), records[-1].metrics, roles, folder
    )


def _superlink(group: Processes, place: Path, say: Say, check: Callable[[], None]) -> str:
    """Start the server; its address."""
    port = free_port()
    command = [sys.executable, "-m", "fedloop.flower.deploy.superlink", "127.0.0.1", str(port)]
    group.start("superlink", [*command, place / "certificates", place / "state.db"])
    say(f"SuperLink on 127.0.0.1:{port}; logs in {group.logs}")
    wait_for_port(port, check)
    return f"127.0.0.1:{port}"


def _clients(
    group: Processes, place: Path, experiment: Path, names: list[str], address: str, say: Say
) -> None:
    """Start one SuperNode a client, and the process that trains for them."""
    secret, runtimes = new_secret(place / "secret"), []
    for index, name in enumerate(names):
        port = free_port()
        written = write_node_config(
            place / "keys" / f"{name}.toml", {"experiment": str(experiment), "partition-id": index}
        )
        group.start(
            f"supernode-{name}",
            supernode(
                address,
                place / "certificates" / "ca.crt",
                place / "keys" / name,
                port,
                secret,
                written,
            ),
        )
        runtimes.append(f"127.0.0.1:{port}")
    group.start(
        "trainer", [sys.executable, "-m", "fedloop.flower.deploy.runner", secret, *runtimes]
    )
    say(f"{len(names)} SuperNodes, and one process that trains for all of them")


def wait_for_port(port: int, check: Callable[[], None]) -> None:
    """Wait until something listens on 127.0.0.1.

    Raises:
        EngineError: nothing does for three minutes, or `check` raises it.
    """
    import socket

    deadline = time.monotonic() + _START
    while time.monotonic() < deadline:
        check()
        with socket.socket() as sock:
            sock.settimeout(1.0)
            if sock.connect_ex(("127.0.0.1", port)) == 0:
                return
        time.sleep(0.1)
    raise EngineError(
        f"nothing listens on 127.0.0.1:{port} after {_START:.0f} seconds; expected the SuperLink"
    )


def follow(
    control: Control,
    run: int,
    folder: Path,
    check: Callable[[], None] = lambda: None,
    watch: Watch | None = None,
) -> None:
    """Wait for a run's end and tell who watches of every round; leaving early stops the run.

    Raises:
        EngineError: the run failed, or `check` raises it.
    """
    reported = len(read_run(folder)[2]) if (folder / "clients.json").exists() else 0
    try:
        while True:
            check()
            status = control.status(run)
            reported = _tell(folder, reported, watch)
            if status.finished:
                break
            time.sleep(_POLL)
    except BaseException:
        with suppress(EngineError):  # if the SuperLink is gone, so is the run
            control.stop(run)
        raise
    if not status.completed:
        raise EngineError(
            f"the run ended before its last round: {status.details or 'it was stopped'}"
        )


def _tell(folder: Path, reported: int, watch: Watch | None) -> int:
    """Report the rounds that were finished since the last look."""
    if watch is None or not (folder / "clients.json").exists():
        return reported
    records = read_run(folder)[2]
    for record in records[reported:]:
        for client in sorted(record.factors):
            watch("client", record.round, client, record.losses.get(client, float("nan")))
        watch("round", record.round, "", sum(record.factors.values()) / len(record.factors))
    return len(records)


@contextmanager
def ended_by_signals() -> Iterator[Callable[[], None]]:
    """SIGTERM and SIGINT as exceptions, so that blocks are left and what they started is ended.

    Where Python cannot pass an exception on, as in a finaliser that happened to run, it prints and
    drops it, and the signal is lost: what is yielded raises it again. In the main thread only;
    signals that this process was started to ignore, or answers outside Python, stay as they are.
    """
    caught: list[int] = []

    def raise_caught() -> None:
        if caught:
            raise KeyboardInterrupt if caught[-1] == signal.SIGINT else SystemExit(128 + caught[-1])

    def end(number: int, frame: FrameType | None) -> None:
        caught.append(number)
        raise_caught()

    former = {
        number: handler
        for number in (signal.SIGTERM, signal.SIGINT)
        if (handler := signal.getsignal(number)) not in (None, signal.SIG_IGN)
    }
    try:
        for number in former:
            signal.signal(number, end)
    except ValueError:  # another thread's: its process has to see to signals
        yield raise_caught
        return
    try:
        yield raise_caught
    finally:
        for number, handler in former.items():
            signal.signal(number, handler)
