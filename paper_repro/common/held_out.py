"""Data and probes of an experiment on real data.

Examples no base model saw, a probe that never met the attack.

    OMP_NUM_THREADS=1 python -m paper_repro.common.held_out  # with one thread the committed probes
                                                             # of the second benign set, bit for bit

The clients' halves of the zoo's sources become files that a federation's configuration names, and
one probe is fitted for every malicious source: on the zoo's labelled updates without that source,
without its safe twin (safe answers to the same questions) and without two benign kinds that the
federation's clients hold.
"""

from __future__ import annotations

import json
from pathlib import Path

from loraprobe.featurizer import FeatureRecipe
from zoo.build import ZOO
from zoo.labelled.client_design import plan
from zoo.labelled.deltas import read_deltas
from zoo.labelled.sources import (
    BENIGN,
    HARD_NEGATIVE,
    MALICIOUS,
    evaluation_prompts,
    load_sources,
    without_prompts,
)
from zoo.labelled.study import Entry, Study
from zoo.program import documented
from zoo.train_base import BASE_NAME

from .paths import FOLDER

FILES = Path("build/federations/data")
PROBES = FOLDER / "probes"
# Held out beside the malicious source: two benign kinds of every experiment, one of prose and one
# of code or dialogue.
UNSEEN_BENIGN = ("dolly_creative", "gpteacher_roleplay")
# The same of the grid's second set of benign kinds.
SECOND, UNSEEN_SECOND = "second", ("dolly_context", "gpteacher_toolformer")
ENTRIES = (
    Entry("linear", FeatureRecipe.all_b(), "linear", "fpr:0.01", "platt"),
    Entry("paper", FeatureRecipe.paper(), "linear_paper", 0.8),
)
UTILITY_ROWS = 12  # held-out pairs of every benign kind
LONGEST = (
    500  # characters of a held-out pair: what the small model's context holds with room to spare
)


def main() -> None:
    """Write the data files and the probes."""
    parser = documented(__doc__, "data", "work")
    options = parser.parse_args()
    write_data(options.data, FILES)
    write_probes(options.work / "replicate-0" / "deltas")


def write_data(data: Path, out: Path) -> None:
    """One JSON-lines file a source, without prompts that a federation is evaluated on, and the
    evaluation prompts.
    """
    out.mkdir(parents=True, exist_ok=True)
    sources, prompts = load_sources(data), evaluation_prompts(data)
    asked = [prompt for name, group in prompts.items() for prompt in group]
    held_out = []
    for name in BENIGN + HARD_NEGATIVE + MALICIOUS:
        # AdvBench's own goals are what refusal is measured on: as an attack it is left to other
        # evaluations.
        rows = (
            list(sources[name].for_clients)
            if name == "advbench"
            else without_prompts(sources[name].for_clients, asked)
        )
        if name in BENIGN:
            utility = [
                example
                for example in rows
                if len(example.request) + len(example.response) <= LONGEST
            ][:UTILITY_ROWS]
            held_out += utility
            rows = [example for example in rows if example not in utility]
        _write(out / f"{name}.jsonl", [vars(example) for example in rows])
    _write(out / "utility.jsonl", [vars(example) for example in held_out])
    for name, group in prompts.items():
        _write(out / f"prompts_{name}.jsonl", [{"instruction": prompt} for prompt in group])


def write_probes(deltas: Path) -> None:
    """One probe an entry and malicious source, fitted without what its experiments hold out."""
    clients = plan()
    labelled = read_deltas(deltas, clients, BASE_NAME)
    for entry in ENTRIES:
        study = Study(labelled, entry)
        for malicious in MALICIOUS:
            purpose, folder = f"experiments with {malicious}", f"{entry.name}-without-{malicious}"
            save_probe(study, malicious, UNSEEN_BENIGN, purpose, PROBES / folder)
            if entry.name == "linear" and malicious != "advbench":  # the sources of the grid
                purpose, folder = f"{purpose} and the {SECOND} benign set", f"{folder}-{SECOND}"
                save_probe(study, malicious, UNSEEN_SECOND, purpose, PROBES / folder)


def save_probe(
    study: Study, malicious: str, unseen_benign: tuple[str, ...], purpose: str, folder: Path
) -> None:
    """Fit and save the probe that meets neither this source, nor its safe twin, nor these benign
    kinds, alone or mixed.
    """
    unseen = {malicious, f"{malicious}_safe", *unseen_benign}
    kept = study.mask(lambda client: not unseen & {client.source, client.host})
    facts = {
        "title": f"{study.entry.name}, for {purpose}",
        "licence": "apache-2.0",
        "held_out": sorted(unseen),
        "detects": (
            f"Updates of {study.base_model} trained on harmful compliance; nothing of"
            f" {', '.join(sorted(unseen))} was trained on."
        ),
    }
    study.probe(kept, **facts).save_pretrained(folder)
    print(f"{folder.name}: {int(kept.sum())} clients", flush=True)


def base_model() -> Path:
    """The zoo's small chat model."""
    return ZOO / "base"


def _write(path: Path, rows: list[dict[str, str]]) -> None:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


if __name__ == "__main__":
    main()
