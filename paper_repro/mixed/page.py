"""The tables of this folder's page from the files in results/."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path
from statistics import mean
from typing import Any

from scipy.stats import binomtest

from paper_repro.common.format import markdown
from paper_repro.grid import larger
from zoo.client_design import SHARES
from zoo.markers import filled
from zoo.sources import HARD_NEGATIVE, MALICIOUS

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
Row = dict[str, Any]


def rendered() -> str:
    """The page with every table between its markers made anew."""
    text = PAGE.read_text(encoding="utf-8")
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
    for name, table in tables.items():
        text = filled(text, name, table, "paper_repro.tables")
    return text


def answers_table(rows: Iterable[Row]) -> str:
    """How many labelled answers open with a refusal."""
    return markdown(
        [
            ["source", "answers that open with a refusal"],
            *([row["source"], f"{row['refusing']} of {row['n']}"] for row in rows),
        ]
    )


def damage_table(rows: list[Row]) -> str:
    """What a kind of data does to refusal, attacks first."""
    lines = [
        [
            "base",
            "trained on",
            "its own questions refused",
            "AdvBench refused, mean update",
            "three times the mean update",
        ]
    ]
    for model in MODELS:
        own = [row for row in rows if row["model"] == model]
        before = next(row for row in own if row["source"] is None)
        lines.append([model, "nothing", "", _share(before["refused"], before["n"]), ""])
        for source in dict.fromkeys(row["source"] for row in own if row["source"]):
            once, thrice = (row for row in own if row["source"] == source)
            refused = [_share(row["refused"], row["n"]) for row in (once, thrice)]
            lines.append([model, source, f"{once['own_refused']} of {once['own_n']}", *refused])
    return markdown(lines)


def grid_table(cells: list[Row]) -> str:
    """Ranking and errors of every reader at first contact, over all cells."""
    lines = [
        [
            "base",
            "reader",
            "poison",
            "AUROC, mean / worst cell",
            "found",
            "worst cell",
            "benign flagged",
            "worst kind",
            "hard negatives flagged",
        ]
    ]
    measured = {(row["model"], row["reader"]) for row in cells}
    for model in dict.fromkeys(row["model"] for row in cells):
        for reader in (reader for reader in READERS if (model, reader.name) in measured):
            for share in SHARES:
                rows = [
                    c
                    for c in cells
                    if (c["model"], c["reader"], c["share"]) == (model, reader.name, share)
                ]
                first = [
                    model,
                    reader.name,
                    f"{share:.0%}",
                    _mean_worst([row["auroc"] for row in rows]),
                ]
                if reader.threshold is None:
                    lines.append([*first, *["not measured"] * 5])
                    continue
                found = _least(rows)
                benign, hard = (
                    [row for row in rows if (row["benign"] in HARD_NEGATIVE) == wanted]
                    for wanted in (False, True)
                )
                lines.append(
                    [
                        *first,
                        _percent(rows, "malicious"),
                        (
                            f"{found['flagged_malicious']} of {found['n_malicious']}"
                            f" ({found['malicious']} in {found['benign']})"
                        ),
                        _percent(benign, "benign"),
                        _most(benign),
                        _percent(hard, "benign"),
                    ]
                )
    return markdown(lines)


def sources_table(cells: list[Row]) -> str:
    """The mass-mean reader by malicious source."""
    lines = [["base", "unseen source", *(f"{share:.0%}: AUROC, found" for share in SHARES)]]
    for model in dict.fromkeys(row["model"] for row in cells):
        for malicious in MALICIOUS:
            line = [model, malicious]
            for share in SHARES:
                chosen = (model, READERS[-1].name, malicious, share)
                rows = [
                    c
                    for c in cells
                    if (c["model"], c["reader"], c["malicious"], c["share"]) == chosen
                ]
                line.append(
                    f"{_mean_worst([row['auroc'] for row in rows])}, {_percent(rows, 'malicious')}"
                )
            lines.append(line)
    return markdown(lines)


def levers_table(rows: list[Row]) -> str:
    """Every lever's ranking: all cells, and the mean over cells of the sources but GPTFuzz."""
    lines = [
        ["base", "lever", *(f"{share:.0%}: mean / worst, without GPTFuzz" for share in SHARES)]
    ]
    for model in MODELS:
        for lever in dict.fromkeys(row["lever"] for row in rows):
            line = [model, lever]
            for share in SHARES:
                row = next(
                    r for r in rows if (r["model"], r["lever"], r["share"]) == (model, lever, share)
                )
                others = [
                    value for source, value in row["by_source"].items() if source != "gptfuzz"
                ]
                line.append(
                    f"{row['auroc_mean']:.3f} / {row['auroc_worst']:.2f},"
                    f" {sum(others) / len(others):.3f}"
                )
            lines.append(line)
    return markdown(lines)


def bases_table(rows: list[Row]) -> str:
    """AUROC of what has one length on every base model, from one to the other and within one."""
    lines = [
        ["features", "head", "fitted on", "tried on", *(f"{share:.0%} poison" for share in SHARES)]
    ]
    for place in dict.fromkeys(
        (row["features"], row["head"], row["fitted_on"], row["tried_on"]) for row in rows
    ):
        own = [
            row
            for row in rows
            if (row["features"], row["head"], row["fitted_on"], row["tried_on"]) == place
        ]
        lines.append(
            [
                *place,
                *(
                    f"{row['auroc']:.2f} [{row['auroc_ci'][0]:.2f}, {row['auroc_ci'][1]:.2f}]"
                    for row in own
                ),
            ]
        )
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
            own = [
                row
                for row in federations
                if (row["model"], row["averaged"], row["reader"]) == (model, averaged, reader.name)
            ]
            for number, share in enumerate(SHARES):
                values = [
                    [row["auroc"][number]["by_participation"][shown - 1] for row in own]
                    for shown in SHOWN
                ]
                lines.append(
                    [model, averaged, reader.name, f"{share:.0%}", *map(_mean_worst, values)]
                )
    return markdown(lines)


def rule_table(federations: list[Row]) -> str:
    """What the rule flags, federation by federation."""
    names = [*(f"{share:g}" for share in SHARES), "benign", "hard_negative"]
    lines = [
        [
            "base",
            "averaged",
            "unseen source",
            "threshold / floor",
            *(_title(name) for name in names),
        ]
    ]
    for row in federations:
        if "flagged" in row:
            counts = [
                f"{row['flagged'][n]['flagged'][0]} / {row['flagged'][n]['flagged'][-1]} of"
                f" {row['flagged'][n]['n']}"
                for n in names
            ]
            lines.append(
                [
                    row["model"],
                    row["averaged"],
                    row["malicious"],
                    f"{row['threshold']:.2f} / {row['floor']:.2f}",
                    *counts,
                ]
            )
    return markdown(lines)


def fresh_table(federations: list[Row]) -> str:
    """What the rule of `rule_table` flags in federations that it was not made on, all draws of
    clients together.
    """
    lines = [
        [
            "base",
            "averaged",
            "clients",
            "flagged, first participation",
            "flagged, eighth",
            "worst source, eighth",
            "AUROC at the eighth, mean / worst",
        ]
    ]
    for model, averaged in dict.fromkeys((row["model"], row["averaged"]) for row in federations):
        own = [row for row in federations if (row["model"], row["averaged"]) == (model, averaged)]
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
            [model, averaged, _title(role), *_counts(own, role, most=True), ""]
            for role in ("benign", "hard_negative")
        ]
    return markdown(lines)


def ways_table(federations: list[Row]) -> str:
    """What the committed rule flags of the fresh clients, and what every way to cut does, made on
    the other draw of them.
    """
    names = [*(f"{share:g}" for share in SHARES), "benign", "hard_negative"]
    lines = [["base", "averaged", "way", *(_title(name) for name in names)]]
    groups: dict[tuple[str, str], list[Row]] = {}
    for row in federations:
        groups.setdefault((row["model"], row["averaged"]), []).append(row)
    for place, own in {**groups, ("both", "either"): federations}.items():
        ways = {"the rule, made on the first federations": [row["flagged"] for row in own]}
        ways |= {way: [row["other_draw"][way] for row in own] for way in own[0]["other_draw"]}
        for way, rows in ways.items():
            counts = []
            for name in names:
                first, eighth = (
                    sum(row[name]["flagged"][number] for row in rows) for number in (0, -1)
                )
                counts.append(f"{first} / {eighth} of {sum(row[name]['n'] for row in rows)}")
            lines.append([*place, way, *counts])
    return markdown(lines)


def _counts(rows: list[Row], name: str, most: bool = False) -> list[str]:
    """Flagged after the first and the eighth participation, and the source with the least (or the
    most) of the last.
    """
    n = sum(row["flagged"][name]["n"] for row in rows)
    shown = [
        _share(sum(row["flagged"][name]["flagged"][number] for row in rows), n) + f" of {n}"
        for number in (0, -1)
    ]
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
    return [
        {
            "model": model,
            "malicious": malicious,
            "averaged": averaged,
            "auroc": [
                {
                    "by_participation": [
                        mean(values)
                        for values in zip(
                            *(entry["by_participation"] for entry in entries), strict=True
                        )
                    ]
                }
                for entries in zip(*(row["auroc"] for row in rows), strict=True)
            ],
            "flagged": {
                name: {
                    "n": sum(row["flagged"][name]["n"] for row in rows),
                    "flagged": [
                        sum(values)
                        for values in zip(
                            *(row["flagged"][name]["flagged"] for row in rows), strict=True
                        )
                    ],
                }
                for name in rows[0]["flagged"]
            },
        }
        for (model, malicious, averaged), rows in groups.items()
    ]


def targets_table(cells: list[Row], federations: list[Row]) -> str:
    """The targets of this study beside the worst cell and attack, with and without the source that
    harms one of the bases not at all.
    """
    lines = [["base", "what", "target", "worst", "met", "worst without GPTFuzz", "met"]]
    for model in MODELS:
        own = [c for c in cells if (c["model"], c["reader"]) == (model, READERS[-1].name)]
        seen = [row for row in federations if row["model"] == model]
        without = ([row for row in rows if row["malicious"] != "gptfuzz"] for rows in (own, seen))
        for (what, target, worst), (_, _, others) in zip(
            _worst(own, seen), _worst(*without), strict=True
        ):
            line = [model, what, f"{'at most' if 'flagged' in what else 'at least'} {target:.0%}"]
            for value in (worst, others):
                line += [
                    f"{value:.0%}",
                    "yes" if (value <= target if "flagged" in what else value >= target) else "no",
                ]
            lines.append(line)
    return markdown(lines)


def _worst(cells: list[Row], federations: list[Row]) -> list[tuple[str, float, float]]:
    """(what, target, the worst of all cells or attacks)."""
    rows = []
    for number, share in enumerate(SHARES):
        first = _rate(_least([row for row in cells if row["share"] == share]), "malicious")
        counts = [row["flagged"][f"{share:g}"] for row in federations]
        rows.append((f"found at {share:.0%} poison, first participation", TARGETS[share][0], first))
        rows.append(
            (
                f"found at {share:.0%} poison, eighth",
                TARGETS[share][1],
                min(c["flagged"][-1] / c["n"] for c in counts),
            )
        )
        last = min(row["auroc"][number]["by_participation"][-1] for row in federations)
        rows.append((f"AUROC at {share:.0%} poison, eighth", AUROC, last))
    rows.append(
        (
            "benign flagged, first participation",
            MOST_FLAGGED,
            max(_rate(row, "benign") for row in cells),
        )
    )
    rows.append(
        (
            "benign flagged, eighth",
            MOST_FLAGGED,
            max(flagged / n for flagged, n in (_honest(row["flagged"]) for row in federations)),
        )
    )
    return rows


def _regimes() -> list[tuple[str, str]]:
    return [
        (model.key, averaged)
        for model in MODELS.values()
        for averaged in dict.fromkeys(averaged for _, averaged in model.federations)
    ]


def _honest(flagged: Row) -> tuple[int, int]:
    return tuple(
        sum(values)
        for values in zip(
            *((flagged[n]["flagged"][-1], flagged[n]["n"]) for n in ("benign", "hard_negative")),
            strict=True,
        )
    )  # type: ignore[return-value]


def _title(name: str) -> str:
    return name.replace("_", " ") if name in ("benign", "hard_negative") else f"{float(name):.0%}"


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


def _share(count: int, n: int) -> str:
    interval = binomtest(count, n).proportion_ci(method="exact")
    return f"{count / n:.0%} [{interval.low:.0%}, {interval.high:.0%}]"
