"""Trust over rounds: what each level leaves malicious clients of their weight while the global LoRA
drifts, on both base models of the grid.

python -m figures.trust
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import product
from statistics import mean

from matplotlib.axes import Axes

from figures import style
from figures.options import folder_of
from loraprobe.errors import DataError
from paper_repro.common.setting import BASES, BENIGN_SETS
from paper_repro.grid.lines import Line, cell_of, read_lines

LEVELS = ("step", "client", "cumulative", "shadow")
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
    for (colour, marker), level in zip(style.LINES, LEVELS, strict=False):
        curves = [line["factors"]["malicious"] for line in chosen(lines, level, base, share)]
        rounds = range(1, len(curves[0]) + 1)
        ax.plot(
            rounds,
            [mean(values) for values in zip(*curves, strict=True)],
            color=colour,
            marker=marker,
            markersize=4,
            label=level,
        )
        low, high = (list(map(pick, zip(*curves, strict=True))) for pick in (min, max))
        ax.fill_between(rounds, low, high, color=colour, alpha=0.12, linewidth=0)
    ax.set_title(f"{base}, {share:.0%} poison")
    ax.set_ylim(-0.03, 1.03)
    ax.set_xlabel("round")


def main(argv: Sequence[str] | None = None) -> None:
    """Write trust.png and trust.pdf."""
    lines = read_lines()
    fig, axes = style.panels(len(SHARES), len(BASES), (8.0, 6.4), sharey=True)
    for ax, (share, base) in zip(axes.flat, product(SHARES, BASES), strict=True):
        plot_trust(ax, lines, base, share)
    for ax in axes[:, 0]:
        ax.set_ylabel("security factor of malicious clients")
    style.legend_above(fig, axes[0, 0], len(LEVELS))
    counts = {
        len(chosen(lines, level, base, share))
        for level, base, share in product(LEVELS, BASES, SHARES)
    }
    style.caption(
        fig,
        f"{MALICIOUS} of 10 clients malicious, {SOURCE}, {BENIGN} benign set;"
        f" {' to '.join(map(str, sorted(counts)))} seeds a line, bands from the lowest to the"
        " highest.\n0: such a client counts for nothing; 1: as much as an honest one. At full"
        " poison cumulative lies under shadow.",
    )
    style.save_both(fig, folder_of("trust", __doc__, argv), "trust", dpi=110)


if __name__ == "__main__":
    main()
