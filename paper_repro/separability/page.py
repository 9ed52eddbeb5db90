"""The tables of this folder's page from results/separability.json."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from ..common.format import Row, area, distinct, markdown, page_with, where
from .cells import PROTOCOLS
from .rounds import WAYS
from .run import FACTORS, LAST, LAYERS, MODULES, RECIPES, RESULTS, STEPS
from .sweeps import AXES

PAGE = Path(__file__).with_name("README.md")
IN, OUT = "all benign", "the unseen benign source"
NAMES = {"q_proj": "q", "v_proj": "v", "all": "all adapted"}


def rendered(results: Path = RESULTS) -> str:
    """The page's text with every table between its markers made anew."""
    numbers = json.loads(results.read_text(encoding="utf-8"))
    return page_with(PAGE, {name: table(numbers) for name, table in TABLES.items()})


def sources_table(numbers: Row) -> str:
    """Each malicious source, mean over the nine benign sources that were left out with it.

    And its safe twin.
    """
    shares = _shares(numbers)
    table = [["feature", "malicious source", "against", *_shown("{} poison", shares)]]
    for recipe in RECIPES:
        for section, against in (
            ("by_malicious", "unseen benign"),
            ("twins", "its safe twin, unseen"),
        ):
            own = [row for row in where(numbers[section], recipe=recipe) if row.get("malicious")]
            for malicious in distinct(own, "malicious"):
                cells = [_one(own, malicious=malicious, share=share) for share in shares]
                table.append([recipe, malicious, against, *map(area, cells)])
    cells = where(numbers["cross_source"], recipe="all B")
    worst = min(cells, key=lambda row: row["auroc"])
    sizes = [_one(cells[:4], share=share) for share in shares]
    counts = ", ".join(
        f"{cell['share']:.0%}: {cell['n_malicious']} against {cell['n_benign']}" for cell in sizes
    )
    return (
        f"{markdown(table)}\nClients a pair of sources, {counts}. The worst of all {len(cells)}"
        f" cells of all B: {worst['malicious']} in {worst['benign']} at {worst['share']:.0%},"
        f" {area(worst)}. Every cell is in results/separability.json and in the heat map."
    )


def answers_table(numbers: Row) -> str:
    """What the sources' answers are, whatever their name says."""
    rows = [
        f"{row['source']} | {'malicious' if row['label'] else 'benign'} | {row['n']}"
        f" | {row['refuses']:.0%}"
        for row in numbers["answers"]
    ]
    head = "source | counted as | answers that clients may hold | of them refusals, strict rule"
    return markdown([head, *rows]).rstrip("\n")


def mended_table(numbers: Row) -> str:
    """The zoo's clients and those of mended sources side by side, all B, both protocols."""
    shares = _shares(numbers)
    table = [["sources", "protocol", "malicious source", *_shown("{} poison", shares)]]
    view = {"layer": "all", "factors": "B", "modules": "all", "step": LAST}

    places = [
        (PROTOCOLS[0], "all", "views", {**view, "against": IN}),
        (PROTOCOLS[1], "all", "views", {**view, "against": OUT}),
    ]
    for malicious in numbers["about"]["zoo_design"]["malicious"]:
        own = {"recipe": "all B", "malicious": malicious, "against": OUT}
        places.append((PROTOCOLS[1], malicious, "by_malicious", own))
    for protocol, malicious, part, fields in places:
        new = {"recipe": "all B", "malicious": None if malicious == "all" else malicious}
        new |= {"protocol": protocol, "against": fields["against"]}
        if part == "views":
            fields = {**fields, "protocol": protocol}
        for name, rows in (
            ("as they are", where(numbers[part], **fields)),
            ("mended", where(numbers["mended"], **new)),
        ):
            cells = [_one(rows, share=share) for share in shares]
            table.append([name, protocol, malicious, *map(area, cells)])
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
    rows = numbers["sweeps"]
    if not rows:
        return _not_measured("separability.sweeps")
    shares = numbers["about"]["sweep_design"]["shares"]
    columns = ("in distribution, {}", "unseen, {}", "the zoo's heads, unseen, {}")
    table = [["setting", "feature", *(head for name in columns for head in _shown(name, shares))]]
    for setting in distinct(rows, "setting"):
        for recipe in RECIPES:
            for modules in distinct(where(rows, setting=setting), "modules"):
                own = where(rows, setting=setting, recipe=recipe, modules=modules)
                cells = [_one(own, protocol=PROTOCOLS[0], against=IN, share=s) for s in shares]
                cells += [_one(own, protocol=PROTOCOLS[1], share=share) for share in shares]
                moved = where(numbers["transfer"], setting=setting, recipe=recipe)
                found = {row["share"]: area(row) for row in moved}
                name = _setting(own[0]) + (", q and v alone read" if modules != "all" else "")
                zoo = [found.get(share, "-") for share in shares]
                table.append([name, recipe, *map(area, cells), *zoo])
    own = where(rows, setting="centre", recipe="all B")
    seen, far = (
        [row for row in where(own, protocol=protocol) if row["against"] in (IN, OUT)]
        for protocol in PROTOCOLS
    )
    sizes = "; ".join(
        f"{a['share']:.0%}: {a['n_malicious']} against {a['n_benign']}, and {b['n_benign']} unseen"
        for a, b in zip(seen, far, strict=True)
    )
    return f"{markdown(table)}\nClients a setting, malicious against benign, {sizes}."


def sampled_table(numbers: Row) -> str:
    """Submitted updates over participations, in federations with client sampling."""
    ways = {"client": "the round's global LoRA", "absolute": "the initial LoRA"}
    rows = numbers["sampled"]
    if not rows:
        return _not_measured("mixed.federations")
    table = _over(rows, "participation", _shares(numbers), ways, "contrast kept, {}")
    return (
        f"{table}AUROC within a federation, mean over {rows[0]['federations']}; malicious / honest"
        f" clients flagged at 0.8. {rows[0]['n_malicious']} malicious and {rows[0]['n_benign']}"
        " honest clients a row. Contrast kept: the cosine of the difference of malicious and honest"
        " means to the same difference in the first participation."
    )


def drift_table(numbers: Row) -> str:
    """AUROC and error rates at the paper's cut, over rounds."""
    rows = numbers["drift"]
    if not rows:
        return _not_measured("separability.drift")
    ways = {way: way for way in WAYS}
    shares = distinct(rows, "share")
    table = _over(rows, "round", shares, ways, "contrast kept, round {}")
    return (
        f"{table}AUROC within a federation, mean over {rows[0]['federations']} federations of one"
        " malicious source each; malicious / honest clients flagged at 0.8."
        f" {rows[0]['n_malicious']} malicious and {rows[0]['n_benign']} honest clients a row."
        " Contrast kept: the cosine of the difference of malicious and honest means to the same"
        " difference in round 1."
    )


def _over(
    rows: list[Row],
    time: str,
    shares: Sequence[float],
    ways: dict[str, str],
    kept: str,
) -> str:
    """AUROC and rates over rounds or participations, way by way of looking at an update."""
    last = max(row[time] for row in rows)
    points = sorted({1, 2, last // 2, last})
    table = [
        ["feature", "seen from", "poison", *(f"{time} {at}" for at in points), kept.format(last)]
    ]
    for recipe in RECIPES:
        for share in shares:
            for way in filter(distinct(rows, "way").__contains__, ways):
                own = where(rows, recipe=recipe, way=way, share=share)
                found = [_one(own, **{time: at}) for at in points]
                cells = [
                    f"{area(row)}; {row['flagged_malicious']:.0%} / {row['flagged_honest']:.0%}"
                    for row in found
                ]
                contrast = f"{found[-1]['contrast_cosine']:.2f}"
                table.append([recipe, ways[way], f"{share:.0%}", *cells, contrast])
    return markdown(table) + "\n"


def _not_measured(program: str) -> str:
    return (
        f"Not measured yet: run python -m paper_repro.{program} and python -m"
        " paper_repro.separability.run."
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
    heads = [
        head for name in ("in distribution, {}", "unseen, {}") for head in _shown(name, shares)
    ]
    table = [["read", *heads]]
    for name, fields in wanted:
        chosen = {"layer": "all", "factors": "B", "modules": "all", "step": LAST, **fields}
        own = where(numbers["views"], **chosen)
        cells = [_one(own, protocol=PROTOCOLS[0], against=IN, share=share) for share in shares]
        cells += [_one(own, protocol=PROTOCOLS[1], share=share) for share in shares]
        table.append([name, *map(area, cells)])
    sizes = [_one(own, protocol=protocol, share=s) for protocol in PROTOCOLS for s in shares[:2]]
    return (
        f"{markdown(table)}\nIn distribution: {sizes[0]['n_malicious']} malicious clients at 100 %,"
        f" {sizes[1]['n_malicious']} at each share below, against {sizes[0]['n_benign']} benign"
        f" ones, hard negatives among them. Unseen: mean over {sizes[2]['cells']} pairs of"
        f" sources, the same malicious clients against {sizes[2]['n_benign']} benign ones."
    )


def _one(rows: Sequence[Row], **fields: Any) -> Row:
    return where(rows, **fields)[0]


def _shown(name: str, shares: Sequence[float]) -> list[str]:
    return [name.format(f"{share:.0%}") for share in shares]


def _shares(numbers: Row) -> list[float]:
    return list(numbers["about"]["zoo_design"]["shares"])


def _layer(layer: str) -> str:
    return "all layers" if layer == "all" else f"layer {layer}"


def _setting(row: Row) -> str:
    if row["axis"] == "centre":
        return "centre (" + ", ".join(f"{axis} {value}" for axis, value in AXES.items()) + ")"
    return f"{row['axis']} {row['value']}"
