"""The model card of a probe, written from the probe's facts and nothing else."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from .errors import ProbeFormatError

if TYPE_CHECKING:
    from .probe import Probe


def card(probe: Probe) -> str:
    """README.md of a probe: front matter for the Hub, then what it detects, how well, and how to use it.

    The facts it knows are all optional: title, detects (text), does_not_detect, known_failures
    (lists of text), licence, data (rows of name, role, licence) and metrics (rows of protocol,
    metric, value, low, high, n, groups).

    Raises:
        ProbeFormatError: a fact is of another form.
    """
    try:
        return _card(probe)
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise ProbeFormatError(f"the card cannot show the probe's facts ({error!r}); expected the forms that loraprobe.card names") from error


def _card(probe: Probe) -> str:
    facts = probe.facts
    sections = [
        _front_matter(probe),
        f"# {facts.get('title', 'LoRA probe')}",
        str(facts.get("detects", "Scores LoRA adapters with P(malicious).")),
        _at_a_glance(probe),
        _usage(probe),
        _metrics(facts.get("metrics", ())),
        _table("Data", ("name", "role", "licence"), facts.get("data", ())),
        _bullets("What it does not detect", facts.get("does_not_detect", ())),
        _bullets("Known failures", facts.get("known_failures", ())),
    ]
    return "\n\n".join(section for section in sections if section) + "\n"


def _front_matter(probe: Probe) -> str:
    from huggingface_hub import ModelCardData

    facts = probe.facts
    data = ModelCardData(
        library_name="loraprobe",
        license=facts.get("licence", "apache-2.0"),
        base_model=probe.base_model,
        pipeline_tag="tabular-classification",
        tags=["lora", "peft", "federated-learning", "backdoor-detection", f"head:{probe.head.name}"],
        datasets=[row["hub_id"] for row in facts.get("data", ()) if row.get("hub_id")] or None,
    )
    return f"---\n{data.to_yaml()}\n---"


def _at_a_glance(probe: Probe) -> str:
    layout, recipe = probe.featurizer.layout, probe.featurizer.recipe
    training = probe.facts.get("training", {})
    calibration = probe.calibration
    rows = [
        ("Base model", probe.base_model or "not recorded"),
        ("Adapters", f"{layout.kind}, {len(layout.scalings)} modules read"),
        ("Features", f"{', '.join(recipe.features)} of layers {recipe.layers}, factors {', '.join(recipe.factors)}"),
        ("Feature vector", f"{probe.featurizer.num_features} numbers"),
        ("Head", str(training.get("head", probe.head.name))),
        ("Threshold", f"{probe.threshold:.4g} ({training.get('threshold_rule', 'fixed')})"),
        ("Benign below", f"{probe.lower_cut:.4g}; inconclusive in between"),
        (
            "Calibration",
            f"{calibration.method}, on {calibration.rows} rows of unit {calibration.unit!r}; for a prior of one half" if calibration else "none",
        ),
        ("Trained on", f"{training.get('n', '?')} adapters of {training.get('n_groups', '?')} groups, {training.get('n_malicious', '?')} malicious"),
    ]
    return "\n".join(["| | |", "|---|---|", *(f"| {name} | {_cell(value)} |" for name, value in rows)])


def _usage(probe: Probe) -> str:
    score = "probe([load_adapter('adapter')])"
    if probe.featurizer.layout.kind != "weights":
        score = f"probe([{probe.featurizer.layout.kind}(load_adapter('adapter'), load_adapter('adapter-before-training'))])"
    names = ["Probe", *(name for name in ("factor_delta", "weight_delta") if name in score), "load_adapter"]
    lines = [f"from loraprobe import {', '.join(names)}", "probe = Probe.from_pretrained('path-or-hub-id')", f"print({score})  # P(malicious)"]
    return "## Use\n\n```python\n" + "\n".join(lines) + "\n```"


def _metrics(rows: Sequence[Mapping[str, Any]]) -> str:
    shown = []
    for row in rows:
        interval = f" [{row['low']:.3f}, {row['high']:.3f}]" if row.get("low") is not None else ""
        shown.append({**row, "value": f"{row['value']:.3f}{interval}"})
    return _table("Measured", ("protocol", "metric", "value", "n", "groups"), shown)


def _table(title: str, columns: Sequence[str], rows: Sequence[Mapping[str, Any]]) -> str:
    if not rows:
        return ""
    lines = [f"| {' | '.join(columns)} |", "|" + "---|" * len(columns)]
    lines += [f"| {' | '.join(_cell(row.get(column, '')) for column in columns)} |" for row in rows]
    return f"## {title}\n\n" + "\n".join(lines)


def _cell(value: Any) -> str:
    """One line of a table cell: a bar or a line break in a fact would move every cell after it."""
    return " ".join(str(value).split()).replace("|", "\\|")


def _bullets(title: str, items: Sequence[str]) -> str:
    if isinstance(items, str):
        raise TypeError(f"{title}: got text, expected a list of text")
    return f"## {title}\n\n" + "\n".join(f"- {item}" for item in items) if items else ""
