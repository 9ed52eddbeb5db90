"""Updates of single clients with known labels, from the initial LoRA.

What probes of this study are fitted on.

    python -m paper_repro.mixed.labelled  # 15 to 30 minutes a base on one core; goes on where it
                                          # stopped

The zoo's plan (1,480 clients: 9 benign kinds, 4 of hard negatives, 4 malicious sources at 100, 50,
25 and 10 % poison) on mended sources.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import torch

from zoo.labelled.client_design import ZOO_DESIGN, plan
from zoo.labelled.deltas import Base, DeltaSet, make_deltas
from zoo.program import documented

from .setting import MODELS, Model, mended_sources

DESIGN = replace(ZOO_DESIGN, all_steps=False)


def main() -> None:
    """Train what is missing."""
    data = documented(__doc__, "data").parse_args().data
    torch.set_num_threads(1)
    for model in MODELS.values():
        labelled_updates(model, data)


def labelled_updates(model: Model, data: Path) -> DeltaSet:
    """Every labelled client of a base model, last local step only.

    The clients that have no file are trained.
    """
    base = Base(str(model.path), model.name)
    return make_deltas(
        base,
        mended_sources(data),
        plan(DESIGN),
        model.folder / "labelled",
        design=DESIGN,
        seed=model.lora_seed,
    )


if __name__ == "__main__":
    main()
