"""The `loraprobe` sub-commands that publish and find probes. The library is imported inside: help must be quick."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer
from rich.table import Table

from .terminal import JsonOption, app, console, plain, reports_errors

zoo = typer.Typer(no_args_is_help=True, help="Pretrained probes.")
app.add_typer(zoo, name="zoo")


@zoo.command("list")
@reports_errors
def zoo_list(folder: Annotated[Path, typer.Argument(help="A folder of probe folders.")] = Path("zoo/probes"), as_json: JsonOption = False) -> None:
    """List the probes in a folder."""
    from .errors import ProbeFormatError
    from .format import CONFIG_NAME, load_probe

    found = sorted(path.parent for path in folder.glob(f"*/{CONFIG_NAME}"))
    if not found:
        raise ProbeFormatError(f"no probe in {folder}; expected folders with a {CONFIG_NAME}. Run this in the project's root, or name a folder.")
    probes = {path.name: load_probe(path) for path in found}
    if as_json:
        listed = [{**probe.facts, "name": name, "base_model": probe.base_model, "head": probe.head.name} for name, probe in probes.items()]
        print(json.dumps(listed, indent=2))
        return
    table = Table("probe", "base model", "head", "features", "threshold", "unseen sources: AUROC, worst cell")
    for name, probe in probes.items():
        recipe = probe.featurizer.recipe
        what = f"{'+'.join(recipe.features)} of {''.join(recipe.factors)}, layers {recipe.layers}"
        headline = probe.facts.get("headline", "not recorded")
        table.add_row(plain(name), plain(probe.base_model or "?"), probe.head.name, plain(what), f"{probe.threshold:.3g}", plain(headline))
    console.print(table)
