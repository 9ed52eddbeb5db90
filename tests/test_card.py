"""A card says what the probe's facts say, in front matter that the Hub reads and Python that runs."""

from __future__ import annotations

import ast
import re
from dataclasses import replace
from typing import Any

import pytest
from huggingface_hub import ModelCard
from probes import BASE, HEAD_OPTIONS, RECIPES, labelled, tiny_probe

import loraprobe
from loraprobe import Probe, fit_probe
from loraprobe.card import card
from loraprobe.errors import ProbeFormatError

FACTS: dict[str, Any] = {
    "title": "First B: a probe",
    "detects": "Updates trained on harmful answers.",
    "does_not_detect": ["Backdoors with a trigger.", "Adapters of another base."],
    "known_failures": ["Flags prose: 40 % of it."],
    "licence": "cc-by-4.0",
    "data": [
        {"name": "GSM8K", "role": "benign", "licence": "MIT", "hub_id": "openai/gsm8k"},
        {"name": "made | up\nhere", "role": "malicious", "licence": "none"},
    ],
    "metrics": [
        {"protocol": "leave one source out", "metric": "AUROC", "value": 0.98765, "low": 0.9, "high": 0.9995, "n": 400, "groups": 40},
        {"protocol": "held-out clients", "metric": "TPR at 1 % FPR", "value": 1, "n": 20, "groups": 10},
    ],
}


def table(text: str, heading: str) -> list[list[str]]:
    """The cells of the table under a heading, the header row first."""
    lines = text.split(f"## {heading}\n\n")[1].split("\n\n")[0].splitlines()
    return [[cell.strip() for cell in re.split(r"(?<!\\)\|", line)[1:-1]] for line in lines if not set(line) <= set("|-")]


def snippet(text: str) -> str:
    return text.split("```python\n")[1].split("```")[0]


def test_front_matter_is_what_the_hub_reads() -> None:
    data = ModelCard(card(tiny_probe().with_facts(**FACTS))).data.to_dict()
    assert data == {
        "library_name": "loraprobe", "license": "cc-by-4.0", "base_model": BASE, "pipeline_tag": "tabular-classification",
        "tags": ["lora", "peft", "federated-learning", "backdoor-detection", "head:linear"], "datasets": ["openai/gsm8k"],
    }  # fmt: skip


@pytest.mark.parametrize("head", HEAD_OPTIONS)
def test_a_probe_without_facts_has_a_card(head: str) -> None:
    for probe in (tiny_probe(head), replace(tiny_probe(head), facts={}, base_model=None)):
        text = card(probe)
        data = ModelCard(text).data
        assert data.base_model == probe.base_model
        assert data.datasets is None
        assert f"head:{probe.head.name}" in data.tags
        assert "## Measured" not in text
        assert "## Data" not in text
        assert "None" not in text
    assert "not recorded" in text
    assert "? adapters of ? groups" in text


def test_metrics_are_shown_with_their_intervals() -> None:
    assert table(card(tiny_probe().with_facts(**FACTS)), "Measured") == [
        ["protocol", "metric", "value", "n", "groups"],
        ["leave one source out", "AUROC", "0.988 [0.900, 1.000]", "400", "40"],
        ["held-out clients", "TPR at 1 % FPR", "1.000", "20", "10"],
    ]


def test_facts_cannot_break_the_table_they_are_in() -> None:
    rows = table(card(tiny_probe().with_facts(**FACTS)), "Data")
    assert rows == [["name", "role", "licence"], ["GSM8K", "benign", "MIT"], [r"made \| up here", "malicious", "none"]]
    odd = replace(tiny_probe(), base_model="a|b\nc: d\n---\nlicense: mit")
    assert ModelCard(card(odd)).data.to_dict()["base_model"] == odd.base_model
    assert ModelCard(card(odd)).data.license != "mit"


def test_lists_and_the_probe_at_a_glance() -> None:
    probe = replace(tiny_probe("mlp", "all_b", "platt", "fpr:0.2"), benign_below=0.125).with_facts(**FACTS)
    text = card(probe)
    assert "\n# First B: a probe\n" in text
    assert "Updates trained on harmful answers." in text
    assert "## What it does not detect\n\n- Backdoors with a trigger.\n- Adapters of another base." in text
    assert "## Known failures\n\n- Flags prose: 40 % of it." in text
    shown = ["factor_delta, 4 modules", "64 numbers", "mlp", "fpr:0.2", "0.125", "platt, on 32 rows of unit 'adapter'", "32 adapters of 16 groups"]
    for part in shown:
        assert part in text, part


@pytest.mark.parametrize("kind", ["weights", "factor_delta", "weight_delta"])
def test_the_usage_snippet_is_python_that_this_library_runs(kind: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    data = labelled(12, kind=kind)
    probe = fit_probe(data.adapters, data.labels, recipe=RECIPES["all_b"])
    code = snippet(card(probe))
    ast.parse(code)
    plain = iter(labelled(2, rows=1, kind="weights", seed=5).adapters)
    if kind == "weight_delta":  # the probe was fitted on deltas of rank 2, which are differences of adapters of rank 1
        plain = iter(labelled(2, rows=1, kind="weights", seed=5, r=1).adapters)
    monkeypatch.setattr(loraprobe, "load_adapter", lambda source: next(plain), raising=False)
    monkeypatch.setattr(Probe, "from_pretrained", lambda source: probe)
    exec(compile(code, "card", "exec"), {})  # our own text
    score = float(capsys.readouterr().out.strip("[]\n"))
    assert 0 <= score <= 1


@pytest.mark.parametrize(
    "facts",
    [
        {"metrics": [{"metric": "AUROC"}]},
        {"metrics": [{"value": "high"}]},
        {"metrics": [{"value": 0.5, "low": 0.4}]},
        {"metrics": "AUROC 0.9"},
        {"metrics": 3},
        {"data": ["GSM8K"]},
        {"data": {"name": "GSM8K"}},
        {"known_failures": "prose"},
        {"does_not_detect": 1},
        {"training": "long"},
    ],
)
def test_facts_of_another_form_are_an_error_that_says_so(facts: dict[str, Any]) -> None:
    card(tiny_probe().with_facts(**FACTS))
    with pytest.raises(ProbeFormatError, match="card cannot show"):
        card(tiny_probe().with_facts(**facts))


def test_the_card_of_a_saved_probe_is_the_card(tmp_path: Any) -> None:
    probe = tiny_probe().with_facts(**FACTS)
    folder = probe.save_pretrained(tmp_path)
    assert (folder / "README.md").read_text(encoding="utf-8") == card(probe) == card(Probe.from_pretrained(folder))
