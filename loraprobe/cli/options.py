"""Options that several sub-commands share, and how they are read."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from ..errors import RecipeError
from ..hub.names import named_revision
from .terminal import complaints, plain, tracked

if TYPE_CHECKING:
    from ..adapters.adapter import Adapter
    from ..featurizer import FeatureRecipe
    from ..manifest import Row
    from ..probe import Probe

BaseOption = Annotated[
    str | None,
    typer.Option(
        "--base", "-b", help="The adapter that training started from; 'fresh' if its B was zero."
    ),
]
ManifestArgument = Annotated[
    Path,
    typer.Argument(
        help="CSV with columns path, label[, group, source, ...], or a folder with benign/ and"
        " malicious/."
    ),
]
RecipeOption = Annotated[
    str,
    typer.Option(
        help="A recipe's name, such as all_b or spectral, or a JSON object of its fields."
    ),
]
KindOption = Annotated[
    str, typer.Option(help="weights, factor_delta or weight_delta; deltas need --base.")
]
AnyBaseOption = Annotated[
    bool, typer.Option("--any-base", help="Score adapters of a base model with another name.")
]
SeedOption = Annotated[int, typer.Option(help="Everything random follows from it.")]
CalibrationOption = Annotated[str | None, typer.Option(help="platt or isotonic.")]
KeyOption = Annotated[
    Path | None,
    typer.Option("--key", help="A public key (PEM): its owner must have signed it."),
]
ForceOption = Annotated[bool, typer.Option("--force", help="Write over what is there.")]
ManyHeadsOption = Annotated[
    list[str] | None, typer.Option("--head", help="Heads to fit; repeat it.")
]


def read_probe(source: str, subfolder: str | None = None, revision: str | None = None) -> Probe:
    """A probe by its folder or Hub id; what it came from is said on stderr.

    Raises:
        LoraprobeError: as `Probe.from_pretrained`.
    """
    from ..probe import Probe

    probe = Probe.from_pretrained(source, subfolder, revision)
    tell_commit(source, probe.commit, revision)
    return probe


def read_named_probe(name: str) -> Probe:
    """As `read_probe`, for commands without --revision: a folder or org/name[@revision]."""
    from ..probe import Probe

    source, revision = named_revision(name)
    probe = Probe.from_pretrained(source, revision=revision)
    tell_commit(source, probe.commit, revision, f"{source}@{probe.commit}")
    return probe


def tell_commit(
    source: str, commit: str | None, revision: str | None, pinned: str | None = None
) -> None:
    """Say which commit something on the Hub is of, and warn where none was asked for.

    Args:
        pinned: how this command is told the commit, if not by --revision.
    """
    if commit is None:
        return
    complaints.print(plain(f"{source} is of commit {commit}"), soft_wrap=True)
    if revision != commit:
        pinned = pinned or f"--revision {commit}"
        warning = f"warning: {revision or 'main'} can change; {pinned} does not"
        complaints.print(plain(warning), style="yellow", soft_wrap=True)


def recipe_of(text: str) -> FeatureRecipe:
    """A recipe by its name, or from a JSON object of its fields.

    Raises:
        RecipeError: there is none of that name, or the text is no such object.
    """
    from ..featurizer import FeatureRecipe, named_recipe

    if not text.lstrip().startswith("{"):
        return named_recipe(text)
    try:
        fields = json.loads(text)
    except ValueError as error:
        raise RecipeError(f"got a recipe that is not readable JSON ({error})") from None
    return FeatureRecipe.from_dict(fields)


def read_adapters(rows: list[Row], kind: str, base: str | None, quiet: bool) -> list[Adapter]:
    """The adapters of a manifest, with a progress bar on stderr where there are many."""
    from ..manifest import read_labelled

    shown = rows if quiet else tracked(rows, "reading", len(rows), least=200)
    return read_labelled(shown, kind, base)
