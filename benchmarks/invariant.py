"""What the invariant features of an 8B adapter cost, from its file.

    python -m benchmarks.invariant          # prints and writes benchmarks/results/invariant.json

All linear modules of 32 layers of Llama-3.1-8B's shapes at r = 16, stored in 16 bits (84 MB), of
random numbers: time and memory do not depend on the values. Measured in fresh processes of one
thread: CPU seconds, and by how much the process grows at its peak beyond its imports, with the
probe's bases.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np
import safetensors.numpy

RESULTS = Path(__file__).parent / "results/invariant.json"
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


def main() -> None:
    """Measure, print and save."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--repetitions", type=int, default=7)
    repetitions = parser.parse_args().repetitions
    with tempfile.TemporaryDirectory() as name:
        folder = write_adapter(Path(name))
        runs = [measured(folder) for _ in range(repetitions)]
        size = (folder / "adapter_model.safetensors").stat().st_size
    result = {
        "modules": LAYERS * len(MODULES),
        "adapter_mb": size / 1e6,
        "repetitions": repetitions,
        "median_cpu_seconds": statistics.median(run["cpu_seconds"] for run in runs),
        "largest_mb_beyond_imports": max(run["mb_beyond_imports"] for run in runs),
    }
    print(json.dumps(result, indent=2))
    RESULTS.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")


def write_adapter(folder: Path) -> Path:
    """A random adapter in PEFT's format, and bases of its modules beside it."""
    rng = np.random.default_rng(0)
    factors, bases = {}, {}
    for layer in range(LAYERS):
        for name, (d_out, d_in) in MODULES.items():
            module = f"model.layers.{layer}.{name}"
            for factor, shape in (("A", (RANK, d_in)), ("B", (d_out, RANK))):
                key = f"base_model.model.{module}.lora_{factor}.weight"
                factors[key] = _random(rng, shape, 0.02)
            bases[f"left.{module}"] = _random(rng, (d_out, K), d_out**-0.5)
            bases[f"right.{module}"] = _random(rng, (d_in, K), d_in**-0.5)
    safetensors.numpy.save_file(factors, folder / "adapter_model.safetensors", {"format": "pt"})
    safetensors.numpy.save_file(bases, folder / BASES)
    config = {
        "peft_type": "LORA",
        "r": RANK,
        "lora_alpha": 2 * RANK,
        "target_modules": sorted(name.partition(".")[2] for name in MODULES),
        "base_model_name_or_path": "org/base",
    }
    (folder / "adapter_config.json").write_text(json.dumps(config), encoding="utf-8")
    return folder


def _random(rng: np.random.Generator, shape: tuple[int, int], size: float) -> np.ndarray:
    return (rng.standard_normal(shape, np.float32) * np.float32(size)).astype(np.float16)


def measured(folder: Path) -> dict[str, float]:
    """What a fresh process of one thread needs for the features of the adapter."""
    threads = dict.fromkeys(("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"), "1")
    command = [sys.executable, "-m", "benchmarks.invariant_once", str(folder)]
    done = subprocess.run(
        command, env={**os.environ, **threads}, capture_output=True, text=True, check=True
    )
    found: dict[str, float] = json.loads(done.stdout)
    return found


def used() -> tuple[float, float]:
    """CPU seconds of this process, and the most memory it ever took (MB)."""
    usage = resource.getrusage(resource.RUSAGE_SELF)
    return usage.ru_utime + usage.ru_stime, usage.ru_maxrss * 1024 / 1e6


if __name__ == "__main__":
    main()
