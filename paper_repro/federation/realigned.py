"""The server fine-tunes what its federation ends with, on refusals of its own.

    python -m paper_repro.federation.realigned        # results/realigned.jsonl; resumable

Ten steps of the clients' own kind after the last round, half on refusals, half on ordinary answers
of a kind that no client holds. None of the requests is one that is measured, or an attacker's.

Source: arXiv:2406.10630, the defence after the federation, with data that the server has.
"""

from __future__ import annotations

import random
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

from fedloop.data.examples import Example
from fedloop.run.plan import plan_round
from loraprobe.adapters.deltas import add_delta
from zoo.program import read_lines
from zoo.smollm2 import refusal
from zoo.smollm2.clients import load_kinds

from ..common.paths import RESULTS
from ..grid.lines import append_line
from .cells import NOBODY, Cell
from .engine import Federation, Trainer
from .prepare import HARMFUL
from .run import measured_once, parser, play

LINES = RESULTS / "realigned.jsonl"
KINDS = ("refusal_short", "dolly_general_qa")
EXAMPLES = 40  # of a kind
STEPS = 10
CELLS = (
    Cell("FedAvg", *NOBODY, "maliciousgen"),
    Cell("FedAvg", 5, 0.5, "maliciousgen"),
    Cell("ours, no change", 5, 0.5, "maliciousgen"),
)
Line = dict[str, Any]


def main() -> None:
    """The command line."""
    options = parser(__doc__, "data").parse_args()
    done = {line["cell"] for line in read_lines(LINES)}
    todo = [cell for cell in CELLS if str(cell) not in done]
    if not todo:
        return
    examples = server_examples(options.data)
    trainer = Trainer(todo[0].config(options.work, options.base), options.work / "kept")
    for cell in todo:
        line = run(cell, examples, trainer, options.work, options.base)
        append_line(line, LINES)
        print(time.strftime("%H:%M:%S"), cell, line["refused"], flush=True)


def server_examples(data: Path) -> list[Example]:
    """What the server trains on: refusals and ordinary answers, as many of each."""
    kinds = load_kinds(data)[0]
    prompts = refusal.prompts(data)
    asked = {text for name in HARMFUL for text in prompts[name]}
    found = []
    for name in KINDS:
        rows = [example for example in kinds[name] if example.request not in asked]
        found += random.Random(f"realigned {name}").sample(rows, EXAMPLES)
    return found


def run(cell: Cell, examples: list[Example], trainer: Trainer, work: Path, base: Path) -> Line:
    """One federation and what the server makes of it, as the line that is kept."""
    federation = Federation(trainer, cell.config(work, base))
    play(federation)
    last = federation.lora
    training = replace(plan_round(federation.config, 1).training, steps=STEPS)
    delta, _, seconds = trainer.update(examples, last, training, seed=cell.seed)
    federation.lora = add_delta(last, delta)
    found = measured_once(federation, work)
    return {"cell": str(cell), **found, "seconds_server": round(seconds, 1)}


if __name__ == "__main__":
    main()
