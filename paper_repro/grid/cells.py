"""Which federations the tables are of: how they are defended, by attack, data and seed.

Nothing here runs anything.

A new defence is one entry of ROWS.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from dataclasses import dataclass, replace
from itertools import product
from typing import Any

from fedloop.config import Config
from fedloop.errors import ConfigError

from ..common.setting import BASE, BASES, BENIGN_SETS, LARGER_BASE, federation

GRADIENT = {"options": {"evidence": "shadow_gradient"}}
# row of the table -> how the federation is defended; "f" stands for the number of malicious
# clients, which the rules are told.
ROWS: dict[str, dict[str, Any]] = {
    "FedAvg": {},
    "median": {"rule": "median"},
    "trimmed mean": {"rule": "trimmed_mean", "rule_options": {"f": "f"}},
    "Krum": {"rule": "krum", "rule_options": {"f": "f"}},
    "multi-Krum": {"rule": "multi_krum", "rule_options": {"f": "f"}},
    "FoolsGold": {"rule": "foolsgold"},
    "DnC": {"rule": "dnc", "rule_options": {"f": "f"}},
    "Residual": {"rule": "residual"},
    "FLAME": {"rule": "flame"},
    "LASA": {"rule": "lasa"},
    "client": {"level": "client"},
    "step": {"level": "step"},
    "cumulative": {"level": "cumulative"},
    "cumulative, mass-mean": {"level": "cumulative", "probe": "mass-mean"},
    "shadow, cheap": {"level": "shadow", "defense": GRADIENT},
    "evidence, cheap": {"level": "evidence", "defense": GRADIENT},
    "evidence": {"level": "evidence"},
    "shadow": {"level": "shadow"},
}
NO_ATTACK = "no attack"  # FedAvg without malicious clients: what every row is compared with
# AdvBench's goals are what refusal is measured on, so it is no attack here. GPTFuzz is the source
# that probes which never met it
# are known to miss, and the one that hardly harms this model; HarmBench harms it most, with 400
# answers that five clients share.
SOURCES = ("jailbreakbench", "harmbench", "gptfuzz")


@dataclass(frozen=True)
class Axes:
    """The values of every axis that are meant; a whole grid is all combinations.

    Attributes:
        malicious: malicious clients of ten; 0 for what a defence does when nothing is to be
            defended against.
        shares: poison share of the data of every malicious client.
        sources: where their harmful answers come from.
        benign: names in BENIGN_SETS, what the honest clients hold.
        bases: names in BASES.
    """

    rows: tuple[str, ...] = tuple(ROWS)
    malicious: tuple[int, ...] = (0, 2, 3, 4, 5)
    shares: tuple[float, ...] = (1.0, 0.5, 0.25, 0.1)
    sources: tuple[str, ...] = SOURCES
    benign: tuple[str, ...] = tuple(BENIGN_SETS)
    seeds: tuple[int, ...] = (0, 1, 2)
    bases: tuple[str, ...] = (BASE,)


FULL = Axes()
FIRST = Axes(malicious=(3, 5), shares=(1.0, 0.25), sources=SOURCES[:1], benign=("first",))
# The first grid once more on the larger base model, for which nobody has made the rule that the
# mass-mean probe is cut by.
LARGER = replace(
    FIRST, rows=tuple(row for row in ROWS if "mass-mean" not in row), bases=(LARGER_BASE,)
)


@dataclass(frozen=True)
class Cell:
    """One run of the grid."""

    row: str
    malicious: int
    share: float
    seed: int
    source: str = SOURCES[0]
    benign: str = "first"
    base: str = BASE

    @classmethod
    def named(cls, name: str) -> Cell:
        """The cell of such a name as `str(cell)`.

        Source, benign set and base model may be left out.

        Raises:
            ConfigError: no cell of the full grid or of that on the larger base model is called so.
        """
        row, *rest = name.split("/")
        try:
            malicious, share, seed, *data = rest
            cell = cls(row, int(malicious), float(share), int(seed), *data)
        except (TypeError, ValueError):
            cell = None
        if cell is None or cell not in {*grid(FULL), *grid(LARGER)}:
            raise ConfigError(
                f"got the cell {name!r}; expected ROW/MALICIOUS/SHARE/SEED[/SOURCE/BENIGN[/BASE]]"
                f" of a grid, such as 'cumulative/5/0.25/1'. Rows: {', '.join((NO_ATTACK, *ROWS))}."
            )
        return cell

    def __str__(self) -> str:
        base = "" if self.base == BASE else f"/{self.base}"
        attack = f"{self.row}/{self.malicious}/{self.share:g}/{self.seed}"
        return f"{attack}/{self.source}/{self.benign}{base}"

    @property
    def config(self) -> Config:
        """The experiment."""
        row = dict(ROWS.get(self.row, {}))
        if "rule_options" in row:
            row["rule_options"] = {
                name: self.malicious if value == "f" else value
                for name, value in row["rule_options"].items()
            }
        return federation(
            malicious=self.malicious,
            source=self.source,
            share=self.share,
            seed=self.seed,
            benign=self.benign,
            base=self.base,
            **row,
        )

    @property
    def digest(self) -> str:
        """A hash of what the experiment sets.

        Neither a new field with a default nor another folder makes old lines stale.
        """
        values = self.config.model_dump(mode="json", exclude_defaults=True)
        text = json.dumps(values, sort_keys=True).replace(
            f"{BASES[self.base].path.parent.parent}/", ""
        )
        return hashlib.sha256(text.encode()).hexdigest()[:16]


def grid(axes: Axes) -> Iterator[Cell]:
    """Seed by seed, data by data and row by row, so that an unfinished grid still holds whole
    tables.

    Without malicious clients only what the probe never met still depends on the malicious source,
    so rules and FedAvg have one such cell for all sources, and FedAvg's is the row of no attack.
    """
    for base, seed, benign in product(axes.bases, axes.seeds, axes.benign):
        yield Cell(NO_ATTACK, 0, 1.0, seed, benign=benign, base=base)
        for source in axes.sources:
            for row in axes.rows:
                if 0 in axes.malicious and (
                    "level" in ROWS[row] or (row != "FedAvg" and source == SOURCES[0])
                ):
                    yield Cell(row, 0, 1.0, seed, source, benign, base)
                for share in axes.shares:
                    yield from (
                        Cell(row, malicious, share, seed, source, benign, base)
                        for malicious in axes.malicious
                        if malicious
                    )
