"""The figure on a probe's card: a histogram of the scores of each kind of adapter.

It is drawn from counts in the probe's facts, so that a card can be written from the probe alone.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from io import BytesIO
from typing import Any

import numpy as np

from ..colours import BENIGN_COLOURS, HARD_COLOURS, MALICIOUS_COLOURS
from ..errors import quoted

FIGURE_NAME = "scores.png"
_STYLE: dict[Any, Any] = {
    "font.size": 9.0,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.edgecolor": "#666666",
}


def can_draw() -> bool:
    """Whether matplotlib, of the `figures` extra, can be imported."""
    try:
        import matplotlib.figure  # noqa: F401
    except ImportError:
        return False
    return True


def draw_scores(distribution: Mapping[str, Any], threshold: float, lower_cut: float) -> bytes:
    """The figure as a PNG; equal arguments give equal bytes with the same matplotlib.

    A row for each group, on a common logarithmic scale of the group's own share: a small group and
    a rare score are as visible as the others.

    Args:
        distribution: as `loraprobe.distribution.score_distribution` returns it.
        threshold, lower_cut: drawn as lines; the second only where it differs.
    """
    import matplotlib
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    groups = {name: np.asarray(counts) for name, counts in distribution["counts"].items()}
    floor = 0.5 / max(1, *(int(counts.sum()) for counts in groups.values()))
    with matplotlib.rc_context():
        matplotlib.rcdefaults()  # not the reader's own settings
        matplotlib.rcParams.update(_STYLE)
        figure = Figure(figsize=(8.0, 1.1 + 0.62 * len(groups)), layout="constrained")
        FigureCanvasAgg(figure)
        rows = figure.subplots(len(groups), sharex=True, sharey=True, squeeze=False)[:, 0]
        for ax, (name, counts), colour in zip(
            rows, groups.items(), _colours(list(groups)), strict=True
        ):
            share = np.maximum(counts / max(1, counts.sum()), floor)
            ax.stairs(
                share,
                np.linspace(0.0, 1.0, len(counts) + 1),
                fill=True,
                color=colour,
                baseline=floor,
            )
            ax.axvline(threshold, color="black", linewidth=1.2, linestyle="--", clip_on=False)
            if lower_cut != threshold:
                ax.axvline(lower_cut, color="black", linewidth=0.9, linestyle=":", clip_on=False)
            ax.text(
                1.015,
                0.5,
                f"{_shown(name)}\nn = {counts.sum()}",
                transform=ax.transAxes,
                va="center",
            )
        rows[0].set(xlim=(0.0, 1.0), ylim=(floor, 1.3), yscale="log")
        decades = int(-np.log10(floor))
        ticks = [10.0**-power for power in range(0, decades + 1, 2 if decades > 2 else 1)]
        rows[0].set_yticks(ticks, [f"{100 * tick:g} %" for tick in ticks])
        rows[0].set_yticks([], minor=True)
        cuts = f"dashed: threshold {threshold:.3g}" + (
            f", dotted: benign below {lower_cut:.3g}" if lower_cut != threshold else ""
        )
        rows[0].set_title(_shown(distribution["what"]), loc="left", fontsize=9)
        rows[-1].set_xlabel(f"P(malicious) of one {_shown(distribution['unit'])}; {cuts}")
        figure.supylabel("share of the group, log scale", fontsize=9)
        buffer = BytesIO()
        figure.savefig(
            buffer, dpi=130, format="png", facecolor="white", metadata={"Software": None}
        )
    return buffer.getvalue()


def _colours(names: Sequence[str]) -> list[str]:
    """Warm for malicious, grey for hard negatives, cool for the others, as in every figure here."""
    used = dict.fromkeys(range(3), 0)
    colours = []
    for name in names:
        kind = 2 if "malicious" in name.lower() else 1 if "hard" in name.lower() else 0
        palette = (BENIGN_COLOURS, HARD_COLOURS, MALICIOUS_COLOURS)[kind]
        colours.append(palette[used[kind] % len(palette)])
        used[kind] += 1
    return colours


def _shown(text: str) -> str:
    """Text from a stranger's file on one line; $ would start a formula."""
    return quoted(" ".join(str(text).split()), 80).replace("$", r"\$")
