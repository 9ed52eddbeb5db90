"""The figure on a probe's card.

How its scores are distributed, a histogram for each kind of adapter, with the threshold.

It is drawn from counts in the probe's facts, so that a card can be written from the probe alone.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from io import BytesIO
from typing import Any

import numpy as np

from ..study.embed import BENIGN_COLOURS, HARD_COLOURS, MALICIOUS_COLOURS

FIGURE_NAME = "scores.png"
BINS = 40
_FIELDS = {"what", "unit", "bins", "counts"}
_MAX_BINS, _MAX_GROUPS = 1000, 24
_STYLE: dict[Any, Any] = {
    "font.size": 9.0,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.edgecolor": "#666666",
}


def distribution_of(what: str, unit: str, groups: Mapping[str, np.ndarray]) -> dict[str, Any]:
    """The fact that the figure is drawn from.

    Group name -> its scores (n,) in [0, 1], counted in 40 bins.

    >>> distribution_of("scores", "adapter", {"benign": np.array([0.0, 0.01, 1.0])})["counts"]["benign"][::39]
    [2, 1]
    """
    counts = {
        name: np.histogram(scores, BINS, (0.0, 1.0))[0].tolist() for name, scores in groups.items()
    }
    return {"what": what, "unit": unit, "bins": BINS, "counts": counts}


def score_distribution(facts: Mapping[str, Any]) -> Mapping[str, Any] | None:
    """What `distribution_of` made.

    Facts["score_distribution"], or else facts["training"]["score_distribution"]; None without.

    Raises:
        TypeError, ValueError: it is of another form.
    """
    found = facts.get("score_distribution", facts.get("training", {}).get("score_distribution"))
    if found is None:
        return None
    if (
        not isinstance(found, Mapping)
        or set(found) != _FIELDS
        or not isinstance(found["counts"], Mapping)
    ):
        raise TypeError(
            f"score_distribution: expected an object with the fields {', '.join(sorted(_FIELDS))},"
            " counts an object of groups"
        )
    if not isinstance(found["what"], str) or not isinstance(found["unit"], str):
        raise TypeError("score_distribution: expected what and unit to be text")
    if (
        type(found["bins"]) is not int
        or not 1 < found["bins"] <= _MAX_BINS
        or not 0 < len(found["counts"]) <= _MAX_GROUPS
    ):
        raise ValueError(
            f"score_distribution: expected 2 to {_MAX_BINS} bins and 1 to {_MAX_GROUPS} groups"
        )
    for name, counts in found["counts"].items():
        if (
            not isinstance(counts, list)
            or len(counts) != found["bins"]
            or not all(type(count) is int and count >= 0 for count in counts)
        ):
            raise ValueError(
                f"score_distribution: group {name!r}: expected {found['bins']} counts, whole"
                " numbers of at least 0"
            )
    return found


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
        distribution: as `score_distribution` returns it.
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
    """Warm for malicious, grey for hard negatives, cool for the others, as in every figure of this
    library.
    """
    used = dict.fromkeys(range(3), 0)
    colours = []
    for name in names:
        kind = 2 if "malicious" in name.lower() else 1 if "hard" in name.lower() else 0
        palette = (BENIGN_COLOURS, HARD_COLOURS, MALICIOUS_COLOURS)[kind]
        colours.append(palette[used[kind] % len(palette)])
        used[kind] += 1
    return colours


def _shown(text: str) -> str:
    """Text from a stranger's file as it stands, on one line: $ would start a formula."""
    return "".join(char for char in " ".join(str(text).split())[:80] if char.isprintable()).replace(
        "$", r"\$"
    )
