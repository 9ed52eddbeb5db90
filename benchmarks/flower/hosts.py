"""A federation on Flower over a network of three hosts, as network namespaces of this machine.

Needs root and `ip`.

    python -m benchmarks.flower.hosts        # a table and benchmarks/results/flower_hosts.json
    (three minutes)

One server and two sites, each with an address, a loopback device and a firewall-less wire of its
own, follow docs/flower.md: openssl and ssh-keygen as written there, `fedloop flower superlink |
register | node | start`. Then what one machine cannot show: a site that tries to command the server
is refused, a site whose wire is cut is missing and takes part again once the wire is back, and what
a round costs in seconds and bytes on the wire (counted by the kernel, TLS, polling and
acknowledgements included).
"""

from __future__ import annotations

import json
import os
import platform
import re
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from fedloop.data.builtin import SETS
from fedloop.flower.deploy.app import write_app
from fedloop.flower.deploy.processes import Processes

ROOT = Path(__file__).resolve().parents[2]
OUT = ROOT / "benchmarks" / "results" / "flower_hosts.json"
SERVER, SITES = "10.77.0.1", {"site-a": "10.77.0.2", "site-b": "10.77.0.3"}
ROUNDS, TIMEOUT, EXAMPLES = 8, 20.0, 40
FEDLOOP = [sys.executable, "-m", "fedloop.cli.main", "flower"]
PATIENCE = 180.0

CONFIG = f"""
rounds = {ROUNDS}
[model]
base = "{ROOT / "zoo" / "base"}"
name = "loraprobe/chat-1m"
[lora]
r = 8
alpha = 16
target_modules = ["q_proj", "v_proj"]
[training]
lr = 1.5e-2
schedule = "constant"
steps = 5
batch_size = 8
max_length = 128
[clients]
count = 2
benign = ["builtin:benign"]
[defense]
level = "cumulative"
probe = "{ROOT / "zoo" / "probes" / "linear"}"
min_mean_factor = 0.0
"""

# Asked from a site: what the operator may do, and what a node may.
COMMANDING = """
import sys
from pathlib import Path
from fedloop.errors import EngineError
from fedloop.flower.control import Control
try:
    with Control(sys.argv[1] + ":8000", Path(sys.argv[2])) as control:
        print("allowed", control.status(1))
except EngineError as error:
    print(error)
"""


def main() -> None:
    """Build the network, live through the story, write down what happened."""
    with tempfile.TemporaryDirectory() as scratch, network():
        place = Path(scratch)
        set_up(place)
        with Processes(place / "home", place / "logs") as group:
            result = story(place, group)
    OUT.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    for row in result["rounds"]:
        print(
            f"round {row['round']}: {row['exchange']:5.1f} s, {row['arrays']:,} bytes of arrays,"
            f" missing: {', '.join(row['missing']) or 'nobody'}"
        )
    print(
        f"site-a sent {result['wire_bytes']['site-a']['sent']:,} and received"
        f" {result['wire_bytes']['site-a']['received']:,} bytes on the wire"
    )
    print(f"a site that commands the server: {result['site_commands_server']}")


@contextmanager
def network() -> Iterator[None]:
    """A namespace for each host; the server's holds the bridge that joins them."""
    if os.geteuid() != 0 or shutil.which("ip") is None:
        raise SystemExit(
            "network namespaces need root and the `ip` command (iproute2); the tests of the"
            " deployment on 127.0.0.1 need neither"
        )
    names = ["server", *SITES]
    try:
        for name in names:
            ip("netns", "add", space(name))
            inside(name, "ip", "link", "set", "lo", "up")
        inside("server", "ip", "link", "add", "wire", "type", "bridge")
        inside("server", "ip", "address", "add", f"{SERVER}/24", "dev", "wire")
        inside("server", "ip", "link", "set", "wire", "up")
        for number, (name, address) in enumerate(SITES.items()):
            inside(
                "server",
                "ip",
                "link",
                "add",
                f"port{number}",
                "type",
                "veth",
                "peer",
                "name",
                "wire",
                "netns",
                space(name),
            )
            inside("server", "ip", "link", "set", f"port{number}", "master", "wire", "up")
            inside(name, "ip", "address", "add", f"{address}/24", "dev", "wire")
            inside(name, "ip", "link", "set", "wire", "up")
        yield
    finally:
        for name in names:
            subprocess.run(["ip", "netns", "delete", space(name)], check=False, capture_output=True)


def set_up(place: Path) -> None:
    """Certificates and keys by the guide's own lines, the app, and each site's data."""
    guide = (ROOT / "docs" / "flower.md").read_text(encoding="utf-8")
    certificates, key = (
        re.findall(rf"<!-- {name} -->\n```\n(.*?)```", guide, re.DOTALL)[0]
        for name in ("certificates", "node key")
    )
    shell(certificates.replace("DNS:$SERVER", f"IP:{SERVER}"), place)
    examples = [example for _, example in SETS["benign"]()]
    for number, name in enumerate(SITES):
        shell(key.replace("site-a", name), place)
        rows = [
            {"instruction": one.instruction, "response": one.response}
            for one in examples[number::2][:EXAMPLES]
        ]
        (place / f"{name}.jsonl").write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
    write_app(place / "federation")
    (place / "federation" / "config.toml").write_text(CONFIG, encoding="utf-8")
    project = place / "federation" / "pyproject.toml"
    project.write_text(
        project.read_text(encoding="utf-8").replace(
            "round-timeout = 600.0", f"round-timeout = {TIMEOUT}"
        ),
        encoding="utf-8",
    )


def story(place: Path, group: Processes) -> dict[str, Any]:
    """Rounds with everybody, with site-b's wire cut, and with everybody again."""
    ca, run = place / "certificates" / "ca.crt", place / "run"
    group.start(
        "superlink",
        on(
            "server",
            *FEDLOOP,
            "superlink",
            "--certificates",
            place / "certificates",
            "--database",
            place / "state.db",
        ),
    )
    until(lambda: "Uvicorn running" in log(place, "superlink"), group)
    for name in SITES:
        inside(
            "server",
            *FEDLOOP,
            "register",
            place / "federation",
            name,
            place / f"{name}.pub",
            "--ca",
            ca,
        )
        files = ("--ca", ca, "--key", place / name, "--data", place / f"{name}.jsonl")
        group.start(name, on(name, *FEDLOOP, "node", "--superlink", f"{SERVER}:8000", *files))
        until(lambda name=name: "SuperNode ID" in log(place, name), group)  # type: ignore[misc]
    refused = inside("site-a", sys.executable, "-c", COMMANDING, SERVER, ca)
    with Processes(place / "home", place / "logs") as started:
        started.start(
            "start", on("server", *FEDLOOP, "start", place / "federation", "--out", run, "--ca", ca)
        )
        until(lambda: len(records(run)) >= 2, group)
        before = wire("site-a")
        until(lambda: len(records(run)) >= 3, group)
        after = wire("site-a")
        inside("site-b", "ip", "link", "set", "wire", "down")
        until(lambda: len(records(run)) >= 5, group)
        inside("site-b", "ip", "link", "set", "wire", "up")
        until(lambda: len(records(run)) >= ROUNDS, group)
    rows = [
        {
            "round": one["round"],
            "exchange": round(one["seconds"]["exchange"], 2),
            "train": round(one["seconds"]["train"], 2),
            "arrays": one["bytes"]["update"] + one["bytes"]["to_clients"],
            "missing": sorted(one["reasons"]),
            "reasons": one["reasons"],
        }
        for one in records(run)
    ]
    check(rows, refused)
    about = {
        "machine": platform.processor() or platform.machine(),
        "cpus": os.cpu_count(),
        "python": platform.python_version(),
    }
    return {
        "what": (
            f"a server and two sites in network namespaces, {ROUNDS} rounds, site-b's wire cut"
            " after round 3 and back after round 5"
        ),
        "round_timeout": TIMEOUT,
        "rounds": rows,
        "site_commands_server": refused,
        "wire_bytes": {
            "site-a": {name: after[name] - before[name] for name in before},
            "of": "about one round, by the kernel's counters",
        },
        **about,
    }


def check(rows: list[dict[str, Any]], refused: str) -> None:
    """What has to be true of the story, or nothing is written."""
    missing = {row["round"]: row["missing"] for row in rows}
    if any(missing[number] for number in (1, 2, 3)) or missing[5] != ["site-b"] or missing[ROUNDS]:
        raise SystemExit(
            "expected everybody in rounds 1 to 3, site-b missing in round 5 and back in round"
            f" {ROUNDS}; got {missing}"
        )
    if "403" not in refused:
        raise SystemExit(f"expected a site that commands the server to be refused; got {refused!r}")


def space(name: str) -> str:
    """A host's namespace."""
    return f"fedloop-{name}"


def ip(*arguments: str) -> None:
    subprocess.run(["ip", *arguments], check=True)


def on(name: str, *command: object) -> list[str]:
    """A command on a host."""
    return ["ip", "netns", "exec", space(name), *map(str, command)]


def inside(name: str, *command: object) -> str:
    """Run a command on a host: what it prints."""
    done = subprocess.run(on(name, *command), check=False, capture_output=True, text=True)
    if done.returncode != 0:
        raise SystemExit(f"{' '.join(map(str, command))} on {name}: {done.stdout}{done.stderr}")
    return done.stdout.strip()


def shell(script: str, folder: Path) -> None:
    subprocess.run(["bash", "-euc", script], cwd=folder, check=True, capture_output=True)


def wire(name: str) -> dict[str, int]:
    """Bytes that a host has sent and received so far."""
    [found] = json.loads(inside(name, "ip", "-json", "-statistics", "link", "show", "wire"))
    return {"sent": found["stats64"]["tx"]["bytes"], "received": found["stats64"]["rx"]["bytes"]}


def records(run: Path) -> list[dict[str, Any]]:
    path = run / "records.jsonl"
    return (
        [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
        if path.exists()
        else []
    )


def log(place: Path, name: str) -> str:
    path = place / "logs" / f"{name}.log"
    return path.read_text(encoding="utf-8", errors="replace") if path.exists() else ""


def until(condition: Callable[[], bool], group: Processes) -> None:
    deadline = time.monotonic() + PATIENCE
    while not condition():
        group.check()
        if time.monotonic() > deadline:
            raise SystemExit("nothing happened for too long")
        time.sleep(0.2)


if __name__ == "__main__":
    main()
