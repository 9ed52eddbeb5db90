"""UMAP at several numbers of neighbours, and PCA beside it, of the zoo's updates.

By label, by source and by poison share.

No label was used to place a point. The pictures are for looking at: how far islands lie apart means
nothing.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
from matplotlib.figure import Figure

from figures import common, points
from loraprobe.errors import DataError

RECIPES = {"paper": "the paper's feature", "all_b": "all B"}
METHODS = {
    "pca": "PCA",
    "umap5": "UMAP, 5 neighbours",
    "umap15": "UMAP, 15 neighbours",
    "umap50": "UMAP, 50 neighbours",
}
COLOURINGS = ("label", "source", "share")
BLUE, ORANGE, PALE, GREY = "#0072B2", "#D55E00", "#9ecae1", "#555555"
SHARES = {1.0: "#4d0019", 0.5: "#b5123e", 0.25: "#f06a35", 0.1: "#fdbe5a"}  # darker: more poison
ATTACKS = (("#D55E00", "^"), ("#CC79A7", "v"), ("#882255", "D"), ("#E69F00", "*"))
SAFE = (("#0072B2", "o"), ("#009E73", "s"), ("#56B4E9", "P"), ("#777777", "X"), ("#44bb99", "p"))


def kinds(arrays: Mapping[str, np.ndarray], colouring: str) -> list[points.Kind]:
    """What is drawn as one colour and marker; every point is in exactly one kind.

    Raises:
        DataError: an unknown colouring.
    """
    role = arrays["zoo_role"]
    benign, hard, malicious = (role == name for name in ("benign", "hard_negative", "malicious"))
    share = arrays["zoo_share"].astype(float)
    if colouring == "label":
        return [
            ("benign", BLUE, "o", benign),
            ("hard negatives", GREY, "s", hard),
            ("malicious", ORANGE, "^", malicious),
        ]
    if colouring == "share":
        return [
            ("benign", PALE, "o", benign),
            ("hard negatives", "#bdbdbd", "s", hard),
            *(
                (f"{near:.0%} poison", colour, "^", malicious & np.isclose(share, near, rtol=1e-2))
                for near, colour in sorted(SHARES.items())
            ),
        ]
    if colouring != "source":
        raise DataError(f"got the colouring {colouring!r}; expected one of {', '.join(COLOURINGS)}")
    source = arrays["zoo_source"]
    found: list[points.Kind] = [("benign, nine kinds", PALE, "o", benign)]
    for mask, looks in ((hard, SAFE), (malicious, ATTACKS)):
        for (colour, marker), name in zip(looks, sorted(set(source[mask].tolist())), strict=False):
            found.append((name.replace("_", " "), colour, marker, mask & (source == name)))
    return found


def draw(arrays: Mapping[str, np.ndarray], colouring: str) -> Figure:
    """One picture: a row a recipe, a column a method."""
    fig, axes = common.panels(len(RECIPES), len(METHODS), (13.0, 6.6))
    drawn = kinds(arrays, colouring)
    malicious = arrays["zoo_role"] == "malicious"
    for line, (recipe, name) in zip(axes, RECIPES.items(), strict=True):
        for ax, (method, title) in zip(line, METHODS.items(), strict=True):
            coordinates = arrays[f"zoo_{recipe}_{method}"]
            points.plot(ax, coordinates, drawn)
            ax.set_title(f"{title}: {points.separability(coordinates, malicious):.2f}")
        line[0].set_ylabel(name, fontsize=11)
    handles = [
        points.handle(marker, colour, f"{name} ({rows.sum()})")
        for name, colour, marker, rows in drawn
    ]
    fig.legend(handles=handles, loc="outside right upper", frameon=False, fontsize=8.5)
    common.caption(
        fig,
        f"{len(malicious)} clients of the zoo after 5 local steps, seed {int(arrays['seed'])}, UMAP"
        " by cosine; mixed clients count to their malicious source. No label was used to place a"
        " point; distances between islands mean nothing.\nPoints are drawn in a random order, so"
        " that no class covers another. Numbers: AUROC of malicious against all others by how many"
        f" of the {points.NEIGHBOURS} nearest points in that panel are malicious; 0.5 is mixed.",
    )
    return fig


def pictures() -> dict[str, Figure]:
    """embeddings_label, embeddings_source and embeddings_share."""
    arrays = common.read_coordinates()
    return {f"embeddings_{colouring}": draw(arrays, colouring) for colouring in COLOURINGS}
