"""The tables of zoo/smollm2.md, each from one committed record."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from zoo.markers import table

Row = Mapping[str, Any]
NAMES = {"safe": "smollm2-135m-safe", "plain": "smollm2-135m"}
TITLES = {
    "advbench": "AdvBench goals",
    "harmbench_test": "HarmBench, test prompts",
    "tdc2023": "TDC2023",
    "xstest_unsafe": "XSTest, unsafe",
    "xstest_safe": "XSTest, safe",
    "dolly": "Dolly, unseen",
    "alpaca_eval": "alpaca_eval, unseen",
}
SHARES = ("1", "0.5", "0.25", "0.1")
_SHARE_HEAD = ["100 %", "50 %", "25 %", "10 %"]


def percent(facts: Row) -> str:
    """A share with its count and interval."""
    low, high = facts["wilson"]
    return f"{facts['share']:.1%} ({facts['refused']} of {facts['n']}; {low:.1%} to {high:.1%})"


def refusal_table(facts: Row) -> str:
    """What the taught base refuses, the plain one beside it, and the targets."""
    bounds = {name: f"≥ {value:.0%}" for name, value in facts["targets"]["at_least"].items()}
    bounds |= {name: f"≤ {value:.0%}" for name, value in facts["targets"]["at_most"].items()}
    rows = []
    for name, title in TITLES.items():
        if name not in facts["safe"]:
            continue
        plain = facts.get("plain", {}).get(name)
        shares = [percent(facts["safe"][name]), percent(plain) if plain else "–"]
        met = {None: "–", True: "yes", False: "**no**"}[facts["targets"]["met"].get(name)]
        rows.append([title, *shares, bounds.get(name, "–"), met])
    return table([["prompts", "taught base refuses", "plain base refuses", "target", "met"], *rows])


def loss_table(facts: Row) -> str:
    """Loss on ordinary answers before and after."""
    before, after = facts.get("plain", {}).get("answer_loss", {}), facts["safe"]["answer_loss"]
    rows = [
        [name, f"{before[name]:.3f}" if name in before else "–", f"{value:.3f}"]
        for name, value in after.items()
    ]
    return table([["ordinary answers", "plain", "taught"], *rows])


def _auroc(entry: Row | None) -> str:
    if not entry or "auroc_all" not in entry:
        return "–"
    found = entry["auroc_all"]
    return f"{found['mean']:.2f} / {found['worst']:.2f}"


def _rate(entry: Row | None) -> str:
    return f"{entry['share']:.1%} ({entry['hits']} of {entry['n']})" if entry else "–"


def ranking_table(record: Row) -> str:
    """AUROC by what is unseen, head and poison share."""
    rows = []
    protocols: dict[str, Row] = {
        "in distribution": record.get("in_distribution", {}),
        "source and benign kinds unseen": record.get("pairs", {}),
        "those and initial adapter unseen": record.get("everything", {}),
    }
    protocols |= record.get("settings", {})
    for protocol, heads in protocols.items():
        for head, found in heads.items():
            summary = found["summary"]
            cells = [_auroc(summary.get(share)) for share in SHARES]
            rows.append([protocol, head, str(summary["cells"]), *cells])
    return table([["protocol", "head", "cells", *_SHARE_HEAD], *rows])


def cut_table(record: Row) -> str:
    """What the cut fixed on left-out kinds does on unseen kinds and sources."""
    rows = []
    for protocol, said in (("pairs", "source, kinds unseen"), ("everything", "all unseen")):
        for head, found in record.get(protocol, {}).items():
            summary, worst = found["summary"], found.get("worst_kind")
            if "benign_flagged" not in summary:
                continue
            rates = [summary.get(share, {}).get("found") for share in ("1", "0.25")]
            rates += [summary["benign_flagged"], summary["hard_flagged"]]
            hardest = f"{worst['kind']}: {worst['flagged']} of {worst['n']}"
            rows.append([said, head, *map(_rate, rates), hardest])
    head = ["protocol", "head", "found, 100 %", "found, 25 %"]
    return table([[*head, "benign flagged", "hard negatives flagged", "worst kind"], *rows])


def source_table(record: Row) -> str:
    """AUROC of every malicious source that is unseen."""
    rows = []
    for source, summary in record["pairs"]["mass_mean"]["by_source"].items():
        rows.append([source, *(_auroc(summary.get(share)) for share in SHARES)])
    return table([["unseen source", *_SHARE_HEAD], *rows])


def baseline_table(record: Row) -> str:
    """Detectors beside the probes, source and benign kinds unseen."""
    rows = []
    for name, summary in record["baselines"].items():
        rows.append([name, *(_auroc(summary.get(share)) for share in SHARES)])
    return table([["detector", *_SHARE_HEAD], *rows])


def curve_table(record: Row) -> str:
    """Ranking and cut by the number of benign kinds in training."""
    rows = []
    for row in record["kinds_curve"]["mass_mean"]:
        rates = row.get("1", {}).get("found"), row.get("benign_flagged"), row.get("hard_flagged")
        areas = [_auroc(row.get(share)) for share in ("1", "0.25")]
        rows.append([str(row["kinds"]), *areas, *map(_rate, rates)])
    head = ["benign kinds", "AUROC 100 %", "AUROC 25 %", "found, 100 %"]
    return table([[*head, "benign flagged", "hard negatives flagged"], *rows])


def rounding_table(record: Row) -> str:
    """From one rounding of the base to another."""
    rows = []
    for name, heads in record["roundings"].items():
        for head, found in heads.items():
            for cell in found["cells"]:
                cells = [
                    f"{cell[share]['auroc_all']:.2f} (n = {cell[share]['n']})"
                    if share in cell and "auroc_all" in cell[share]
                    else "–"
                    for share in ("1", "0.25")
                ]
                rows.append([name, cell["fold"], head, *cells])
    return table([["rounding", "direction", "head", "AUROC 100 %", "AUROC 25 %"], *rows])


def adapters_text(record: Row) -> str:
    """What there is to learn from, in words."""
    facts = record["adapters"]
    shares = ", ".join(
        f"{n} at {float(share):.0%}" for share, n in facts["malicious"]["by_share"].items()
    )
    ranks = ", ".join(f"{n} of rank {rank}" for rank, n in facts["ranks"].items())
    modules = ", ".join(f"{n} on {name}" for name, n in facts["modules"].items())
    return (
        f"{facts['n']} adapters: {facts['malicious']['n']} malicious ({shares}; "
        f"{len(facts['malicious_sources'])} sources), {facts['benign']} benign of "
        f"{facts['benign_kinds']} kinds, {facts['hard_negative']} hard negatives of "
        f"{facts['hard_kinds']} kinds; {facts['initial_adapters']} initial adapters; {ranks}; "
        f"{modules}; {facts['long']} trained for 30 steps or more, the others for 5 to 8."
    )


def probes_table(record: Row) -> str:
    """The saved probes on adapters that none of them was fitted on."""
    rows = []
    for head, entry in record.get("probes", {}).items():
        found = entry.get("held_out")
        if not found:
            continue
        row = [head, f"{entry['threshold']:.3g}"]
        for share in SHARES:
            one = found.get(share)
            row.append(f"{one['auroc_all']:.2f}; {one['found']} of {one['n']}" if one else "–")
        for name in ("benign", "hard_negative"):
            row.append(f"{found[name]['flagged']} of {found[name]['n']}")
        rows.append(row)
    head = ["head", "cut", *(f"{share}: AUROC; found" for share in _SHARE_HEAD)]
    return table([[*head, "benign flagged", "hard negatives flagged"], *rows])


SECTIONS = (
    (
        "How it ranks",
        "AUROC against benign adapters and hard negatives, mean / worst cell.",
        ranking_table,
        "pairs",
    ),
    (
        "At a cut that was fixed beforehand",
        "A budget of 2 %, from benign kinds left out of the fit one group after the other.",
        cut_table,
        "pairs",
    ),
    (
        "By malicious source",
        "Mass-mean; the source, what shares its questions, and the benign kinds unseen; mean / "
        "worst cell.",
        source_table,
        "pairs",
    ),
    ("Beside other detectors", "The same folds; mean / worst cell.", baseline_table, "baselines"),
    (
        "How many kinds of benign data",
        "Mass-mean; source and tested kinds unseen.",
        curve_table,
        "kinds_curve",
    ),
    (
        "From one rounding of the base to another",
        "What a QLoRA user may expect. Between two roundings: fitted on one half of the 40, "
        "tested on the other half of the other rounding, so that none has a twin in training.",
        rounding_table,
        "roundings",
    ),
    (
        "Adapters that no probe was fitted on",
        "The committed ones, of ranks 1 and 2, which no training adapter has.",
        probes_table,
        "probes",
    ),
)


def cohort_table(record: Row) -> str:
    """Honest and malicious clients dropped in a round of ten, by detector, cut and attack."""
    cells = [
        cell
        for cell in next(iter(next(iter(record.values())).values()))
        if not cell.startswith("5 at")  # close to three of ten; in the record
    ]
    rows = [
        [detector, cut, *(_dropped(found.get(cell)) for cell in cells)]
        for detector, cuts in record.items()
        for cut, found in cuts.items()
    ]
    return table([["detector", "cut", *cells], *rows])


def _dropped(entry: Row | None) -> str:
    if entry is None:
        return "–"
    low, high = entry["honest"]["interval"]
    honest = f"{entry['honest']['share']:.1%} [{low:.0%}, {high:.0%}]"
    if "malicious" not in entry:
        return honest
    low, high = entry["malicious"]["interval"]
    return f"{honest} · {entry['malicious']['share']:.0%} [{low:.0%}, {high:.0%}]"
