"""Refusal that a federation's model keeps on a real base model: by attack, defence and source."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from figures import common
from paper_repro.federation.cells import ATTACKS, SOURCES
from paper_repro.federation.page import pooled
from paper_repro.federation.prepare import HARMFUL
from paper_repro.federation.run import Line, read_lines
from zoo.smollm2.refusal import wilson

ROWS = {  # row of the table -> what its points are called
    "FedAvg": "no defence",
    "rival": "rival",
    "ours": "ours",
    "ours, no change": "ours, rejected ones as no change",
    "ours, strict": "the same with the strict cut",
}
COLUMNS = sorted(ATTACKS)  # nobody, then three, then five


def plot_refusals(ax: Axes, lines: Sequence[Line], source: str) -> None:
    """Refused of all prompts, with Wilson intervals; a place without a point was not run."""
    found = {
        (line["row"], line["malicious"], line["share"]): pooled(line, HARMFUL)
        for line in lines
        if line["source"] == source and line["seed"] == 0
    }
    for number, (row, name) in enumerate(ROWS.items()):
        colour, marker = common.LINES[number]
        places = [at for at, attack in enumerate(COLUMNS) if (row, *attack) in found]
        counts = [found[row, *COLUMNS[at]] for at in places]
        values = np.array([hits / n for hits, n in counts])
        ends = np.array([wilson(hits, n) for hits, n in counts]).reshape(-1, 2)
        ax.errorbar(
            np.array(places) + 0.15 * (number - 2),
            values,
            np.maximum(np.abs(ends.T - values), 0.0),
            color=colour,
            marker=marker,
            linestyle="",
            markersize=4.5,
            elinewidth=1.0,
            capsize=2,
            label=name,
        )
    names = [f"{count} of 10\n{share:.0%}" if count else "nobody" for count, share in COLUMNS]
    ax.set_xticks(range(len(COLUMNS)), names)
    ax.set_title(f"poison from {source}", pad=8)
    ax.set_ylim(0, 1)


def pictures() -> dict[str, Figure]:
    """federation."""
    lines = read_lines()
    fig, axes = common.panels(1, len(SOURCES), (10.5, 4.0), sharey=True)
    for ax, source in zip(axes.flat, SOURCES, strict=True):
        plot_refusals(ax, lines, source)
    axes[0, 0].set_ylabel("harmful prompts refused")
    nobody = next(line for line in lines if (line["row"], line["malicious"]) == ("FedAvg", 0))
    hits, n = pooled(nobody, HARMFUL)
    for ax in axes.flat:
        common.reference(ax, hits / n)
    common.legend_above(fig, axes[0, 0], len(ROWS))
    common.caption(
        fig,
        f"SmolLM2-135M taught to refuse, ten clients, six rounds, seed 0; malicious clients and"
        f" the share of poison in their data below.\n{n} prompts of AdvBench, HarmBench (test) and"
        " TDC2023; bars: 95 % Wilson intervals over prompts. Dotted: plain averaging, nobody"
        " attacks. No point: not run.",
    )
    return {"federation": fig}
