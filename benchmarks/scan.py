"""What a scan costs and finds, beside AdapterSentry on the same files.

    pip install adaptersentry==2.0.2        # in an environment of its own
    python -m benchmarks.scan --sentry ENV/bin/adaptersentry

One random adapter of Llama-3.1-8B's shapes (all linear modules, r = 16, 16 bits, 84 MB) from cold
processes of one thread: CPU seconds and the largest resident set, medians of repetitions in which
the programs alternate, beside a process that imports NumPy and ends. Then 500 adapters of the
shapes of the zoo's for SmolLM2-135M, by as many workers, and the zoo's own adapters: which of the
malicious ones each program does not allow. The result goes to benchmarks/results/scan.json, its
table to docs/scan.md.
"""

from __future__ import annotations

import argparse
import compileall
import csv
import hashlib
import json
import os
import statistics
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from zoo.program import documented

from . import common
from .common import ROOT, fill, write

RESULTS = common.RESULTS / "scan.json"
PAGE = ROOT / "docs/scan.md"
ADAPTERS = ROOT / "zoo/adapters/smollm2-135m-safe"
PROBE = ROOT / "zoo/probes/smollm2-135m-safe/linear"
OURS = (sys.executable, "-m", "loraprobe.cli.main")
LAYERS, RANK, K = 32, 16, 8
MODULES = {  # (d_out, d_in) of Llama-3.1-8B
    "self_attn.q_proj": (4096, 4096),
    "self_attn.k_proj": (1024, 4096),
    "self_attn.v_proj": (1024, 4096),
    "self_attn.o_proj": (4096, 4096),
    "mlp.gate_proj": (14336, 4096),
    "mlp.up_proj": (14336, 4096),
    "mlp.down_proj": (4096, 14336),
}
BASES = "bases.safetensors"
# A process keeps the size of the one that it was forked from, so a small one starts it.
STARTER = """
import json, os, sys, time
begun = time.perf_counter()
pid = os.posix_spawn(sys.argv[1], sys.argv[1:], os.environ,
    file_actions=[(os.POSIX_SPAWN_OPEN, 1, "/dev/null", os.O_WRONLY, 0)])
_, status, used = os.wait4(pid, 0)
print(json.dumps({"cpu_s": used.ru_utime + used.ru_stime, "mb": used.ru_maxrss * 1024 / 1e6,
    "wall_s": time.perf_counter() - begun, "exit": os.waitstatus_to_exitcode(status)}))
"""


def main() -> None:
    """Measure what is asked for and not there yet, write results and table."""
    parser = documented(__doc__)
    parser.add_argument("--sentry", help="The other program: a path. Without it, only the table.")
    parser.add_argument("--repetitions", type=int, default=5)
    parser.add_argument("--adapters", type=int, default=500)
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--batches", type=int, default=1, help="Repetitions of the batch.")
    parser.add_argument("--make", nargs=2, help=argparse.SUPPRESS)  # the files, in a child
    options = parser.parse_args()
    if options.make:
        make(Path(options.make[0]), int(options.make[1]))
        return
    result: dict[str, Any] = json.loads(RESULTS.read_text()) if RESULTS.exists() else {}
    if options.sentry:
        with tempfile.TemporaryDirectory() as name:
            measure(result, options, Path(name))
    fill(PAGE, "cost and findings", tables(result), "benchmarks.scan")


def measure(result: dict[str, Any], options: argparse.Namespace, place: Path) -> None:
    """Every part that the result lacks; it is saved after each run, so that it can go on."""
    compileall.compile_dir(ROOT / "loraprobe", quiet=1)  # as an installation has it
    count = options.adapters if options.batches else 0
    command = [sys.executable, "-m", "benchmarks.scan", "--make", str(place), str(count)]
    subprocess.run(command, check=True, cwd=ROOT)
    large, probe, many = (str(place / part) for part in ("large", "probe", "many"))
    weights = f"{large}/adapter_model.safetensors"
    result["adaptersentry"] = said(options.sentry, "--version")
    result["adapter_mb"] = Path(weights).stat().st_size / 1e6
    alternated(
        result,
        "one",
        {
            "import numpy": [sys.executable, "-c", "import numpy"],
            "inspect": [*OURS, "inspect", large],
            "score": [*OURS, "score", large, "--probe", probe],
            "scan": [*OURS, "scan", large],
            "scan --probe": [*OURS, "scan", large, "--probe", probe],
            "AdapterSentry scan": [options.sentry, "scan", weights],
        },
        options.repetitions,
    )
    if "found" not in result:
        result["found"] = {"loraprobe": ours(), "AdapterSentry": theirs(options.sentry, place)}
        write(RESULTS, result)
    workers = ["--workers", str(options.workers)]
    sentry = [options.sentry, "batch", "--no-cache", "--force-rescan", "--output-dir"]
    alternated(
        result,
        f"{options.adapters} adapters, {options.workers} workers",
        {
            "scan": [*OURS, "scan", many, *workers],
            "scan --probe": [*OURS, "scan", many, *workers, "--probe", str(PROBE)],
            "AdapterSentry batch": [*sentry, str(place / "out"), "--input-dir", many, *workers],
        },
        options.batches,
    )


def make(place: Path, count: int) -> None:
    """The large adapter, a probe that reads all of it, and many small adapters."""
    import numpy as np
    from safetensors.numpy import load_file

    from loraprobe import FeatureRecipe, Featurizer, LoRAPair, Probe, load_adapter
    from loraprobe.adapters.layout import Layout
    from loraprobe.adapters.load import save_adapter
    from loraprobe.features.invariant import Bases
    from loraprobe.heads import LinearHead

    (place / "large").mkdir()
    folder = write_adapter(place / "large")
    adapter = load_adapter(folder)
    (folder / BASES).rename(place / BASES)
    bases = load_file(place / BASES)
    left, right = ({m: bases[f"{side}.{m}"] for m in adapter} for side in ("left", "right"))
    featurizer = Featurizer(FeatureRecipe.invariant(), Layout.of(adapter), frozenset(adapter))
    p = featurizer.num_features
    whole = Bases(left, right, np.zeros(p, np.float32))
    featurizer = Featurizer(featurizer.recipe, featurizer.layout, featurizer.modules, whole)
    rng = np.random.default_rng(0)
    head = LinearHead(rng.standard_normal(p).astype(np.float32), 0.0)
    Probe(featurizer, head, base_model=adapter.base_model).save_pretrained(place / "probe")
    originals = [
        load_adapter(path.parent).load() for path in sorted(ADAPTERS.rglob("*.safetensors"))
    ]
    for number in range(count):
        of = originals[number % len(originals)]
        size = float(rng.uniform(0.5, 1.5))
        pairs = {
            module: LoRAPair(pair.A, (pair.B * size).astype(pair.B.dtype), pair.scaling)
            for module, pair in of.items()
        }
        save_adapter(of.with_pairs(pairs), place / "many" / f"{number:03}")


def write_adapter(folder: Path) -> Path:
    """A random adapter in PEFT's format, and bases of its modules beside it."""
    import numpy as np
    from safetensors.numpy import save_file

    rng = np.random.default_rng(0)
    factors, bases = {}, {}

    def random(shape: tuple[int, int], size: float) -> np.ndarray:
        return (rng.standard_normal(shape, np.float32) * np.float32(size)).astype(np.float16)

    for layer in range(LAYERS):
        for name, (d_out, d_in) in MODULES.items():
            module = f"model.layers.{layer}.{name}"
            for factor, shape in (("A", (RANK, d_in)), ("B", (d_out, RANK))):
                key = f"base_model.model.{module}.lora_{factor}.weight"
                factors[key] = random(shape, 0.02)
            bases[f"left.{module}"] = random((d_out, K), d_out**-0.5)
            bases[f"right.{module}"] = random((d_in, K), d_in**-0.5)
    save_file(factors, folder / "adapter_model.safetensors", {"format": "pt"})
    save_file(bases, folder / BASES)
    config = {
        "peft_type": "LORA",
        "r": RANK,
        "lora_alpha": 2 * RANK,
        "target_modules": sorted(name.partition(".")[2] for name in MODULES),
        "base_model_name_or_path": "org/base",
    }
    (folder / "adapter_config.json").write_text(json.dumps(config), encoding="utf-8")
    return folder


def alternated(
    result: dict[str, Any], part: str, commands: dict[str, list[str]], repetitions: int
) -> None:
    """Add the runs of each command that a part of the result lacks, one of each in turn."""
    runs = result.setdefault("runs", {}).setdefault(part, {})
    for number in range(repetitions):
        for name, command in commands.items():
            if len(runs.setdefault(name, [])) <= number:
                runs[name].append(measured(command))
                print(number, name, runs[name][-1], flush=True)
                write(RESULTS, result)


def measured(command: Sequence[str]) -> dict[str, float]:
    """What a process and those that it starts took.

    Raises:
        RuntimeError: it ended in an error.
    """
    threads = dict.fromkeys(("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"), "1")
    done = subprocess.run(
        [sys.executable, "-S", "-c", STARTER, *command],
        env={**os.environ, **threads},
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=True,
    )
    found: dict[str, float] = json.loads(done.stdout)
    if found["exit"] not in (0, 3, 4):
        raise RuntimeError(f"{' '.join(command)} ended with {found['exit']}:\n{done.stderr}")
    return found


def said(*command: str) -> str:
    """What a command prints."""
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    return done.stdout.strip()


def labels() -> dict[str, str]:
    """Name of a folder in the zoo -> what it is: benign, hard_negative or malicious."""
    with (ADAPTERS / "manifest.csv").open(encoding="utf-8") as file:
        return {row["path"]: row["role"] for row in csv.DictReader(file)}


def ours() -> dict[str, dict[str, int]]:
    """Label -> decision -> how many of the zoo's adapters."""
    command = [*OURS, "scan", str(ADAPTERS), "--probe", str(PROBE), "--format", "json"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, check=False)
    results = json.loads(done.stdout)["results"]
    return counted([(Path(one["target"]).name, one["decision"]) for one in results])


def theirs(sentry: str, place: Path) -> dict[str, dict[str, int]]:
    """The same of the other program."""
    out = place / "zoo"
    command = [sentry, "batch", "--no-cache", "--force-rescan", "--output-dir", str(out)]
    subprocess.run([*command, "--input-dir", str(ADAPTERS)], capture_output=True, check=True)
    folders = {
        f"sha256:{hashlib.sha256(path.read_bytes()).hexdigest()}": path.parent.name
        for path in ADAPTERS.rglob("*.safetensors")
    }
    results = [json.loads(path.read_text(encoding="utf-8")) for path in out.rglob("*.json")]
    return counted(
        [
            (folders[one["artifact"]["content_hash"]], one["verdict"]["action"].lower())
            for one in results
            if "verdict" in one
        ]
    )


def counted(decisions: Sequence[tuple[str, str]]) -> dict[str, dict[str, int]]:
    """What the adapters are -> decision -> how many, of (folder, decision)."""
    known = labels()
    counts: dict[str, Counter[str]] = {label: Counter() for label in sorted(set(known.values()))}
    for folder, decision in decisions:
        counts[known[folder]][decision] += 1
    return {label: dict(sorted(count.items())) for label, count in counts.items()}


def tables(result: dict[str, Any]) -> str:
    """The tables of docs/scan.md: medians of what was measured."""
    lines: list[str] = []
    for part, runs in result["runs"].items():
        if not any(runs.values()):
            continue
        title = f"one adapter of {result['adapter_mb']:.0f} MB, cold" if part == "one" else part
        times = min(map(len, runs.values()))
        lines += [
            f"| {title} (n = {times}) | CPU seconds | largest resident set (MB) |",
            "|---|---|---|",
        ]
        for name, found in runs.items():
            cpu, size = (statistics.median(run[key] for run in found) for key in ("cpu_s", "mb"))
            lines.append(f"| {name} | {cpu:.2f} | {size:.0f} |")
        lines.append("")
    if "found" in result:
        lines += [
            "| the zoo's adapters for SmolLM2-135M | loraprobe, with the zoo's probe |"
            " AdapterSentry |",
            "|---|---|---|",
            *(
                f"| {label} | {_shown(result, 'loraprobe', label)} |"
                f" {_shown(result, 'AdapterSentry', label)} |"
                for label in result["found"]["loraprobe"]
            ),
            "",
        ]
    return "\n".join(lines)


def _shown(result: dict[str, Any], program: str, label: str) -> str:
    """Counts of the decisions, and the 95 % interval of the share that is not allowed."""
    import numpy as np

    from loraprobe.metrics import rate_ci

    counts = result["found"][program][label]
    total = sum(counts.values())
    stopped = np.arange(total) < total - counts.get("allow", 0)
    low, high = rate_ci(stopped, np.arange(total))
    shown = ", ".join(f"{number} {decision}" for decision, number in counts.items())
    return f"{shown} ({stopped.mean():.0%} stopped [{low:.0%}, {high:.0%}])"


if __name__ == "__main__":
    main()
