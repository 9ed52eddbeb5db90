"""Which layer and which factor of an update tells clients apart.

AUROC per layer, with 95 % intervals.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from figures import common
from figures.common import Row, chosen, read_numbers

PROTOCOLS = {"in distribution": "all benign", "unseen": "the unseen benign source"}
LAYERS, FACTORS = ("0", "1", "2", "3", "all"), ("A", "B", "AB")


def plot(ax: Axes, rows: Sequence[Row], protocol: str, share: float) -> None:
    """Draw one panel into ax: a line a factor over the layers."""
    where = {"modules": "all", "step": 5, "protocol": protocol, "share": share}
    for number, factors in enumerate(FACTORS):
        own = [
            chosen(rows, layer=layer, factors=factors, against=PROTOCOLS[protocol], **where)[0]
            for layer in LAYERS
        ]
        # beside each other, or intervals cover each other
        places = [place + 0.12 * (number - 1) for place in range(len(LAYERS))]
        common.points(ax, number, places[:-1], own[:-1], label=factors)
        common.points(ax, number, places[-1:], own[-1:])
    common.chance(ax)
    ax.axvline(len(LAYERS) - 1.5, color="#dddddd", linewidth=0.8, zorder=0)
    ax.set_xticks(range(len(LAYERS)), LAYERS)


def draw(numbers: dict[str, Any]) -> Figure:
    """The figure: a row a protocol, a column a poison share."""
    shares = numbers["about"]["zoo_design"]["shares"]
    fig, axes = common.panels(2, len(shares), (11.5, 5.8), sharex=True, sharey=True)
    for line, protocol in zip(axes, PROTOCOLS, strict=True):
        for ax, share in zip(line, shares, strict=True):
            plot(ax, numbers["views"], protocol, share)
            ax.set_title(f"{protocol}, {share:.0%} poison")
        line[0].set_ylabel("AUROC")
    for ax in axes[-1]:
        ax.set_xlabel("layer whose deltas are read")
    common.legend_above(fig, axes[0, 0], len(FACTORS), "factor whose deltas are read")
    about = numbers["about"]
    common.caption(
        fig,
        f"{about['clients']} clients ({about['malicious_clients']} malicious), linear head, 95 %"
        f" client-bootstrap intervals, seed {about['seed']}. Unseen: mean over 36 pairs of a"
        " malicious and a benign source that no head met.",
    )
    return fig


def pictures() -> dict[str, Figure]:
    """layers."""
    return {"layers": draw(read_numbers())}
