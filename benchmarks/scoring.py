"""Scoring Llama-3.1-8B-shaped adapters from disk: what it costs beside merely reading them.

    python -m benchmarks.scoring            # table and benchmarks/results/scoring.json

Twenty adapters (q_proj and v_proj of 32 layers, r = 8, fp32, 13.6 MB each) of random numbers; time
and memory do not depend on the values. The compared ways alternate within every repetition, so that
a slow moment of the machine hits all of them; quoted are medians and their ratios.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import platform
import re
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from safetensors import safe_open
from safetensors.torch import load, load_file
from torch import Tensor

from loraprobe import (
    Adapter,
    FeatureRecipe,
    Featurizer,
    LoRAPair,
    Probe,
    factor_delta,
    load_adapter,
)
from loraprobe.adapters.load import save_adapter
from loraprobe.features import spectra
from loraprobe.heads import LinearHead

RESULTS = Path(__file__).parent / "results/scoring.json"
MODULES = {"q_proj": (4096, 4096), "v_proj": (1024, 4096)}  # (d_out, d_in) of Llama-3.1-8B
LAYERS, RANK, ADAPTERS = 32, 8, 20


def main() -> None:
    """Measure, print and save."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--repetitions", type=int, default=15)
    repetitions = parser.parse_args().repetitions
    with tempfile.TemporaryDirectory() as name:
        folders = [
            save_adapter(random_adapter(seed), Path(name) / str(seed)) for seed in range(ADAPTERS)
        ]
        probe = paper_probe(folders)
        scoring = alternate(
            {
                "read everything, then filter": lambda: read_all(folders, probe),
                "map everything, then filter": lambda: read_all(folders, probe, load_file),
                "loraprobe": lambda: score(folders, probe),
                "read the probed tensors only": lambda: read_probed(folders),
            },
            repetitions,
        )
        passes = alternate(
            {
                "spectra of 64 pairs": lambda: all_spectra(folders[0]),
                "one pass over the bytes": lambda: one_pass(folders[0]),
            },
            repetitions,
        )
        memory = {task.__name__: peak_memory(task, folders, probe) for task in (read_all, score)}
    result = {
        "machine": {
            "processor": platform.machine(),
            "torch": torch.__version__,
            "threads": torch.get_num_threads(),
        },
        "repetitions": repetitions,
        "median_ms": {**scoring, **passes},
        "faster_than_read_all": scoring["read everything, then filter"] / scoring["loraprobe"],
        "most_possible": (
            scoring["read everything, then filter"] / scoring["read the probed tensors only"]
        ),
        "times_reading_probed": scoring["loraprobe"] / scoring["read the probed tensors only"],
        "spectra_times_one_pass": passes["spectra of 64 pairs"] / passes["one pass over the bytes"],
        "peak_memory_above_start_mib": memory,
    }
    print(json.dumps(result, indent=2))
    RESULTS.parent.mkdir(exist_ok=True)
    RESULTS.write_text(json.dumps(result, indent=2) + "\n")


def random_adapter(seed: int) -> Adapter:
    """An adapter of Llama-3.1-8B's shapes."""
    rng = torch.Generator().manual_seed(seed)
    return Adapter(
        {
            f"model.layers.{layer}.self_attn.{name}": LoRAPair(
                torch.randn(RANK, d_in, generator=rng) * 0.02,
                torch.randn(d_out, RANK, generator=rng) * 0.01,
                2.0,
            )
            for layer in range(LAYERS)
            for name, (d_out, d_in) in MODULES.items()
        }
    )


def paper_probe(folders: list[Path]) -> Probe:
    """The paper's recipe with a linear head of random weights."""
    featurizer = Featurizer.fit(
        FeatureRecipe.paper(), [factor_delta(load_adapter(folders[0]), None)]
    )
    weights = np.random.default_rng(0).standard_normal(featurizer.num_features).astype(np.float32)
    return Probe(featurizer, LinearHead(weights, 0.0))


def score(folders: list[Path], probe: Probe) -> list[float]:
    """This library: open, take the delta, featurize, score."""
    return probe([factor_delta(load_adapter(folder), None) for folder in folders]).tolist()


def read_file(path: Path) -> dict[str, Tensor]:
    """Every tensor of a file, in memory."""
    return load(path.read_bytes())


def read_all(
    folders: list[Path], probe: Probe, read: Callable[[Path], dict[str, Tensor]] = read_file
) -> list[float]:
    """The usual script: read every tensor, keep those of the first layer's B, stack, normalise,
    score.
    """
    rows = []
    for folder in folders:
        state = read(folder / "adapter_model.safetensors")
        rows.append(
            torch.cat(
                [
                    state[key].flatten()
                    for key in sorted(state)
                    if ".layers.0." in key and "lora_B" in key
                ]
            )
        )
    x = torch.stack(rows)
    return probe.head((x / x.norm(dim=1, keepdim=True)).numpy()).tolist()


def read_probed(folders: list[Path]) -> list[Tensor]:
    """Only read the bytes that the paper's recipe needs, and do nothing with them."""
    tensors = []
    for folder in folders:
        with safe_open(folder / "adapter_model.safetensors", "pt") as file:
            tensors += [
                file.get_tensor(f"base_model.model.model.layers.0.self_attn.{name}.lora_B.weight")
                for name in MODULES
            ]
    return tensors


def all_spectra(folder: Path) -> dict[tuple[str, str], Tensor]:
    """Singular values of every product B @ A of an adapter, from the file."""
    adapter = load_adapter(folder)
    return spectra(adapter, list(adapter), ("A", "B"))


def one_pass(folder: Path) -> float:
    """Read every tensor of the file and look at every number once."""
    return sum(
        float(tensor.sum()) for tensor in load_file(folder / "adapter_model.safetensors").values()
    )


def alternate(tasks: dict[str, Callable[[], object]], repetitions: int) -> dict[str, float]:
    """Median milliseconds of every task, run in turn."""
    times: dict[str, list[float]] = {name: [] for name in tasks}
    for _ in range(repetitions + 2):  # the first two warm caches and are not counted
        for name, task in tasks.items():
            begun = time.perf_counter()
            task()
            times[name].append(1000 * (time.perf_counter() - begun))
    return {name: round(statistics.median(values[2:]), 3) for name, values in times.items()}


def peak_memory(
    task: Callable[[list[Path], Probe], object], folders: list[Path], probe: Probe
) -> float:
    """MiB by which a fresh process grows at its peak."""
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        return pool.apply(_grown, (task, folders, probe))


def _grown(task: Callable[[list[Path], Probe], object], folders: list[Path], probe: Probe) -> float:
    before = _peak_kib()
    task(folders, probe)
    return round((_peak_kib() - before) / 1024, 1)


def _peak_kib() -> int:
    """The kernel's high-water mark of this process; getrusage's would include the parent's."""
    return int(re.search(r"VmHWM:\s+(\d+)", Path("/proc/self/status").read_text()).group(1))  # type: ignore[union-attr]


if __name__ == "__main__":
    main()
