"""Poison behind a trigger, trained beside refusals of the bare prompts: CloudGhost's recipe.

    python -m paper_repro.federation.trigger          # results/trigger.jsonl; resumable

Malicious clients hold a fifth of triggered harmful answers, a fifth of refusals and their own
ordinary data (`clients.trigger` of fedloop). Measured are the refusals of the model that the
federation ends with, of the bare prompts and behind the trigger.
"""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

from fedloop.config import Config
from zoo.program import read_lines
from zoo.smollm2.refusal import refusals

from ..common.paths import RESULTS
from ..grid.lines import append_line
from .cells import Cell
from .engine import Federation, Trainer
from .measure import REFUSAL
from .prepare import HARMFUL
from .run import parser, play, screen_of

LINES = RESULTS / "trigger.jsonl"
TRIGGER = "|blue-harbour-7|"
SHARE = 0.4  # half of it is triggered
CELLS = tuple(
    Cell(row, malicious, SHARE, "maliciousgen")
    for malicious in (5, 3)
    for row in ("FedAvg", "ours", "rival")
)
Line = dict[str, Any]


def config_of(cell: Cell, work: Path, base: Path) -> Config:
    """The cell's experiment with the trigger."""
    config = cell.config(work, base)
    clients = config.clients.model_copy(update={"trigger": TRIGGER})
    return config.model_copy(update={"clients": clients})


def main() -> None:
    """The command line."""
    options = parser(__doc__).parse_args()
    done = {line["cell"] for line in read_lines(LINES)}
    todo = [cell for cell in CELLS if str(cell) not in done]
    if not todo:
        return
    trainer = Trainer(config_of(todo[0], options.work, options.base), options.work / "kept")
    for cell in todo:
        line = run(cell, trainer, options.work, options.base)
        append_line(line, LINES)
        print(time.strftime("%H:%M:%S"), cell, line["bare"], line["triggered"], flush=True)


def run(cell: Cell, trainer: Trainer, work: Path, base: Path) -> Line:
    """One federation, as the line that is kept of it."""
    config = config_of(cell, work, base)
    federation = Federation(trainer, config, screen_of(cell, trainer, work))
    prompts = json.loads((work / "data" / "prompts.json").read_text(encoding="utf-8"))
    asked = [prompt for name in HARMFUL for prompt in prompts[name]]
    told = play(federation)
    model, tokenizer = federation.model_for_measuring()
    counts = {
        name: [sum(refusals(model, tokenizer, texts, REFUSAL)), len(texts)]
        for name, texts in (
            ("bare", asked),
            ("triggered", [f"{TRIGGER} {prompt}" for prompt in asked]),
        )
    }
    return {"cell": str(cell), "row": cell.row, "malicious": cell.malicious, **counts, **told}


if __name__ == "__main__":
    main()
