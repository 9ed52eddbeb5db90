"""What a round on Flower costs in seconds and bytes, packed as fedloop does it and tensor by tensor
as FedAvg with a PEFT state dict does.

    python -m benchmarks.flower.cost  # benchmarks/results/flower_cost.json and the table in
                                      # docs/scale.md (about twenty minutes)

Two deployments on 127.0.0.1 a size, both started by fedloop's launcher, with TLS and node keys: a
SuperLink and two SuperNodes each. The nodes of one work as `fedloop flower node` does, the others
as plain `flower-supernode`. The ways take turns, a round each, after a warm-up round. A round
counts if both clients were in it: Flower drops a reply whose upload takes more than 180 s. A size
ends with the rounds there are when its time is up or a SuperLink breaks down. See
`flower_cost_apps` for what a round does. Seconds are those from the making of the first message to
the new global adapter, the checkpoint included where there is one; bytes are what TCP carried
between the nodes and the SuperLink, both clients together.
"""

from __future__ import annotations

import json
import os
import platform
import signal
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import flwr

from benchmarks import common
from benchmarks.common import ROOT, fill, write
from benchmarks.flower.apps import CLIENTS, TENSORS, WAYS, WIDTH
from benchmarks.flower.counted_wire import CountedWire
from fedloop.errors import EngineError
from fedloop.flower.deploy.control import Control
from fedloop.flower.deploy.keys import make_certificates, make_node_key
from fedloop.flower.deploy.launch import wait_for_port
from fedloop.flower.deploy.node import new_secret, supernode, write_node_config
from fedloop.flower.deploy.processes import Processes, flower_command, free_port
from fedloop.flower.nodes import Node, write_nodes
from zoo.markers import markdown
from zoo.program import documented

PAGE, RESULTS = ROOT / "docs" / "scale.md", common.RESULTS / "flower_cost.json"
COMMAND = "python -m benchmarks.flower.cost"
STOCK, CONTROL = "FedAvg, tensor by tensor", "FedAvg, one array"
# rank -> the ways that are measured, and in how many rounds, after one that is not
RANKS = {
    8: (list(WAYS), 3),
    56: ([name for name in WAYS if name != CONTROL], 2),
    168: ([name for name in WAYS if name != CONTROL], 1),
}
PATIENCE, TIMEOUT = 900.0, 600.0  # seconds for a size, and for a round

PYPROJECT = """[project]
name = "cost"
version = "1.0.0"
description = "What a round costs"
license = "Apache-2.0"

[tool.flwr.app]
publisher = "fedloop"
fab-include = ["cost_app/*.py"]

[tool.flwr.app.components]
serverapp = "cost_app.server:app"
clientapp = "cost_app.client:app"

[tool.flwr.app.config]
way = ""
order = ""
rank = 8
rounds = 1
folder = ""
nodes = ""
counters = ""
timeout = 60.0
"""


def main() -> None:
    """Measure, print and save; sizes that are not asked for stay as they were measured."""
    parser = documented(__doc__)
    parser.add_argument(
        "--rank", type=int, nargs="*", choices=RANKS, default=list(RANKS), help="which sizes"
    )
    ranks = parser.parse_args().rank
    signal.signal(
        signal.SIGTERM, lambda *_: sys.exit(143)
    )  # leave the blocks, end what was started
    for rank in ranks:
        with tempfile.TemporaryDirectory(prefix="flower-cost-") as scratch, ExitStack() as stack:
            ours, stock = (
                stack.enter_context(Deployment(Path(scratch) / name, own).up())
                for name, own in (("ours", True), ("stock", False))
            )
            save(measure(Path(scratch), rank, ours, stock))
    print(table())


def save(case: dict[str, Any]) -> None:
    """One size into the results and the page."""
    former = json.loads(RESULTS.read_text(encoding="utf-8"))["cases"] if RESULTS.exists() else []
    cases = {one["rank"]: one for one in (*former, case)}
    here = common.machine(
        cpus=os.cpu_count(), python=platform.python_version(), flwr=flwr.__version__
    )
    about = {"command": COMMAND, "machine": here}
    about |= {"clients": CLIENTS, "tensors": TENSORS, "width": WIDTH}
    write(RESULTS, {**about, "cases": [cases[rank] for rank in sorted(cases)]})
    fill(PAGE, "flower cost", table(), "benchmarks.flower.cost")


# --- what is started


class Deployment:
    """A SuperLink with two registered SuperNodes behind a counted wire.

    Args:
        own: whether the nodes' work is done by a process that stays, as in `fedloop flower node`,
            or by one a message, as in Flower.
    """

    def __init__(self, place: Path, own: bool) -> None:
        self.place, self._own, self.counters = place, own, place / "counters"
        self.group = Processes(place / "home", place / "logs")
        self.address, self._authority = "", place / "certificates" / "ca.crt"

    @contextmanager
    def up(self) -> Iterator[Deployment]:
        """Everything is started in here, and ended with it."""
        make_certificates(self.place / "certificates")
        write_app(self.place / "app")
        port = free_port()
        self.address = f"127.0.0.1:{port}"
        with self.group, CountedWire(port, self.counters) as wire:
            module = [sys.executable, "-m", "fedloop.flower.deploy.superlink"]
            where = [self.place / "certificates", self.place / "state.db"]
            self.start("superlink", [*module, "127.0.0.1", str(port), *where])
            wait_for_port(port, self.group.check)
            nodes = {}
            with self.control() as control:
                for name in (f"node-{number}" for number in range(CLIENTS)):
                    nodes[name] = Node(*control.register(make_node_key(self.place / "keys" / name)))
                    self._node(name, f"127.0.0.1:{wire.port}")
            write_nodes(self.place / "nodes.json", nodes)
            yield self

    def control(self) -> Control:
        """A connection for the operator."""
        return Control(self.address, self._authority)

    def start(self, name: str, command: list[Any]) -> None:
        """A process that finds this benchmark."""
        path = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
        self.group.start(name, command, PYTHONPATH=path, HF_HUB_OFFLINE="1")

    def _node(self, name: str, superlink: str) -> None:
        key, port = self.place / "keys" / name, free_port()
        config = write_node_config(self.place / f"{name}.toml", {"name": name})
        if self._own:
            secret = new_secret(self.place / f"{name}.secret")
            self.start(name, supernode(superlink, self._authority, key, port, secret, config))
            work = [sys.executable, "-m", "benchmarks.flower.apps", secret, f"127.0.0.1:{port}"]
            self.start(f"{name}-work", work)
            return
        options = {
            "--superlink": superlink,
            "--root-certificates": self._authority,
            "--auth-supernode-private-key": key,
            "--port": str(port),
            "--node-config": config,
        }
        flat = [part for option in options.items() for part in option]
        self.start(name, [flower_command("flower-supernode"), *flat])


def write_app(folder: Path) -> None:
    """A Flower app whose halves are in `flower_cost_apps`."""
    (folder / "cost_app").mkdir(parents=True)
    (folder / "pyproject.toml").write_text(PYPROJECT, encoding="utf-8")
    (folder / "cost_app" / "__init__.py").touch()
    for half, name in (("server", "server_app"), ("client", "stock_client")):
        text = f"from benchmarks.flower.apps import {name}\n\napp = {name}()\n"
        (folder / "cost_app" / f"{half}.py").write_text(text, encoding="utf-8")


# --- what is measured


def measure(scratch: Path, rank: int, ours: Deployment, stock: Deployment) -> dict[str, Any]:
    """One size: a run of every way at the same time, whose rounds take turns."""
    folder, (order, rounds) = scratch / f"rank-{rank}", RANKS[rank]
    folder.mkdir()
    (folder / "turn").write_text(order[0], encoding="utf-8")
    options = {"order": json.dumps(order), "rank": rank, "rounds": rounds + 1}
    options |= {"folder": str(folder), "timeout": TIMEOUT}
    with ours.control() as one, stock.control() as other:
        runs = []
        for name in order:
            place, control = (ours, one) if WAYS[name].ours else (stock, other)
            own = {"nodes": str(place.place / "nodes.json"), "counters": str(place.counters)}
            run = control.start(place.place / "app", {**options, **own, "way": name})
            runs.append((place, control, run))
        ended = wait(lambda: all(finished(*run) for run in runs))
    ways = {}
    for name in order:
        first, *rows = begun(folder, name, rounds + 1, ended)
        ways[name] = {"warm_up": first, "rounds": rows}
        times = ", ".join(str(row.get("seconds")) for row in (first, *rows))
        full = f"{len(complete(ways[name]))} of {len(rows)} complete"
        print(f"rank {rank}, {name}: {times} s, {full}", flush=True)
    return {"rank": rank, "bytes": 4 * TENSORS * WIDTH * rank, "ways": ways}


def wait(is_over: Callable[[], bool]) -> str:
    """Until it is over, for as long as a size may take; what ended it.

    A SuperLink that has broken down under a round ends it as well.
    """
    deadline = time.monotonic() + PATIENCE
    while time.monotonic() < deadline:
        try:
            if is_over():
                return "over"
        except EngineError as error:
            return str(error)
        time.sleep(0.5)
    return f"not over when the {PATIENCE:.0f} s of this size were up"


def begun(folder: Path, name: str, rounds: int, ended: str) -> list[dict[str, Any]]:
    """A way's rounds as it has written them down, and the one that it was in when it ended, if it
    was in one.
    """
    log = folder / f"{name}.jsonl"
    rows = (
        [json.loads(line) for line in log.read_text(encoding="utf-8").splitlines()]
        if log.exists()
        else []
    )
    if len(rows) < rounds and (folder / "turn").read_text(encoding="utf-8") == name:
        rows.append({"round": len(rows) + 1, "replies": 0, "errors": [ended]})
    if not rows:
        raise SystemExit(f"{name}: {ended}, and its first round had not begun")
    return rows


def finished(place: Deployment, control: Control, run: int) -> bool:
    """Whether a run has come to a good end; a bad one ends everything."""
    place.group.check()
    status = control.status(run)
    if status.finished and not status.completed:
        raise SystemExit(f"run {run} failed: {status.details}{place.group.tail('superlink', 60)}")
    return status.finished


def table() -> str:
    """The page's table of what was measured."""
    measured = json.loads(RESULTS.read_text(encoding="utf-8"))
    columns = "adapter, MB | way | seconds a round: median [least, most] | complete rounds"
    lines = [f"{columns} | FedAvg tensor by tensor takes | MB on the wire a round"]
    for case in measured["cases"]:
        rows = {name: complete(way) for name, way in case["ways"].items()}
        seconds = {name: [row["seconds"] for row in some] for name, some in rows.items()}
        for name, some in rows.items():
            moved = [row["to_server"] + row["to_clients"] for row in some]
            times = "-"
            if seconds[STOCK] and moved:
                ratio = statistics.median(seconds[STOCK]) / statistics.median(seconds[name])
                times = f"{ratio:.1f} times as long"
            full = f"{len(some)} of {len(case['ways'][name]['rounds'])}"
            wire = f"{statistics.median(moved) / 1e6:,.1f}" if moved else "-"
            shown = f"{case['bytes'] / 1e6:.1f} | {name} | {middle(seconds[name])} | {full}"
            lines.append(f"{shown} | {'' if name == STOCK else times} | {wire}")
    machine = measured["machine"]
    return (
        f"{markdown(lines)}\n{measured['clients']} clients, {machine['cpus']} cores for"
        f" everything, Flower {machine['flwr']}."
    )


def complete(way: dict[str, Any]) -> list[dict[str, Any]]:
    """The measured rounds that every client was in."""
    return [row for row in way["rounds"] if row["replies"] == CLIENTS]


def middle(numbers: list[float]) -> str:
    """Median, least and most."""
    if not numbers:
        return "-"
    return f"{statistics.median(numbers):.1f} [{min(numbers):.1f}, {max(numbers):.1f}]"


if __name__ == "__main__":
    main()
