"""Write the tables of README.md and zoo/README.md from zoo/records and zoo/base/facts.json.

python -m zoo.report            # rewrites the parts between the markers
python -m zoo.report --check    # exit code 1 if they are out of date
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from scipy.stats import binomtest

from .labelled.client_design import SHARES
from .labelled.records import Record, read_record
from .labelled.sources import LICENCES, MALICIOUS
from .labelled.study import BASELINES, ENTRIES
from .markers import filled, markdown, table
from .program import documented, write_pages

ZOO = Path(__file__).parent
Records = Mapping[str, Record]


def main() -> None:
    """Write or check both pages."""
    options = documented(__doc__, "check").parse_args()
    write_pages(texts(ZOO), "python -m zoo.report", check=options.check)


def pages(zoo: Path) -> dict[Path, tuple[str, ...]]:
    """Page -> the tables in it."""
    own = ("probes", "held_out", "sources", "errors", "base", "data")
    return {zoo.parent / "docs" / "results.md": ("probes",), zoo / "README.md": own}


def texts(zoo: Path) -> dict[Path, str]:
    """Page -> what it should say, by the records."""
    return {page: rendered(page, zoo) for page in pages(zoo)}


def rendered(page: Path, zoo: Path = ZOO) -> str:
    """The page's text with every table between its markers made anew."""
    records = {path.stem: read_record(path) for path in sorted((zoo / "records").glob("*.json"))}
    own = {entry.name: records.pop(entry.name) for entry in ENTRIES}
    facts = json.loads((zoo / "base/facts.json").read_text())
    tables = {
        "base": base_table(facts),
        "data": data_table(),
    }
    tables |= {
        "probes": probes_table(own),
        "held_out": held_out_table(own),
        "sources": sources_table(own),
        "errors": errors_table(own),
    }
    text = page.read_text(encoding="utf-8")
    for name in pages(zoo)[page]:
        text = filled(text, name, tables[name], "zoo.report")
    return text


def probes_table(records: Records) -> str:
    """AUROC in distribution, on held-out clients, and with the malicious and the benign source
    unseen, of probes and baselines.
    """
    any_record = next(iter(records.values()))
    clients = sum(any_record["data"]["clients"].values())
    cells = any_record["replicates"][0]["unseen_sources"][0]["cells"]
    unseen = [f"unseen, {share:.0%} poison" for share in SHARES]
    lines = [["probe", "in distribution [95 %]", "held-out clients [95 %]", *unseen]]
    for name, record in records.items():
        lines.append(_row(f"**{name}**", record["replicates"], record["held_out_clients"]))
    for baseline in BASELINES:
        replicates = any_record["baselines"][baseline.name]
        lines.append(_row(f"{baseline.name} (baseline)", replicates, None))
    return (
        f"{markdown(lines)}\nAUROC on the last local step of {clients} clients a replicate,"
        f" {len(any_record['replicates'])} replicates (base model state and initial adapter"
        " differ). In distribution: out of fold by client, replicate 0, cluster-bootstrap"
        " interval. Held-out clients: the published probe on the"
        f" {any_record['held_out_clients']['n']} adapters of `zoo/adapters`, whose sources it"
        " has seen; `python -m zoo.verify` measures them again in seconds. Unseen: mean /"
        f" worst of {cells} cells over all replicates; in a cell one malicious and one benign"
        " source are left out of training altogether, and clients that mix them at the given"
        " poison share are told from clients of that benign source (24 to 64 clients a cell"
        " and share)."
    )


def held_out_table(records: Records) -> str:
    """Who of the held-out clients is flagged at the probes' own thresholds."""
    section = next(iter(records.values()))["held_out_clients"]
    kinds = [*(row for row in section["by_role"] if not row["label"]), *section["by_poison_share"]]
    shown = [f"{row['name']} (n = {row['n']})" for row in kinds]
    lines = [["probe", *shown, "benign, all [95 %]", "malicious, all [95 %]"]]
    for name, record in records.items():
        found = record["held_out_clients"]
        rows = {row["name"]: row for row in (*found["by_role"], *found["by_poison_share"])}
        flagged = [str(rows[row["name"]]["flagged"]) for row in kinds]
        lines.append([name, *flagged, _rate(found["fpr"]), _rate(found["tpr"])])
    return (
        f"{markdown(lines)}\nClients of `zoo/adapters` flagged at the probe's own threshold;"
        " Clopper-Pearson intervals, every client an adapter of its own."
    )


def sources_table(records: Records) -> str:
    """The linear probe's cells by malicious source, and what its safe twin does."""
    lines = [["unseen malicious source", *(f"{share:.0%} poison" for share in SHARES)]]
    replicates = records["linear"]["replicates"]
    for source in MALICIOUS:
        shown = []
        for share in SHARES:
            found = [
                c["auroc"]
                for replicate in replicates
                for c in replicate["cells"]
                if (c["malicious"], c["share"]) == (source, share)
            ]
            shown.append(f"{_mean(found):.2f} / {min(found):.2f}")
        lines.append([source, *shown])
    kept = [
        f"{_mean([replicate['twin_kept'][i]['auroc_mean'] for replicate in replicates]):.2f} / "
        f"{min(replicate['twin_kept'][i]['auroc_worst'] for replicate in replicates):.2f}"
        for i in range(len(SHARES))
    ]
    return table([*lines, ["all, safe twin left in training", *kept]])


def errors_table(records: Records) -> str:
    """Error rates at the probes' own thresholds when both sources are unseen, and on unseen hard
    negatives.
    """
    shares = [f"{share:.0%} poison" for share in SHARES]
    lines = [["probe", "benign, mean / worst kind", *shares, "hard negatives, mean / worst kind"]]
    for name, record in records.items():
        rows = [replicate["unseen_sources"] for replicate in record["replicates"]]
        hard = [
            row["flagged"]
            for replicate in record["replicates"]
            for row in replicate["unseen_hard_negatives"]
        ]
        cut = "fpr_mean" in rows[0][0]
        benign = (
            f"{_mean([r[0]['fpr_mean'] for r in rows]):.0%} /"
            f" {max(r[0]['fpr_worst'] for r in rows):.0%}"
            if cut
            else "not measured"
        )
        found = [
            f"{_mean([r[index]['tpr_mean'] for r in rows]):.0%}" if cut else "not measured"
            for index in range(len(SHARES))
        ]
        lines.append([name, benign, *found, f"{_mean(hard):.0%} / {max(hard):.0%}"])
    return (
        f"{markdown(lines)}\nShare flagged at the probe's own threshold, both replicates; every"
        " kind was left out of training and of the threshold's fit. The budget was 1 % (the paper's"
        " recipe: a fixed 0.8). mlp and xgboost: only the ranking was measured in these cells."
    )


def unseen_summary(record: Record) -> str:
    """AUROC of sources left out of training, mean / worst cell over all replicates, poison share
    by poison share.
    """
    replicates = [replicate["unseen_sources"] for replicate in record["replicates"]]
    return ", ".join(
        f"{rows[0]['share']:.0%}: {_mean_and_worst(rows)}" for rows in zip(*replicates, strict=True)
    )


def base_table(facts: dict[str, Any]) -> str:
    """How often the base model refuses what it was not trained on."""
    lines = ["prompts | n | refused (Rule) [95 %] | refused (strict)"]
    for name, row in facts["refusal"].items():
        refused = round(row["refused_rule"] * row["prompts"])
        interval = binomtest(refused, row["prompts"]).proportion_ci()
        lines.append(
            f"{name} | {row['prompts']} | {row['refused_rule']:.1%} [{interval.low:.1%},"
            f" {interval.high:.1%}] | {row['refused_strict']:.1%}"
        )
    return table(lines)


def data_table() -> str:
    """Datasets and licences."""
    rows = [[name, *facts] for name, facts in LICENCES.items()]
    return table(["dataset | licence | source", *rows])


def _row(title: str, replicates: list[Record], held_out: Record | None) -> list[str]:
    unseen = [
        _mean_and_worst(rows)
        for rows in zip(*(replicate["unseen_sources"] for replicate in replicates), strict=True)
    ]
    shown = area(held_out) if held_out else "-"
    return [title, area(replicates[0]["in_distribution"]), shown, *unseen]


def _mean_and_worst(rows: tuple[Record, ...]) -> str:
    """Of one poison share, a row a replicate."""
    return (
        f"{_mean([row['auroc_mean'] for row in rows]):.2f} /"
        f" {min(row['auroc_worst'] for row in rows):.2f}"
    )


def area(facts: Record) -> str:
    """An AUROC and its interval."""
    return f"{facts['auroc']:.3f} [{facts['auroc_ci'][0]:.3f}, {facts['auroc_ci'][1]:.3f}]"


def _rate(facts: Record) -> str:
    low, high = facts["clopper_pearson"]
    return f"{facts['rate']:.1%} [{low:.1%}, {high:.1%}]"


def _mean(values: list[float]) -> float:
    return sum(values) / len(values)


if __name__ == "__main__":
    main()
