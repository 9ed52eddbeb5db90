"""How far runs move when sums are rounded otherwise: some with AVX2, where their committed lines were made with AVX-512.

    python -m paper_repro.instructions --data ../shared/data      # about 3 minutes on two cores: results/instructions.json

Another processor picks other instructions, adds up in another order, and training carries the last digits on. What comes out differs by as much
as the run is worth in decimals, and says how close a run on another kind of machine has to come to its committed line.
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

from .defences import processes, run
from .grid import Cell
from .grid_format import markdown
from .grid_lines import cell_of, read_lines
from .setting import DATA, make_files

RESULTS = Path(__file__).parent / "results" / "instructions.json"
RUNS = tuple(Cell(row, 5, share, 0) for row in ("FedAvg", "client", "cumulative") for share in (0.5, 0.1))
# What PyTorch's own kernels, MKL and oneDNN may use.
NARROWER = {"ATEN_CPU_CAPABILITY": "avx2", "MKL_CBWR": "AVX2", "ONEDNN_MAX_CPU_ISA": "AVX2"}
METRICS = {
    "refusal_strict": ("refusal, points", 100),
    "over_refusal_strict": ("over-refusal, points", 100),
    "loss": ("answer loss", 1),
    "rouge_l": ("ROUGE-L", 1),
}


def main() -> None:
    """Run them and write down both lines' metrics and the mean factors."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--workers", type=int, default=2, help="processes; one a core")
    parser.add_argument("--data", type=Path, default=DATA, help="folder of the datasets, if their files are not made yet")
    options = parser.parse_args()
    try:
        make_files(options.data)
        committed = {cell_of(line): line for line in read_lines()}
    except (ConfigError, DataError) as error:
        raise SystemExit(str(error)) from None
    if absent := [str(cell) for cell in RUNS if "machine" not in committed.get(cell, {})]:
        raise SystemExit(f"no line that names its machine of {', '.join(absent)}; `python -m paper_repro.defences --full` makes them")
    os.environ |= NARROWER  # for the processes that are started
    rows = []
    with processes(options.workers) as pool:
        for cell, line in zip(RUNS, pool.map(run, RUNS), strict=True):
            rows.append({"run": str(cell), "committed": kept(committed[cell]), "again": kept(line)})
            print(f"{cell}: refusal {rows[-1]['committed']['refusal_strict']:.1%} and {rows[-1]['again']['refusal_strict']:.1%}", flush=True)
    RESULTS.write_text(json.dumps(rows, indent=1) + "\n", encoding="utf-8")


def kept(line: dict[str, Any]) -> dict[str, Any]:
    """What is compared of a line."""
    metrics = {name: line["metrics"][name] for name in METRICS}
    return {"machine": line["machine"], **metrics, "factors": line["clients"]["benign"] + line["clients"]["malicious"]}


def table() -> str:
    """How far apart the two lines of a run are, over the runs."""
    rows = json.loads(RESULTS.read_text(encoding="utf-8"))
    apart = {name: [abs(row["committed"][name] - row["again"][name]) * scale for row in rows] for name, (_, scale) in METRICS.items()}
    factors = [abs(one - other) for row in rows for one, other in zip(row["committed"]["factors"], row["again"]["factors"], strict=True)]
    shown = [(METRICS[name][0], values) for name, values in apart.items()] + [("mean factor of a client", factors)]
    digits = {True: ".1f", False: ".4f"}
    lines = [["measure", "mean distance", "largest distance", "pairs"]]
    for name, values in shown:
        form = digits["points" in name]
        lines.append([name, f"{mean(values):{form}}", f"{max(values):{form}}", str(len(values))])
    machines = " and ".join(dict.fromkeys(row[which]["machine"] for which in ("committed", "again") for row in rows))
    return f"{markdown(lines)}\n{machines}."


if __name__ == "__main__":
    main()
