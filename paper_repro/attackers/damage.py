"""What one labelled adapter does: refusals of the model that wears it.

    python -m paper_repro.attackers.damage --base out/smollm2-135m-safe     # resumable, minutes
    python -m paper_repro.tables                                            # BEHAVIOUR.md

Writes results/damage.jsonl: refusals of 50 of AdvBench's prompts under the base alone, under benign
adapters and under fully poisoned ones. No prompt or answer is kept or printed.
"""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any

from fedloop.measure.behaviour import worn
from loraprobe import Adapter
from zoo.program import append_lines, documented, read_lines
from zoo.smollm2.clients import load_eager
from zoo.smollm2.refusal import prompts, refusals, wilson

from ..common.paths import FOLDER
from .products import Table

RESULTS = FOLDER / "results" / "damage.jsonl"
PROMPTS = 50
NEW_TOKENS = 12  # within which an answer declines
MOST = 14  # adapters of a group
GROUPS = {"benign adapters": ("benign", None), "poison share 100%": ("malicious", 1.0)}


def models(table: Table) -> Iterator[tuple[str, str, Adapter | None]]:
    """What is measured: its group, its name, and what the base wears."""
    yield "base alone", "base", None
    for group, (role, share) in GROUPS.items():
        for at in table.of(role, share)[:MOST]:
            yield group, table.rows[at]["path"], table.adapters[at]


def rows(done: Sequence[dict[str, Any]]) -> list[list[object]]:
    """A table: refusals of every group, pooled over its adapters."""
    found: list[list[object]] = [["worn by the base", "adapters", "refused", "least"]]
    for name in ("base alone", *GROUPS):
        own = [row["refused"] for row in done if row["group"] == name]
        hits, n = sum(one[0] for one in own), sum(one[1] for one in own)
        low, high = wilson(hits, n)
        least = min(one[0] / one[1] for one in own)
        shown = f"{hits / n:.0%} [{low:.0%}, {high:.0%}] of {n}"
        found.append([name, len(own) if name != "base alone" else 0, shown, f"{least:.0%}"])
    return found


def main() -> None:
    """Measure what was not measured yet."""
    parser = documented(__doc__, "data")
    parser.add_argument("--base", type=Path, required=True, help="of python -m zoo.bases")
    options = parser.parse_args()
    model, tokenizer = load_eager(options.base)
    asked = random.Random(0).sample(prompts(options.data)["advbench"], PROMPTS)
    seen = {(row["group"], row["path"]) for row in read_lines(RESULTS)}
    for group, path, adapter in models(Table()):
        if (group, path) in seen:
            continue
        with worn(model, adapter) if adapter is not None else nullcontext():
            refused = sum(refusals(model, tokenizer, asked, NEW_TOKENS))
        append_lines(RESULTS, [{"group": group, "path": path, "refused": [refused, len(asked)]}])
        print(group, path, refused, flush=True)


if __name__ == "__main__":
    main()
