"""Make the whole zoo anew.

Base models, labelled adapters, studies, probes, records, sample adapters.

    python -m zoo.build --data ../shared/data
    python -m zoo.build --cards-only  # seconds: after a change to the card or the format, nothing
                                      # is fitted

Everything expensive is kept under build/zoo and not made twice, so an interrupted run goes on.
Replicate 0 is the one that is published (zoo/base, zoo/probes); the others, with another state of
the base model and another initial adapter, say how far its figures can be believed.
"""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from loraprobe.probe import Probe

from .labelled.client_design import ZOO_DESIGN
from .labelled.deltas import Base, DeltaSet
from .labelled.measure import same_rounding
from .labelled.pipeline import (
    Replicate,
    folder_of,
    held_out_adapters,
    labelled_deltas,
    smaller,
    studies,
)
from .labelled.records import data_facts, fit_and_record, read_record, save_recorded, write_record
from .labelled.sources import LICENCES, Source, load_sources
from .labelled.study import BASELINES, ENTRIES, Entry, Row
from .program import documented
from .train_base import BASE_NAME, BaseConfig, train_base

ZOO = Path(__file__).parent
# replicate -> its base model. Detection differed between checkpoints of one small model, so the
# second
# replicate stops after two of the five phases; its initial adapter is another one too.
REPLICATES = (BaseConfig(), replace(BaseConfig(), phases=BaseConfig().phases[:2], averaged=1))
CLIENTS_SEED, SAMPLE_SEED = (
    0,
    1,
)  # the sample adapters' clients are drawn apart from those that probes are fitted on
SAMPLE = smaller(ZOO_DESIGN, per_source=4)
ADAPTERS = "adapters"
THREADS = 2  # as when the published probes were first fitted: their heads come out bit for bit


def main() -> None:
    """Build the zoo, or write its cards again."""
    parser = documented(__doc__, "data", "work", "workers")
    parser.add_argument(
        "--cards-only",
        action="store_true",
        help="save every probe again with the card of its record; fit nothing",
    )
    options = parser.parse_args()
    if options.cards_only:
        save_again(ZOO)
    else:
        build(options.data, options.work, options.workers)


def build(data: Path, work: Path, workers: int) -> None:
    """Run every stage that has not been run."""
    sources = load_sources(data)
    results = []
    for number, config in enumerate(REPLICATES):
        base = Base(str(_base(data, folder_of(work, number), config)), BASE_NAME)
        replicate = Replicate(number, base, initial_seed=number, clients_seed=CLIENTS_SEED)
        deltas = labelled_deltas(replicate, sources, ZOO_DESIGN, work, workers)
        with same_rounding(THREADS):
            results.append(studies(deltas, ENTRIES, replicate, work, twins_of=ENTRIES[0].name))
        if number == 0:
            shutil.copytree(base.path, ZOO / "base", dirs_exist_ok=True)
            held_out_adapters(
                replicate, sources, SAMPLE, SAMPLE_SEED, work, workers, ZOO / ADAPTERS
            )
            published = deltas
    with same_rounding(THREADS):
        write_probes(published, sources, results, ZOO)


def _base(data: Path, work: Path, config: BaseConfig) -> Path:
    if not (work / "base" / "facts.json").exists():
        train_base(data, work / "base", config, work)
    return work / "base"


def write_probes(
    deltas: DeltaSet, sources: Mapping[str, Source], results: list[dict[str, Row]], zoo: Path
) -> None:
    """Fit every entry on all of a replicate's clients; write probe, card and record."""
    licences = {name: _licence(name) for name in deltas.design.sources}
    data = data_facts(deltas.design, deltas, sources, licences)
    for entry in ENTRIES:
        print(f"fitting {entry.name}", flush=True)
        record = {
            "probe": entry.name,
            "command": "python -m zoo.build",
            "base_model": deltas.base_model,
            "about": _about(entry, deltas.base_model),
            "adapters": ADAPTERS,
            "data": data,
            "threads": THREADS,
            "replicates": [result[entry.name] for result in results],
            "baselines": {
                baseline.name: [result[baseline.name] for result in results]
                for baseline in BASELINES
            },
        }
        record = fit_and_record(deltas, entry, record, zoo / ADAPTERS, zoo / "probes" / entry.name)
        write_record(record, zoo / "records" / f"{entry.name}.json")


def save_again(zoo: Path) -> None:
    """Write every probe's folder anew from its record: for a change to the card or to the format.

    What was learnt stays.
    """
    for path in sorted((zoo / "records").glob("*.json")):
        record, folder = read_record(path), zoo / "probes" / path.stem
        probe = Probe.from_pretrained(folder)
        write_record(save_recorded(probe, record, folder), path)


def _about(entry: Entry, base_model: str) -> dict[str, Any]:
    """What the card says that no study measures."""
    return {
        "title": f"{entry.name}: malicious LoRA updates of {base_model}",
        "detects": (
            "Client updates (factor deltas of one short local training) of the zoo's small chat"
            " model that were trained on harmful questions with complying answers, alone or mixed"
            " into ordinary data. It was fitted with refusals to harmful questions among the benign"
            " clients."
        ),
        "does_not_detect": [
            (
                "adapters of any other base model or of another initial adapter than"
                " zoo/adapters/initial"
            ),
            "backdoors with a trigger, data theft, or any attack other than harmful compliance",
        ],
        "licence": "apache-2.0",
    }


def _licence(source: str) -> str:
    return next(licence for prefix, (licence, _) in LICENCES.items() if source.startswith(prefix))


if __name__ == "__main__":
    main()
