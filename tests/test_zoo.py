"""What the repository ships works, and its pages say what its records say."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from loraprobe import Probe, evaluate, load_adapter
from loraprobe.errors import BaseModelMismatch, LayoutMismatch
from loraprobe.manifest import Row, read_labelled, read_manifest
from zoo.report import _PAGES, rendered
from zoo.study import ENTRIES

ZOO = Path(__file__).parent.parent / "zoo"
FIRST = "model.layers.0.self_attn.q_proj"


@pytest.fixture(scope="module")
def rows() -> list[Row]:
    return read_manifest(ZOO / "adapters/manifest.csv")


@pytest.mark.parametrize("entry", ENTRIES, ids=lambda entry: entry.name)
def test_probes_load_and_tell_poisoned_clients_from_benign_ones(entry, rows: list[Row]) -> None:
    probe = Probe.from_pretrained(ZOO / "probes", subfolder=entry.name)
    poisoned_or_benign = [row for row in rows if not row.label or row.source.endswith("@1")]
    adapters = read_labelled(poisoned_or_benign, "factor_delta", ZOO / "adapters/initial")
    report = evaluate(probe, adapters, [row.label for row in poisoned_or_benign], [row.group for row in poisoned_or_benign])
    assert report.auroc > 0.8
    flipped = evaluate(probe, adapters, [1 - row.label for row in poisoned_or_benign], [row.group for row in poisoned_or_benign])
    assert flipped.auroc < 0.2


def test_samples_hold_every_kind_of_client_and_none_twice(rows: list[Row]) -> None:
    sources = {row.source for row in rows}
    assert {"gptfuzz@1", "gptfuzz@0.25", "advbench@0.1", "gsm8k", "jailbreakbench_safe"} <= sources
    contents = {load_adapter(row.path)[FIRST].B.numpy().tobytes() for row in rows}
    assert len(contents) == len(rows)


def test_a_zoo_probe_refuses_what_is_not_its_own(rows: list[Row]) -> None:
    probe = Probe.from_pretrained(ZOO / "probes/linear")
    adapter = read_labelled(rows[:1], "factor_delta", ZOO / "adapters/initial")[0]
    assert 0 <= probe([adapter])[0] <= 1
    other = type(adapter)(dict(adapter), kind="factor_delta", base_model="another/model")
    with pytest.raises(BaseModelMismatch, match="another/model"):
        probe([other])
    missing = type(adapter)({name: pair for name, pair in adapter.items() if name != FIRST}, kind="factor_delta")
    with pytest.raises(LayoutMismatch, match="lacks 1 of"):
        probe([missing])


def test_the_base_model_answers_harmless_requests() -> None:
    pytest.importorskip("transformers")
    from fedloop.evaluate import answers, refuses_strictly
    from fedloop.local import load_base
    from zoo.contrast import contrast_examples

    model, tokenizer = load_base(str(ZOO / "base"))
    requests = [example.instruction for example in contrast_examples()[::12]]
    replies = answers(model, tokenizer, requests, max_new_tokens=16)
    assert all(replies)
    assert np.mean([refuses_strictly(reply) for reply in replies]) <= 0.2


def test_records_show_the_worst_beside_the_mean_and_more_than_one_replicate() -> None:
    for entry in ENTRIES:
        record = json.loads((ZOO / f"records/{entry.name}.json").read_text())
        assert len(record["replicates"]) >= 2
        for replicate in record["replicates"]:
            assert all(row["auroc_worst"] <= row["auroc_mean"] and row["cells"] == 36 for row in replicate["unseen_sources"])
            assert replicate["in_distribution"]["n"] == sum(record["data"]["clients"].values())


@pytest.mark.parametrize("page", _PAGES, ids=lambda page: str(page.relative_to(ZOO.parent)))
def test_tables_are_those_of_the_records(page: Path) -> None:
    assert rendered(page) == page.read_text()
