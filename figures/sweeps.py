"""What separability depends on.

Rank, adapted modules, learning rate and local steps; the initial adapter has a figure of its own.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from figures import common
from figures.common import RECIPES, Row, chosen, read_numbers
from loraprobe.errors import DataError

ORDER = {
    "rank": ("2", "8", "32"),
    "modules": ("q, v", "attention", "attention, MLP"),
    "learning rate": ("0.001", "0.005", "0.015"),
    "local steps": ("1", "5", "20"),
}


def at(rows: Sequence[Row], axis: str, value: str, centre: str, **fields: Any) -> Row:
    """The one row of an axis's value; the centre is one setting that belongs to every axis."""
    where = {"setting": "centre"} if value == centre else {"axis": axis, "value": value}
    return chosen(rows, **where, **fields)[0]


def available(rows: Sequence[Row], centre: Mapping[str, str]) -> dict[str, tuple[str, ...]]:
    """The axes along which something else than the centre was measured, with the values that were.

    Raises:
        DataError: nothing was.
    """
    done = {(row["axis"], row["value"]) for row in rows}
    found = {
        axis: tuple(value for value in values if value == centre[axis] or (axis, value) in done)
        for axis, values in ORDER.items()
    }
    found = {axis: values for axis, values in found.items() if len(values) > 1}
    if not found:
        raise DataError(
            "got no setting beside the centre; expected some. Run python -m"
            " paper_repro.separability.sweeps and write the results anew"
        )
    return found


def plot(
    ax: Axes,
    own: Sequence[Sequence[Row]],
    transfer: Sequence[Sequence[Row]],
    shares: Sequence[float],
) -> None:
    """Draw one axis into ax: a line a poison share; filled, heads fitted at the setting itself.

    Hollow, heads of the zoo's clients.
    """
    for number, share in enumerate(shares):
        colour, marker = common.LINES[number]
        places = [place + 0.1 * (number - 1) for place in range(len(own[number]))]
        common.points(ax, number, places, own[number], label=f"{share:.0%} poison")
        if transfer:
            moved, _ = common.bars(transfer[number])
            hollow = {"markersize": 6, "markerfacecolor": "white", "linestyle": "--"}
            ax.plot(places, moved, color=colour, marker=marker, linewidth=0.8, **hollow)
    common.chance(ax)


def draw(numbers: dict[str, Any]) -> Figure:
    """The figure: a row a recipe, a column an axis."""
    about = numbers["about"]
    shares = about["sweep_design"]["shares"]
    order = available(numbers["sweeps"], about["centre"])
    fig, axes = common.panels(
        len(RECIPES), len(order), (max(9.0, 2.6 * len(order)), 6.2), sharey=True, sharex="col"
    )
    for line, recipe in zip(axes, RECIPES, strict=True):
        for ax, (axis, values) in zip(line, order.items(), strict=True):
            centre = about["centre"][axis]
            fields = {"recipe": recipe, "protocol": "unseen"}
            own = [
                [
                    at(numbers["sweeps"], axis, value, centre, modules="all", share=share, **fields)
                    for value in values
                ]
                for share in shares
            ]
            moves = axis not in ("rank", "modules")  # those change what a head reads
            moved = (
                [
                    [
                        at(numbers["transfer"], axis, value, centre, share=share, **fields)
                        for value in values
                    ]
                    for share in shares
                ]
                if moves
                else []
            )
            plot(ax, own, moved, shares)
            ax.set_xticks(
                range(len(values)),
                [value.replace("attention, ", "attention,\n") for value in values],
            )
            ax.set_xlim(-0.4, len(values) - 0.6)
        line[0].set_ylabel(f"AUROC, sources unseen\n{recipe}")
    for ax, axis in zip(axes[-1], order, strict=True):
        ax.set_xlabel(axis)
    common.legend_above(fig, axes[0, 0], len(shares))
    sizes = chosen(numbers["sweeps"], setting="centre", protocol="unseen", recipe=RECIPES[1])
    counts = ", ".join(f"{row['n_malicious']} malicious at {row['share']:.0%}" for row in sizes)
    common.caption(
        fig,
        f"A setting: {counts}, {sizes[0]['n_benign']} benign clients, and hard negatives to learn"
        " from; mean over pairs of unseen sources, 95 % client-bootstrap intervals, seed"
        f" {about['seed']}.\nSolid: linear heads fitted at that setting. Dashed, hollow: heads of"
        f" the zoo's {about['clients']} clients (r = 8 on q and v, 5 steps at 2.5e-3 to 8e-3,"
        " initial adapter of seed 0), on the same test clients.",
    )
    return fig


def pictures() -> dict[str, Figure]:
    """sweeps."""
    return {"sweeps": draw(read_numbers())}
