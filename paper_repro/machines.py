"""How far runs move on another kind of machine: some cells of the grid there, beside their committed lines.

    python -m paper_repro.machines --data ../shared/data      # about 5 minutes on two cores: results/machines.json

Another processor picks other instructions, adds up in another order, and training carries the last digits on. What comes out differs by as much
as a run is worth in decimals, and says how close `paper_repro.check` can ask a run on another machine to come to its line. On the kind of
machine that made the lines the runs take AVX2 in place of AVX-512; what other kinds came to stays in the file.
"""

from __future__ import annotations

import argparse
import json
import os
from pathlib import Path
from statistics import mean
from typing import Any

from fedloop.errors import ConfigError
from loraprobe.errors import DataError

from .defences import machine, processes, run
from .grid import Cell
from .grid_format import markdown
from .grid_lines import Line, cell_of, read_lines
from .setting import DATA, make_files

RESULTS = Path(__file__).parent / "results" / "machines.json"
RUNS = tuple(Cell(row, 5, share, 0) for row in ("FedAvg", "client", "cumulative") for share in (0.5, 0.1))
# What PyTorch's own kernels, MKL and oneDNN may use.
NARROWER = {"ATEN_CPU_CAPABILITY": "avx2", "MKL_CBWR": "AVX2", "ONEDNN_MAX_CPU_ISA": "AVX2"}
METRICS = {
    "refusal_strict": ("refusal, points", 100, ".1f"),
    "over_refusal_strict": ("over-refusal, points", 100, ".1f"),
    "loss": ("answer loss", 1, ".4f"),
    "rouge_l": ("ROUGE-L", 1, ".4f"),
}


def main() -> None:
    """Run them, and write down what they came to in place of what this kind of machine came to before."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--workers", type=int, default=2, help="processes; one a core")
    parser.add_argument("--data", type=Path, default=DATA, help="folder of the datasets, if their files are not made yet")
    options = parser.parse_args()
    try:
        make_files(options.data)
        lines = committed()
    except (ConfigError, DataError) as error:
        raise SystemExit(str(error)) from None
    if any(line["machine"] == machine() for line in lines.values()):
        os.environ |= NARROWER  # for the processes that are started
    rows = []
    with processes(options.workers) as pool:
        for cell, line in zip(RUNS, pool.map(run, RUNS), strict=True):
            rows.append(kept(line))
            print(f"{cell}: refusal {lines[str(cell)]['metrics']['refusal_strict']:.1%} and {line['metrics']['refusal_strict']:.1%}", flush=True)
    others = [row for row in json.loads(RESULTS.read_text(encoding="utf-8")) if row["machine"] != rows[0]["machine"]] if RESULTS.exists() else []
    RESULTS.write_text(json.dumps(others + rows, indent=1) + "\n", encoding="utf-8")


def committed() -> dict[str, Line]:
    """The committed line of every run.

    Raises:
        DataError: one has none.
    """
    lines = {str(cell_of(line)): line for line in read_lines()}
    if absent := [str(cell) for cell in RUNS if str(cell) not in lines]:
        raise DataError(f"no line of {', '.join(absent)}; `python -m paper_repro.defences --full` makes them")
    return {str(cell): lines[str(cell)] for cell in RUNS}


def kept(line: Line) -> dict[str, Any]:
    """What is compared of a line."""
    metrics = {name: line["metrics"][name] for name in METRICS}
    return {"run": str(cell_of(line)), "machine": line["machine"], **metrics, "factors": line["clients"]["benign"] + line["clients"]["malicious"]}


def table() -> str:
    """How far the runs of every machine are from the committed lines."""
    lines = {name: kept(line) for name, line in committed().items()}
    rows = json.loads(RESULTS.read_text(encoding="utf-8"))
    kinds = list(dict.fromkeys(row["machine"] for row in rows))
    head = ["measure", *(f"{kind}: mean distance, largest" for kind in kinds)]
    table = [[title, *(_distance(lines, rows, kind, name, scale, form) for kind in kinds)] for name, (title, scale, form) in METRICS.items()]
    table.append(["mean factor of a client", *(_factors(lines, rows, kind) for kind in kinds)])
    makers = ", ".join(dict.fromkeys(line["machine"] for line in lines.values()))
    clients = sum(len(line["factors"]) for line in lines.values())
    return f"{markdown([head, *table])}\nFrom the lines of {makers}: {len(lines)} runs with {clients} clients."


def _distance(lines: dict[str, Any], rows: list[dict[str, Any]], kind: str, name: str, scale: int, form: str) -> str:
    return _shown([scale * abs(row[name] - lines[row["run"]][name]) for row in rows if row["machine"] == kind], form)


def _factors(lines: dict[str, Any], rows: list[dict[str, Any]], kind: str) -> str:
    pairs = [pair for row in rows if row["machine"] == kind for pair in zip(row["factors"], lines[row["run"]]["factors"], strict=True)]
    return _shown([abs(one - other) for one, other in pairs], ".4f")


def _shown(distances: list[float], form: str) -> str:
    return f"{mean(distances):{form}}, {max(distances):{form}}"


if __name__ == "__main__":
    main()
