"""What it costs to know a base model by its content, at the start of a run and of a resumption.

    python -m benchmarks.base_digest        # benchmarks/results/base_digest.json (half a minute)

A module of 1 GiB of bfloat16 parameters, in matrices of 4096 x 4096 as Llama-3.1-8B has them; what
is larger takes as much longer as it is larger, since every byte is hashed once. Processor seconds
on one thread, beside those of SHA-256 over as many bytes in one piece.
"""

from __future__ import annotations

import hashlib
import json
import platform
import statistics
import time
from collections.abc import Callable

import torch

from fedloop.run.identity import base_digest

from . import common
from .common import write

RESULTS = common.RESULTS / "base_digest.json"
SIDE = 4096
MATRICES = 32
RUNS = 7
LLAMA_8B = 16.06e9  # bytes: 8.03e9 parameters of two bytes


def seconds(work: Callable[[], object]) -> float:
    start = time.process_time()
    work()
    return time.process_time() - start


def main() -> None:
    """Measure and write."""
    torch.set_num_threads(1)
    matrices = [torch.randn(SIDE, SIDE).to(torch.bfloat16) for _ in range(MATRICES)]
    model = torch.nn.ParameterList(map(torch.nn.Parameter, matrices))
    size = 2 * sum(parameter.numel() for parameter in model.parameters())
    plain = torch.cat([matrix.flatten() for matrix in matrices]).view(torch.uint8).numpy()
    digests = [seconds(lambda: base_digest(model)) for _ in range(RUNS)]
    bare = [seconds(lambda: hashlib.sha256(plain.data).digest()) for _ in range(RUNS)]
    found = {
        "bytes": size,
        "runs": RUNS,
        "seconds": [round(one, 3) for one in digests],
        "sha256_alone": [round(one, 3) for one in bare],
        "seconds_8b": [
            round(at(digests) * LLAMA_8B / size, 1) for at in (min, statistics.median, max)
        ],
        "machine": f"{platform.machine()}, Python {platform.python_version()}",
    }
    write(RESULTS, found)
    print(json.dumps(found, indent=1))


if __name__ == "__main__":
    main()
