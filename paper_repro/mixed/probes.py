"""Probes for the federations of `paper_repro.grid.run`.

Mass-mean, fitted without what a federation holds out, with their rule for the cut.

    python -m paper_repro.mixed.probes  # writes probes/mass-mean-without-*; needs .labelled and
                                        # results/mixed_accumulated.json

Left out are the malicious source, the safe answers to its questions and two of the benign kinds
that the federation's clients hold, as for the other probes there. Threshold and floor are what
`paper_repro.mixed.accumulated` found on federations of other sources.
"""

from __future__ import annotations

from typing import Any

from paper_repro.common.held_out import PROBES, SECOND, UNSEEN_BENIGN, UNSEEN_SECOND
from paper_repro.common.setting import probe_name
from paper_repro.grid.cells import SOURCES
from zoo.labelled.client_design import plan
from zoo.labelled.deltas import read_deltas
from zoo.program import documented

from .accumulated import committed_rule
from .labelled import DESIGN
from .readers import READERS, Reading, unseen_in
from .setting import MODELS

MODEL = MODELS["chat-1m"]


def main() -> None:
    """Fit and save."""
    documented(__doc__).parse_args()
    reading = Reading(
        read_deltas(MODEL.folder / "labelled", plan(DESIGN), MODEL.name, DESIGN), READERS[-1]
    )
    for source in SOURCES:
        for benign, kinds in (("first", UNSEEN_BENIGN), (SECOND, UNSEEN_SECOND)):
            unseen = unseen_in(source, *kinds)
            facts: dict[str, Any] = {
                "title": f"mass-mean, for experiments with {source} and the {benign} benign set",
                "licence": "apache-2.0",
                "held_out": sorted(unseen),
                "cumulative": rule_of(source),
                "detects": (
                    f"Updates of {MODEL.name} trained on harmful compliance; nothing of"
                    f" {', '.join(sorted(unseen))} was trained on."
                ),
            }
            probe = reading.probe(unseen, with_cut=True).with_facts(**facts)
            probe.save_pretrained(PROBES / probe_name(READERS[-1].name, source, benign))


def rule_of(source: str) -> dict[str, float]:
    """Threshold and floor where this source is unknown."""
    level = committed_rule(MODEL.key, source)
    return {"threshold": level.threshold, "floor": level.floor}


if __name__ == "__main__":
    main()
