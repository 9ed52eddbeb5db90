"""A card says what the probe's facts say: front matter that the Hub reads, Python that runs."""

from __future__ import annotations

import ast
import re
import sys
from dataclasses import replace
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from huggingface_hub import ModelCard
from huggingface_hub.repocard_data import model_index_to_eval_results

from loraprobe import Probe, fit_probe, weight_delta
from loraprobe.adapters.load import save_adapter
from loraprobe.colours import BENIGN_COLOURS, HARD_COLOURS, MALICIOUS_COLOURS
from loraprobe.distribution import distribution_of, score_distribution
from loraprobe.errors import ProbeFormatError
from loraprobe.hub.card import card, card_files
from loraprobe.hub.card_figure import draw_scores
from tests.helpers.probes import BASE, HEAD_OPTIONS, RECIPES, initial, labelled, tiny_probe

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
        {
            "protocol": "leave one source out",
            "metric": "AUROC",
            "value": 0.98765,
            "low": 0.9,
            "high": 0.9995,
            "n": 400,
            "groups": 40,
        },
        {
            "protocol": "held-out clients",
            "metric": "TPR at 1 % FPR",
            "value": 1,
            "n": 20,
            "groups": 10,
        },
    ],
}
DISTRIBUTION: dict[str, Any] = {
    "what": "scores",
    "unit": "update",
    "bins": 40,
    "counts": {
        "benign": [3, *[0] * 39],
        "hard negative": [*[0] * 20, 1, *[0] * 19],
        "malicious | 25 %": [0] * 40,
    },
}
WRONG_DISTRIBUTIONS: list[dict[str, Any]] = [
    {"more": 1},
    {"what": 3},
    {"unit": None},
    {"bins": 39},
    {"bins": "40"},
    {"bins": True},
    {"bins": 10**9},
    {"counts": {}},
    {"counts": [[0] * 40]},
    {"counts": {"a": [0] * 39}},
    {"counts": {"a": [-1] * 40}},
    {"counts": {"a": [0.5] * 40}},
    {"counts": {"a": [True] * 40}},
    {"counts": {"a": 3}},
    {"counts": {str(number): [0] * 40 for number in range(25)}},
]


def table(text: str, heading: str) -> list[list[str]]:
    """The cells of the table under a heading, the header row first."""
    lines = text.split(f"## {heading}\n\n")[1].split("\n\n")[0].splitlines()
    return [
        [cell.strip() for cell in re.split(r"(?<!\\)\|", line)[1:-1]]
        for line in lines
        if not set(line) <= set("|-")
    ]


def snippet(text: str) -> str:
    return text.split("```python\n")[1].split("```")[0]


def test_front_matter_is_what_the_hub_reads() -> None:
    data = ModelCard(card(tiny_probe().with_facts(**FACTS))).data.to_dict()
    assert len(data.pop("model-index")) == 1
    assert data == {
        "library_name": "loraprobe",
        "license": "cc-by-4.0",
        "base_model": BASE,
        "pipeline_tag": "tabular-classification",
        "tags": ["lora", "peft", "federated-learning", "backdoor-detection", "head:linear"],
        "datasets": ["openai/gsm8k"],
        "metrics": ["roc_auc"],
    }


def test_the_model_index_holds_every_metric_and_reads_back_as_it_was() -> None:
    text = card(tiny_probe().with_facts(**FACTS), "org/name", "a/b")
    [index] = yaml.safe_load(text.split("---\n")[1])["model-index"]
    name, read = model_index_to_eval_results([index])
    assert name == index["name"] == "org/name/a/b"
    assert read == ModelCard(text).data.eval_results
    assert [
        (row.dataset_name, row.metric_type, row.metric_name, row.metric_value, row.metric_args)
        for row in read
    ] == [
        (
            "leave one source out",
            "roc_auc",
            "AUROC",
            0.98765,
            {"low": 0.9, "high": 0.9995, "n": 400, "groups": 40},
        ),
        ("held-out clients", "tpr@fpr0.01", "TPR at 1 % FPR", 1.0, {"n": 20, "groups": 10}),
    ]
    assert {row.task_type for row in read} == {"tabular-classification"}
    assert ModelCard(card(tiny_probe().with_facts(**FACTS))).data.model_name == FACTS["title"]


@pytest.mark.parametrize("base", ["/home/me/model", "./model", "a/b/c", "", "a b"])
def test_a_base_that_is_no_id_on_the_hub_stays_out_of_the_front_matter(base: str) -> None:
    """The Hub refuses a card that names one."""
    text = card(replace(tiny_probe(), base_model=base))
    assert ModelCard(text).data.base_model is None
    assert f"| Base model | {base or 'not recorded'} |" in text
    for known in ("org/name", "gpt2"):
        assert ModelCard(card(replace(tiny_probe(), base_model=known))).data.base_model == known


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
    assert table(card(tiny_probe().with_facts(**FACTS)), "Measured by the publisher") == [
        ["protocol", "metric", "value", "n", "groups"],
        ["leave one source out", "AUROC", "0.988 [0.900, 1.000]", "400", "40"],
        ["held-out clients", "TPR at 1 % FPR", "1.000", "20", "10"],
    ]


def test_facts_cannot_break_the_table_they_are_in() -> None:
    rows = table(card(tiny_probe().with_facts(**FACTS)), "Data")
    assert rows == [
        ["name", "role", "licence"],
        ["GSM8K", "benign", "MIT"],
        [r"made \| up here", "malicious", "none"],
    ]
    odd = replace(tiny_probe(), base_model="a|b\nc: d\n---\nlicense: mit").with_facts(
        title="t\n---\nlicense: mit", metrics=FACTS["metrics"]
    )
    data = ModelCard(card(odd)).data
    assert data.license == "apache-2.0"
    assert data.model_name == "t --- license: mit"
    assert r"| Base model | a\|b c: d --- license: mit |" in card(odd)


def test_lists_and_the_probe_at_a_glance() -> None:
    probe = replace(tiny_probe("mlp", "all_b", "platt", "fpr:0.2"), benign_below=0.125).with_facts(
        **FACTS
    )
    text = card(probe)
    assert "\n# First B: a probe\n" in text
    assert "Updates trained on harmful answers." in text
    assert (
        "## What it does not detect\n\n- Backdoors with a trigger.\n- Adapters of another base."
        in text
    )
    assert "## Known failures\n\n- Flags prose: 40 % of it." in text
    assert "\n| unit | adapter |\n" in text
    assert "\n| head options | hidden = 8, max_epochs = 60 |\n" in text
    assert "\n| recipe: factors | B |\n" in text
    shown = [
        "factor_delta, 4 modules",
        "64 numbers",
        "mlp",
        "fpr:0.2",
        "0.125",
        "platt, on 32 rows of unit 'adapter'",
        "32 adapters of 16 groups",
    ]
    for part in shown:
        assert part in text, part


@pytest.mark.parametrize("kind", ["weights", "factor_delta", "weight_delta"])
def test_the_usage_snippet_is_python_that_this_library_runs(
    kind: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    # The change of a weight is made of both adapters, which started from one.
    rank = 1 if kind == "weight_delta" else 2
    before = initial({"r": rank})
    data = labelled(12, kind="weights" if kind == "weight_delta" else kind, r=rank)
    changes = [
        weight_delta(adapter, before) if kind == "weight_delta" else adapter
        for adapter in data.adapters
    ]
    probe = fit_probe(changes, data.labels, recipe=RECIPES["all_b"])
    code = snippet(card(probe))
    ast.parse(code)
    trained = labelled(2, rows=1, kind="weights", seed=5, r=rank).adapters[0]
    save_adapter(trained, tmp_path / "adapter")
    save_adapter(before, tmp_path / "adapter-before-training")
    monkeypatch.chdir(tmp_path)
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
        {"licence": {1, 2}},
        {"title": 3},
        {"detects": ["text"]},
        *({"score_distribution": {**DISTRIBUTION, **wrong}} for wrong in WRONG_DISTRIBUTIONS),
        {"training": {"score_distribution": {**DISTRIBUTION, "bins": 39}}},
        {"score_distribution": "wide"},
        {"score_distribution": {"what": "scores", "bins": 40, "counts": {"a": [0] * 40}}},
    ],
)
def test_facts_of_another_form_are_an_error_that_says_so(facts: dict[str, Any]) -> None:
    card(tiny_probe().with_facts(**FACTS, score_distribution=DISTRIBUTION))
    with pytest.raises(ProbeFormatError, match="card cannot show"):
        card(tiny_probe().with_facts(**facts))


# ---- where it is published ----


def test_the_usage_names_the_repository_and_says_how_to_pin() -> None:
    text = card(tiny_probe(), "org/name", "a/b")
    assert 'Probe.from_pretrained("org/name", subfolder="a/b")' in snippet(text)
    command = (
        "loraprobe score adapter --base adapter-before-training --probe org/name --subfolder a/b"
        " --revision COMMIT"
    )
    assert f"\n```\n{command}\n```" in text
    assert "40-digit commit" in text
    plain = card(tiny_probe(), "org/name")
    assert 'Probe.from_pretrained("org/name")' in snippet(plain)
    assert "subfolder" not in plain
    weights = fit_probe(labelled(12, kind="weights").adapters, labelled(12, kind="weights").labels)
    # which takes no --base
    assert "loraprobe score adapter --probe org/name --revision" in card(weights, "org/name")
    assert 'from_pretrained("path-or-hub-id")' in snippet(card(tiny_probe()))


# ---- the figure ----


def test_the_figure_stands_on_the_card_and_beside_it(tmp_path: Path) -> None:
    probe = tiny_probe("linear", calibration="platt", threshold="fpr:0.2")
    folder = probe.save_pretrained(tmp_path)
    text = (folder / "README.md").read_text()
    assert "![Histograms of the scores, a row for each group](scores.png)" in text
    assert (
        "out-of-fold scores, platt-calibrated. One score is of one adapter. Groups: benign (n ="
        " 16); malicious (n = 16)." in text
    )
    image = pytest.importorskip("matplotlib.image")
    assert min(image.imread(folder / "scores.png").shape[:2]) > 200
    # the same bytes, as the probe is the same
    assert card_files(probe) == card_files(Probe.from_pretrained(folder))
    before = (folder / "scores.png").read_bytes()
    replace(probe, threshold=0.3).save_pretrained(tmp_path)
    assert (folder / "scores.png").read_bytes() != before
    tiny_probe().save_pretrained(tmp_path)  # nothing is known of its scores
    assert not (folder / "scores.png").exists()
    assert "scores.png" not in (folder / "README.md").read_text()


def test_a_distribution_of_more_groups_is_shown_instead() -> None:
    probe = tiny_probe("linear", threshold="fpr:0.2")
    more = probe.with_facts(score_distribution=DISTRIBUTION)
    assert "Groups: benign (n = 3); hard negative (n = 1); malicious | 25 % (n = 0)." in card(more)
    assert card_files(more)["scores.png"] != card_files(probe)["scores.png"]


def test_without_matplotlib_a_line_says_how_to_get_the_figure(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    probe = tiny_probe("linear", threshold="fpr:0.2")
    (probe.save_pretrained(tmp_path) / "scores.png").stat()
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)  # importing it raises ImportError
    assert set(card_files(probe)) == {"README.md"}
    assert "](scores.png)" not in card(probe)
    assert "pip install 'loraprobe[figures]'" in card(probe)
    assert "Groups: benign (n = 16); malicious (n = 16)." in card(probe)
    probe.save_pretrained(tmp_path)
    assert not (tmp_path / "scores.png").exists()  # it would be that of another probe


def drawn(
    distribution: dict[str, Any], threshold: float = 0.5, lower_cut: float = 0.5
) -> np.ndarray:
    """The figure's pixels (height, width, 3), 0 to 255."""
    image = pytest.importorskip("matplotlib.image")
    return np.asarray(
        255 * image.imread(BytesIO(draw_scores(distribution, threshold, lower_cut)))[..., :3]
    ).astype(int)


def coloured(pixels: np.ndarray, colour: str) -> np.ndarray:
    """(height, width): where the figure has exactly this colour."""
    return np.asarray(
        (pixels == [int(colour[place : place + 2], 16) for place in (1, 3, 5)]).all(axis=2)
    )


def test_the_figure_shows_each_group_where_its_scores_are() -> None:
    rng = np.random.default_rng(0)
    groups = {
        "benign": rng.uniform(0, 0.3, 900),
        "hard negative": rng.uniform(0.3, 0.5, 3),
        "malicious": rng.uniform(0.7, 1, 100),
    }
    pixels = drawn(distribution_of("scores", "adapter", groups))
    benign, hard, malicious = (
        coloured(pixels, palette[0])
        for palette in (BENIGN_COLOURS, HARD_COLOURS, MALICIOUS_COLOURS)
    )
    columns = {
        name: np.flatnonzero(found.any(axis=0))
        for name, found in (("benign", benign), ("hard", hard), ("malicious", malicious))
    }
    width = columns["malicious"].max() - columns["benign"].min()
    assert columns["benign"].max() < columns["benign"].min() + 0.35 * width
    assert columns["malicious"].min() > columns["benign"].min() + 0.65 * width
    # rows of their own
    assert np.flatnonzero(benign.any(axis=1)).max() < np.flatnonzero(malicious.any(axis=1)).min()
    assert hard.sum() > 300  # three scores beside 900 can be seen


def test_a_strangers_names_are_text_and_not_formulas() -> None:
    for name in ("$", "$x^2$", r"\frac{", "a\nb", "\x1b[2J", "n" * 500, "{}", "%s"):
        drawn({**DISTRIBUTION, "what": name, "unit": name, "counts": {name: [1] * 40}})


def test_distributions_count_every_score() -> None:
    scores = np.array([0.0, 0.024, 0.025, 0.5, 0.999, 1.0])
    made = distribution_of("what", "unit", {"a": scores, "b": np.array([])})
    assert made["counts"]["a"] == [2, 1, *[0] * 17, 0, 1, *[0] * 18, 2]
    assert made["counts"]["b"] == [0] * 40
    assert score_distribution({"score_distribution": made}) == made
    assert score_distribution({"training": {"score_distribution": made}}) == made
    assert score_distribution({"training": {}}) is None
