"""Leave-one-out evaluation of the zoo's adapters: their manifest with every column of the design, and the command that measures.

    python -m zoo.leave_out          # writes zoo/leave_out/designed.csv, measures what is not measured yet, minutes each
    python -m zoo.leave_out --anew   # measures again

Each result is what one `loraprobe evaluate zoo/leave_out/designed.csv --leave-out ...` writes; the commands are printed.
"""

from __future__ import annotations

import argparse

from typer.testing import CliRunner

from loraprobe.errors import DataError

from .build import ADAPTERS, SAMPLE, SAMPLE_SEED, ZOO
from .design import plan
from .held_out import write_designed
from .measure import same_rounding

OUT = ZOO / "leave_out"
# 88 benign clients: a budget of 1 % would need 99 of them in training, so the cut is that of 5 %.
CUTS = ("--cut", "fpr:0.05", "--cut", "0.8")
RUNS = {  # the quickest first; baselines come with every recipe
    "lr": ("--leave-out", "lr", "--head", "linear", *CUTS),
    "pairs": ("--leave-out", "source", "--pairs", "--head", "linear", "--recipe", "all_b", *CUTS),
    "source": ("--leave-out", "source", "--head", "linear", *CUTS),
    "source_twins_kept": ("--leave-out", "source", "--keep-twins", "--head", "linear", "--recipe", "all_b", *CUTS),
    "source_published": ("--leave-out", "source", "--head", "linear_paper", "--recipe", "paper", *CUTS),
}


def main() -> None:
    """Write the manifest, then run what has no result."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--anew", action="store_true", help="measure again what has a result")
    anew = parser.parse_args().anew
    from loraprobe.commands import app

    manifest = write_designed(plan(SAMPLE, SAMPLE_SEED), ZOO / ADAPTERS, OUT)
    for name, options in RUNS.items():
        out = OUT / f"{name}.json"
        if out.exists() and not anew:
            continue
        arguments = ["evaluate", str(manifest), *options, "--out", str(out)]
        print(f"loraprobe {' '.join(arguments)}", flush=True)
        with same_rounding(1):
            result = CliRunner().invoke(app, arguments)
        print(result.output, flush=True)
        if result.exit_code:
            raise DataError(f"{name} was not measured: exit code {result.exit_code}")


if __name__ == "__main__":
    main()
