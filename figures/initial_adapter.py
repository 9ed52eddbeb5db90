"""What another initial adapter does to features of B, and not to invariant ones."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from figures import common
from figures.common import HERE, RECIPES, Row, read_numbers
from figures.sweeps import at, plot
from loraprobe.errors import DataError
from paper_repro.initial_adapter.page import interval

CELLS = HERE.parent / "paper_repro/initial_adapter/results/cells.jsonl"
COMMAND = "paper_repro.initial_adapter"
AXIS = "initial adapter"
SEEDS = ("seed 0", "seed 1")
QUESTIONS = ("same start", "another start")
HEAD = "mass_mean"
FEATURES = {
    "product and gram": "invariant:\nproduct and Gram",
    "B of all layers": "B of\nall layers",
    "B of the first layer": "B of the\nfirst layer",
}
SHARES = ("100%", "25%")


def read_cells(path: Path = CELLS) -> list[Row]:
    """The cells in which B and the product are compared, one direction as the head.

    Raises:
        DataError: the file is missing, damaged or without them.
    """
    try:
        rows = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
        found = [
            row
            for row in rows
            if row["question"] in QUESTIONS and row["variant"] and row["variant"][2] == HEAD
        ]
    except (OSError, ValueError, LookupError, TypeError) as error:
        raise DataError(
            f"cannot read {path}: {error!r}. Write it with python -m {COMMAND}"
        ) from None
    if not found:
        raise DataError(f"{path} compares no starts. Write it with python -m {COMMAND}")
    return found


def areas(rows: Sequence[Row], features: str, question: str, share: str) -> Row:
    """Mean AUROC over cells, its interval, and those of the cells.

    The interval is a bootstrap that draws initial adapters whole, as on the page of the study.
    """
    mine = [
        (row["seed"], row["auroc"][f"{share} against all"])
        for row in rows
        if row["variant"][0] == features
        and row["question"] == question
        and f"{share} against all" in row["auroc"]
    ]
    if not mine:
        raise DataError(f"got no cell of {features}, {question}, {share}; expected some")
    seeds = [seed for seed, _ in mine]
    values = np.array([value for _, value in mine])
    ends = interval(values, seeds)
    return {"auroc": values.mean(), "auroc_ci": ends, "cells": values, "starts": len(set(seeds))}


def compare(ax: Axes, rows: Sequence[Row], share: str) -> None:
    """Features along x; trained under the same start, and under others."""
    for number, question in enumerate(QUESTIONS):
        measured = [areas(rows, features, question, share) for features in FEATURES]
        places = [place + 0.24 * (number - 0.5) for place in range(len(FEATURES))]
        for place, one in zip(places, measured, strict=True):
            spread = np.linspace(-0.07, 0.07, len(one["cells"]))
            ax.plot(place + spread, one["cells"], ".", color="#bbbbbb", markersize=2.5, zorder=1)
        filled = {} if number == 0 else {"markerfacecolor": "white"}
        common.points(ax, number + 3, places, measured, label=question, linestyle="none", **filled)
    common.chance(ax)
    ax.set_xticks(range(len(FEATURES)), list(FEATURES.values()))
    ax.set_xlim(-0.5, len(FEATURES) - 0.5)


def draw(numbers: Mapping[str, Any], cells: Sequence[Row]) -> Figure:
    """The figure: probes of B on a second initial adapter, then B beside the invariant features."""
    about = numbers["about"]
    shares = about["sweep_design"]["shares"]
    centre = about["centre"][AXIS]
    fig, axes = common.panels(1, 4, (11.5, 3.9), sharey=True, width_ratios=(1, 1, 1.6, 1.6))
    for ax, recipe in zip(axes[0, :2], RECIPES, strict=True):
        fields = {"recipe": recipe, "protocol": "unseen"}
        own, moved = (
            [
                [at(rows, AXIS, seed, centre, share=share, **extra, **fields) for seed in SEEDS]
                for share in shares
            ]
            for rows, extra in (
                (numbers["sweeps"], {"modules": "all"}),
                (numbers["transfer"], {}),
            )
        )
        plot(ax, own, moved, shares)
        ax.set_xticks(range(len(SEEDS)), SEEDS)
        ax.set_xlim(-0.4, len(SEEDS) - 0.6)
        ax.set_title(recipe)
        ax.set_xlabel(AXIS)
    for ax, share in zip(axes[0, 2:], SHARES, strict=True):
        compare(ax, cells, share)
        ax.set_title(f"{share} poison")
    axes[0, 0].set_ylabel("AUROC, sources unseen")
    common.legend_above(fig, axes[0, 0], len(shares))
    common.legend_above(fig, axes[0, 2], len(QUESTIONS), side="right")
    size = areas(cells, "B of all layers", "another start", SHARES[0])
    common.caption(
        fig,
        "Left two: solid, linear heads fitted under that initial adapter; dashed and hollow, heads"
        f" of the zoo's {about['clients']} clients (seed 0) on the same test clients; 95 %"
        " client-bootstrap intervals.\nRight two: the direction between the class means, fitted"
        " under the same initial adapter or under others; malicious source, benign family and hard"
        f" negatives unseen;\nmean and each of {len(size['cells'])} cells of {size['starts']}"
        " initial adapters (q and v, r = 8), 95 % intervals that draw initial adapters whole.",
    )
    return fig


def pictures() -> dict[str, Figure]:
    """initial_adapter."""
    return {"initial_adapter": draw(read_numbers(), read_cells())}
