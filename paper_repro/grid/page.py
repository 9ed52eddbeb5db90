"""Tables of the defended federations, on the pages that show them."""

from __future__ import annotations

import json
import math
from collections import Counter
from pathlib import Path
from statistics import mean

from zoo.program import read_lines

from ..common.format import attack_name, distinct, markdown, page_with, spread, where
from ..common.paths import FOLDER, REPOSITORY
from ..evidence import accumulation
from . import larger, machines, overhead
from .cells import FIRST, FULL, LARGER, NO_ATTACK, ROWS
from .lines import Line
from .lines import read_lines as read_runs
from .reported import reported_table
from .run import on_gpu
from .tables import cells_page, grid_tables, within
from .targets import targets_table, worst_table

CELLS_SHOWN = [(count, share) for share in FIRST.shares for count in FIRST.malicious]
CELLS = FOLDER / "results" / "grid.md"
# page -> the tables between markers on it; a page without any is written as a whole.
PAGES: dict[Path, tuple[str, ...]] = {
    FOLDER / "README.md": (
        *("refusal", "factors", "ledger", "overhead", "accumulation", "grid", "worst", "targets"),
        *("reported", "machines"),
        *(f"larger{what}" for what in ("", "_factors", "_targets", "_rates", "_machines")),
    ),
    REPOSITORY / "docs" / "results.md": ("refusal",),
    CELLS: (),
}


def rendered(page: Path) -> str:
    """The page's text with every table between its markers made anew."""
    made = read_runs()
    lines, tenfold = within(made, FULL), within(made, LARGER)
    if page == CELLS:
        return cells_page(lines)
    first = within(lines, FIRST)
    tables = {
        "refusal": lambda: refusal_table(first),
        "factors": lambda: factor_table(first),
        "ledger": lambda: ledger_table(lines),
        "overhead": lambda: overhead_table(read_lines(overhead.RESULTS)),
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
    return page_with(page, {name: tables[name]() for name in PAGES[page]})


def refusal_table(lines: list[Line]) -> str:
    """Refusal of harmful prompts, mean ± standard deviation over seeds, and what else the model
    lost.
    """
    heads = [attack_name(count, share) for count, share in CELLS_SHOWN]
    rows = [["defence", *heads, "over-refusal", "answer loss", "ROUGE-L", "runs"]]
    for name in (NO_ATTACK, *ROWS):
        if own := where(lines, row=name):
            cells = [_spread(_cell(own, *cell), "refusal_strict") for cell in CELLS_SHOWN]
            rest = [
                _spread(own, metric, scale)
                for metric, scale in (("over_refusal_strict", 100), ("loss", 1), ("rouge_l", 1))
            ]
            rows.append([name, *cells, *rest, str(len(own))])
    return markdown(rows) + "\n" + _sizes(lines)


def _spread(lines: list[Line], metric: str, scale: float = 100) -> str:
    return spread([line["metrics"][metric] for line in lines], scale)


def where_made(lines: list[Line]) -> str:
    """How many runs a GPU made, and of which rows a processor."""
    others = Counter(line["row"] for line in lines if not on_gpu(line["machine"]))
    counts = ", ".join(f"{row} {count}" for row, count in others.items())
    rest = f"; on a processor: {counts}" if counts else ""
    return f"Made on a GPU: {len(lines) - others.total()}{rest}."


def factor_table(lines: list[Line]) -> str:
    """How far each level trusted whom: the mean factor over rounds, clients and seeds."""
    heads = [f"{attack_name(*cell)}: malicious / benign" for cell in CELLS_SHOWN]
    rows = [["level", *heads, "rounds skipped"]]
    for name in ROWS:
        own = where(lines, row=name)
        if "level" not in ROWS[name] or not own:
            continue
        cells = []
        for cell in CELLS_SHOWN:
            found = _cell(own, *cell)
            pairs = [
                [mean(line["factors"][role]) for line in found] for role in ("malicious", "benign")
            ]
            cells.append(" / ".join(f"{mean(values):.2f}" if values else "-" for values in pairs))
        rows.append([name, *cells, str(sum(line["skipped"] for line in own))])
    return markdown(rows)


def ledger_table(lines: list[Line]) -> str:
    """What each level costs beside local training, over all its runs."""
    rows = [
        "defence | evidence | scoring and weighing | aggregating | evidence sent / update sent"
        " | runs"
    ]
    for name in ROWS:
        if own := where(lines, row=name):
            train, *phases = (
                sum(line["seconds"][phase] for line in own)
                for phase in ("train", "evidence", "assess", "aggregate")
            )
            update, sent = (
                sum(line["bytes"][what] for line in own) for what in ("update", "evidence")
            )
            shares = " | ".join(f"{seconds / train:.2%}" for seconds in phases)
            rows.append(f"{name} | {shares} | {sent / update:.0%} | {len(own)}")
    return markdown(rows) + "\nSeconds as shares of the seconds of local training in the same runs."


def overhead_table(lines: list[Line]) -> str:
    """Cost and detection of the cheap shadow at the paper's round shape."""
    rows = [
        "level | examples in the gradient | extra training | scoring and weighing"
        " | evidence sent / update sent | trust: malicious | benign"
    ]
    for line in lines:
        seconds, sent, factors = line["seconds"], line["bytes"], line["factors"]
        rows.append(
            f"{line['level']} | {line['examples']} of 160"
            f" | {seconds['evidence'] / seconds['train']:.1%}"
            f" | {seconds['assess'] / seconds['train']:.2%}"
            f" | {sent['evidence'] / sent['update']:.0%}"
            f" | {mean(factors['malicious']):.2f} | {mean(factors['benign']):.2f}"
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
    columns = [(share, number) for share in shares for number in rounds]
    heads = [f"{share:.0%} poison, {n} round{'s' * (n > 1)}" for share, n in columns]
    table = [["what is scored", *heads]]
    for way in distinct(rows, "way"):
        own = {(row["share"], row["rounds"]): row for row in where(rows, way=way)}
        chosen = [own[column] for column in columns]
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
        f"{share:.0%}: {', '.join(where(rows, share=share)[0]['sources'])}" for share in shares
    )
    return (
        f"{markdown(table)}\nMean AUROC over federations, one malicious source each / TPR / FPR at"
        f" {accumulation.THRESHOLD}; {rows[0]['n_malicious']} malicious and {rows[0]['n_honest']}"
        f" honest clients a share ({sources})."
    )


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
