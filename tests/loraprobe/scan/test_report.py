"""`loraprobe report`: its numbers against dense definitions, and a page that needs nothing else."""

from __future__ import annotations

import base64
import csv
import io
import re
import zipfile
from pathlib import Path

import numpy as np
import pytest

from loraprobe.adapters.adapter import Adapter
from loraprobe.adapters.load import save_adapter
from loraprobe.adapters.pair import LoRAPair
from loraprobe.errors import OutputError
from loraprobe.report.analysis import analyse
from loraprobe.report.page import csv_tables, write_report
from tests.helpers import make
from tests.helpers.boxed import invoke
from tests.loraprobe.scan.test_scan import adapter


def dense(one: Adapter) -> np.ndarray:
    return np.concatenate(
        [(pair.scaling * pair.B.astype(float) @ pair.A).ravel() for pair in one.values()]
    )


def turned(one: Adapter, seed: int) -> Adapter:
    """The same products from other factors."""
    rng = np.random.default_rng(seed)
    pairs = {}
    for module, pair in one.items():
        g = rng.normal(size=(pair.rank, pair.rank))
        pairs[module] = LoRAPair(np.linalg.solve(g, pair.A), pair.B @ g, pair.scaling)
    return Adapter(pairs, base_model=one.base_model)


def test_cosines_are_those_of_the_dense_products() -> None:
    adapters = {str(seed): adapter(seed, rank=1 + seed % 3) for seed in range(5)}
    rows = np.stack([dense(one) for one in adapters.values()])
    unit = rows / np.linalg.norm(rows, axis=1, keepdims=True)
    np.testing.assert_allclose(analyse(adapters).cosine, unit @ unit.T, atol=1e-5)


def test_the_same_product_from_other_factors_is_the_same() -> None:
    one = adapter(0)
    analysis = analyse({"one": one, "turned": turned(one, 1), "another": adapter(1)})
    assert analysis.cosine[0, 1] == pytest.approx(1, abs=1e-5)
    assert analysis.overlap[0, 1] == pytest.approx(1, abs=1e-5)
    other_base = make.adapter(dims=dict.fromkeys(make.DIMS, (3, 5)))  # the names, not the shapes
    mixed = analyse({"one": one, "wide": make.adapter(), "narrow": other_base})
    assert mixed.cosine[1].tolist() == pytest.approx([mixed.cosine[0, 1], 1, 0])
    assert abs(analysis.cosine[0, 2]) < 0.9
    assert analysis.overlap[0, 2] < 0.95


def test_an_outlier_is_named_and_the_others_are_not() -> None:
    adapters = {str(seed): adapter(seed) for seed in range(12)}
    assert analyse(adapters).outliers == {}
    adapters["long"] = adapter(12, size=1e4)
    assert "norm" in analyse(adapters).outliers["long"]


def test_the_page_needs_no_other_file_and_escapes_names(tmp_path: Path) -> None:
    name = "<script>alert(1)</script>"
    analysis = analyse({name: adapter(0), "b": adapter(1), "c": adapter(2)})
    page, *others = write_report(analysis, tmp_path / "page.html", tmp_path / "figures")
    text = page.read_text()
    assert name not in text
    assert not re.search(r"(src|href)=\"(?!data:)", text)
    pictures = re.findall(r"<img [^>]*>", text)
    assert len(pictures) == 5
    assert all(re.search(r'alt="[^"]{20,}"', picture) for picture in pictures)
    assert {path.suffix for path in others} == {".png", ".pdf", ".csv"}
    [numbers] = re.findall(r"data:application/zip;base64,([^\"]+)", text)
    with zipfile.ZipFile(io.BytesIO(base64.b64decode(numbers))) as archive:
        apart = {path.name: path.read_bytes() for path in others if path.suffix == ".csv"}
        assert {name: archive.read(name) for name in archive.namelist()} == apart
    with pytest.raises(OutputError, match="exists"):
        write_report(analysis, page)


def test_the_numbers_of_the_pictures(tmp_path: Path) -> None:
    one = adapter(0)
    rows = list(csv.DictReader(io.StringIO(csv_tables(analyse({"a": one}))["modules"])))
    assert len(rows) == len(one)
    for row in rows:
        values = np.asarray(one[row["module"]].svdvals())
        assert float(row["norm"]) == pytest.approx(np.linalg.norm(values), rel=1e-4)
        assert float(row["sigma_1"]) == pytest.approx(values[0], rel=1e-4)


def test_the_command_leaves_out_what_it_cannot_read(tmp_path: Path) -> None:
    folder = save_adapter(adapter(0), tmp_path / "adapter")
    out = tmp_path / "page.html"
    invoke("report", folder, tmp_path / "gone", "--out", out)
    assert "1 LoRA adapter<" in out.read_text()
    assert "exists" in invoke("report", folder, "--out", out, code=2).output
    for option in (("--reference", tmp_path / "gone"), ("--base", "fresh"), ("--any-base",)):
        words = ("report", folder, "--out", tmp_path / "other.html", *option)
        assert re.search(r"'--reference'|without --probe", invoke(*words, code=2).output)
