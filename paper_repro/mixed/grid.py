"""First contact: how well one update of an unknown attack is told from one of an unknown kind of
benign data.

    python -m paper_repro.mixed.grid  # writes results/mixed_grid.json; needs .labelled; half an
                                      # hour on one core, goes on where it stopped

4 malicious sources x 13 benign kinds, hard negatives among them. In a cell the malicious source,
the safe answers to its questions and the benign kind are left out of training, alone and in
mixtures. Tested are clients of that source at every poison share, mixed into that benign kind (hard
negatives: into any), against every client of that benign kind.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from typing import Any

import torch

from zoo.labelled.client_design import plan
from zoo.labelled.deltas import read_deltas
from zoo.labelled.sources import BENIGN, HARD_NEGATIVE, MALICIOUS
from zoo.labelled.unseen_sources import told_apart
from zoo.program import documented, write_rows

from ..common.paths import FOLDER
from .labelled import DESIGN
from .readers import READERS, Reader, Reading, unseen_in
from .setting import MODELS, Model

RESULTS = FOLDER / "results" / "mixed_grid.json"


def main() -> None:
    """Measure every reader on every base model."""
    documented(__doc__).parse_args()
    torch.set_num_threads(1)
    pairs = [(model, reader) for reader in READERS for model in MODELS.values()]
    write_rows(RESULTS, [row for pair in pairs for row in measured(*pair)])


def measured(
    model: Model, reader: Reader, sources: Sequence[str] = MALICIOUS
) -> Iterator[dict[str, Any]]:
    """One row a cell and poison share.

    Those of a malicious source are kept as soon as they are there.
    """
    reading: Reading | None = None
    for malicious in sources:
        kept = model.folder / "grid" / f"{reader.name}-{malicious}.json"
        if not kept.exists():
            reading = reading or Reading(
                read_deltas(model.folder / "labelled", plan(DESIGN), model.name, DESIGN), reader
            )
            rows = [
                {
                    "model": model.key,
                    "reader": reader.name,
                    "malicious": malicious,
                    "benign": benign,
                    **row,
                }
                for benign in (*BENIGN, *HARD_NEGATIVE)
                for row in cell(reading, malicious, benign)
            ]
            kept.parent.mkdir(exist_ok=True)
            part = kept.with_suffix(".part")
            part.write_text(json.dumps(rows))
            part.replace(kept)
            print(f"{model.key}, {reader.name}: {malicious}", flush=True)
        yield from json.loads(kept.read_text())


def cell(reading: Reading, malicious: str, benign: str) -> Iterator[dict[str, Any]]:
    """One row a poison share, of a probe that knows neither."""
    unseen = reading.cells[malicious, benign]
    probe = reading.probe(unseen_in(malicious, benign), with_cut=True)
    good = probe.score_features(reading.features[unseen.benign_rows])
    for share, chosen in unseen.malicious_rows.items():
        bad = probe.score_features(reading.features[chosen])
        row = {"share": share, **told_apart(bad, good)}
        row["auroc"] = round(row["auroc"], 6)
        if reading.reader.threshold is not None:
            row |= {
                "flagged_malicious": int((bad >= probe.threshold).sum()),
                "flagged_benign": int((good >= probe.threshold).sum()),
            }
        yield row


if __name__ == "__main__":
    main()
