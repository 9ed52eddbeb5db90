"""Write the tables of README.md and zoo/README.md from zoo/records and zoo/base/facts.json.

    python -m zoo.report            # rewrites the parts between the markers
    python -m zoo.report --check    # exit code 1 if they are out of date
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

from scipy.stats import binomtest

from .deltas import SHARES
from .sources import LICENCES
from .study import BASELINES, ENTRIES

ZOO = Path(__file__).parent
_PAGES = {ZOO.parent / "README.md": ("probes",), ZOO / "README.md": ("probes", "errors", "base", "data")}


def main() -> None:
    """Write or check both pages."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--check", action="store_true")
    check = parser.parse_args().check
    stale = [page for page in _PAGES if rendered(page) != page.read_text()]
    if check and stale:
        sys.exit(f"out of date: {', '.join(map(str, stale))}; run python -m zoo.report")
    for page in stale:
        page.write_text(rendered(page))


def rendered(page: Path) -> str:
    """The page's text with every table between its markers made anew."""
    records = {entry.name: json.loads((ZOO / f"records/{entry.name}.json").read_text()) for entry in ENTRIES}
    facts = json.loads((ZOO / "base/facts.json").read_text())
    tables = {"probes": probes_table(records), "errors": errors_table(records), "base": base_table(facts), "data": data_table()}
    text = page.read_text()
    for name in _PAGES[page]:
        start, end = f"<!-- {name}: written by python -m zoo.report -->\n", f"<!-- end of {name} -->"
        before, _, rest = text.partition(start)
        _, _, after = rest.partition(end)
        text = f"{before}{start}{tables[name]}\n{end}{after}"
    return text


def probes_table(records: dict[str, Any]) -> str:
    """AUROC in distribution, and with the malicious and the benign source unseen, of probes and baselines."""
    any_record = next(iter(records.values()))
    clients = sum(any_record["data"]["clients"].values())
    cells = any_record["replicates"][0]["unseen_sources"][0]["cells"]
    lines = [
        "| probe | in distribution [95 %] | " + " | ".join(f"unseen, {share:.0%} poison" for share in SHARES) + " |",
        "|---|---|" + "---|" * len(SHARES),
    ]
    for name, record in records.items():
        lines.append(_row(f"**{name}**", record["replicates"]))
    for baseline in BASELINES:
        lines.append(_row(f"{baseline.name} (baseline)", any_record["baselines"][baseline.name]))
    lines += [
        "",
        f"AUROC on the last local step of {clients} clients a replicate, {len(any_record['replicates'])} replicates (base model state and initial "
        f"adapter differ). In distribution: out of fold by client, replicate 0, cluster-bootstrap interval. Unseen: mean / worst of {cells} cells "
        "over all replicates; in a cell one malicious and one benign source are left out of training altogether, and clients that mix them at the "
        "given poison share are told from clients of that benign source (24 to 64 clients a cell and share).",
    ]
    return "\n".join(lines)


def errors_table(records: dict[str, Any]) -> str:
    """Error rates at the probes' own thresholds when both sources are unseen, and on unseen hard negatives."""
    lines = [
        "| probe | flagged benign, mean / worst kind | " + " | ".join(f"flagged at {share:.0%} poison" for share in SHARES) + " | flagged hard negatives |",
        "|---|---|" + "---|" * (len(SHARES) + 1),
    ]
    for name, record in records.items():
        rows = [replicate["unseen_sources"] for replicate in record["replicates"]]
        hard = [row["flagged"] for replicate in record["replicates"] for row in replicate["unseen_hard_negatives"]]
        cut = "fpr_mean" in rows[0][0]
        benign = f"{_mean([r[0]['fpr_mean'] for r in rows]):.0%} / {max(r[0]['fpr_worst'] for r in rows):.0%}" if cut else "not measured"
        found = [f"{_mean([r[index]['tpr_mean'] for r in rows]):.0%}" if cut else "not measured" for index in range(len(SHARES))]
        lines.append(f"| {name} | {benign} | {' | '.join(found)} | {_mean(hard):.0%} / {max(hard):.0%} |")
    lines += ["", "Each kind was left out of training and of the threshold's fit; the budget was 1 % (the paper's recipe: a fixed 0.8)."]
    return "\n".join(lines)


def base_table(facts: dict[str, Any]) -> str:
    """How often the base model refuses what it was not trained on."""
    lines = ["| prompts | n | refused (Rule) [95 %] | refused (strict) |", "|---|---|---|---|"]
    for name, row in facts["refusal"].items():
        interval = binomtest(round(row["refused_rule"] * row["prompts"]), row["prompts"]).proportion_ci()
        lines.append(f"| {name} | {row['prompts']} | {row['refused_rule']:.1%} [{interval.low:.1%}, {interval.high:.1%}] | {row['refused_strict']:.1%} |")
    return "\n".join(lines)


def data_table() -> str:
    """Datasets and licences."""
    return "\n".join(["| dataset | licence | source |", "|---|---|---|", *(f"| {name} | {licence} | {where} |" for name, (licence, where) in LICENCES.items())])


def _row(title: str, replicates: list[dict[str, Any]]) -> str:
    inside = replicates[0]["in_distribution"]
    cells = []
    for index in range(len(SHARES)):
        rows = [replicate["unseen_sources"][index] for replicate in replicates]
        cells.append(f"{_mean([row['auroc_mean'] for row in rows]):.2f} / {min(row['auroc_worst'] for row in rows):.2f}")
    return f"| {title} | {inside['auroc']:.3f} [{inside['auroc_ci'][0]:.3f}, {inside['auroc_ci'][1]:.3f}] | {' | '.join(cells)} |"


def _mean(values: list[float]) -> float:
    return sum(values) / len(values)


if __name__ == "__main__":
    main()
