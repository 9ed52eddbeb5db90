"""The tables of this folder's page from results/separability.json."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from zoo.markers import filled

from ..common.format import markdown
from .cells import PROTOCOLS
from .rounds import WAYS
from .run import FACTORS, LAST, LAYERS, MODULES, RECIPES, RESULTS, STEPS
from .sweeps import AXES

PAGE = Path(__file__).with_name("README.md")
Row = dict[str, Any]
IN, OUT = "all benign", "the unseen benign source"
NAMES = {"q_proj": "q", "v_proj": "v", "all": "all adapted"}


def rendered(results: Path = RESULTS) -> str:
    """The page's text with every table between its markers made anew."""
    numbers = json.loads(results.read_text(encoding="utf-8"))
    text = PAGE.read_text(encoding="utf-8")
    for name, table in TABLES.items():
        text = filled(text, name, table(numbers), "paper_repro.tables")
    return text


def sources_table(numbers: Row) -> str:
    """Each malicious source, mean over the nine benign sources that were left out with it.

    And its safe twin.
    """
    shares = _shares(numbers)
    table = [
        ["feature", "malicious source", "against", *(f"{share:.0%} poison" for share in shares)]
    ]
    for recipe in RECIPES:
        for section, against in (
            ("by_malicious", "unseen benign"),
            ("twins", "its safe twin, unseen"),
        ):
            own = [
                row for row in numbers[section] if row["recipe"] == recipe and row.get("malicious")
            ]
            for malicious in dict.fromkeys(row["malicious"] for row in own):
                chosen = {row["share"]: row for row in own if row["malicious"] == malicious}
                table.append(
                    [recipe, malicious, against, *(_cell(chosen[share]) for share in shares)]
                )
    cells = [row for row in numbers["cross_source"] if row["recipe"] == "all B"]
    worst = min(cells, key=lambda row: row["auroc"])
    counts = ", ".join(
        f"{share:.0%}: {cell['n_malicious']} against {cell['n_benign']}"
        for share in shares
        for cell in cells[:4]
        if cell["share"] == share
    )
    return (
        markdown(table)
        + "\n"
        + f"Clients a pair of sources, {counts}. The worst of all {len(cells)} cells of all B:"
        f" {worst['malicious']} in {worst['benign']} at {worst['share']:.0%}, {_cell(worst)}."
        " Every cell is in results/separability.json and in the heat map."
    )


def answers_table(numbers: Row) -> str:
    """What the sources' answers are, whatever their name says."""
    table = [
        ["source", "counted as", "answers that clients may hold", "of them refusals, strict rule"]
    ]
    table += [
        [
            row["source"],
            "malicious" if row["label"] else "benign",
            str(row["n"]),
            f"{row['refuses']:.0%}",
        ]
        for row in numbers["answers"]
    ]
    return markdown(table).rstrip("\n")


def mended_table(numbers: Row) -> str:
    """The zoo's clients and those of mended sources side by side, all B, both protocols."""
    shares = _shares(numbers)
    table = [
        ["sources", "protocol", "malicious source", *(f"{share:.0%} poison" for share in shares)]
    ]
    view = {"layer": "all", "factors": "B", "modules": "all", "step": LAST}
    for protocol, against in ((PROTOCOLS[0], IN), (PROTOCOLS[1], OUT)):
        old = [
            _one(numbers["views"], **view, protocol=protocol, against=against, share=share)
            for share in shares
        ]
        new = [
            _one(
                numbers["mended"],
                recipe="all B",
                malicious=None,
                protocol=protocol,
                against=against,
                share=share,
            )
            for share in shares
        ]
        table += [
            [name, protocol, "all", *map(_cell, rows)]
            for name, rows in (("as they are", old), ("mended", new))
        ]
    for malicious in numbers["about"]["zoo_design"]["malicious"]:
        where = {"recipe": "all B", "malicious": malicious, "share": None}
        old, new = (
            [_one(numbers[part], **{**where, "share": share}, against=OUT) for share in shares]
            for part in ("by_malicious", "mended")
        )
        table += [
            [name, PROTOCOLS[1], malicious, *map(_cell, rows)]
            for name, rows in (("as they are", old), ("mended", new))
        ]
    return markdown(table).rstrip("\n")


def layers_table(numbers: Row) -> str:
    """Layers and factors, both protocols."""
    return _views(
        numbers,
        [
            (f"{_layer(layer)}, {factors}", {"layer": layer, "factors": factors})
            for layer in LAYERS
            for factors in FACTORS
        ],
    )


def modules_table(numbers: Row) -> str:
    """Modules, all layers."""
    wanted = [
        (f"{NAMES[name]}, {factors}", {"factors": factors, "modules": name})
        for name in (*MODULES, "all")
        for factors in FACTORS
    ]
    return _views(numbers, wanted)


def steps_table(numbers: Row) -> str:
    """Local steps, heads fitted at the same step."""
    return _views(
        numbers,
        [
            (f"{name}, step {step}", {"layer": view.layer, "step": step})
            for name, view in RECIPES.items()
            for step in STEPS
        ],
    )


def sweeps_table(numbers: Row) -> str:
    """Settings, heads fitted at the setting; and heads of the zoo's clients."""
    if not numbers["sweeps"]:
        return (
            "Not measured yet: run python -m paper_repro.separability.sweeps and python -m"
            " paper_repro.separability.run."
        )
    shares = numbers["about"]["sweep_design"]["shares"]
    heads = [
        *(f"in distribution, {share:.0%}" for share in shares),
        *(f"unseen, {share:.0%}" for share in shares),
    ]
    table = [
        [
            "setting",
            "feature",
            *heads,
            *(f"the zoo's heads, unseen, {share:.0%}" for share in shares),
        ]
    ]
    for setting in dict.fromkeys(row["setting"] for row in numbers["sweeps"]):
        for recipe in RECIPES:
            for modules in dict.fromkeys(
                row["modules"] for row in numbers["sweeps"] if row["setting"] == setting
            ):
                own = [
                    row
                    for row in numbers["sweeps"]
                    if (row["setting"], row["recipe"], row["modules"]) == (setting, recipe, modules)
                ]
                cells = [
                    _cell(_one(own, protocol=PROTOCOLS[0], against=IN, share=share))
                    for share in shares
                ]
                cells += [_cell(_one(own, protocol=PROTOCOLS[1], share=share)) for share in shares]
                moved = {
                    row["share"]: row
                    for row in numbers["transfer"]
                    if (row["setting"], row["recipe"]) == (setting, recipe)
                }
                cells += [_cell(moved[share]) if share in moved else "-" for share in shares]
                name = _setting(own[0]) + (", q and v alone read" if modules != "all" else "")
                table.append([name, recipe, *cells])
    own = [
        row for row in numbers["sweeps"] if row["setting"] == "centre" and row["recipe"] == "all B"
    ]
    seen, far = (
        [row for row in own if row["protocol"] == protocol and row["against"] in (IN, OUT)]
        for protocol in PROTOCOLS
    )
    sizes = "; ".join(
        f"{a['share']:.0%}: {a['n_malicious']} against {a['n_benign']}, and {b['n_benign']} unseen"
        for a, b in zip(seen, far, strict=True)
    )
    return markdown(table) + "\n" + f"Clients a setting, malicious against benign, {sizes}."


def sampled_table(numbers: Row) -> str:
    """Submitted updates over participations, in federations with client sampling."""
    rows = numbers["sampled"]
    if not rows:
        return (
            "Not measured yet: run python -m paper_repro.mixed.federations and python -m"
            " paper_repro.separability.run."
        )
    last = max(row["participation"] for row in rows)
    points = [1, 2, last // 2, last]
    table = [
        [
            "feature",
            "seen from",
            "poison",
            *(f"participation {number}" for number in points),
            f"contrast kept, {last}",
        ]
    ]
    for recipe in RECIPES:
        for share in _shares(numbers):
            for way in dict.fromkeys(row["way"] for row in rows):
                own = {
                    row["participation"]: row
                    for row in rows
                    if (row["recipe"], row["way"], row["share"]) == (recipe, way, share)
                }
                cells = [
                    f"{_cell(own[number])}; {own[number]['flagged_malicious']:.0%} /"
                    f" {own[number]['flagged_honest']:.0%}"
                    for number in points
                ]
                name = {"client": "the round's global LoRA", "absolute": "the initial LoRA"}[way]
                table.append(
                    [recipe, name, f"{share:.0%}", *cells, f"{own[last]['contrast_cosine']:.2f}"]
                )
    first = rows[0]
    return (
        markdown(table)
        + "\n"
        + f"AUROC within a federation, mean over {first['federations']}; malicious / honest clients"
        f" flagged at 0.8. {first['n_malicious']} malicious and {first['n_benign']} honest"
        " clients a row. Contrast kept: the cosine of the difference of malicious and honest"
        " means to the same difference in the first participation."
    )


def drift_table(numbers: Row) -> str:
    """AUROC and error rates at the paper's cut, over rounds."""
    rows = numbers["drift"]
    if not rows:
        return (
            "Not measured yet: run python -m paper_repro.separability.drift and python -m"
            " paper_repro.separability.run."
        )
    last = max(row["round"] for row in rows)
    rounds = sorted({1, 2, last // 2, last})
    table = [
        [
            "feature",
            "seen from",
            "poison",
            *(f"round {number}" for number in rounds),
            f"contrast kept, round {last}",
        ]
    ]
    for recipe in RECIPES:
        for share in dict.fromkeys(row["share"] for row in rows):
            for way in WAYS:
                own = {
                    row["round"]: row
                    for row in rows
                    if (row["recipe"], row["way"], row["share"]) == (recipe, way, share)
                }
                cells = [
                    f"{_cell(own[number])}; {own[number]['flagged_malicious']:.0%} /"
                    f" {own[number]['flagged_honest']:.0%}"
                    for number in rounds
                ]
                table.append(
                    [recipe, way, f"{share:.0%}", *cells, f"{own[last]['contrast_cosine']:.2f}"]
                )
    first = rows[0]
    return (
        markdown(table)
        + "\n"
        + f"AUROC within a federation, mean over {first['federations']} federations of one"
        " malicious source each; malicious / honest clients flagged at 0.8."
        f" {first['n_malicious']} malicious and {first['n_benign']} honest clients a row."
        " Contrast kept: the cosine of the difference of malicious and honest means to the same"
        " difference in round 1."
    )


TABLES: dict[str, Callable[[Row], str]] = {
    "answers": answers_table,
    "sources": sources_table,
    "mended": mended_table,
    "layers": layers_table,
    "modules": modules_table,
    "steps": steps_table,
    "sweeps": sweeps_table,
    "sampled": sampled_table,
    "drift": drift_table,
}


def _views(numbers: Row, wanted: Sequence[tuple[str, Row]]) -> str:
    shares = _shares(numbers)
    table = [
        [
            "read",
            *(f"in distribution, {share:.0%}" for share in shares),
            *(f"unseen, {share:.0%}" for share in shares),
        ]
    ]
    for name, fields in wanted:
        where = {"layer": "all", "factors": "B", "modules": "all", "step": LAST, **fields}
        cells = [
            _one(numbers["views"], **where, protocol=PROTOCOLS[0], against=IN, share=share)
            for share in shares
        ]
        cells += [
            _one(numbers["views"], **where, protocol=PROTOCOLS[1], share=share) for share in shares
        ]
        table.append([name, *map(_cell, cells)])
    sizes = [
        _one(numbers["views"], **where, protocol=protocol, share=share)
        for protocol in PROTOCOLS
        for share in shares[:2]
    ]
    return (
        markdown(table)
        + "\n"
        + f"In distribution: {sizes[0]['n_malicious']} malicious clients at 100 %,"
        f" {sizes[1]['n_malicious']} at each share below, against {sizes[0]['n_benign']} benign"
        f" ones, hard negatives among them. Unseen: mean over {sizes[2]['cells']} pairs of"
        f" sources, the same malicious clients against {sizes[2]['n_benign']} benign ones."
    )


def _one(rows: Sequence[Row], **fields: Any) -> Row:
    return next(
        row for row in rows if all(row.get(name) == value for name, value in fields.items())
    )


def _cell(row: Row) -> str:
    low, high = row["auroc_ci"]
    return f"{row['auroc']:.2f} [{low:.2f}, {high:.2f}]"


def _shares(numbers: Row) -> list[float]:
    return list(numbers["about"]["zoo_design"]["shares"])


def _layer(layer: str) -> str:
    return "all layers" if layer == "all" else f"layer {layer}"


def _setting(row: Row) -> str:
    if row["axis"] == "centre":
        return "centre (" + ", ".join(f"{axis} {value}" for axis, value in AXES.items()) + ")"
    return f"{row['axis']} {row['value']}"
