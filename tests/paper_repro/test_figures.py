"""The figures of the documentation draw the committed numbers."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

pytest.importorskip("matplotlib")

from figures import __main__ as figures
from figures import common, cross_source, embeddings, mixed, trust
from loraprobe.errors import DataError
from paper_repro.common.setting import LARGER_BASE
from paper_repro.grid.lines import read_lines


@pytest.fixture(scope="module")
def numbers() -> dict[str, Any]:
    return common.read_numbers()


@pytest.fixture(scope="module")
def coordinates() -> dict[str, np.ndarray]:
    return common.read_coordinates()


@pytest.mark.parametrize("name", figures.FIGURES)
def test_every_figure_is_drawn_as_committed_in_both_formats_and_small(
    name: str, tmp_path: Path
) -> None:
    figures.main([name, "--out", str(tmp_path)])
    drawn = {path.name for path in tmp_path.iterdir()}
    assert drawn <= {path.name for path in common.PICTURES.iterdir()}
    assert {Path(one).suffix for one in drawn} == {".png", ".pdf"}
    for path in tmp_path.iterdir():
        assert path.read_bytes().startswith(b"\x89PNG" if path.suffix == ".png" else b"%PDF")
        assert path.stat().st_size < (600_000 if path.suffix == ".png" else 300_000)


def test_a_figure_refuses_results_that_lack_what_it_draws(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit):
        figures.main(["nothing"])
    assert "got nothing; expected some of attackers, " in capsys.readouterr().err
    lines = [line for line in read_lines() if line["row"] != "step"]
    with pytest.raises(DataError, match=r"no run of step with 5 of 10 at 100% poison on chat-11m"):
        trust.chosen(lines, "step", LARGER_BASE, 1.0)
    monkeypatch.setattr(mixed, "RESULTS", tmp_path)
    with pytest.raises(DataError, match=r"paper_repro\.mixed\.grid"):
        mixed.read_rows("mixed_grid")


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
