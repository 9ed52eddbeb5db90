"""Trust over rounds: what each level leaves malicious clients of their weight.

The global LoRA drifts meanwhile; on both base models of the grid, beside no defence.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import product

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from figures import common
from loraprobe.errors import DataError
from paper_repro.common.setting import BASES, BENIGN_SETS
from paper_repro.grid.lines import Line, cell_of, read_lines

# row of the grid -> how its line is drawn: marks of other sizes, so that lines on each other show
LEVELS = {
    "step": {"markersize": 4},
    "client": {"markersize": 4},
    "cumulative": {"markersize": 8},
    "shadow": {"markersize": 4, "linestyle": "--"},
    "FedAvg": {"markersize": 4, "linestyle": ":"},
}
NAMES = {"FedAvg": "no defence"}
MALICIOUS, SHARES, SOURCE, BENIGN = 5, (1.0, 0.25), "jailbreakbench", next(iter(BENIGN_SETS))


def chosen(lines: Sequence[Line], level: str, base: str, share: float) -> list[Line]:
    """The seeds of one cell.

    Raises:
        DataError: it was not run.
    """
    wanted = (level, MALICIOUS, share, SOURCE, BENIGN, base)
    found = [
        line
        for line in lines
        if (c := cell_of(line))
        and (c.row, c.malicious, c.share, c.source, c.benign, c.base) == wanted
    ]
    if not found:
        raise DataError(
            f"no run of {level} with {MALICIOUS} of 10 at {share:.0%} poison on {base}. Make it"
            " with python -m paper_repro.grid.run, or --larger"
        )
    return found


def plot_trust(ax: Axes, lines: Sequence[Line], base: str, share: float) -> None:
    """Mean factor of the malicious clients over rounds, mean over seeds.

    Bands from the lowest seed to the highest.
    """
    for number, (level, look) in enumerate(LEVELS.items()):
        curves = [line["factors"]["malicious"] for line in chosen(lines, level, base, share)]
        common.band(ax, number, curves, NAMES.get(level, level), **look)
    ax.set_title(f"{base}, {share:.0%} poison", pad=10)
    ax.set_ylim(0, 1)
    ax.set_xlabel("round")


def pictures() -> dict[str, Figure]:
    """trust."""
    lines = read_lines()
    fig, axes = common.panels(len(SHARES), len(BASES), (8.0, 6.4), sharey=True)
    for ax, (share, base) in zip(axes.flat, product(SHARES, BASES), strict=True):
        plot_trust(ax, lines, base, share)
    for ax in axes[:, 0]:
        ax.set_ylabel("security factor of malicious clients")
    common.legend_above(fig, axes[0, 0], len(LEVELS))
    cells = product(LEVELS, BASES, SHARES)
    counts = {len(chosen(lines, level, base, share)) for level, base, share in cells}
    common.caption(
        fig,
        f"{MALICIOUS} of 10 clients malicious, {SOURCE}, {BENIGN} benign set;"
        f" {' to '.join(map(str, sorted(counts)))} seeds a line, bands from the lowest to the"
        " highest.\n0: such a client counts for nothing; 1: as much as an honest one, as without a"
        " defence.",
    )
    return {"trust": fig}
