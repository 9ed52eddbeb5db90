"""What the cheap shadow costs and finds at the paper's round shape.

10 local steps of 16 examples, few of them in the gradient.

    python -m paper_repro.grid.overhead --workers 2

A federation with the shadow and one with the evidence level, on gradient signs; the whole shadow
branch doubles training by its definition. A line of JSON a run in results/overhead.jsonl, and the
table in README.md.
"""

from __future__ import annotations

import multiprocessing
from typing import Any

import torch

from fedloop.client.training import quiet
from fedloop.run.simulate import simulate
from zoo.program import append_lines, documented, read_lines

from ..common.paths import FOLDER
from ..common.setting import federation
from .cells import SOURCES
from .run import mean_factors, totals

RESULTS = FOLDER / "results" / "overhead.jsonl"
CLIENTS, MALICIOUS, ROUNDS = 5, 2, 6
# Of a round's 160 training examples: about 3 % of training, the evidence level asking in half of
# these rounds (in fewer of many).
EXAMPLES = {"shadow": 5, "evidence": 10}


def main() -> None:
    """Run what has no line yet."""
    parser = documented(__doc__, "workers")
    options = parser.parse_args()
    done = {line["level"] for line in read_lines(RESULTS)}
    todo = [level for level in EXAMPLES if level not in done]
    with multiprocessing.get_context("spawn").Pool(options.workers) as pool:
        for line in pool.imap_unordered(run, todo):
            append_lines(RESULTS, [line])
            print(line, flush=True)


def run(level: str) -> dict[str, Any]:
    """One federation, as the line that is kept of it."""
    quiet()
    torch.set_num_threads(1)
    config = federation(
        malicious=MALICIOUS,
        source=SOURCES[0],
        share=1.0,
        seed=0,
        level=level,
        defense={"options": {"evidence": "shadow_gradient"}},
        training={"steps": 10, "batch_size": 16, "lr": 5e-3, "shadow_examples": EXAMPLES[level]},
        clients={"count": CLIENTS, "examples": 200},
        evaluation={"harmful": None, "safe": None, "utility": None},
    )
    result = simulate(config)
    return {
        "level": level,
        "examples": EXAMPLES[level],
        "rounds": len(result.records),
        "factors": {role: mean_factors(result, role) for role in ("benign", "malicious")},
        "seconds": totals(result, "seconds"),
        "bytes": totals(result, "bytes"),
    }


if __name__ == "__main__":
    main()
