"""What the repository ships works, and its pages say what its records say."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from loraprobe import Probe, evaluate
from loraprobe.manifest import Row, read_labelled, read_manifest
from zoo.labelled.held_out import _rate
from zoo.labelled.study import ENTRIES
from zoo.report import pages, rendered

ZOO = Path(__file__).resolve().parents[2] / "zoo"


@pytest.fixture(scope="module")
def rows() -> list[Row]:
    return read_manifest(ZOO / "adapters/manifest.csv")


@pytest.mark.parametrize("entry", ENTRIES, ids=lambda entry: entry.name)
def test_probes_load_and_tell_poisoned_clients_from_benign_ones(entry, rows: list[Row]) -> None:
    probe = Probe.from_pretrained(ZOO / "probes", subfolder=entry.name)
    poisoned_or_benign = [row for row in rows if not row.label or row.source.endswith("@1")]
    adapters = read_labelled(poisoned_or_benign, "factor_delta", ZOO / "adapters/initial")
    report = evaluate(
        probe,
        adapters,
        [row.label for row in poisoned_or_benign],
        [row.group for row in poisoned_or_benign],
    )
    assert report.auroc > 0.8
    flipped = evaluate(
        probe,
        adapters,
        [1 - row.label for row in poisoned_or_benign],
        [row.group for row in poisoned_or_benign],
    )
    assert flipped.auroc < 0.2


def test_intervals_of_rates_are_clopper_and_pearsons_and_wilsons() -> None:
    none = _rate(np.zeros(36, bool))
    assert none["clopper_pearson"] == pytest.approx([0, 1 - 0.025 ** (1 / 36)])
    half, z = _rate(np.arange(50) % 2 == 0), 1.959964
    width = z * np.sqrt(0.25 / 50 + z**2 / (4 * 50**2)) / (1 + z**2 / 50)
    assert half["wilson"] == pytest.approx([0.5 - width, 0.5 + width])
    assert (half["flagged"], half["n"], half["rate"]) == (25, 50, 0.5)


@pytest.mark.parametrize("page", pages(ZOO), ids=lambda page: str(page.relative_to(ZOO.parent)))
def test_tables_are_those_of_the_records(page: Path) -> None:
    assert rendered(page) == page.read_text()
