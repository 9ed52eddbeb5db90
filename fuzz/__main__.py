"""python -m fuzz: damage files, load them, and say what the loaders did.

Every target runs in a child of its own. With --write the table in README.md and results/report.json
are written. Exit code 1 if a case failed; its files are then under the folder that is printed.
"""

from __future__ import annotations

import json
import platform
import tempfile
import time
from importlib.metadata import version
from pathlib import Path
from typing import Any

from zoo.markers import filled
from zoo.program import documented

from .cases import run_child
from .oracle import OUTCOMES
from .targets import TARGETS

HERE = Path(__file__).parent
RESULTS = HERE / "results" / "report.json"
README = HERE / "README.md"
VERSIONS = ("numpy", "safetensors", "fastapi", "hypothesis")
Report = dict[str, Any]


def main(arguments: list[str] | None = None) -> int:
    """Run and print; the exit code."""
    parser = documented(__doc__)
    parser.prog = "python -m fuzz"
    parser.add_argument("--target", action="append", choices=list(TARGETS), help="all unless said")
    parser.add_argument("--cases", type=int, default=2000, help="cases of every target")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--write", action="store_true", help="write the report")
    options = parser.parse_args(arguments)
    if options.cases < 1:
        parser.error(f"--cases: got {options.cases}; expected at least 1")
    if options.write and options.target:
        parser.error("--write: got --target as well; expected all targets in a report")
    report: Report = {"cases": options.cases, "seed": options.seed, "setting": setting()}
    report["outcomes"] = {}
    failed = False
    for name in options.target or TARGETS:
        folder = Path(tempfile.mkdtemp(prefix=f"fuzz-{name}-"))
        began = time.monotonic()
        ending = run_child(name, options.cases, options.seed, folder)
        report["outcomes"][name] = dict(sorted(ending.outcomes.items()))
        print(f"{name}, {time.monotonic() - began:.0f} s: {ending.kind}", flush=True)
        if ending.kind != "ok":
            failed = True
            print(f"{ending.text[-3000:]}\nThe files are in {folder}/damaged.", flush=True)
    if options.write and not failed:
        RESULTS.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
        README.write_text(page(report), encoding="utf-8")
    return int(failed)


def setting() -> dict[str, str]:
    """What the cases ran with."""
    return {"python": platform.python_version(), **{name: version(name) for name in VERSIONS}}


def page(report: Report) -> str:
    """README.md with the table of a report."""
    return filled(README.read_text(encoding="utf-8"), "cases", table(report), "fuzz")


def table(report: Report) -> str:
    """Markdown: one row a target, one column an outcome."""
    lines = [
        f"| target | file | cases | {' | '.join(OUTCOMES)} |",
        "| --- | --- " + "| ---: " * (len(OUTCOMES) + 1) + "|",
    ]
    for name, counts in report["outcomes"].items():
        numbers = [sum(counts.values()), *(counts.get(outcome, 0) for outcome in OUTCOMES)]
        cells = " | ".join(f"{number:,}" for number in numbers)
        lines.append(f"| {name} | {TARGETS[name].title} | {cells} |")
    versions = ", ".join(f"{name} {number}" for name, number in report["setting"].items())
    return "\n".join([*lines, "", f"Seed {report['seed']}; {versions}. No case failed."])


if __name__ == "__main__":
    raise SystemExit(main())
