"""After how many local steps, and in which module, clients can be told apart."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from figures import common
from figures.common import Row, chosen, read_numbers

STEPS = (1, 2, 3, 4, 5)
MODULES = {"q_proj": "q", "v_proj": "v", "all": "q and v"}
FACTORS = ("A", "B", "AB")
LAYERS = {"first layer's B": "0", "all B": "all"}


def plot_steps(ax: Axes, rows: Sequence[Row], layer: str, shares: Sequence[float]) -> None:
    """Draw AUROC over local steps into ax, a line a poison share; heads fitted at the same step."""
    where = {"layer": layer, "factors": "B", "modules": "all", "protocol": "unseen"}
    for number, share in enumerate(shares):
        own = [chosen(rows, step=step, share=share, **where)[0] for step in STEPS]
        places = [step + 0.08 * (number - 1.5) for step in STEPS]
        common.points(ax, number, places, own, label=f"{share:.0%} poison")
    common.chance(ax)
    ax.set_xticks(STEPS)


def plot_modules(ax: Axes, rows: Sequence[Row], factors: str, shares: Sequence[float]) -> None:
    """Draw AUROC of each module, all layers, into ax."""
    where = {"layer": "all", "factors": factors, "step": 5, "protocol": "unseen"}
    for number, share in enumerate(shares):
        own = [chosen(rows, modules=modules, share=share, **where)[0] for modules in MODULES]
        places = [place + 0.1 * (number - 1.5) for place in range(len(MODULES))]
        common.points(ax, number, places, own, linewidth=0)
    common.chance(ax)
    ax.set_xticks(range(len(MODULES)), MODULES.values())
    ax.set_xlim(-0.5, len(MODULES) - 0.5)


def draw(numbers: dict[str, Any]) -> Figure:
    """The figure: two panels over steps, three over modules."""
    about, rows = numbers["about"], numbers["views"]
    shares = about["zoo_design"]["shares"]
    fig, axes = common.panels(1, len(LAYERS) + len(FACTORS), (13.0, 3.8), sharey=True)
    for ax, (name, layer) in zip(axes[0], LAYERS.items(), strict=False):
        plot_steps(ax, rows, layer, shares)
        ax.set(title=name, xlabel="local steps made")
    for ax, factors in zip(axes[0, len(LAYERS) :], FACTORS, strict=True):
        plot_modules(ax, rows, factors, shares)
        ax.set(title=f"{' and '.join(factors)}, all layers", xlabel="module whose deltas are read")
    axes[0, 0].set_ylabel("AUROC, sources unseen")
    common.legend_above(fig, axes[0, 0], len(shares))
    common.caption(
        fig,
        f"{about['clients']} clients ({about['malicious_clients']} malicious), linear heads fitted"
        " on the same part; mean over 36 pairs of unseen sources, 95 % client-bootstrap intervals,"
        f" seed {about['seed']}.",
    )
    return fig


def pictures() -> dict[str, Figure]:
    """parts."""
    return {"parts": draw(read_numbers())}
