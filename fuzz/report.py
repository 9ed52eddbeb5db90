"""The report: results/report.json adds up the runs.

The table in README.md is made of it and of nothing else.
"""

from __future__ import annotations

import hashlib
import json
import platform
from collections import Counter
from collections.abc import Iterable
from importlib.metadata import version
from pathlib import Path
from typing import Any

from .oracle import OUTCOMES
from .runner import Tally
from .targets import TARGETS

Report = dict[str, Any]

RESULTS = Path(__file__).parent / "results"
README = Path(__file__).parent / "README.md"
LOADERS = Path(__file__).resolve().parent.parent / "loraprobe"
VERSIONS = ("numpy", "torch", "safetensors", "xgboost-cpu", "fastapi")
START, END = "<!-- cases: written by python -m fuzz -->", "<!-- end of cases -->"


def load(folder: Path) -> Report:
    """The report so far, or an empty one."""
    path = folder / "report.json"
    if path.exists():
        report: Report = json.loads(path.read_text(encoding="utf-8"))
        return report
    return {"runs": [], "outcomes": {}, "failures": []}


def add(report: Report, target: str, seed: int, tally: Tally) -> None:
    """Count a run in."""
    report["runs"].append(
        {
            "target": target,
            "seed": seed,
            "first": tally.first,
            "cases": tally.cases,
            "seconds": round(tally.seconds, 1),
            "setting": setting(),
        }
    )
    counts = report["outcomes"].setdefault(target, {})
    for (mutation, outcome), cases in sorted(tally.outcomes.items()):
        of_mutation = counts.setdefault(mutation, {})
        of_mutation[outcome] = of_mutation.get(outcome, 0) + cases
    for number, kind, mutation, what in tally.failures:
        report["failures"].append(
            {
                "target": target,
                "seed": seed,
                "number": number,
                "kind": kind,
                "mutation": mutation,
                "what": what,
                "again": reproduction(target, seed, number),
            }
        )


def setting() -> dict[str, str]:
    """What the cases ran with: versions, and a digest of the library's sources."""
    digest = hashlib.sha256(
        b"".join(path.read_bytes() for path in sorted(LOADERS.rglob("*.py")))
    ).hexdigest()
    return {
        "python": platform.python_version(),
        **{name: version(name) for name in VERSIONS},
        "loraprobe": digest[:16],
    }


def reproduction(target: str, seed: int, number: int) -> str:
    """The command that runs one case again."""
    return (
        f"python -m fuzz --target {target} --seed {seed} --first {number} --cases 1 --out /tmp/fuzz"
    )


def next_number(report: Report, target: str, seed: int) -> int:
    """The first case of this target and seed that no run has had."""
    return max(
        (
            run["first"] + run["cases"]
            for run in report["runs"]
            if (run["target"], run["seed"]) == (target, seed)
        ),
        default=0,
    )


def overlaps(report: Report, target: str, seed: int, numbers: range) -> bool:
    """Whether a case would be counted twice."""
    return any(
        run["first"] < numbers.stop and numbers.start < run["first"] + run["cases"]
        for run in report["runs"]
        if (run["target"], run["seed"]) == (target, seed)
    )


def save(report: Report, folder: Path) -> None:
    """Write the report; the README beside the package is written where its own results are."""
    folder.mkdir(parents=True, exist_ok=True)
    part = folder / "report.json.part"
    part.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
    part.replace(folder / "report.json")  # a run may be stopped at any moment
    if folder.resolve() == RESULTS:
        text = README.read_text(encoding="utf-8")
        before, after = text.partition(START)[0], text.partition(END)[2]
        README.write_text(f"{before}{START}\n{table(report)}\n{END}{after}", encoding="utf-8")


def table(report: Report) -> str:
    """Markdown: one row a target, one column an outcome."""
    rows = [
        (target, of_target(report, target)) for target in TARGETS if target in report["outcomes"]
    ]
    rows.append(("**all**", sum((counts for _, counts in rows), Counter())))
    lines = [
        f"| target | file | cases | {' | '.join(OUTCOMES)} | failed |",
        "| --- | --- " + "| ---: " * (len(OUTCOMES) + 2) + "|",
    ]
    for name, counts in rows:
        title = TARGETS[name].title if name in TARGETS else ""
        numbers = [counts.total(), *(counts[outcome] for outcome in (*OUTCOMES, "failed"))]
        lines.append(f"| {name} | {title} | {' | '.join(f'{number:,}' for number in numbers)} |")
    return "\n".join([*lines, "", _footnote(report)])


def of_target(report: Report, target: str) -> Counter[str]:
    """Outcome -> cases, over all mutations of a target."""
    total: Counter[str] = Counter()
    for counts in report["outcomes"].get(target, {}).values():
        total.update(counts)
    return total


def _footnote(report: Report) -> str:
    runs = report["runs"]
    seeds = sorted({run["seed"] for run in runs})
    minutes = sum(run["seconds"] for run in runs) / 60
    settings = _distinct(
        ", ".join(
            f"{name} {value}" for name, value in run["setting"].items() if name != "loraprobe"
        )
        for run in runs
    )
    return (
        f"{len(runs)} runs, {minutes:.0f} minutes, seeds {', '.join(map(str, seeds))};"
        f" {'; '.join(settings)}. The counts of every mutation are in `results/report.json`."
    )


def _distinct(items: Iterable[str]) -> list[str]:
    return list(dict.fromkeys(items))
