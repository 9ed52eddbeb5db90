"""The model card of a probe, written from the probe's facts and nothing else."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from ..distribution import score_distribution
from ..errors import ProbeFormatError
from .card_figure import FIGURE_NAME, can_draw, draw_scores

if TYPE_CHECKING:
    from ..probe import Probe

CARD_NAME = "README.md"
PAGES = (CARD_NAME, FIGURE_NAME)
TASK = "tabular-classification"
# Those of huggingface.co/metrics; the others are in the model-index alone.
_KNOWN_METRICS = ("roc_auc", "brier_score")
_METRIC_COLUMNS = ("protocol", "metric", "value", "n", "groups")
_CLAIMED = (
    "The publisher's word, until you measure it: `loraprobe verify PROBE --on ADAPTERS.csv`"
    " compares this table with labelled adapters of yours."
)
_HUB_MODEL = re.compile(r"[\w-][\w.-]*(/[\w-][\w.-]*)?", re.ASCII)


def card(probe: Probe, repo_id: str | None = None, subfolder: str | None = None) -> str:
    """README.md of a probe: front matter for the Hub, what it detects, how well, how to use it.

    The facts it knows are all optional: title, detects (text), does_not_detect, known_failures
    (lists of text), licence, data (rows of name, role, licence, hub_id), metrics (rows of protocol,
    metric, value, low, high, n, groups), training (what `fit_features` records) and
    score_distribution (as `distribution_of` makes it), which is shown instead of the one that
    training holds. The metrics go into the front matter too, as the Hub's model-index.

    The same probe gives the same text, with one exception: where matplotlib is missing, a line
    stands in place of the figure and says how to get it.

    Args:
        repo_id, subfolder: where the probe is published, for the usage lines.

    Raises:
        ProbeFormatError: a fact is of another form.
    """
    try:
        return _card(probe, repo_id, subfolder)
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise ProbeFormatError(
            f"the card cannot show the probe's facts ({error!r}); expected the forms that"
            " loraprobe.hub.card names"
        ) from error


def card_files(
    probe: Probe, repo_id: str | None = None, subfolder: str | None = None
) -> dict[str, bytes]:
    """The card, and its figure where there are scores and matplotlib: file name -> content.

    Raises:
        ProbeFormatError: as `card`.
    """
    files = {CARD_NAME: card(probe, repo_id, subfolder).encode()}
    distribution = score_distribution(probe.facts)
    if distribution is not None and can_draw():
        files[FIGURE_NAME] = draw_scores(distribution, probe.threshold, probe.lower_cut)
    return files


def _card(probe: Probe, repo_id: str | None, subfolder: str | None) -> str:
    facts = probe.facts
    sections = [
        _front_matter(probe, repo_id, subfolder),
        f"# {_line(_text(facts, 'title', 'LoRA probe'))}",
        _text(facts, "detects", "Scores LoRA adapters with P(malicious)."),
        _at_a_glance(probe),
        _usage(probe, repo_id, subfolder),
        _bullets("Known failures", facts.get("known_failures", ())),
        _bullets("What it does not detect", facts.get("does_not_detect", ())),
        _figure(probe),
        _metrics(facts.get("metrics", ())),
        _training(probe),
        _table("Data", ("name", "role", "licence"), facts.get("data", ())),
    ]
    return "\n\n".join(section for section in sections if section) + "\n"


def _front_matter(probe: Probe, repo_id: str | None, subfolder: str | None) -> str:
    from huggingface_hub import ModelCardData

    facts = probe.facts
    results = _eval_results(facts.get("metrics", ()))
    metrics = {result.metric_type for result in results} & set(_KNOWN_METRICS)
    title = _line(_text(facts, "title", "LoRA probe"))
    name = "/".join(filter(None, (repo_id, subfolder))) or title
    # The Hub refuses a card whose base is no id of a model there; the table below names it anyway.
    on_hub = probe.base_model and _HUB_MODEL.fullmatch(probe.base_model)
    head = f"head:{probe.head.name}"
    data = ModelCardData(
        library_name="loraprobe",
        license=_text(facts, "licence", "apache-2.0"),
        base_model=probe.base_model if on_hub else None,
        pipeline_tag=TASK,
        tags=["lora", "peft", "federated-learning", "backdoor-detection", head],
        datasets=[row["hub_id"] for row in facts.get("data", ()) if row.get("hub_id")] or None,
        metrics=sorted(metrics) or None,
        model_name=name if results else None,
        eval_results=results or None,
    )
    return f"---\n{data.to_yaml()}\n---"


def _eval_results(rows: Sequence[Mapping[str, Any]]) -> list[Any]:
    """The metrics as the Hub's model-index has them; the protocol stands for the data set."""
    from huggingface_hub import EvalResult

    results = []
    for row in rows:
        protocol = _line(row.get("protocol", "not said"))
        size = {
            name: row[name] for name in ("low", "high", "n", "groups") if row.get(name) is not None
        }
        results.append(
            EvalResult(
                task_type=TASK,
                task_name="malicious LoRA detection",
                dataset_type="lora-adapters",
                dataset_name=protocol,
                dataset_config=_slug(protocol),
                metric_type=metric_type(row["metric"]),
                metric_name=_line(row["metric"]),
                metric_value=float(row["value"]),
                metric_args=size or None,
            )
        )
    return results


def metric_type(name: str) -> str:
    """The identifier of a metric in a model-index.

    >>> [metric_type(name) for name in ("AUROC, worst of 36", "TPR at 1 % FPR", "Brier score")]
    ['roc_auc', 'tpr@fpr0.01', 'brier_score']
    """
    if re.match(r"(AUROC|ROC AUC)\b", name):
        return "roc_auc"
    rate = re.match(r"TPR at ([\d.]+) ?% FPR", name)
    return f"tpr@fpr{float(rate[1]) / 100:g}" if rate else _slug(name).replace("-", "_")


def _at_a_glance(probe: Probe) -> str:
    layout, recipe = probe.featurizer.layout, probe.featurizer.recipe
    training = probe.facts.get("training", {})
    calibration = "none"
    if probe.calibration:
        calibration = (
            f"{probe.calibration.method}, on {probe.calibration.rows} rows of unit"
            f" {probe.calibration.unit!r}; for a prior of one half"
        )
    rows = {
        "Base model": probe.base_model or "not recorded",
        "Adapters": f"{layout.kind}, {len(layout.scalings)} modules read",
        "Features": f"{', '.join(recipe.features)} of layers {recipe.layers}, factors"
        f" {', '.join(recipe.factors)}",
        "Feature vector": f"{probe.featurizer.num_features} numbers",
        "Head": str(training.get("head", probe.head.name)),
        "Threshold": f"{probe.threshold:.4g} ({_rule(training)})",
        "Benign below": f"{probe.lower_cut:.4g}; inconclusive in between",
        "Calibration": calibration,
        "Trained on": f"{training.get('n', '?')} adapters of {training.get('n_groups', '?')}"
        f" groups, {training.get('n_malicious', '?')} malicious",
    }
    lines = [f"| {name} | {_cell(value)} |" for name, value in rows.items()]
    return "\n".join(["| | |", "|---|---|", *lines])


def _rule(training: Mapping[str, Any]) -> str:
    """Where the threshold comes from."""
    rule = str(training.get("threshold_rule", "fixed"))
    if not rule.startswith("fpr:"):
        return "fixed"
    return (
        f"{rule}: a budget of {float(rule[4:]):.3g} false positives a benign group, kept on"
        " out-of-fold scores"
    )


def _usage(probe: Probe, repo_id: str | None, subfolder: str | None) -> str:
    kind = probe.featurizer.layout.kind
    where = f'"{repo_id or "path-or-hub-id"}"' + (f', subfolder="{subfolder}"' if subfolder else "")
    names = "Probe" if kind == "weights" else f"Probe, {kind}, load_adapter"
    # A blank line after the import, double quotes: formatters that know Markdown leave it as it is.
    lines = [f"from loraprobe import {names}", "", f"probe = Probe.from_pretrained({where})"]
    base = ""
    if kind == "weights":
        lines += ['print(probe("adapter"))  # P(malicious)']
    else:
        base = " --base adapter-before-training"
        lines += [
            'before = load_adapter("adapter-before-training")',
            f'delta = {kind}(load_adapter("adapter"), before)',
            "print(probe(delta))  # P(malicious)",
        ]
    text = "## Use\n\n```python\n" + "\n".join(lines) + "\n```"
    if not repo_id:
        return text
    command = f"loraprobe score adapter{base} --probe {repo_id}" + (
        f" --subfolder {subfolder}" if subfolder else ""
    )
    return (
        f"{text}\n\nPin what you have tested: `revision=` takes the 40-digit commit that `loraprobe"
        " push` and `loraprobe pull` print and the history on the Hub lists. A branch such as"
        f" `main` can change under you; a commit cannot. On the command line:\n\n```\n{command}"
        " --revision COMMIT\n```"
    )


def _figure(probe: Probe) -> str:
    distribution = score_distribution(probe.facts)
    if distribution is None:
        return ""
    sizes = "; ".join(
        f"{_line(name)} (n = {sum(counts)})" for name, counts in distribution["counts"].items()
    )
    what = (
        f"{_line(distribution['what'])}. One score is of one {_line(distribution['unit'])}. Groups:"
        f" {sizes}."
    )
    if can_draw():
        return (
            "## Scores\n\n![Histograms of the scores, a row for each"
            f" group]({FIGURE_NAME})\n\nShown: {what}"
        )
    return (
        "## Scores\n\nNo figure: matplotlib was missing where this card was written. `pip install"
        f" 'loraprobe[figures]'`, then `loraprobe card FOLDER --out FOLDER/{CARD_NAME}` draws"
        f" {FIGURE_NAME} from the counts in config.json. It shows: {what}"
    )


def _metrics(rows: Sequence[Mapping[str, Any]]) -> str:
    shown = []
    for row in rows:
        interval = f" [{row['low']:.3f}, {row['high']:.3f}]" if row.get("low") is not None else ""
        shown.append({**row, "value": f"{row['value']:.3f}{interval}"})
    table = _table("Measured by the publisher", _METRIC_COLUMNS, shown)
    return f"{table}\n\n{_CLAIMED}" if table else ""


def _training(probe: Probe) -> str:
    """The recipe: everything that `fit_features` recorded, and what the featurizer computes."""
    training, recipe = probe.facts.get("training", {}), probe.featurizer.recipe
    if not training:
        return ""
    rows = [
        {"what": name.replace("_", " "), "value": _value(value)}
        for name, value in training.items()
        if name not in ("score_distribution", "marks")
    ]
    computed = {**recipe.to_dict(), "modules": recipe.modules or "all"}
    rows += [{"what": f"recipe: {name}", "value": _value(item)} for name, item in computed.items()]
    return _table("Training recipe", ("what", "value"), rows)


def _value(value: Any) -> str:
    """A setting as a reader would write it."""
    if isinstance(value, Mapping):
        pairs = ", ".join(f"{name} = {_value(item)}" for name, item in value.items())
        return pairs or "none but the defaults"
    if isinstance(value, list | tuple):
        return ", ".join(_value(item) for item in value)
    if isinstance(value, float):
        return f"{value:.6g}"
    return "none" if value in (None, "None") else str(value)


def _table(title: str, columns: Sequence[str], rows: Sequence[Mapping[str, Any]]) -> str:
    if not rows:
        return ""
    lines = [f"| {' | '.join(columns)} |", "|" + "---|" * len(columns)]
    lines += [f"| {' | '.join(_cell(row.get(column, '')) for column in columns)} |" for row in rows]
    return f"## {title}\n\n" + "\n".join(lines)


def _cell(value: Any) -> str:
    """One line of a table cell: a bar or a line break in a fact would move every cell after it."""
    return _line(value).replace("|", "\\|")


def _text(facts: Mapping[str, Any], name: str, default: str) -> str:
    text = facts.get(name, default)
    if not isinstance(text, str):
        raise TypeError(f"{name}: got {type(text).__name__}, expected text")
    return text


def _line(value: Any) -> str:
    return " ".join(str(value).split())


def _slug(text: str) -> str:
    return re.sub(r"[^a-z0-9@.]+", "-", text.lower()).strip("-")


def _bullets(title: str, items: Sequence[str]) -> str:
    if isinstance(items, str):
        raise TypeError(f"{title}: got text, expected a list of text")
    return f"## {title}\n\n" + "\n".join(f"- {item}" for item in items) if items else ""
