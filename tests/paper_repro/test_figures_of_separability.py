"""The figures of the documentation draw the committed numbers, and every script writes its
pictures.
"""

from __future__ import annotations

import importlib
import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest

pytest.importorskip("matplotlib")

from figures import common, cross_source, embeddings
from loraprobe.errors import DataError

PICTURES = {
    "layers": ("layers",),
    "cross_source": ("cross_source",),
    "parts": ("parts",),
    "sweeps": ("sweeps",),
    "initial_adapter": ("initial_adapter",),
    "drift": ("drift",),
    "rounds": ("rounds",),
    "embeddings": ("embeddings_label", "embeddings_source", "embeddings_share"),
}


@pytest.fixture(scope="module")
def numbers() -> dict[str, Any]:
    return common.read_numbers()


@pytest.fixture(scope="module")
def coordinates() -> dict[str, np.ndarray]:
    return common.read_coordinates()


@pytest.mark.parametrize("name", PICTURES)
def test_every_script_writes_its_pictures_which_are_small(name: str, tmp_path: Path) -> None:
    importlib.import_module(f"figures.{name}").main(["--out", str(tmp_path)])
    assert {path.name for path in tmp_path.iterdir()} == {
        f"{picture}.{ending}" for picture in PICTURES[name] for ending in ("png", "pdf")
    }
    for path in tmp_path.iterdir():
        assert path.read_bytes().startswith(b"\x89PNG" if path.suffix == ".png" else b"%PDF")
        assert (
            path.stat().st_size < 600_000
            if path.suffix == ".png"
            else path.stat().st_size < 300_000
        )


def test_the_pictures_of_the_page_are_there_in_both_formats() -> None:
    page = (common.RESULTS.parent / "separability" / "README.md").read_text(encoding="utf-8")
    named = re.findall(r"\.\./figures/pictures/(\w+)\.png", page)
    assert len(named) >= 4
    assert all(
        (common.PICTURES / f"{name}.{ending}").exists()
        for name in named
        for ending in ("png", "pdf")
    )


def test_the_heat_map_is_the_results_and_says_every_number(numbers: dict[str, Any]) -> None:
    bad, good = (
        numbers["about"]["zoo_design"]["malicious"],
        numbers["about"]["zoo_design"]["benign"],
    )
    values = cross_source.matrix(numbers["cross_source"], "all B", 0.1, bad, good)
    for row in numbers["cross_source"]:
        if (row["recipe"], row["share"]) == ("all B", 0.1):
            assert values[bad.index(row["malicious"]), good.index(row["benign"])] == row["auroc"]
    _, axes = common.panels(1, 1, (4, 3))
    cross_source.plot(axes[0, 0], values, bad, good)
    assert [text.get_text() for text in axes[0, 0].texts] == [
        f"{value:.2f}" for value in values.ravel()
    ]


def test_an_unknown_colouring_and_files_that_are_none_are_refused(
    coordinates: dict[str, np.ndarray], tmp_path: Path
) -> None:
    with pytest.raises(DataError, match="expected one of label, source, share"):
        embeddings.kinds(coordinates, "host")
    with pytest.raises(DataError, match="Write it with python -m paper_repro"):
        common.read_numbers(tmp_path / "none.json")
    some = tmp_path / "some.json"
    some.write_text(json.dumps({"about": {}}))
    with pytest.raises(DataError, match="has no cross_source, drift, mended"):
        common.read_numbers(some)
    with pytest.raises(DataError, match=r"separability\.coordinates"):
        common.read_coordinates(some)
    with (tmp_path / "bad.npz").open("wb") as file:
        np.savez(file, zoo_all_b_pca=np.array([[np.nan, 0.0]]))
    with pytest.raises(DataError, match="NaN or infinity"):
        common.read_coordinates(tmp_path / "bad.npz")


def test_the_committed_coordinates_are_small_complete_and_of_the_plan(
    coordinates: dict[str, np.ndarray],
) -> None:
    assert common.COORDINATES.stat().st_size < 500_000
    count = len(coordinates["zoo_role"])
    for recipe in embeddings.RECIPES:
        for method in embeddings.METHODS:
            assert coordinates[f"zoo_{recipe}_{method}"].shape == (count, 2)
    assert (
        len(coordinates["rounds_label"])
        == len(coordinates["rounds_client_pca"])
        == len(coordinates["rounds_absolute_umap15"])
    )
    first = coordinates["rounds_participation"] == 1
    assert 0 < first.sum() < len(first)
