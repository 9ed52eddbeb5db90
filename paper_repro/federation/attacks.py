"""Attackers who know the defence, in whole federations: results/attacks.jsonl, resumable.

    python -m paper_repro.federation.attacks

Five of ten clients, poison alone. Each attack is a table of a configuration of fedloop; an arm is a
row of the table of federations with what a server can add to it.
"""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

from fedloop.config import Config
from fedloop.data.corpora import load_corpus
from zoo.program import read_lines

from ..common.paths import RESULTS
from ..grid.lines import append_line
from .cells import Cell
from .engine import Federation, Trainer
from .run import measured_once, parser, play, screen_of

LINES = RESULTS / "attacks.jsonl"
SECRET = "secret.jsonl"  # in the data folder: prompts that only the server has
# Attack -> fields of the table [clients].
ATTACKS: dict[str, dict[str, Any]] = {
    "hidden from the probe in training": {"evade_probe": -4.0},
    "colluding parts, 4": {"update_attack": "collusion", "update_attack_options": {"times": 4.0}},
    "three rounds benign, then three times as long": {
        "attack_from": 4,
        "update_attack": "scaling",
        "update_attack_options": {"factor": 3.0},
    },
}
# Arm -> row, and fields of the table [defense].
ARMS: dict[str, tuple[str, dict[str, Any]]] = {
    "FedAvg": ("FedAvg", {}),
    "ours, no change": ("ours, no change", {}),
    "with bounds": ("ours, no change", {"max_norm_ratio": 1.5, "score_aggregate": True}),
    "with behaviour": ("ours, no change", {"behaviour": SECRET, "behaviour_cut": 1.6}),
    "rival": ("rival", {}),
}
# Undefended, covers cancel in the mean; the rival is not who hides from our probe.
LEFT_OUT = {
    ("hidden from the probe in training", "FedAvg"),
    ("hidden from the probe in training", "rival"),
    ("colluding parts, 4", "FedAvg"),
}
PLAIN = Cell("FedAvg", 5, 1.0, "maliciousgen")
Line = dict[str, Any]


def planned() -> list[tuple[str, str]]:
    """Attack and arm of every run."""
    return [(one, arm) for one in ATTACKS for arm in ARMS if (one, arm) not in LEFT_OUT]


def cell_of(arm: str) -> Cell:
    """The cell of the table of federations that an arm starts from."""
    return Cell(ARMS[arm][0], PLAIN.malicious, PLAIN.share, PLAIN.source)


def config_of(attack: str, arm: str, work: Path, base: Path) -> Config:
    """The experiment of one run."""
    values = cell_of(arm).config(work, base).model_dump(mode="json")
    values["clients"] |= ATTACKS[attack]
    values["defense"] |= ARMS[arm][1]
    if values["defense"]["behaviour"]:
        values["defense"]["behaviour"] = str(work / "data" / SECRET)
    return Config.of(values)


def write_secret(work: Path) -> None:
    """The server's prompts: harmful ones of the source that the attackers do not use, benign ones
    of one of the kinds of data.
    """
    path = work / "data" / SECRET
    pools = {"harmful": PLAIN.other_source, "benign": "dolly_open_qa"}
    rows = [
        json.dumps({"prompt": example.request, "kind": kind})
        for kind, name in pools.items()
        for example in load_corpus(str(work / "data" / f"{name}.jsonl")).examples
    ]
    path.write_text("\n".join(rows) + "\n", encoding="utf-8")


def main() -> None:
    """The command line."""
    options = parser(__doc__).parse_args()
    done = {(line["attack"], line["arm"]) for line in read_lines(LINES)}
    todo = [run for run in planned() if run not in done]
    if not todo:
        return
    write_secret(options.work)
    trainer = Trainer(PLAIN.config(options.work, options.base), options.work / "kept")
    for attack, arm in todo:
        line = run(attack, arm, trainer, options.work, options.base)
        append_line(line, LINES)
        print(time.strftime("%H:%M:%S"), attack, arm, line["refused"], line["factors"], flush=True)


def run(attack: str, arm: str, trainer: Trainer, work: Path, base: Path) -> Line:
    """One federation, as the line that is kept of it."""
    config = config_of(attack, arm, work, base)
    federation = Federation(trainer, config, screen_of(cell_of(arm), trainer, work))
    told = play(federation)
    return {"attack": attack, "arm": arm, **measured_once(federation, work), **told}


if __name__ == "__main__":
    main()
