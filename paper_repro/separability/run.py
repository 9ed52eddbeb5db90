"""How well clients can be told apart by what they train on.

AUROC over sources, layers, factors, modules, steps and settings.

    python -m paper_repro.separability.run  # writes results/separability.json, about 15 minutes on
                                            # one core

Needs the zoo's labelled deltas (`make zoo` keeps them in build/zoo) and what
paper_repro.separability.sweeps and paper_repro.separability.drift trained. What was measured is
kept under build/separability, so that an interrupted run goes on; delete that folder's `measured`
after a change to how something is measured.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path

import numpy as np
import torch

from fedloop.measure.refusal import refuses_strictly
from loraprobe.adapters.pair import Factor
from loraprobe.featurizer import FeatureRecipe, Featurizer
from zoo.labelled.client_design import ZOO_DESIGN, plan
from zoo.labelled.deltas import MADE_FROM, DeltaSet, read_deltas
from zoo.labelled.sources import HARD_NEGATIVE, MALICIOUS, Source, load_sources
from zoo.program import documented
from zoo.train_base import BASE_NAME

from ..common.paths import FOLDER
from ..mixed.setting import MODELS
from . import drift as drift
from . import rounds as separability_rounds
from . import sampled as separability_sampled
from .cells import (
    PROTOCOLS,
    RESAMPLES,
    SEED,
    Cell,
    Row,
    Rows,
    in_distribution,
    single,
    summary,
    unseen_cells,
    unseen_fits,
)
from .sweeps import AXES, CENTRE, SETTINGS, Setting

RESULTS = FOLDER / "results" / "separability.json"
MEASURED = Path("build/separability/measured")
LAST, TWIN = 5, "the safe twin, unseen"


@dataclass(frozen=True)
class View:
    """Which part of an update is looked at, flattened and L2-normalised.

    Attributes:
        layer: "all" or a layer's number.
        factors: "A", "B" or "AB".
        modules: "all" that the adapter has, or one module's name.
        step: after how many local steps.
    """

    layer: str = "all"
    factors: str = "B"
    modules: str = "all"
    step: int = LAST

    @property
    def recipe(self) -> FeatureRecipe:
        """As a featurizer takes it."""
        layers: str | tuple[int, ...] = "all" if self.layer == "all" else (int(self.layer),)
        factors: tuple[Factor, ...] = (
            ("A", "B") if self.factors == "AB" else ("A",) if self.factors == "A" else ("B",)
        )
        return FeatureRecipe(
            layers=layers,
            factors=factors,
            modules=None if self.modules == "all" else tuple(self.modules.split(", ")),
        )

    def features(self, deltas: DeltaSet) -> np.ndarray:
        """(n, p) float32 of the clients' updates."""
        adapters = deltas.adapters(self.step - 1 if deltas.steps.shape[1] > 1 else -1)
        return Featurizer.fit(self.recipe, adapters)(adapters)

    @property
    def name(self) -> str:
        """A file's name for it."""
        return f"{self.layer}-{self.factors}-{self.modules}-{self.step}".replace(", ", "+")


RECIPES = {"paper (B, first layer)": View(layer="0"), "all B": View()}
LAYERS, FACTORS, MODULES, STEPS = (
    ("0", "1", "2", "3", "all"),
    ("A", "B", "AB"),
    ("q_proj", "v_proj"),
    range(1, LAST + 1),
)
VIEWS = tuple(
    dict.fromkeys(
        [
            *RECIPES.values(),
            *(View(layer=layer, factors=factors) for layer in LAYERS for factors in FACTORS),
            *(View(factors=factors, modules=modules) for factors in FACTORS for modules in MODULES),
            *(View(layer=view.layer, step=step) for view in RECIPES.values() for step in STEPS),
        ]
    )
)


def main() -> None:
    """Measure everything that is not measured yet and write the results."""
    options = documented(__doc__, "data", "work").parse_args()
    torch.set_num_threads(1)
    results = {
        **measure(
            zoo_deltas(options.work),
            mended_deltas(MODELS["chat-1m"].folder / "labelled"),
            MEASURED / _digest(options.work),
        ),
        "answers": answers(load_sources(options.data)),
    }
    RESULTS.write_text(
        json.dumps(rounded(results), indent=None, allow_nan=False).replace('}, {"', '},\n{"') + "\n"
    )


def zoo_deltas(work: Path) -> DeltaSet:
    """The labelled updates that the zoo's probes are fitted on."""
    return read_deltas(work / "replicate-0" / "deltas", plan(), BASE_NAME)


def mended_deltas(folder: Path) -> DeltaSet:
    """Updates of the same plan on sources whose answers agree with their labels
    (paper_repro.mixed.labelled).
    """
    return read_deltas(folder, plan(), BASE_NAME, replace(ZOO_DESIGN, all_steps=False))


def measure(deltas: DeltaSet, mended: DeltaSet, kept: Path) -> Row:
    """Every section of the results, of what was trained.

    What the folder holds already is read from there.
    """
    sections: dict[str, list[Row]] = {
        "views": [],
        "cross_source": [],
        "by_malicious": [],
        "twins": [],
        "mended": [],
        "sweeps": [],
        "transfer": [],
    }
    for view in VIEWS:
        for section, rows in _kept(
            kept / f"view-{view.name}.json", partial(of_view, view, deltas)
        ).items():
            sections[section] += rows
    for recipe, view in RECIPES.items():
        sections["mended"] += _kept(
            kept / f"mended-{view.name}.json", partial(of_mended, recipe, mended)
        )["mended"]
    trained = [setting for setting in SETTINGS if setting.trained]
    for setting in trained:
        sections["sweeps"] += _kept(
            kept / f"sweep-{setting.name}.json", partial(of_setting, setting)
        )["sweeps"]
    movable = [setting for setting in trained if setting.transfers]
    for recipe, view in RECIPES.items() if movable else ():
        name = f"transfer-{view.name}-{len(movable)}"  # settings are trained in their order
        sections["transfer"] += _kept(
            kept / f"{name}.json", partial(transferred, recipe, deltas, movable)
        )["transfer"]
    recorded = drift.recorded_sources()
    drifted = (
        _kept(kept / f"drift-{len(recorded)}.json", partial(separability_rounds.measured, deltas))[
            "drift"
        ]
        if recorded
        else []
    )
    sampled = _kept(
        kept / f"sampled-{len(separability_sampled.recorded_sources())}.json",
        partial(separability_sampled.measured, mended),
    )["sampled"]
    about = {
        "command": "python -m paper_repro.separability.run",
        "base_model": BASE_NAME,
        "clients": len(deltas.clients),
        "malicious_clients": sum(client.label for client in deltas.clients),
        "seed": SEED,
        "resamples": RESAMPLES,
        "level": 0.95,
        "zoo_design": deltas.design.to_dict(),
        "sweep_design": CENTRE.to_dict(),
        "centre": AXES,
        "rounds": drift.ROUNDS,
        "drift_lr": drift.LR,
    }
    return {"about": about, **sections, "sampled": sampled, "drift": drifted}


def answers(sources: Mapping[str, Source]) -> list[Row]:
    """How many of a source's answers refuse by the strict rule.

    Malicious ones should not, safe ones should.
    """
    rows = []
    for name in (*MALICIOUS, *HARD_NEGATIVE):
        examples = sources[name].for_clients
        refused = sum(refuses_strictly(example.response) for example in examples)
        rows.append(
            {
                "source": name,
                "label": int(name in MALICIOUS),
                "n": len(examples),
                "refuses": refused / len(examples),
            }
        )
    return rows


def of_view(view: View, deltas: DeltaSet) -> dict[str, list[Row]]:
    """The two protocols with one part of the update, and the single pairs of sources of the two
    recipes.
    """
    print(f"view {view.name}", flush=True)
    rows, facts = Rows(view.features(deltas), deltas.clients), asdict(view)
    cells, twins = unseen_cells(rows, deltas.design, unseen_fits(rows, deltas.design))
    found = {
        "views": [
            {**facts, **row} for row in (*in_distribution(rows, deltas.design), *unseen(cells))
        ]
    }
    recipe = next((name for name, own in RECIPES.items() if own == view), None)
    if recipe is not None:
        found["cross_source"] = [{"recipe": recipe, **single(cell)} for cell in cells]
        found["by_malicious"] = [
            {"recipe": recipe, "malicious": name, **row}
            for name in deltas.design.malicious
            for row in unseen([cell for cell in cells if cell.malicious == name])
        ]
        found["twins"] = [{"recipe": recipe, **row} for row in unseen(twins, TWIN)]
        found["twins"] += [
            {"recipe": recipe, "malicious": name, **row}
            for name in dict.fromkeys(cell.malicious for cell in twins)
            for row in unseen([cell for cell in twins if cell.malicious == name], TWIN)
        ]
    return found


def of_mended(recipe: str, deltas: DeltaSet) -> dict[str, list[Row]]:
    """The two protocols on the clients of sources whose answers were mended to agree with their
    labels.
    """
    print(f"mended, {recipe}", flush=True)
    rows = Rows(RECIPES[recipe].features(deltas), deltas.clients)
    cells, twins = unseen_cells(rows, deltas.design, unseen_fits(rows, deltas.design))
    found = [
        {"recipe": recipe, "malicious": None, **row}
        for row in (*in_distribution(rows, deltas.design), *unseen(cells))
    ]
    for name in deltas.design.malicious:
        found += [
            {"recipe": recipe, "malicious": name, **row}
            for row in unseen([cell for cell in cells if cell.malicious == name])
        ]
        found += [
            {"recipe": recipe, "malicious": name, **row}
            for row in unseen([cell for cell in twins if cell.malicious == name], TWIN)
        ]
    return {"mended": found}


def unseen(cells: list[Cell], against: str = "the unseen benign source") -> list[Row]:
    """One row a poison share: the mean over its cells."""
    shares = dict.fromkeys(cell.share for cell in cells)
    return [
        {
            "protocol": PROTOCOLS[1],
            "against": against,
            "share": share,
            **summary(cell for cell in cells if cell.share == share),
        }
        for share in shares
    ]


def of_setting(setting: Setting) -> dict[str, list[Row]]:
    """The two protocols with heads that are fitted on this setting's own clients."""
    print(f"setting {setting.name}", flush=True)
    deltas = setting.deltas()
    found: list[Row] = []
    reads = ("all", "q_proj, v_proj") if setting.axis == "modules" else ("all",)
    for recipe, view in RECIPES.items():
        for modules in reads:
            own = View(layer=view.layer, modules=modules)
            rows = Rows(own.features(deltas), deltas.clients)
            cells, _ = unseen_cells(rows, deltas.design, unseen_fits(rows, deltas.design))
            facts = {
                "axis": setting.axis,
                "value": setting.value,
                "setting": setting.name,
                "recipe": recipe,
                "modules": modules,
            }
            found += [
                {**facts, **row} for row in (*in_distribution(rows, deltas.design), *unseen(cells))
            ]
    return {"sweeps": found}


def transferred(recipe: str, deltas: DeltaSet, settings: Sequence[Setting]) -> dict[str, list[Row]]:
    """Heads of the zoo's clients, which trained at 2.5e-3 to 8e-3, on the clients of other
    settings; both sources unseen.
    """
    print(f"transfer of {recipe}", flush=True)
    others = [setting.deltas() for setting in settings]
    clients = [client for one in (deltas, *others) for client in one.clients]
    of = np.repeat(np.arange(len(others) + 1), [len(one.clients) for one in (deltas, *others)])
    rows = Rows(
        np.concatenate([RECIPES[recipe].features(one) for one in (deltas, *others)]),
        clients,
        of == 0,
    )
    fits = unseen_fits(rows, deltas.design)
    found: list[Row] = []
    for number, setting in enumerate(settings, start=1):
        cells, _ = unseen_cells(rows, setting.design, fits, of == number)
        found += [
            {
                "axis": setting.axis,
                "value": setting.value,
                "setting": setting.name,
                "recipe": recipe,
                **row,
            }
            for row in unseen(cells)
        ]
    return {"transfer": found}


def rounded(value: object) -> object:
    """Numbers to four digits after the point: more would be noise beside the intervals."""
    if isinstance(value, float):
        return round(value, 4) if abs(value) >= 0.01 else float(f"{value:.4g}")
    if isinstance(value, dict):
        return {name: rounded(part) for name, part in value.items()}
    return [rounded(part) for part in value] if isinstance(value, list | tuple) else value


def _digest(work: Path) -> str:
    """Of what the deltas were made from: results of others must not pass for theirs."""
    return hashlib.sha256((work / "replicate-0" / "deltas" / MADE_FROM).read_bytes()).hexdigest()[
        :12
    ]


def _kept(path: Path, make: Callable[[], dict[str, list[Row]]]) -> dict[str, list[Row]]:
    if not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        part = path.with_suffix(".part")
        part.write_text(json.dumps(make(), allow_nan=False))
        part.replace(path)
    found: dict[str, list[Row]] = json.loads(path.read_text())
    return found


if __name__ == "__main__":
    main()
