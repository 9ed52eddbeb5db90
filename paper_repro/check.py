"""Run cells of the grid again and compare them with their committed lines.

    python -m paper_repro.check --random 7                              # one cell, drawn by this seed
    python -m paper_repro.check --cell "cumulative/5/0.25/1" "shadow/3/1/0"
    python -m paper_repro.check --small --workers 2                     # `make repro-small`: 15 cells, under 15 minutes on two cores

Metrics and security factors have to agree to 1e-6, which is all that is written down of them: on the machine that made a
line, and on others whose sums are rounded alike, they do to the last digit. On another kind of processor training takes other
rounding errors, and a run ends elsewhere within the noise of a seed. Exit code 1 and one line a difference.
"""

from __future__ import annotations

import argparse
import random
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

from fedloop.errors import ConfigError
from loraprobe.errors import DataError

from .defences import processes, run
from .grid import NO_ATTACK, Cell
from .grid_format import markdown
from .grid_lines import Line, cell_of, read_lines
from .setting import DATA, make_files

TOLERANCE = 1e-6
# No attack and, with half of the clients fully or a quarter poisoned: no defence, the best and the worst rule, four levels.
SMALL = (
    Cell(NO_ATTACK, 0, 1.0, 0),
    *(Cell(row, 5, share, 0) for share in (1.0, 0.25) for row in ("FedAvg", "DnC", "Krum", "client", "step", "cumulative", "shadow")),
)


def main() -> None:
    """Run the cells that were asked for; exit code 1 if anything differs."""
    options = parser().parse_args()
    lines = {cell_of(line): line for line in read_lines()}
    try:
        make_files(options.data)
        cells = chosen(options, lines)
    except (ConfigError, DataError) as error:
        raise SystemExit(str(error)) from None
    print(f"{len(cells)} of {len(lines)} committed runs are made again", flush=True)
    again = {}
    began = time.monotonic()
    differing = 0
    with processes(min(options.workers, len(cells))) as pool:
        for cell, line in zip(cells, pool.map(run, cells), strict=True):
            found = list(differences(lines[cell], line, options.tolerance))
            differing += bool(found)
            again[cell] = line
            print(f"{cell}: {'; '.join(found) or 'as committed'}", flush=True)
    print(f"\n{side_by_side(lines, again)}\n{verdict(lines, again, differing, options.tolerance)} ({time.monotonic() - began:.0f} s)")
    sys.exit(differing > 0)


def parser() -> argparse.ArgumentParser:
    """The command line."""
    made = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    which = made.add_mutually_exclusive_group(required=True)
    which.add_argument("--cell", nargs="+", metavar="ROW/MALICIOUS/SHARE/SEED[/SOURCE/BENIGN]", help="these cells")
    which.add_argument("--random", type=int, metavar="SEED", help="cells drawn by this seed from all committed ones")
    which.add_argument("--small", action="store_true", help="a fixed small part of the first grid")
    made.add_argument("--count", type=int, default=1, help="with --random: how many")
    made.add_argument("--workers", type=int, default=2, help="processes; one a core")
    made.add_argument("--tolerance", type=float, default=TOLERANCE, help="largest difference of a metric or factor")
    made.add_argument("--data", type=Path, default=DATA, help="folder of the datasets, if their files are not made yet")
    return made


def chosen(options: argparse.Namespace, lines: Mapping[Cell, Line]) -> list[Cell]:
    """The cells to run.

    Raises:
        ConfigError: one is no cell of the grid, has no line, or its line is of another configuration.
    """
    if options.random is not None:
        cells = random.Random(options.random).sample(sorted(lines, key=str), options.count)
    else:
        cells = list(SMALL) if options.small else [Cell.named(name) for name in options.cell]
    for cell in cells:
        if cell not in lines:
            raise ConfigError(f"{cell} has no line in the results; expected a run that was made. `python -m paper_repro.defences --full` makes it.")
        if lines[cell]["config"] != cell.digest:
            raise ConfigError(
                f"the line of {cell} is of the configuration {lines[cell]['config']}; its configuration is now {cell.digest}. Run "
                "`python -m paper_repro.defences` again, or go back to the commit that the line is of."
            )
    return cells


def differences(old: Line, new: Line, tolerance: float = TOLERANCE) -> Iterator[str]:
    """What differs between two lines of a cell, in words; seconds do not count, and neither does what only one of them records."""
    for name in sorted(old["metrics"].keys() | new["metrics"].keys()):
        one, other = old["metrics"].get(name), new["metrics"].get(name)
        if one is None or other is None or not abs(one - other) <= tolerance:
            yield f"{name} was {one}, is {other}"
    for what in ("factors", "clients"):
        for role in ("benign", "malicious") if what in old else ():
            one, other = old[what][role], new[what][role]
            if len(one) != len(other) or not all(abs(a - b) <= tolerance for a, b in zip(one, other, strict=True)):
                yield f"{what}, {role}: were {one}, are {other}"
    for name in ("skipped", "refused"):
        if old[name] != new[name]:
            yield f"{name} was {old[name]}, is {new[name]}"


def side_by_side(lines: Mapping[Cell, Line], again: Mapping[Cell, Line]) -> str:
    """A table of what was committed and what came out."""
    names = ("refusal_rule", "refusal_strict", "over_refusal_strict", "loss", "rouge_l")
    rows = [["run", *(f"{name}: committed / again" for name in names)]]
    for cell, line in again.items():
        rows.append([str(cell), *(f"{lines[cell]['metrics'][name]:.6g} / {line['metrics'][name]:.6g}" for name in names)])
    return markdown(rows)


def verdict(lines: Mapping[Cell, Line], again: Mapping[Cell, Line], differing: int, tolerance: float) -> str:
    """The last line of the report."""
    if not differing:
        return f"All {len(again)} runs are as committed, every metric and factor to {tolerance:g}."
    machines = [sorted({line.get("machine", "not recorded") for line in group}) for group in ([lines[cell] for cell in again], again.values())]
    return (
        f"{differing} of {len(again)} runs differ. The committed ones were made with {_listed(machines[0])}; these with {_listed(machines[1])}. "
        "If these are not the same kind, compare the tables within the spread over seeds, or give a --tolerance."
    )


def _listed(names: Sequence[str]) -> str:
    return " and ".join(names)


if __name__ == "__main__":
    main()
