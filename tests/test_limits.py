"""What a file may cost: the largest of each kind is answered within the memory that docs/inputs.md
states, and a larger one is refused unread.
"""

from __future__ import annotations

import os
import re
import struct
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from fedloop.data.files import read_file
from fedloop.defense.audit import AuditLog, read_audit
from fedloop.errors import ConfigError, StateError
from fedloop.flower.nodes import read_nodes
from fedloop.run.checkpoint import read_checkpoint
from fedloop.run.folder import read_config
from fedloop.run.logs import read_records, read_roles
from fedloop.run.words import read_words
from loraprobe import limits
from loraprobe.errors import DataError, PolicyError
from loraprobe.scan.batch import scan_many
from loraprobe.scan.facts import Reference
from loraprobe.scan.policy import Policy
from loraprobe.scan.targets import expand

ROOT = Path(__file__).resolve().parents[1]
TABLE = re.findall(
    r"^\| ([^|]+) \| (\d+) MiB[^|]* \| [^|]+ \| (\d+) MiB \|$",
    (ROOT / "docs/inputs.md").read_text(encoding="utf-8"),
    re.MULTILINE,
)


def lists(size: int) -> bytes:
    """JSON whose objects take the most memory for its length."""
    return b"[" + b"{}," * ((size - 4) // 3) + b"{}]"


def header(size: int) -> bytes:
    """A safetensors header of this size, with as many tensors as fit."""
    one = b'"%08x":{"dtype":"F16","shape":[0],"data_offsets":[0,0]}'
    tensors = b",".join(one % number for number in range((size - 2) // (len(one % 0) + 1)))
    text = b"{" + tensors + b"}"
    return struct.pack("<Q", len(text)) + text


def rows(size: int) -> bytes:
    return b"path,label\n" + b"a,0\n" * ((size - 11) // 4)


def settings(size: int) -> bytes:
    return b"".join(b"a%07d=0\n" % number for number in range(size // 11))


# Row of the table -> the limit, how to fill it, and what reads the file at sys.argv[1].
KINDS: dict[str, tuple[int, Callable[[int], bytes], str, str]] = {
    "`adapter_config.json`": (
        *(limits.ADAPTER_CONFIG, lists, "adapter_config.json"),
        "from loraprobe.adapters.config import read_config as read",
    ),
    "header of a safetensors file": (
        *(limits.TENSOR_HEADER, header, "adapter_model.safetensors"),
        "from loraprobe import load_adapter; read = lambda path: load_adapter(path, alpha=8)",
    ),
    "`config.json` of a probe": (
        *(limits.PROBE_CONFIG, lists, "config.json"),
        "from loraprobe.hub.format import load_probe; read = lambda path: load_probe(path.parent)",
    ),
    "`head.json` (format version 1 and 2)": (
        *(limits.PROBE_TREES, lists, "head.json"),
        "from loraprobe.limits import PROBE_TREES, read_limited;"
        " from loraprobe.heads.trees import trees_from_xgboost;"
        " read = lambda path: trees_from_xgboost(read_limited(path, PROBE_TREES), 4)",
    ),
    "a manifest": (
        *(limits.MANIFEST, rows, "m.csv"),
        "from loraprobe.manifest import read_manifest as read",
    ),
    "a policy, `config.toml`, an experiment's TOML": (
        *(limits.SETTINGS, settings, "policy.toml"),
        "from loraprobe.scan.policy import Policy; read = Policy.read",
    ),
}
CHILD = """
import sys
from pathlib import Path
from loraprobe.errors import LoraprobeError
import loraprobe
{imports}
path = Path(sys.argv[1])


def peak():
    status = Path("/proc/self/status").read_text()  # getrusage counts the parent's peak, too
    return int(status.partition("VmHWM:")[2].split()[0]) // 1024


before = peak()
try:
    read(path)
    said = "read"
except LoraprobeError as error:
    said = type(error).__name__
print(said, peak() - before)
"""


def cost(path: Path, imports: str) -> tuple[str, int]:
    """What a child says of a file, and the MiB that it needed beyond its imports."""
    done = subprocess.run(
        [sys.executable, "-c", CHILD.format(imports=imports), str(path)],
        env={**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=600,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    said, mebibytes = done.stdout.split()
    return said, int(mebibytes)


def test_the_table_has_every_kind_with_its_limit() -> None:
    assert {name: int(limit) for name, limit, _ in TABLE} == {
        name: limit // limits.MIB for name, (limit, *_) in KINDS.items()
    }


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="the peak is Linux's to tell")
@pytest.mark.parametrize("name", KINDS)
def test_the_largest_file_is_answered_within_the_stated_memory_and_a_larger_one_unread(
    name: str, tmp_path: Path
) -> None:
    limit, fill, called, imports = KINDS[name]
    [bound] = [int(memory) for row, _, memory in TABLE if row == name]
    path = tmp_path / called
    path.write_bytes(fill(limit))
    said, mebibytes = cost(path, imports)
    assert mebibytes <= bound, said
    with path.open("wb") as file:
        file.truncate(64 * limit)  # sparse: of zeros, nothing of which is on the disk
        file.write(struct.pack("<Q", 63 * limit))
    refused, of_larger = cost(path, imports)
    assert refused.endswith("Error")
    assert of_larger <= max(16, 3 * limit // limits.MIB)


def read_run_state(folder: Path) -> object:
    return read_checkpoint(folder / "checkpoint")


RUN: dict[str, tuple[int, Callable[[Path], object]]] = {
    "config.json": (limits.RUN_CONFIG, read_config),
    "clients.json": (limits.RUN_CLIENTS, read_roles),
    "overrulings.jsonl": (limits.RUN_WORDS, read_words),
    "records.jsonl": (limits.RUN_LOG, read_records),
    "audit.jsonl": (limits.RUN_LOG, lambda folder: read_audit(folder / "audit.jsonl")),
    "checkpoint/round-000001/state.json": (limits.CHECKPOINT_STATE, read_run_state),
    "checkpoint/round-000001/arrays.safetensors": (limits.CHECKPOINT_ARRAYS, read_run_state),
}


@pytest.mark.parametrize(
    ("name", "limit", "read", "error"),
    [
        ("list.txt", limits.MANIFEST, lambda path: expand([str(path)]), PolicyError),
        ("data.jsonl", limits.TRAINING_DATA, read_file, DataError),
        ("reference.json", limits.SCAN_REFERENCE, Reference.load, PolicyError),
        (
            *("cache.jsonl", limits.SCAN_CACHE),
            lambda path: scan_many([], Policy(), cache=path),
            PolicyError,
        ),
        ("nodes.json", limits.RUN_CLIENTS, read_nodes, ConfigError),
        *((name, limit, read, StateError) for name, (limit, read) in RUN.items()),
        ("audit log", limits.RUN_LOG, AuditLog, StateError),
    ],
)
def test_a_larger_list_data_set_cache_or_file_of_a_run_is_refused_unread(
    name: str,
    limit: int,
    read: Callable[[Path], object],
    error: type[Exception],
    tmp_path: Path,
) -> None:
    path = tmp_path / name
    path.parent.mkdir(parents=True, exist_ok=True)
    for other in ("config.json", "checkpoint/round-000001/state.json"):
        if name in RUN and not (tmp_path / other).exists():
            (tmp_path / other).parent.mkdir(parents=True, exist_ok=True)
            (tmp_path / other).write_text("{}")
    path.touch()
    os.truncate(path, limit + 1)
    with pytest.raises(error, match="It was not read"):
        read(tmp_path if name in RUN else path)


def test_the_limits_of_runs_and_scans_are_on_the_page() -> None:
    page = (ROOT / "docs/inputs.md").read_text(encoding="utf-8")
    for name, (limit, _) in RUN.items():
        row = rf"^\| [^|]*`{Path(name).name}`[^|]*\| (\d+) ([MG])iB[^|]*\|[^|]*\|$"
        [(count, unit)] = re.findall(row, page, re.MULTILINE)
        assert int(count) << {"M": 20, "G": 30}[unit] == limit, name
