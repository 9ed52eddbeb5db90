"""Probes for the grid's second benign set.

As `paper_repro.common.held_out` fits those for the first, with two kinds of that set held out.

    OMP_NUM_THREADS=1 python -m paper_repro.grid.probes     # needs what `make zoo` keeps; with one
    thread the committed probes, bit for bit

The probes of both sets are of the same kind and never met the malicious source, its safe twin, or
one benign kind of prose and one of code or dialogue that the federation's honest clients hold.
"""

from __future__ import annotations

from zoo.labelled.client_design import plan
from zoo.labelled.deltas import read_deltas
from zoo.labelled.study import Study
from zoo.program import documented
from zoo.train_base import BASE_NAME

from ..common.held_out import ENTRIES, PROBES, save_probe
from ..common.setting import probe_name
from .cells import SOURCES

SET, UNSEEN = "second", ("dolly_context", "gpteacher_toolformer")


def main() -> None:
    """Fit and save one probe a malicious source of the grid."""
    parser = documented(__doc__, "work")
    labelled = read_deltas(parser.parse_args().work / "replicate-0" / "deltas", plan(), BASE_NAME)
    entry = next(entry for entry in ENTRIES if entry.name == "linear")
    study = Study(labelled, entry)
    for source in SOURCES:
        save_probe(
            study,
            source,
            UNSEEN,
            f"experiments with {source} and the {SET} benign set",
            PROBES / probe_name(entry.name, source, SET),
        )


if __name__ == "__main__":
    main()
