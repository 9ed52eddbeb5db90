"""python -m fuzz: damage files, load them, report.

Without --first a run goes on where the report ends, so that runs add up. Exit code 1 if a case
failed.
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path

from . import report as reports
from .runner import BATCH, Tally, run
from .targets import TARGETS

MINUTES = 10.0


def main(arguments: list[str] | None = None) -> int:
    """Run, print and write; the exit code."""
    options = _options(arguments)
    report = reports.load(options.out)
    minutes = MINUTES if options.minutes is None and options.cases is None else options.minutes
    until = float("inf") if minutes is None else time.monotonic() + 60 * minutes
    failed, left = 0, dict.fromkeys(options.target or TARGETS, options.cases or 10**9)
    while left:
        for target in list(left):  # in turn, so that every target gets its share of the time
            if time.monotonic() > until:
                return 1 if failed else 0
            first = (
                reports.next_number(report, target, options.seed)
                if options.first is None
                else options.first + options.cases - left[target]
            )
            cases = min(left[target], BATCH)
            if reports.overlaps(report, target, options.seed, range(first, first + cases)):
                raise SystemExit(
                    f"{options.out}/report.json has some of these cases of {target} and this seed:"
                    " leave --first out, or take another --out"
                )
            tally = run(target, options.seed, first, cases)
            _say(target, options.seed, tally)
            failed += len(tally.failures)
            reports.add(report, target, options.seed, tally)
            reports.save(report, options.out)
            left[target] -= tally.cases
            if not left[target]:
                del left[target]
    return 1 if failed else 0


def _options(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m fuzz",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "--target",
        action="append",
        choices=list(TARGETS),
        help="what to fuzz, several times for several; all targets unless said",
    )
    parser.add_argument("--cases", type=int, help="cases of every target")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument(
        "--first", type=int, help="the number of the first case; where the report ends unless said"
    )
    parser.add_argument(
        "--minutes",
        type=float,
        help=f"start no batch after this time ({MINUTES:g} unless --cases is given)",
    )
    parser.add_argument(
        "--out", type=Path, default=reports.RESULTS, help="the folder of report.json"
    )
    options = parser.parse_args(arguments)
    if (options.cases is not None and options.cases < 1) or (
        options.first is not None and options.cases is None
    ):
        parser.error("expected --cases of at least 1, and --cases beside --first")
    return options


def _say(target: str, seed: int, tally: Tally) -> None:
    counts: dict[str, int] = {}
    for (_, outcome), cases in tally.outcomes.items():
        counts[outcome] = counts.get(outcome, 0) + cases
    print(
        f"{target}: {tally.first}-{tally.first + tally.cases - 1}, {tally.seconds:.1f} s, {counts}",
        flush=True,
    )
    for number, kind, mutation, what in tally.failures:
        print(
            f"  {kind} ({mutation}): {what}\n    {reports.reproduction(target, seed, number)}",
            flush=True,
        )


if __name__ == "__main__":
    raise SystemExit(main())
