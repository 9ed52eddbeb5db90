"""How far runs move on another kind of machine.

Some cells of the grid there, beside their committed lines.

    python -m paper_repro.grid.machines --data ../shared/data  # about 5 minutes on two cores:
                                                               # results/machines.json
    python -m paper_repro.grid.machines --larger               # the base of 11 M parameters, whose
                                                               # lines a GPU made:
                                                               # results/larger_machines.json

Another processor picks other instructions, adds up in another order, and training carries the last
digits on. What comes out differs by as much as a run is worth in decimals, and says how close
`paper_repro.check` can ask a run on another machine to come to its line. On the kind of machine
that made the lines the runs take AVX2 in place of AVX-512; what other kinds came to stays in the
file. Between a GPU and a processor more than rounding differs: each draws dropout masks of its own,
so there a run is another draw of the same experiment.
"""

from __future__ import annotations

import json
import os
from dataclasses import dataclass
from pathlib import Path
from statistics import mean
from typing import Any

from fedloop.errors import ConfigError
from loraprobe.errors import DataError
from zoo.program import documented

from ..common.format import markdown
from ..common.paths import FOLDER
from ..common.setting import LARGER_BASE, make_files
from .cells import NO_ATTACK, Cell
from .lines import Line, cell_of, read_lines
from .run import machine, processes, run


@dataclass(frozen=True)
class Sample:
    """Which cells are run on other machines, and where what they came to is kept."""

    runs: tuple[Cell, ...]
    results: Path


RESULTS = FOLDER / "results"
FIRST = Sample(
    tuple(
        Cell(row, 5, share, 0) for row in ("FedAvg", "client", "cumulative") for share in (0.5, 0.1)
    ),
    RESULTS / "machines.json",
)
LARGER = Sample(
    (
        *(
            Cell(row, 5, share, 0, base=LARGER_BASE)
            for row in ("FedAvg", "client", "cumulative")
            for share in (1.0, 0.25)
        ),
        *(
            Cell(row, 5, 1.0, seed, base=LARGER_BASE)
            for row in ("FedAvg", "cumulative")
            for seed in (1, 2)
        ),
        *(Cell(NO_ATTACK, 0, 1.0, seed, base=LARGER_BASE) for seed in (0, 1, 2)),
    ),
    RESULTS / "larger_machines.json",
)
# What PyTorch's own kernels, MKL and oneDNN may use.
NARROWER = {"ATEN_CPU_CAPABILITY": "avx2", "MKL_CBWR": "AVX2", "ONEDNN_MAX_CPU_ISA": "AVX2"}
METRICS = {
    "refusal_strict": ("refusal, points", 100, ".1f"),
    "over_refusal_strict": ("over-refusal, points", 100, ".1f"),
    "loss": ("answer loss", 1, ".4f"),
    "rouge_l": ("ROUGE-L", 1, ".4f"),
}


def main() -> None:
    """Run them, and write down what they came to in place of what this kind of machine came to
    before.
    """
    parser = documented(__doc__, "data", "workers")
    parser.add_argument("--larger", action="store_true", help="the cells on the larger base model")
    options = parser.parse_args()
    sample = LARGER if options.larger else FIRST
    try:
        make_files(options.data)
        lines = committed(sample)
    except (ConfigError, DataError) as error:
        raise SystemExit(str(error)) from None
    if any(line["machine"] == machine() for line in lines.values()):
        os.environ |= NARROWER  # for the processes that are started
    rows = []
    with processes(options.workers) as pool:
        for cell, line in zip(sample.runs, pool.map(run, sample.runs), strict=True):
            rows.append(kept(line))
            print(
                f"{cell}: refusal {lines[str(cell)]['metrics']['refusal_strict']:.1%} and"
                f" {line['metrics']['refusal_strict']:.1%}",
                flush=True,
            )
    before = (
        json.loads(sample.results.read_text(encoding="utf-8")) if sample.results.exists() else []
    )
    others = [row for row in before if row["machine"] != rows[0]["machine"]]
    sample.results.write_text(json.dumps(others + rows, indent=1) + "\n", encoding="utf-8")


def committed(sample: Sample) -> dict[str, Line]:
    """The committed line of every run.

    Raises:
        DataError: one has none.
    """
    lines = {str(cell_of(line)): line for line in read_lines()}
    if absent := [str(cell) for cell in sample.runs if str(cell) not in lines]:
        raise DataError(
            f"no line of {', '.join(absent)}; `python -m paper_repro.grid.run` makes them (--full,"
            " or --larger)"
        )
    return {str(cell): lines[str(cell)] for cell in sample.runs}


def kept(line: Line) -> dict[str, Any]:
    """What is compared of a line."""
    metrics = {name: line["metrics"][name] for name in METRICS}
    return {
        "run": str(cell_of(line)),
        "machine": line["machine"],
        **metrics,
        "factors": line["clients"]["benign"] + line["clients"]["malicious"],
    }


def table(sample: Sample) -> str:
    """How far the runs of every machine are from the committed lines."""
    lines = {name: kept(line) for name, line in committed(sample).items()}
    rows = json.loads(sample.results.read_text(encoding="utf-8"))
    kinds = list(dict.fromkeys(row["machine"] for row in rows))
    pairs = {
        kind: [(row, lines[row["run"]]) for row in rows if row["machine"] == kind] for kind in kinds
    }
    table = [["measure", *(f"{kind}: mean distance, largest" for kind in kinds)]]
    for name, (title, scale, form) in METRICS.items():
        apart = [[scale * abs(a[name] - b[name]) for a, b in found] for found in pairs.values()]
        table.append([title, *(_shown(distances, form) for distances in apart)])
    factors = [
        [abs(x - y) for a, b in found for x, y in zip(a["factors"], b["factors"], strict=True)]
        for found in pairs.values()
    ]
    table.append(["mean factor of a client", *(_shown(one, ".4f") for one in factors)])
    makers = ", ".join(dict.fromkeys(line["machine"] for line in lines.values()))
    clients = sum(len(line["factors"]) for line in lines.values())
    return (
        f"{markdown(table)}\nFrom the lines of {makers}: {len(lines)} runs with {clients} clients."
    )


def _shown(distances: list[float], form: str) -> str:
    return f"{mean(distances):{form}}, {max(distances):{form}}"


if __name__ == "__main__":
    main()
