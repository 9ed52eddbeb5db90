"""Probes for the grid's second benign set: as `paper_repro.held_out` fits those for the first, with two kinds of that set held out.

    python -m paper_repro.grid_probes       # needs the labelled updates that `make zoo` keeps; the probes are committed

The probes of both sets are of the same kind and never met the malicious source, its safe twin, or one benign kind of prose and
one of code or dialogue that the federation's honest clients hold.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from zoo.deltas import read_deltas
from zoo.design import plan
from zoo.study import Study
from zoo.train_base import BASE_NAME

from .grid import SOURCES
from .held_out import ENTRIES, PROBES
from .setting import probe_name

SET, UNSEEN = "second", ("dolly_context", "gpteacher_toolformer")


def main() -> None:
    """Fit and save one probe a malicious source of the grid."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, default=Path("build/zoo"), help="what `make zoo` kept: replicate-0 holds the labelled updates")
    labelled = read_deltas(parser.parse_args().work / "replicate-0" / "deltas", plan(), BASE_NAME)
    entry = next(entry for entry in ENTRIES if entry.name == "linear")
    study = Study(labelled, entry)
    for source in SOURCES:
        unseen = {source, f"{source}_safe", *UNSEEN}
        kept = study.mask(lambda client, unseen=unseen: not unseen & {client.source, client.host})
        facts = {
            "title": f"{entry.name}, for experiments with {source} and the {SET} benign set", "licence": "apache-2.0", "held_out": sorted(unseen),
            "detects": f"Updates of {BASE_NAME} trained on harmful compliance; nothing of {', '.join(sorted(unseen))} was trained on.",
        }  # fmt: skip
        study.probe(kept, **facts).save_pretrained(PROBES / probe_name(entry.name, source, SET))
        print(f"{entry.name} without {source}, for the {SET} benign set: {int(kept.sum())} clients", flush=True)


if __name__ == "__main__":
    main()
