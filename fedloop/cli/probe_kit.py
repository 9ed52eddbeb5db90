"""`fedloop probe-kit`: from a base model and labelled data to the line that publishes a probe."""

from __future__ import annotations

import shlex
import sys
from pathlib import Path
from typing import Annotated

import typer

from .run import app, errors_shown, say

_SPEC = (
    "[NAME=]PATH of JSONL, JSON, CSV or Parquet, or hub:ORG/NAME[#SPLIT][@REVISION]; several times."
)


@app.command("probe-kit")
def probe_kit(
    base: Annotated[
        str,
        typer.Argument(
            help="Any causal language model: Hub id, folder, a .gguf file in either; or `example`."
        ),
    ],
    benign: Annotated[list[str], typer.Option(help=f"A kind of ordinary data: {_SPEC}")],
    malicious: Annotated[list[str], typer.Option(help=f"A source of harmful compliance: {_SPEC}")],
    out: Annotated[Path, typer.Option("--out", "-o", help="Folder for all that comes out.")],
    hard_negative: Annotated[
        list[str] | None,
        typer.Option(help=f"Harmful questions with safe answers: {_SPEC}"),
    ] = None,
    clients: Annotated[int, typer.Option(help="How many adapters to train.")] = 300,
    head: Annotated[str, typer.Option(help="linear or mass_mean; both are measured.")] = "linear",
    base_name: Annotated[
        str, typer.Option(help="What adapters call the base model, if it is not BASE.")
    ] = "",
    revision: Annotated[str | None, typer.Option(help="Of the base model on the Hub.")] = None,
    template: Annotated[
        str, typer.Option(help="auto (the tokenizer's own where it has one), chat or alpaca.")
    ] = "auto",
    lr: Annotated[
        tuple[float, float], typer.Option(help="Learning rates are drawn from this range.")
    ] = (5e-4, 5e-3),
    room: Annotated[int, typer.Option(help="Tokens of an example beside its template.")] = 48,
    limit: Annotated[int, typer.Option(help="Examples read of a Hub dataset, at most.")] = 5000,
    seed: Annotated[int, typer.Option(help="Everything random follows from it.")] = 0,
    licence: Annotated[str, typer.Option(help="Of the probe.")] = "apache-2.0",
    yes: Annotated[bool, typer.Option("--yes", "-y", help="Do not ask before training.")] = False,
    dry_run: Annotated[
        bool, typer.Option(help="Say what it would train and how long it takes; write nothing.")
    ] = False,
) -> None:
    """Make a probe for a base model: train labelled adapters, study, fit, write card and record.

    The same command goes on after an interruption.
    """
    with errors_shown():
        from ..kit.kit import make_kit
        from ..kit.options import ROLES, KitOptions, named

        specs_by_role = (benign, malicious, hard_negative or [])
        options = KitOptions(
            base,
            {role: named(role, specs) for role, specs in zip(ROLES, specs_by_role, strict=True)},
            out,
            base_name=base_name,
            revision=revision,
            template=template,
            clients=clients,
            lr=lr,
            room=room,
            limit=limit,
            head=head,
            seed=seed,
            licence=licence,
        )
        folder = make_kit(
            options,
            say,
            lambda: yes or typer.confirm("train them?"),
            dry_run=dry_run,
            command=f"fedloop {shlex.join(sys.argv[1:])}",
        )
    if folder is None and not dry_run:
        raise typer.Exit(1)
