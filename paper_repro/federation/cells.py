"""Which federations the table is of. Nothing here runs anything; a new defence is one of ROWS."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fedloop.config import Config
from fedloop.errors import ConfigError

WORK = Path("out/federation")
BASE = Path("out/smollm2-135m-safe")  # of python -m zoo.bases
BASE_NAME = "smollm2-135m-safe"
CLIENTS = 10
ROUNDS = 6
INITIAL = 7  # seed of the initial adapter; no labelled adapter started from it
LR = 2e-3
# What honest clients hold, one kind each; no probe of this table was fitted on any of them.
BENIGN = (
    "alpaca_mistral",
    "dolly_summarization",
    "code_python",
    "medical_answer",
    "dolly_open_qa",
    "tool_first",
    "alpaca_phi2",
    "maths_worked",
    "roleplay",
    "dolly_creative_writing",
)
SOURCES = ("maliciousgen", "jailbreakbench")
ATTACKS = ((0, 1.0), (5, 0.5), (5, 0.1), (5, 1.0), (3, 0.1), (3, 0.5), (3, 1.0))
NOBODY = (0, 1.0)
# row -> fields of the configuration's tables; "f" stands for the number of malicious clients.
# "screen" is no field: what is told apart before the mean is taken, see `screens`. Nor is "strict":
# the probe's watch is the cut, what a fifth of its benign adapters of left-out kinds reach.
ROWS: dict[str, dict[str, Any]] = {
    "FedAvg": {},
    "ours": {"level": "cumulative", "probe": "linear"},
    "ours, no change": {"level": "cumulative", "probe": "linear", "rejected": "no_change"},
    "ours, strict": {
        "level": "cumulative",
        "probe": "linear",
        "rejected": "no_change",
        "strict": True,
    },
    "rival": {"screen": "mixture"},
    "rival, BIC": {"screen": "mixture_by_bic"},
    "DnC": {"rule": "dnc", "rule_options": {"f": "f"}},
    "FoolsGold": {"rule": "foolsgold"},
    "Krum": {"rule": "krum", "rule_options": {"f": "f"}},
    "client, paper's feature": {"level": "client", "probe": "paper"},
}
FIRST_ROWS = 5  # of ROWS: run in every cell before any other row


@dataclass(frozen=True)
class Cell:
    """One run."""

    row: str
    malicious: int
    share: float
    source: str
    seed: int = 0

    def __str__(self) -> str:
        return f"{self.row}/{self.malicious}/{self.share:g}/{self.source}/{self.seed}"

    @classmethod
    def named(cls, name: str) -> Cell:
        """The cell of such a name as `str(cell)`.

        Raises:
            ConfigError: no cell of the table is called so.
        """
        for cell in table((0, 1, 2)):
            if str(cell) == name:
                return cell
        raise ConfigError(
            f"got the cell {name!r}; expected ROW/MALICIOUS/SHARE/SOURCE/SEED, such as"
            f" 'ours/5/0.5/maliciousgen/0'. Rows: {', '.join(ROWS)}."
        )

    @property
    def screen(self) -> str | None:
        """The name of a screen of `paper_repro.federation.screens`, if the row has one."""
        return ROWS[self.row].get("screen")

    @property
    def other_source(self) -> str:
        """The source that this cell's attacker does not use."""
        return next(name for name in SOURCES if name != self.source)

    def config(self, work: Path = WORK, base: Path = BASE) -> Config:
        """The experiment, on the files and probes that `paper_repro.federation.prepare` wrote."""
        row = ROWS[self.row]
        options = {
            name: max(1, self.malicious) if value == "f" else value
            for name, value in row.get("rule_options", {}).items()
        }
        values: dict[str, Any] = {
            "name": "cell",
            "seed": self.seed,
            "rounds": ROUNDS,
            "model": {
                "base": str(base),
                "name": BASE_NAME,
                "dtype": "bfloat16",
                "template": "chat",
            },
            "lora": {
                "r": 8,
                "alpha": 16,
                "dropout": 0.0,
                "target_modules": ["q_proj", "v_proj"],
                "seed": INITIAL,
            },
            "training": {
                "lr": LR,
                "schedule": "constant",
                "steps": 5,
                "batch_size": 8,
                "max_length": 64,
            },
            "clients": {
                "count": CLIENTS,
                "examples": 100,
                "benign": [str(work / "data" / f"{name}.jsonl") for name in BENIGN],
                "partition": "by_source",
                "malicious": self.malicious,
                "poison_share": self.share,
            },
            "aggregation": {"rule": row.get("rule", "mean"), "options": options},
        }
        if "rejected" in row:
            values["aggregation"]["rejected"] = row["rejected"]
        if self.malicious:
            values["clients"]["malicious_source"] = str(work / "data" / f"{self.source}.jsonl")
        if "level" in row:
            probe = work / "probes" / f"{row['probe']}-without-{self.source}"
            values["defense"] = {"level": row["level"], "probe": str(probe)}
            if row["level"] == "cumulative":
                values["defense"]["options"] = facts_of_rounds(probe, row.get("strict", False))
        return Config.of(values)

    def digest(self, work: Path = WORK, base: Path = BASE) -> str:
        """A hash of what the experiment sets; where its files lie does not count."""
        values = self.config(work, base).model_dump(mode="json", exclude_defaults=True)
        text = json.dumps(values, sort_keys=True).replace(f"{work}/", "")
        return hashlib.sha256(text.replace(str(base), "base").encode()).hexdigest()[:16]


def facts_of_rounds(probe: Path, strict: bool = False) -> dict[str, Any]:
    """What a probe says of its use in rounds, with its watch as the cut if strict; {} where there
    is none yet.
    """
    config = probe / "config.json"
    if not config.is_file():
        return {}
    found = json.loads(config.read_text(encoding="utf-8"))["facts"].get("cumulative", {})
    if strict and found:
        found |= {"threshold": found["watch"], "floor": found["watch"]}
    return found  # type: ignore[no-any-return]


def table(seeds: tuple[int, ...] = (0,)) -> Iterator[Cell]:
    """The first rows in every cell of a source, then the other rows; then the next source.

    Without malicious clients there is one cell a row; only a probe that never met a source still
    depends on it.
    """
    rows = list(ROWS)
    for seed in seeds:
        for source in SOURCES:
            for part in (rows[:FIRST_ROWS], rows[FIRST_ROWS:]):
                for malicious, share in ATTACKS:
                    for row in part:
                        depends = malicious or "level" in ROWS[row] or "screen" in ROWS[row]
                        if depends or source == SOURCES[0]:
                            yield Cell(row, malicious, share, source, seed)
