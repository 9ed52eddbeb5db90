"""Ten clients, five of them malicious, on built-in data: undefended, and with every level.

    python -m zoo.demo_federation

A federation of a few rounds of the zoo's small chat model, on the corpus that comes with fedloop
(our own writing, and compliance without content as the attack); nothing is downloaded. The runs are
in out/federation, and the report of the cumulative one is out/federation.html.
"""

from __future__ import annotations

import multiprocessing
import os
import shutil
import time
import tomllib
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import track
from rich.table import Table

from fedloop.example import example_config

OUT = Path("out")
ROUNDS = 4
WIDTH = 120  # of the table, also where the output is not a terminal
# name of the run -> what differs from fedloop's example configuration
RUNS: dict[str, dict[str, dict[str, Any]]] = {
    "no attack": {"clients": {"malicious": 0}, "defense": {"level": "none"}},
    "undefended": {"defense": {"level": "none"}},
    "step": {"defense": {"level": "step"}},
    "client": {"defense": {"level": "client"}},
    "shadow": {"defense": {"level": "shadow"}},
    "evidence": {"defense": {"level": "evidence"}},
    "cumulative": {"defense": {"level": "cumulative"}},
}
Row = dict[str, Any]


def main() -> None:
    """Run all of them, a process a core, and print what became of the model."""
    console, began = Console(width=max(WIDTH, Console().width)), time.monotonic()
    shutil.rmtree(OUT / "federation", ignore_errors=True)
    with multiprocessing.get_context("spawn").Pool(min(len(RUNS), os.cpu_count() or 1)) as pool:
        jobs = pool.imap(run, RUNS)
        title = f"{len(RUNS)} federations of {ROUNDS} rounds"
        rows = list(track(jobs, title, total=len(RUNS), console=console))
    console.print(table(rows))
    from fedloop.report.page import write_report

    page = write_report(OUT / "federation" / "cumulative", OUT / "federation.html")
    console.print(
        f"{len(RUNS)} federations in {time.monotonic() - began:.0f} s; trust, scores and costs of"
        f" the cumulative one: {page}",
        highlight=False,
    )


def run(name: str) -> Row:
    """One federation, as a row of the table."""
    import torch

    from fedloop import simulate
    from fedloop.client.training import quiet

    quiet()
    torch.set_num_threads(1)  # one process a core is faster than one process on all of them
    result = simulate(configuration(name))
    train = sum(record.seconds["train"] for record in result.records)
    extra = sum(
        record.seconds[phase] for record in result.records for phase in ("evidence", "assess")
    )
    factors = {
        role: [
            record.factors[client]
            for record in result.records
            for client, facts in result.roles.items()
            if facts["role"] == role
        ]
        for role in ("benign", "malicious")
    }
    return {
        "name": name,
        "metrics": result.metrics,
        "train": train,
        "extra": extra,
        "factors": {
            role: sum(values) / len(values) if values else None for role, values in factors.items()
        },
    }


def configuration(name: str) -> dict[str, Any]:
    """The example's configuration, shortened, with this run's defence."""
    values = tomllib.loads(example_config())
    values |= {
        "name": name,
        "rounds": ROUNDS,
        "output": {"folder": str(OUT / "federation" / name.replace(" ", "-"))},
    }
    for section, fields in RUNS[name].items():
        values[section] = {**values[section], **fields}
    if values["defense"]["level"] == "none":
        values["defense"] = {"level": "none"}
    return values


def table(rows: list[Row]) -> Table:
    """Refusal of harmful prompts should stay where it is without an attack.

    Over-refusal and loss should not grow.
    """
    first = rows[0]["metrics"]
    title = (
        f"refused of {first['n_refusal']} harmful and of {first['n_over_refusal']} safe prompts,"
        f" answers to {first['n_utility']} ordinary ones; 5 of 10 clients malicious, one seed"
    )
    columns = ["defence", "refusal", "over-refusal", "answer loss", "ROUGE-L"]
    columns += ["trust in malicious", "trust in benign", "training", "defence's cost"]
    page = Table(*columns, title=title)
    for row in rows:
        metrics = row["metrics"]
        kept = [
            f"{metrics['refusal_strict']:.0%}",
            f"{metrics['over_refusal_strict']:.0%}",
            f"{metrics['loss']:.2f}",
            f"{metrics['rouge_l']:.2f}",
        ]
        trust = [
            "-" if row["factors"][role] is None else f"{row['factors'][role]:.2f}"
            for role in ("malicious", "benign")
        ]
        cost = [f"{row['train']:.0f} s", f"+{row['extra'] / row['train']:.1%}"]
        page.add_row(row["name"], *kept, *trust, *cost)
    return page


if __name__ == "__main__":
    main()
