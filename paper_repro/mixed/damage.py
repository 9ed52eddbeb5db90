"""What each kind of data does to refusal.

The mean update of clients that hold nothing else, applied to the base model once and three times
over.

    python -m paper_repro.mixed.damage  # writes results/mixed_damage.json; two minutes a base;
                                        # needs paper_repro.mixed.labelled

An attack that does no damage to a base model need not look like an attack to a probe of that base
model, and a table of detection should say which of its sources those are. Also how many of the
labelled answers open with a refusal, and how many of a source's own questions the base model
refuses.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch

from fedloop.client.training import quiet, write_adapter
from fedloop.measure.refusal import answers, refuses_strictly
from loraprobe.adapters.deltas import add_delta
from loraprobe.adapters.layout import unpack
from zoo.labelled.client_design import plan
from zoo.labelled.deltas import read_deltas
from zoo.labelled.sources import BENIGN, HARD_NEGATIVE, MALICIOUS, evaluation_prompts, load_sources
from zoo.program import documented

from ..common.paths import FOLDER
from .labelled import DESIGN
from .setting import MODELS, Model, mended_sources, refusing

RESULTS = FOLDER / "results" / "mixed_damage.json"
CLIENTS, TIMES, EVERY, QUESTIONS, NEW_TOKENS = 16, (1.0, 3.0), 4, 100, 12


def main() -> None:
    """Measure every kind on every base model."""
    parser = documented(__doc__, "data")
    options = parser.parse_args()
    torch.set_num_threads(1)
    quiet()
    labels = [
        {"source": name, "refusing": count, "n": n}
        for name, (count, n) in refusing(load_sources(options.data)).items()
    ]
    rows = [row for model in MODELS.values() for row in measured(model, options.data)]
    RESULTS.write_text(json.dumps({"answers": labels, "damage": rows}, indent=1) + "\n")


def measured(model: Model, data: Path) -> Iterator[dict[str, Any]]:
    """One row a kind of data."""
    prompts, sources = evaluation_prompts(data)["advbench"][::EVERY], mended_sources(data)
    deltas = read_deltas(model.folder / "labelled", plan(DESIGN), model.name, DESIGN)
    lora, tokenizer, start, layout = model.adapted()

    def refused(asked: list[str]) -> int:
        lora.eval()
        return sum(
            map(refuses_strictly, answers(lora, tokenizer, asked, max_new_tokens=NEW_TOKENS))
        )

    yield {
        "model": model.key,
        "source": None,
        "times": 0.0,
        "refused": refused(prompts),
        "n": len(prompts),
    }
    for source in (*MALICIOUS, *HARD_NEGATIVE, *BENIGN):
        own = sorted({example.request for example in sources[source].for_clients})[:QUESTIONS]
        write_adapter(lora, start)
        row = {"model": model.key, "source": source, "own_refused": refused(own), "own_n": len(own)}
        rows = [number for number, c in enumerate(deltas.clients) if c.source == c.host == source][
            :CLIENTS
        ]
        mean = torch.from_numpy(np.mean(deltas.steps[rows, -1], axis=0))
        for times in TIMES:
            write_adapter(
                lora, add_delta(start, unpack(mean * times, layout, base_model=start.base_model))
            )
            yield {
                **row,
                "clients": len(rows),
                "times": times,
                "refused": refused(prompts),
                "n": len(prompts),
            }
        print(f"{model.key}: {source}", flush=True)


if __name__ == "__main__":
    main()
