"""The tables of this folder's page from the files in results/."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path
from statistics import mean

from paper_repro.common.format import (
    Row,
    area,
    distinct,
    markdown,
    page_with,
    share_of,
    where,
)
from paper_repro.grid import larger
from zoo.labelled.client_design import SHARES
from zoo.labelled.sources import HARD_NEGATIVE, MALICIOUS

from . import accumulated, bases, damage, fresh, grid, levers
from .federations import PARTICIPATIONS
from .readers import READERS
from .setting import MODELS

PAGE = Path(__file__).with_name("README.md")
SHOWN = (1, 2, 4, PARTICIPATIONS)
# What was set out to be reached: the least share found, after the first and after the eighth
# participation, and the most benign clients flagged.
TARGETS = {1.0: (0.95, 0.99), 0.5: (0.95, 0.99), 0.25: (0.80, 0.97), 0.1: (0.50, 0.90)}
MOST_FLAGGED, AUROC = 0.02, 0.99
HONEST = ("benign", "hard_negative")
GROUPS = (*(f"{share:g}" for share in SHARES), *HONEST)  # of clients, as results name them


def rendered() -> str:
    """The page with every table between its markers made anew."""
    files = (
        *(module.RESULTS for module in (grid, accumulated, damage, levers, fresh, bases)),
        larger.CELLS_FILE,
    )
    cells, federations, harm, tried, again, carried, tenfold = (
        json.loads(path.read_text()) for path in files
    )
    tables = {
        "answers": answers_table(harm["answers"]),
        "damage": damage_table(harm["damage"]),
        "grid": grid_table(cells),
        "sources": sources_table(cells),
        "levers": levers_table(tried),
        "rounds": rounds_table(federations),
        "rule": rule_table(federations),
        "fresh": fresh_table(again),
        "ways": ways_table(again),
        "bases": bases_table(carried),
        "larger": grid_table(tenfold),
        "larger_sources": sources_table(tenfold),
        "targets": targets_table(cells, all_draws([*federations, *again])),
    }
    return page_with(PAGE, tables)


def answers_table(rows: Iterable[Row]) -> str:
    """How many labelled answers open with a refusal."""
    counts = [f"{row['source']} | {row['refusing']} of {row['n']}" for row in rows]
    return markdown(["source | answers that open with a refusal", *counts])


def damage_table(rows: list[Row]) -> str:
    """What a kind of data does to refusal, attacks first."""
    lines = [
        "base | trained on | its own questions refused"
        " | AdvBench refused, mean update | three times the mean update"
    ]
    for model in MODELS:
        own = where(rows, model=model)
        (before,) = where(own, source=None)
        lines.append(f"{model} | nothing |  | {share_of(before['refused'], before['n'])} | ")
        for source in filter(None, distinct(own, "source")):
            once, thrice = where(own, source=source)
            refused = " | ".join(share_of(row["refused"], row["n"]) for row in (once, thrice))
            lines.append(
                f"{model} | {source} | {once['own_refused']} of {once['own_n']} | {refused}"
            )
    return markdown(lines)


def grid_table(cells: list[Row]) -> str:
    """Ranking and errors of every reader at first contact, over all cells."""
    lines = [
        "base | reader | poison | AUROC, mean / worst cell | found | worst cell"
        " | benign flagged | worst kind | hard negatives flagged"
    ]
    for model in distinct(cells, "model"):
        for reader in READERS:
            for share in SHARES:
                rows = where(cells, model=model, reader=reader.name, share=share)
                if not rows:
                    continue
                line = f"{model} | {reader.name} | {share:.0%} | {_mean_worst(_areas(rows))}"
                if reader.threshold is None:
                    lines.append(line + " | not measured" * 5)
                    continue
                least = _least(rows)
                hard = [row for row in rows if row["benign"] in HARD_NEGATIVE]
                benign = [row for row in rows if row not in hard]
                lines.append(
                    f"{line} | {_percent(rows, 'malicious')} | {least['flagged_malicious']} of"
                    f" {least['n_malicious']} ({least['malicious']} in {least['benign']})"
                    f" | {_percent(benign, 'benign')} | {_most(benign)}"
                    f" | {_percent(hard, 'benign')}"
                )
    return markdown(lines)


def sources_table(cells: list[Row]) -> str:
    """The mass-mean reader by malicious source."""
    lines = [["base", "unseen source", *(f"{share:.0%}: AUROC, found" for share in SHARES)]]
    for model in distinct(cells, "model"):
        own = where(cells, model=model, reader=READERS[-1].name)
        for malicious in MALICIOUS:
            parts = [where(own, malicious=malicious, share=share) for share in SHARES]
            found = [
                f"{_mean_worst(_areas(rows))}, {_percent(rows, 'malicious')}" for rows in parts
            ]
            lines.append([model, malicious, *found])
    return markdown(lines)


def levers_table(rows: list[Row]) -> str:
    """Every lever's ranking: all cells, and the mean over cells of the sources but GPTFuzz."""
    lines = [
        ["base", "lever", *(f"{share:.0%}: mean / worst, without GPTFuzz" for share in SHARES)]
    ]
    for model in MODELS:
        for lever in distinct(rows, "lever"):
            line = [model, lever]
            for share in SHARES:
                row = where(rows, lever=lever, model=model, share=share)[0]
                others = [area for name, area in row["by_source"].items() if name != "gptfuzz"]
                line.append(
                    f"{row['auroc_mean']:.3f} / {row['auroc_worst']:.2f},"
                    f" {sum(others) / len(others):.3f}"
                )
            lines.append(line)
    return markdown(lines)


def bases_table(rows: list[Row]) -> str:
    """AUROC of what has one length on every base model, from one to the other and within one."""
    fields = ("features", "head", "fitted_on", "tried_on")
    lines = [
        ["features", "head", "fitted on", "tried on", *(f"{share:.0%} poison" for share in SHARES)]
    ]
    for place in dict.fromkeys(tuple(row[name] for name in fields) for row in rows):
        own = where(rows, **dict(zip(fields, place, strict=True)))
        lines.append([*place, *map(area, own)])
    sizes = " / ".join(str(row["n_malicious"]) for row in rows[: len(SHARES)])
    return (
        f"{markdown(lines)}\n{sizes} malicious clients at the four shares, {rows[0]['n_benign']}"
        " benign ones, hard negatives among them."
    )


def rounds_table(federations: list[Row]) -> str:
    """AUROC over participations, mean and worst federation."""
    lines = [
        ["base", "averaged", "reader", "poison", *(f"{number} participations" for number in SHOWN)]
    ]
    for model, averaged in _regimes():
        for reader in READERS:
            own = where(federations, model=model, averaged=averaged, reader=reader.name)
            for number, share in enumerate(SHARES):
                areas = [row["auroc"][number]["by_participation"] for row in own]
                shown = [_mean_worst([area[at - 1] for area in areas]) for at in SHOWN]
                lines.append([model, averaged, reader.name, f"{share:.0%}", *shown])
    return markdown(lines)


def rule_table(federations: list[Row]) -> str:
    """What the rule flags, federation by federation."""
    lines = [["base", "averaged", "unseen source", "threshold / floor", *map(_title, GROUPS)]]
    for row in federations:
        if "flagged" in row:
            own = [row["flagged"][name] for name in GROUPS]
            cuts = f"{row['threshold']:.2f} / {row['floor']:.2f}"
            counts = [f"{c['flagged'][0]} / {c['flagged'][-1]} of {c['n']}" for c in own]
            lines.append([row["model"], row["averaged"], row["malicious"], cuts, *counts])
    return markdown(lines)


def fresh_table(federations: list[Row]) -> str:
    """What the rule of `rule_table` flags in federations that it was not made on, all draws of
    clients together.
    """
    lines: list[str | list[str]] = [
        "base | averaged | clients | flagged, first participation | flagged, eighth"
        " | worst source, eighth | AUROC at the eighth, mean / worst"
    ]
    for model, averaged in dict.fromkeys((row["model"], row["averaged"]) for row in federations):
        own = where(federations, model=model, averaged=averaged)
        harmful = [row for row in own if row["malicious"] != "gptfuzz"]
        for number, share in enumerate(SHARES):
            for what, rows in (("", own), (", without GPTFuzz", harmful)):
                if what and len(harmful) == len(own):
                    continue
                last = [row["auroc"][number]["by_participation"][-1] for row in rows]
                counts = _counts(rows, f"{share:g}")
                lines.append(
                    [model, averaged, f"{share:.0%} poison{what}", *counts, _mean_worst(last)]
                )
        lines += [
            [model, averaged, _title(role), *_counts(own, role, most=True), ""] for role in HONEST
        ]
    return markdown(lines)


def ways_table(federations: list[Row]) -> str:
    """What the committed rule flags of the fresh clients, and what every way to cut does, made on
    the other draw of them.
    """
    lines = [["base", "averaged", "way", *map(_title, GROUPS)]]
    groups: dict[tuple[str, str], list[Row]] = {}
    for row in federations:
        groups.setdefault((row["model"], row["averaged"]), []).append(row)
    for place, own in {**groups, ("both", "either"): federations}.items():
        ways = {"the rule, made on the first federations": [row["flagged"] for row in own]}
        ways |= {way: [row["other_draw"][way] for row in own] for way in own[0]["other_draw"]}
        for way, rows in ways.items():
            sums = [_summed([row[name] for row in rows]) for name in GROUPS]
            counts = [f"{c['flagged'][0]} / {c['flagged'][-1]} of {c['n']}" for c in sums]
            lines.append([*place, way, *counts])
    return markdown(lines)


def _counts(rows: list[Row], name: str, most: bool = False) -> list[str]:
    """Flagged after the first and the eighth participation, and the source with the least (or the
    most) of the last.
    """
    total = _summed([row["flagged"][name] for row in rows])
    n = total["n"]
    shown = [f"{share_of(total['flagged'][at], n)} of {n}" for at in (0, -1)]
    by_source = {row["malicious"]: row["flagged"][name] for row in all_draws(rows)}
    source, counts = (max if most else min)(
        by_source.items(), key=lambda item: item[1]["flagged"][-1] / item[1]["n"]
    )
    return [*shown, f"{counts['flagged'][-1]} of {counts['n']} ({source})"]


def all_draws(federations: list[Row]) -> list[Row]:
    """One row an attack (a base, a source and whom the server averages) of all draws of clients.

    Flagged clients counted together, mean AUROC.
    """
    groups: dict[tuple[str, ...], list[Row]] = {}
    for row in federations:
        if "flagged" in row:
            groups.setdefault((row["model"], row["malicious"], row["averaged"]), []).append(row)
    found = []
    for place, rows in groups.items():
        by_share = zip(*(row["auroc"] for row in rows), strict=True)
        areas = [
            zip(*(entry["by_participation"] for entry in part), strict=True) for part in by_share
        ]
        found.append(
            {
                **dict(zip(("model", "malicious", "averaged"), place, strict=True)),
                "auroc": [{"by_participation": list(map(mean, area))} for area in areas],
                "flagged": {
                    name: _summed([row["flagged"][name] for row in rows])
                    for name in rows[0]["flagged"]
                },
            }
        )
    return found


def _summed(counts: list[Row]) -> Row:
    """Counts of flagged clients after every participation, added up."""
    flagged = zip(*(count["flagged"] for count in counts), strict=True)
    return {"n": sum(count["n"] for count in counts), "flagged": list(map(sum, flagged))}


def targets_table(cells: list[Row], federations: list[Row]) -> str:
    """The targets of this study beside the worst cell and attack, with and without the source that
    harms one of the bases not at all.
    """
    lines: list[str | list[str]] = [
        "base | what | target | worst | met | worst without GPTFuzz | met"
    ]
    for model in MODELS:
        own = where(cells, model=model, reader=READERS[-1].name)
        seen = where(federations, model=model)
        without = ([row for row in rows if row["malicious"] != "gptfuzz"] for rows in (own, seen))
        for (what, target, worst), (_, _, others) in zip(
            _worst(own, seen), _worst(*without), strict=True
        ):
            most = "flagged" in what
            line = [model, what, f"{'at most' if most else 'at least'} {target:.0%}"]
            for value in (worst, others):
                met = value <= target if most else value >= target
                line += [f"{value:.0%}", "yes" if met else "no"]
            lines.append(line)
    return markdown(lines)


def _worst(cells: list[Row], federations: list[Row]) -> list[tuple[str, float, float]]:
    """(what, target, the worst of all cells or attacks)."""
    rows = []
    for number, share in enumerate(SHARES):
        first, eighth = TARGETS[share]
        what = f"at {share:.0%} poison,"
        least = _rate(_least(where(cells, share=share)), "malicious")
        counts = [row["flagged"][f"{share:g}"] for row in federations]
        found = min(c["flagged"][-1] / c["n"] for c in counts)
        last = min(row["auroc"][number]["by_participation"][-1] for row in federations)
        rows += [
            (f"found {what} first participation", first, least),
            (f"found {what} eighth", eighth, found),
            (f"AUROC {what} eighth", AUROC, last),
        ]
    honest = [_summed([row["flagged"][name] for name in HONEST]) for row in federations]
    most = max(_rate(row, "benign") for row in cells)
    last = max(counts["flagged"][-1] / counts["n"] for counts in honest)
    return [
        *rows,
        ("benign flagged, first participation", MOST_FLAGGED, most),
        ("benign flagged, eighth", MOST_FLAGGED, last),
    ]


def _regimes() -> list[tuple[str, str]]:
    return [
        (model.key, averaged)
        for model in MODELS.values()
        for averaged in dict.fromkeys(averaged for _, averaged in model.federations)
    ]


def _title(name: str) -> str:
    return name.replace("_", " ") if name in HONEST else f"{float(name):.0%}"


def _areas(rows: list[Row]) -> list[float]:
    return [row["auroc"] for row in rows]


def _rate(row: Row, side: str) -> float:
    return float(row[f"flagged_{side}"] / row[f"n_{side}"])


def _least(rows: list[Row]) -> Row:
    return min(rows, key=lambda row: _rate(row, "malicious"))


def _most(rows: list[Row]) -> str:
    worst = max(rows, key=lambda row: _rate(row, "benign"))
    return f"{worst['flagged_benign']} of {worst['n_benign']} ({worst['benign']})"


def _percent(rows: list[Row], side: str) -> str:
    flagged, n = (sum(row[f"{what}_{side}"] for row in rows) for what in ("flagged", "n"))
    return f"{flagged / n:.0%}"


def _mean_worst(values: list[float]) -> str:
    return f"{sum(values) / len(values):.2f} / {min(values):.2f}"
