"""Tables of the defended federations, on the pages that show them."""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from statistics import mean

from zoo.markers import filled

from ..common.format import attack_name, markdown, spread
from ..common.paths import FOLDER, REPOSITORY
from ..evidence import accumulation
from . import larger, machines, overhead
from .cells import FIRST, FULL, LARGER, NO_ATTACK, ROWS
from .lines import Line, read_lines
from .reported import reported_table
from .run import on_gpu
from .tables import cells_page, grid_tables, within
from .targets import targets_table, worst_table

CELLS = FOLDER / "results" / "grid.md"
# page -> the tables between markers on it; a page without any is written as a whole.
PAGES: dict[Path, tuple[str, ...]] = {
    FOLDER / "README.md": (
        "refusal",
        "factors",
        "ledger",
        "overhead",
        "accumulation",
        "grid",
        "worst",
        "targets",
        "reported",
        "machines",
        "larger",
        "larger_factors",
        "larger_targets",
        "larger_rates",
        "larger_machines",
    ),
    REPOSITORY / "docs" / "results.md": ("refusal",),
    CELLS: (),
}


def rendered(page: Path) -> str:
    """The page's text with every table between its markers made anew."""
    made = read_lines()
    lines, tenfold = within(made, FULL), within(made, LARGER)
    if page == CELLS:
        return cells_page(lines)
    first = within(lines, FIRST)
    tables = {
        "refusal": lambda: refusal_table(first),
        "factors": lambda: factor_table(first),
        "ledger": lambda: ledger_table(lines),
        "overhead": lambda: overhead_table(overhead.read_results()),
        "accumulation": lambda: accumulation_table(json.loads(accumulation.RESULTS.read_text())),
        "grid": lambda: grid_tables(lines),
        "worst": lambda: worst_table(lines),
        "targets": lambda: targets_table(lines),
        "reported": lambda: reported_table(lines),
        "machines": lambda: machines.table(machines.FIRST),
        "larger_machines": lambda: machines.table(machines.LARGER),
        "larger": lambda: f"{refusal_table(tenfold)} {where_made(tenfold)}",
        "larger_factors": lambda: factor_table(tenfold),
        "larger_targets": lambda: targets_table(tenfold),
        "larger_rates": lambda: larger.rates_table(json.loads(larger.RATES_FILE.read_text())),
    }
    text = page.read_text(encoding="utf-8")
    for name in PAGES[page]:
        text = filled(text, name, tables[name](), "paper_repro.tables")
    return text


def refusal_table(lines: list[Line]) -> str:
    """Refusal of harmful prompts, mean ± standard deviation over seeds, and what else the model
    lost.
    """
    heads = [attack_name(count, share) for count, share in _cells()]
    rows = [["defence", *heads, "over-refusal", "answer loss", "ROUGE-L", "runs"]]
    for name in (NO_ATTACK, *ROWS):
        own = [line for line in lines if line["row"] == name]
        if not own:
            continue
        cells = [
            spread([line["metrics"]["refusal_strict"] for line in _cell(own, count, share)])
            for count, share in _cells()
        ]
        rest = [
            spread([line["metrics"][metric] for line in own], scale)
            for metric, scale in (("over_refusal_strict", 100), ("loss", 1), ("rouge_l", 1))
        ]
        rows.append([name, *cells, *rest, str(len(own))])
    return markdown(rows) + "\n" + _sizes(lines)


def where_made(lines: list[Line]) -> str:
    """How many runs a GPU made, and of which rows a processor."""
    others = Counter(line["row"] for line in lines if not on_gpu(line["machine"]))
    rest = (
        f"; on a processor: {', '.join(f'{row} {count}' for row, count in others.items())}"
        if others
        else ""
    )
    return f"Made on a GPU: {len(lines) - others.total()}{rest}."


def factor_table(lines: list[Line]) -> str:
    """How far each level trusted whom: the mean factor over rounds, clients and seeds."""
    heads = [attack_name(count, share) for count, share in _cells()]
    rows = [["level", *(f"{head}: malicious / benign" for head in heads), "rounds skipped"]]
    for name in ROWS:
        own = [line for line in lines if line["row"] == name]
        if "level" not in ROWS[name] or not own:
            continue
        cells = []
        for count, share in _cells():
            found = _cell(own, count, share)
            pairs = [
                [mean(line["factors"][role]) for line in found] for role in ("malicious", "benign")
            ]
            cells.append(" / ".join(f"{mean(values):.2f}" if values else "-" for values in pairs))
        rows.append([name, *cells, str(sum(line["skipped"] for line in own))])
    return markdown(rows)


def ledger_table(lines: list[Line]) -> str:
    """What each level costs beside local training, over all its runs."""
    rows = [
        [
            "defence",
            "evidence",
            "scoring and weighing",
            "aggregating",
            "evidence sent / update sent",
            "runs",
        ]
    ]
    for name in ROWS:
        own = [line for line in lines if line["row"] == name]
        if not own:
            continue
        total = {
            phase: sum(line["seconds"][phase] for line in own)
            for phase in ("train", "evidence", "assess", "aggregate")
        }
        sent = {what: sum(line["bytes"][what] for line in own) for what in ("update", "evidence")}
        shares = [
            f"{total[phase] / total['train']:.2%}" for phase in ("evidence", "assess", "aggregate")
        ]
        rows.append([name, *shares, f"{sent['evidence'] / sent['update']:.0%}", str(len(own))])
    return markdown(rows) + "\nSeconds as shares of the seconds of local training in the same runs."


def overhead_table(lines: list[Line]) -> str:
    """Cost and detection of the cheap shadow at the paper's round shape."""
    rows = [
        [
            "level",
            "examples in the gradient",
            "extra training",
            "scoring and weighing",
            "evidence sent / update sent",
            "trust: malicious",
            "benign",
        ]
    ]
    for line in lines:
        seconds, sent = line["seconds"], line["bytes"]
        costs = [
            f"{seconds['evidence'] / seconds['train']:.1%}",
            f"{seconds['assess'] / seconds['train']:.2%}",
            f"{sent['evidence'] / sent['update']:.0%}",
        ]
        rows.append(
            [
                line["level"],
                f"{line['examples']} of 160",
                *costs,
                *(f"{mean(line['factors'][role]):.2f}" for role in ("malicious", "benign")),
            ]
        )
    return (
        f"{markdown(rows)}\n{overhead.CLIENTS} clients, {overhead.MALICIOUS} malicious at 100 %"
        f" poison, {overhead.ROUNDS} rounds of 10 steps of 16 examples, one seed. Extra training"
        " and scoring: seconds as shares of the same run's local training."
    )


def accumulation_table(rows: list[Line]) -> str:
    """AUROC of every malicious source, and error rates at the levels' cut, for every way to read
    the evidence.
    """
    shares = sorted({row["share"] for row in rows}, reverse=True)
    rounds = sorted({row["rounds"] for row in rows})
    table = [
        [
            "what is scored",
            *(
                f"{share:.0%} poison, {number} round{'s' * (number > 1)}"
                for share in shares
                for number in rounds
            ),
        ]
    ]
    for way in dict.fromkeys(row["way"] for row in rows):
        own = {(row["share"], row["rounds"]): row for row in rows if row["way"] == way}
        chosen = [own[share, number] for share in shares for number in rounds]
        table.append(
            [
                way,
                *(
                    f"{mean(row['auroc'].values()):.2f} / {row['tpr']:.0%} / {row['fpr']:.0%}"
                    for row in chosen
                ),
            ]
        )
    sources = "; ".join(
        f"{share:.0%}: {', '.join(next(row['sources'] for row in rows if row['share'] == share))}"
        for share in shares
    )
    return (
        f"{markdown(table)}\nMean AUROC over federations, one malicious source each / TPR / FPR at"
        f" {accumulation.THRESHOLD}; {rows[0]['n_malicious']} malicious and {rows[0]['n_honest']}"
        f" honest clients a share ({sources})."
    )


def _cells() -> Iterator[tuple[int, float]]:
    yield from ((count, share) for share in FIRST.shares for count in FIRST.malicious)


def _cell(lines: list[Line], count: int, share: float) -> list[Line]:
    """The seeds of one cell; a federation without an attack is the same in all of them."""
    return [
        line
        for line in lines
        if line["row"] == NO_ATTACK or (line["malicious"] == count and line["share"] == share)
    ]


def _sizes(lines: list[Line]) -> str:
    seeds = sorted({line["seed"] for line in lines})
    metrics = lines[0]["metrics"]
    widest = 1.96 * math.sqrt(0.25 / metrics["n_refusal"]) * 100
    return (
        f"Refusal and over-refusal in % (the strict measure), {metrics['n_refusal']:.0f} AdvBench"
        f" goals and {metrics['n_over_refusal']:.0f} safe XSTest prompts a run; one run's 95 %"
        f" interval is at most ± {widest:.1f} points. Answer loss (nats a token) and ROUGE-L on"
        f" {metrics['n_utility']:.0f} held-out benign pairs, over all cells of a row. Mean ±"
        f" standard deviation over the seeds {', '.join(map(str, seeds))}; {len(lines)} runs."
    )
