"""What the repository ships works, and its pages say what its records say."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path

import numpy as np
import pytest

from loraprobe import Probe, evaluate
from loraprobe.manifest import Row, read_labelled, read_manifest
from zoo.labelled.held_out import _rate
from zoo.labelled.study import ENTRIES, Entry
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


def test_records_show_the_worst_beside_the_mean_and_more_than_one_replicate() -> None:
    for entry in ENTRIES:
        record = json.loads((ZOO / f"records/{entry.name}.json").read_text())
        assert len(record["replicates"]) >= 2
        for replicate in record["replicates"]:
            assert all(
                row["auroc_worst"] <= row["auroc_mean"] and row["cells"] == 36
                for row in replicate["unseen_sources"]
            )
            assert replicate["in_distribution"]["n"] == sum(record["data"]["clients"].values())


@pytest.mark.parametrize("entry", ENTRIES, ids=lambda entry: entry.name)
def test_the_held_out_clients_of_a_record_are_all_of_them_in_every_table(
    entry: Entry, rows: list[Row]
) -> None:
    section = json.loads((ZOO / f"records/{entry.name}.json").read_text())["held_out_clients"]
    malicious = [row for row in rows if row.label]
    assert (
        (section["n"], section["n_malicious"], section["tpr"]["n"], section["fpr"]["n"])
        == (212, 124, 124, 88)
        == (len(rows), len(malicious), len(malicious), len(rows) - len(malicious))
    )
    for table, label, count in (
        ("by_role", 1, 124),
        ("by_role", 0, 88),
        ("by_source", 1, 124),
        ("by_source", 0, 88),
        ("by_poison_share", 1, 124),
    ):
        found = [row for row in section[table] if row["label"] == label]
        assert sum(row["n"] for row in found) == count
        assert sum(row["flagged"] for row in found) == section["tpr" if label else "fpr"]["flagged"]
    assert [row["name"] for row in section["by_poison_share"]] == [
        f"malicious, {share} % poison" for share in (100, 50, 25, 10)
    ]
    assert {row["name"]: row["n"] for row in section["by_source"]} == Counter(
        row.source.partition("@")[0] for row in rows
    )


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
