"""Leave-one-out evaluation of the zoo's adapters.

Their manifest with every column of the design, and the command that measures.

    python -m zoo.leave_out         # writes zoo/leave_out/designed.csv, measures what is not
                                    # measured yet, minutes each
    python -m zoo.leave_out --anew  # measures again

Each result is what one `loraprobe leave-out zoo/leave_out/designed.csv ...` writes; the
commands are printed. The page zoo/leave_out/README.md follows from the results.
"""

from __future__ import annotations

import json
from typing import Any

from typer.testing import CliRunner

from loraprobe.errors import DataError

from .build import ADAPTERS, SAMPLE, SAMPLE_SEED, ZOO
from .labelled.client_design import plan
from .labelled.held_out import DESIGNED, write_designed
from .labelled.measure import same_rounding
from .markers import table
from .program import documented

OUT = ZOO / "leave_out"
# 88 benign clients: a budget of 1 % would need 99 of them in training, so the cut is that of 5 %.
CUTS = "--cut fpr:0.05 --cut 0.8"
ALL_B, PAPER = "--head linear --recipe all_b", "--head linear_paper --recipe paper"
# result -> its title and options; the quickest first; baselines come with every recipe
RUNS = {
    "lr": ("Learning rates", f"lr --head linear {CUTS}"),
    "pairs": ("One malicious and one benign source", f"source --pairs {ALL_B} {CUTS}"),
    "source": ("Sources", f"source --head linear --folds 3 {CUTS}"),
    "source_twins_kept": (
        "Sources, safe twins kept",
        f"source --keep-twins {ALL_B} --folds 3 {CUTS}",
    ),
    "source_published": ("Sources, the published recipe", f"source {PAPER} --folds 3 {CUTS}"),
}
ABOUT = """# Leave-one-out evaluation of the zoo's adapters

Written by `python -m zoo.leave_out` from the results in this folder: the 212 held-out clients of
`zoo/adapters`, 124 malicious and 88 benign, 52 of the benign ones hard negatives. Heads and
baselines are fitted anew on these clients, without what is left out; the published probes, which
saw all sources on other clients, are not used. A malicious source is left out with its safe twin
(safe answers to the same questions) and tested against all benign clients, hard negatives among
them; a benign source is left out with all mixtures into it and tested against all malicious
clients; neither class is tested by a probe that was fitted on the client. Rates are at the
probe's own cut: the conformal one of a budget of 5 % false positives (1 % needs more benign
clients than there are here), and 0.8. Mean / worst over what was left out. The training sets are
small: for probes fitted on 1480 clients see the unseen sources in `zoo/README.md`.
"""


def main() -> None:
    """Write the manifest, then run what has no result."""
    parser = documented(__doc__)
    parser.add_argument("--anew", action="store_true", help="measure again what has a result")
    anew = parser.parse_args().anew
    from loraprobe.cli.commands import app

    manifest = write_designed(plan(SAMPLE, SAMPLE_SEED), ZOO / ADAPTERS, OUT)
    for name, (_, options) in RUNS.items():
        out = OUT / f"{name}.json"
        if out.exists() and not anew:
            continue
        arguments = ["leave-out", str(manifest), *options.split(), "--out", str(out)]
        print(f"loraprobe {' '.join(arguments)}", flush=True)
        with same_rounding(1):
            result = CliRunner().invoke(app, arguments)
        print(result.output, flush=True)
        if result.exit_code:
            raise DataError(f"{name} was not measured: exit code {result.exit_code}")
    (OUT / "README.md").write_text(page(), encoding="utf-8")


def page() -> str:
    """The page of all results, in Markdown."""
    parts = [ABOUT]
    for name, (title, options) in RUNS.items():
        path = OUT / f"{name}.json"
        if not path.exists():
            continue
        found = json.loads(path.read_text())
        command = (
            f"loraprobe leave-out zoo/leave_out/{DESIGNED} {options} --out"
            f" zoo/leave_out/{name}.json"
        )
        parts.append(f"## {title}\n\n```\n{command}\n```\n\n{_summary(found)}\n")
        if not found["protocol"]["pairs"]:
            parts.append(
                f"What was left out, one by one, `{found['outcomes'][0]['detector']}` on"
                f" `{found['outcomes'][0]['recipe']}`:\n\n{_each(found)}\n"
            )
    return "\n".join(parts)


def _summary(found: dict[str, Any]) -> str:
    """A line a detector and side, mean / worst over what was left out."""
    cuts = [
        f"{rate} at {cut}"
        for cut in found["protocol"]["cuts"]
        for rate in ("TPR", "FPR", "hard negatives flagged")
    ]
    rows = []
    for row in found["summary"]:
        rates = [_two(cut, rate) for cut in row["cuts"] for rate in ("tpr", "fpr", "fpr_hard")]
        name = f"{row['detector']}{' (baseline)' if row['baseline'] else ''}"
        ranking = [
            f"{row['auroc_mean']:.2f} / {row['auroc_worst']:.2f}",
            row["worst"].replace("|", "in"),
            f"{row['tpr_at_1_fpr_mean']:.2f}",
        ]
        place = [name, row["recipe"], row["side"], str(row["measured"])]
        rows.append([*place, *ranking, *rates, f"{row['ece_mean']:.2f}"])
    columns = "detector | recipe | left out is | folds | AUROC | worst for | TPR at 1 % FPR"
    return table([[*columns.split(" | "), *cuts, "ECE"], *rows])


def _two(cut: dict[str, Any], rate: str) -> str:
    mean, worst = cut[f"{rate}_mean"], cut[f"{rate}_worst"]
    return "-" if mean is None else f"{mean:.0%} / {worst:.0%}"


def _each(found: dict[str, Any]) -> str:
    """A line a fold of the first detector."""
    first, fields = found["outcomes"][0], ("detector", "recipe", "baseline")
    rows = []
    for one in found["outcomes"]:
        if any(one[field] != first[field] for field in fields):
            continue
        low, high = one["auroc_ci"]
        counts = f"{one['n_malicious']} / {one['n'] - one['n_malicious']}"
        rates = [f"{cut['tpr']:.0%} / {cut['fpr']:.0%}" for cut in one["cuts"]]
        area = f"{one['auroc']:.3f} [{low:.3f}, {high:.3f}]"
        rows.append([one["left_out"], one["side"], counts, area, *rates])
    cuts = [f"TPR / FPR at {cut}" for cut in found["protocol"]["cuts"]]
    head = ["left out", "it is", "malicious / benign tested", "AUROC [95 %]", *cuts]
    return table([head, *rows])


if __name__ == "__main__":
    main()
