"""Run cells of the grid again and compare them with their committed lines.

    python -m paper_repro.check --random 7            # one cell, drawn by this seed from all
                                                      # committed ones
    python -m paper_repro.check --random 7 --count 3  # three
    python -m paper_repro.check --cell "cumulative/5/0.5/0" "shadow/3/1/0"
    python -m paper_repro.check --small --workers 2   # `make repro-small`: 12 cells, under 15
                                                      # minutes on two cores

On the kind of machine that made a line, metrics and security factors have to agree to 1e-6, which
is all that is written down of them. On another kind training takes other rounding errors, and a run
ends a little elsewhere (`paper_repro.grid.machines` measures how far): there they have to agree to
0.05, which is 5 points of refusal. A GPU draws other dropout masks than a processor does, so what
one made is on the other no run to compare with: a draw leaves it out. Exit code 1 and one line a
difference.
"""

from __future__ import annotations

import argparse
import random
import sys
import time
from collections.abc import Iterator, Mapping

from fedloop.errors import ConfigError
from loraprobe.errors import DataError
from zoo.program import documented

from .common.format import markdown
from .common.setting import make_files
from .grid.cells import Cell
from .grid.lines import Line, cell_of, read_lines
from .grid.run import machine, on_gpu, processes, run

TOLERANCE, ELSEWHERE = 1e-6, 0.05
# Half of the clients malicious, half or a tenth of their data poison: no defence, the best rule of
# the first grid, four levels.
SMALL = tuple(
    Cell(row, 5, share, 0)
    for row in ("FedAvg", "DnC", "client", "step", "cumulative", "shadow")
    for share in (0.5, 0.1)
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
            tolerance = (
                options.tolerance
                if options.tolerance is not None
                else usual_tolerance(lines[cell], line)
            )
            found = list(differences(lines[cell], line, tolerance))
            differing += bool(found)
            again[cell] = line
            print(f"{cell}: {'; '.join(found) or f'as committed, to {tolerance:g}'}", flush=True)
    print(
        f"\n{side_by_side(lines, again)}\n{verdict(lines, again, differing)}"
        f" ({time.monotonic() - began:.0f} s)"
    )
    sys.exit(differing > 0)


def parser() -> argparse.ArgumentParser:
    """The command line."""
    made = documented(__doc__, "data", "workers")
    which = made.add_mutually_exclusive_group(required=True)
    which.add_argument(
        "--cell",
        nargs="+",
        metavar="ROW/MALICIOUS/SHARE/SEED[/SOURCE/BENIGN[/BASE]]",
        help="these cells",
    )
    which.add_argument(
        "--random",
        type=int,
        metavar="SEED",
        help="cells drawn by this seed from all committed ones",
    )
    which.add_argument("--small", action="store_true", help="a fixed small part of the first grid")
    made.add_argument("--count", type=int, default=1, help="with --random: how many")
    made.add_argument(
        "--tolerance",
        type=float,
        help=(
            f"largest difference of a metric or factor, instead of {TOLERANCE:g} and {ELSEWHERE:g}"
        ),
    )
    return made


def chosen(options: argparse.Namespace, lines: Mapping[Cell, Line]) -> list[Cell]:
    """The cells to run.

    Raises:
        ConfigError: one is no cell of the grid, has no line, or its line is of another
            configuration or a GPU's and this a processor.
    """
    if options.random is not None:
        here = machine()
        alike = [cell for cell, line in lines.items() if on_gpu(line["machine"]) == on_gpu(here)]
        drawn = sorted(alike, key=str)
        if not 0 < options.count <= len(drawn):
            raise ConfigError(
                f"--count: got {options.count}; expected 1 to {len(drawn)}, the number of lines to"
                " draw from"
            )
        cells = random.Random(options.random).sample(drawn, options.count)
    else:
        cells = list(SMALL) if options.small else [Cell.named(name) for name in options.cell]
    for cell in cells:
        if cell not in lines:
            raise ConfigError(
                f"{cell} has no line in the results; expected a run that was made. `python -m"
                " paper_repro.grid.run --full` makes it."
            )
        if lines[cell]["config"] != cell.digest:
            raise ConfigError(
                f"the line of {cell} is of the configuration {lines[cell]['config']}; its"
                f" configuration is now {cell.digest}. Run `python -m paper_repro.grid.run` again,"
                " or go back to the commit that the line is of."
            )
        if options.tolerance is None and on_gpu(lines[cell]["machine"]) != on_gpu(machine()):
            raise ConfigError(
                f"the line of {cell} was made by {lines[cell]['machine']}, and this is {machine()};"
                " expected a GPU for what a GPU made and a processor for what one made, since they"
                " draw other dropout masks. `python -m paper_repro.grid.machines --larger` says how"
                " far such runs end from each other; with a --tolerance they are compared all the"
                " same."
            )
    return cells


def usual_tolerance(old: Line, new: Line) -> float:
    """How close two lines of a cell have to come.

    That depends on whether one kind of machine made both.
    """
    return TOLERANCE if old["machine"] == new["machine"] else ELSEWHERE


def differences(old: Line, new: Line, tolerance: float) -> Iterator[str]:
    """What differs between two lines of a cell, in words; seconds do not count."""
    for name in sorted(old["metrics"].keys() | new["metrics"].keys()):
        one, other = old["metrics"].get(name), new["metrics"].get(name)
        if one is None or other is None or not abs(one - other) <= tolerance:
            yield f"{name} was {one}, is {other}"
    for what in ("factors", "clients"):
        for role in ("benign", "malicious"):
            one, other = old[what][role], new[what][role]
            if len(one) != len(other) or not all(
                abs(a - b) <= tolerance for a, b in zip(one, other, strict=True)
            ):
                yield f"{what}, {role}: were {one}, are {other}"
    for name in ("skipped", "refused"):
        if old[name] != new[name]:
            yield f"{name} was {old[name]}, is {new[name]}"


def side_by_side(lines: Mapping[Cell, Line], again: Mapping[Cell, Line]) -> str:
    """A table of what was committed and what came out."""
    names = ("refusal_rule", "refusal_strict", "over_refusal_strict", "loss", "rouge_l")
    rows = [["run", *(f"{name}: committed / again" for name in names)]]
    for cell, line in again.items():
        rows.append(
            [
                str(cell),
                *(
                    f"{lines[cell]['metrics'][name]:.6g} / {line['metrics'][name]:.6g}"
                    for name in names
                ),
            ]
        )
    return markdown(rows)


def verdict(lines: Mapping[Cell, Line], again: Mapping[Cell, Line], differing: int) -> str:
    """The last line of the report."""
    same = sum(lines[cell]["machine"] == line["machine"] for cell, line in again.items())
    made = f"{same} of them were made on this kind of machine ({machine()})"
    if not differing:
        return f"All {len(again)} runs are as committed, every metric and factor; {made}."
    return (
        f"{differing} of {len(again)} runs differ; {made}. Look whether the others lie within the"
        " spread over seeds, or give a --tolerance."
    )


if __name__ == "__main__":
    main()
