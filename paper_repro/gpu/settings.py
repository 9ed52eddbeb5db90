"""The published settings as experiments.

A file of configs/ and a row of the tables give one federation, and the probe it needs.

Nothing here loads or runs anything. What the papers leave open, and what differs from their code:
    DEVIATIONS.md.
"""

from __future__ import annotations

import tomllib
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from fedloop.config import Config
from fedloop.errors import ConfigError
from fedloop.rules.classic import OFFICIAL_OPTIONS

from ..common.paths import FOLDER
from ..grid import cells as grid
from ..grid.cells import NO_ATTACK

CONFIGS = FOLDER / "configs"
SETTINGS = tuple(sorted(path.stem for path in CONFIGS.glob("*.toml")))
BENIGN = {"lmsys": "hub:lmsys/lmsys-chat-1m", "wildchat": "hub:allenai/WildChat"}
# A row with a probe of its own needs one that the grid made for the zoo's base; here the kinds are
# "paper" and "linear".
ROWS = {name: row for name, row in grid.ROWS.items() if "probe" not in row}
# MaliciousGen is on no dataset hub that is known to us: a local file
# (gen_data/Mistral/maliciousQA.json of the papers' repositories).
MALICIOUS = {"beavertails": "hub:PKU-Alignment/BeaverTails", "maliciousgen": None}
HARD_NEGATIVE = {"beavertails_safe": "hub:PKU-Alignment/BeaverTails#safe"}
PAPERS_LEVELS = ("step", "client", "shadow", "evidence")


@dataclass(frozen=True)
class Choice:
    """One federation of a setting.

    Attributes:
        row: a row of the tables (`paper_repro.grid.cells.ROWS`), or "no attack".
        benign, malicious: keys of BENIGN and MALICIOUS; None for the file's own.
        malicious_clients, share: None for the file's own.
        probe: "paper" or "linear", as in the zoo; None for the paper's with the paper's levels on
            update or shadow steps, else linear.
        official_rules: the rules as the official code computes them where it differs, see
            `fedloop.rules.classic`.
    """

    setting: str
    row: str
    benign: str | None = None
    malicious: str | None = None
    malicious_clients: int | None = None
    share: float | None = None
    probe: str | None = None
    official_rules: bool = False

    def __post_init__(self) -> None:
        for what, got, valid in (
            ("setting", self.setting, SETTINGS),
            ("row", self.row, (NO_ATTACK, *ROWS)),
            ("benign source", self.benign, (None, *BENIGN)),
            ("malicious source", self.malicious, (None, *MALICIOUS)),
            ("probe", self.probe, (None, "paper", "linear")),
        ):
            if got not in valid:
                raise ConfigError(
                    f"got {what} {got!r}; expected one of"
                    f" {', '.join(repr(one) for one in valid if one)}"
                )

    @property
    def probe_kind(self) -> str | None:
        """Which probe the row's level reads; None for a row without one."""
        row = ROWS.get(self.row, {})
        if "level" not in row:
            return None
        return self.probe or ("paper" if self.row in PAPERS_LEVELS else "linear")

    @property
    def name(self) -> str:
        """What the run's folder is called; every choice has one of its own."""
        attack = [
            self.malicious,
            self.malicious_clients,
            self.share,
            self.probe,
            "official" if self.official_rules else None,
        ]
        parts = [
            self.row.replace(", ", "-").replace(" ", "-"),
            self.benign,
            *(attack if self.row != NO_ATTACK else ()),
        ]
        return "-".join(str(part) for part in parts if part is not None)


@dataclass(frozen=True)
class Inputs:
    """What a user brings, and where everything goes.

    Attributes:
        out: a folder for one setting: data, probes and runs.
        advbench: JSON lines of the prompts, as `paper_repro.gpu.run` makes them.
        malicious_gen: MaliciousGen, JSON lines or a list with instruction and response.
        base: a local folder with the base model; None for the Hub, at `revision`.
        sources: source name -> where it comes from instead of the Hub.
    """

    out: Path
    advbench: Path
    malicious_gen: Path | None = None
    base: Path | None = None
    revision: str | None = None
    sources: Mapping[str, str] = field(default_factory=dict)

    def source(self, name: str) -> str:
        """The specification of a source by its name.

        Raises:
            ConfigError: it is MaliciousGen, and no file was given.
        """
        found = self.sources.get(name) or {**BENIGN, **MALICIOUS, **HARD_NEGATIVE}[name]
        if found is None and self.malicious_gen is not None:
            return str(self.malicious_gen.resolve())
        if found is None:
            raise ConfigError(
                "malicious_gen is missing; expected a local file (--malicious-gen): MaliciousGen is"
                " gen_data/Mistral/maliciousQA.json of the papers' repositories. A probe needs two"
                " malicious sources, so that it can be tested on one that it never met."
            )
        return found

    def of_file(self, spec: str) -> str:
        """A source that a setting's file names: what stands for it in `sources`, or itself."""
        names = {known: name for name, known in {**BENIGN, **MALICIOUS}.items() if known}
        return self.source(names[spec]) if spec in names else spec


def read_setting(name: str) -> dict[str, Any]:
    """The tables of a setting's file."""
    return tomllib.loads((CONFIGS / f"{name}.toml").read_text(encoding="utf-8"))


def experiment(choice: Choice, inputs: Inputs, changes: Mapping[str, Any] | None = None) -> Config:
    """The federation of a choice, checked; its files have to be there.

    Args:
        changes: tables to merge over all else.

    Raises:
        ConfigError: the choice does not make an experiment, or a file is missing.
    """
    values = tables(choice, inputs)
    for table, fields in (changes or {}).items():
        values[table] = (
            {**values.get(table, {}), **fields} if isinstance(fields, Mapping) else fields
        )
    return Config.of(values)


def tables(choice: Choice, inputs: Inputs) -> dict[str, Any]:
    """The federation of a choice as the tables of a configuration, not checked.

    Raises:
        ConfigError: it needs a source that was not given.
    """
    values = read_setting(choice.setting)
    clients = values["clients"]
    clients["benign"] = (
        [inputs.source(choice.benign)]
        if choice.benign
        else [inputs.of_file(spec) for spec in clients["benign"]]
    )
    clients["malicious_source"] = (
        inputs.source(choice.malicious)
        if choice.malicious
        else inputs.of_file(clients["malicious_source"])
    )
    if choice.malicious_clients is not None:
        clients["malicious"] = choice.malicious_clients
    if choice.share is not None:
        clients["poison_share"] = choice.share
    if choice.row == NO_ATTACK:
        clients.update(malicious=0)
    model = values["model"]
    model.update(name=model["base"], revision=inputs.revision if inputs.base is None else None)
    model["base"] = str(inputs.base.resolve()) if inputs.base else model["base"]
    values["evaluation"]["harmful"] = str(inputs.advbench.resolve())
    values["output"] = {"folder": str((inputs.out / "runs" / choice.name).resolve())}
    return {**values, **_defended(choice, inputs, clients)}


def _defended(choice: Choice, inputs: Inputs, clients: Mapping[str, Any]) -> dict[str, Any]:
    """The tables defense and aggregation of a row."""
    row = ROWS.get(choice.row, {})
    rule = row.get("rule", "mean")
    # The rules are told how many of a round's clients are malicious on average, as the official
    # code tells them.
    f = round(
        (clients.get("sampled") or clients["count"]) * clients["malicious"] / clients["count"]
    )
    options = {
        name: f if value == "f" else value for name, value in row.get("rule_options", {}).items()
    }
    if choice.official_rules:
        options |= OFFICIAL_OPTIONS.get(rule, {})
    tables: dict[str, Any] = {"aggregation": {"rule": rule, "options": options}}
    if "level" in row:
        probe = inputs.out / f"probe-{choice.probe_kind}" / "probe"
        tables["defense"] = {
            "level": row["level"],
            "probe": str(probe.resolve()),
            **row.get("defense", {}),
        }
    return tables
