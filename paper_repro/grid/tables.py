"""The grid as tables: refusal in every cell that was run, and a page with every measure of every
cell.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Sequence
from statistics import mean

from ..common.format import attack_name, markdown, spread
from ..common.setting import BENIGN_SETS
from .cells import FIRST, FULL, NO_ATTACK, ROWS, Axes, Cell, grid
from .lines import Line, cell_of

NAMES = (NO_ATTACK, *ROWS)


def within(lines: Sequence[Line], axes: Axes) -> list[Line]:
    """The lines of a part of the grid."""
    cells = set(grid(axes))
    return [line for line in lines if cell_of(line) in cells]


def grid_tables(lines: Sequence[Line]) -> str:
    """Strict refusal, one table for each benign set and malicious source, of the rows that were
    run beyond the first grid.
    """
    parts = []
    for benign, source, own in by_data(lines):
        beyond = (
            {line["row"] for line in own} - {NO_ATTACK}
            if (benign, source) != (FIRST.benign[0], FIRST.sources[0])
            else _beyond(own)
        )
        if beyond:
            parts.append(_refusal(benign, source, own, [name for name in ROWS if name in beyond]))
    return "\n".join(parts) + _coverage(lines)


def _beyond(own: Sequence[Line]) -> set[str]:
    first = set(grid(FIRST))
    return {line["row"] for line in own if cell_of(line) not in first and line["malicious"]}


def _refusal(benign: str, source: str, own: Sequence[Line], names: Sequence[str]) -> str:
    rows, count = [["poison", "malicious", *names]], 0
    runs = _by_cell(own)
    attacks = [(share, n) for share in FULL.shares for n in FULL.malicious if n]
    for share, malicious in [(1.0, 0), *attacks]:
        bare = {"FedAvg": NO_ATTACK} if not malicious else {}
        found = [runs[bare.get(name, name), malicious, share] for name in names]
        if any(found):
            count += sum(map(len, found))
            poison = f"{share:.0%}" if malicious else "-"
            values = [spread([line["metrics"]["refusal_strict"] for line in one]) for one in found]
            rows.append([poison, f"{malicious} of 10", *values])
    return (
        f"**{source}, {benign} benign set** ({', '.join(BENIGN_SETS[benign])}), {count}"
        f" runs\n\n{markdown(rows)}"
    )


def cells_page(lines: Sequence[Line]) -> str:
    """Every measure of every cell that was run."""
    parts = [
        "# Every cell that was run\n",
        (
            "Written by `python -m paper_repro.tables` from `defences.jsonl`. Mean ± standard"
            " deviation over seeds; a cell of one run has no deviation. Rule, strict and"
            " over-refusal (strict) in %; answer loss in nats a token; trust is the mean security"
            " factor over rounds and clients, lowest the least mean of one benign client; seconds"
            " are of a whole run, on whatever machine made it and beside whatever else ran there.\n"
        ),
    ]
    head = (
        "defence | attack | runs | Rule | strict | over-refusal | answer loss | ROUGE-L"
        " | trust: malicious | benign | lowest | seconds"
    )
    for benign, source, own in by_data(lines):
        runs = _by_cell(own)
        order = sorted(runs, key=lambda key: (NAMES.index(key[0]), -key[2], key[1]))
        rows = [
            [key[0], attack_name(key[1], key[2]), str(len(runs[key])), *_measures(runs[key])]
            for key in order
            if runs[key]
        ]
        parts.append(f"## {source}, {benign} benign set\n\n{markdown([head, *rows])}")
    return "\n".join(parts)


def _measures(lines: Sequence[Line]) -> list[str]:
    scales = {"refusal_rule": 100, "refusal_strict": 100, "over_refusal_strict": 100}
    scales |= {"loss": 1, "rouge_l": 1}
    found = [spread([line["metrics"][name] for line in lines], scales[name]) for name in scales]
    trust = [
        [value for line in lines for value in line["factors"][role]]
        for role in ("malicious", "benign")
    ]
    lowest = min(min(line["clients"]["benign"]) for line in lines)
    seconds = mean(sum(line["seconds"].values()) for line in lines)
    shown = [f"{mean(values):.2f}" if values else "-" for values in trust]
    return [*found, *shown, f"{lowest:.2f}", f"{seconds:.0f}"]


def by_data(lines: Sequence[Line]) -> Iterator[tuple[str, str, list[Line]]]:
    """(benign set, malicious source, its lines).

    Runs without malicious clients that no probe watched belong to every source.
    """
    for benign in FULL.benign:
        for source in FULL.sources:
            own = [
                line
                for line in lines
                if cell_of(line).benign == benign
                and (cell_of(line).source == source or of_every_source(cell_of(line)))
            ]
            if any(line["row"] != NO_ATTACK and not of_every_source(cell_of(line)) for line in own):
                yield benign, source, own


def of_every_source(cell: Cell) -> bool:
    """Whether the run does not depend on the malicious source."""
    return not cell.malicious and "level" not in ROWS.get(cell.row, {})


def _by_cell(lines: Sequence[Line]) -> defaultdict[tuple[str, int, float], list[Line]]:
    runs: defaultdict[tuple[str, int, float], list[Line]] = defaultdict(list)
    for line in lines:
        runs[line["row"], line["malicious"], line["share"]].append(line)
    return runs


def _coverage(lines: Sequence[Line]) -> str:
    total = len(list(grid(FULL)))
    return (
        "\nRefusal in % (the strict measure), mean ± standard deviation over seeds; a value"
        f" without a deviation is one run, a dash none. {len(lines)} of the full grid's {total}"
        " runs were made; `results/grid.md` has every measure of every one of their cells."
    )
