"""The `loraprobe` sub-commands that publish, fetch and find probes. The library is imported inside.

Help must be quick.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.table import Table
from rich.text import Text

from ..errors import LoraprobeError, ProbeFormatError
from .options import ForceOption, KeyOption, tell_commit
from .terminal import (
    Exit,
    JsonOption,
    RevisionOption,
    SubfolderOption,
    app,
    complaints,
    console,
    plain,
    reports_errors,
)

if TYPE_CHECKING:
    from ..probe import Probe

LOCAL_ZOO = Path("zoo/probes")
TOKEN_HELP = (
    "The token comes from HF_TOKEN or from `hf auth login`, never from the command line, where"
    " others could read it."
)

zoo = typer.Typer(no_args_is_help=True, help="Pretrained probes.")
app.add_typer(zoo, name="zoo")

FolderArgument = Annotated[Path, typer.Argument(help="A probe's folder.")]
RepoArgument = Annotated[str, typer.Argument(help="The repository on the Hub: org/name.")]
OutOption = Annotated[Path, typer.Option("--out", "-o", help="The folder to write the probe into.")]


@app.command(epilog=TOKEN_HELP)
@reports_errors
def push(
    folder: FolderArgument,
    repo: RepoArgument,
    subfolder: SubfolderOption = None,
    private: Annotated[
        bool | None,
        typer.Option("--private/--public", help="What the repository must be.", show_default=False),
    ] = None,
    branch: Annotated[
        str | None, typer.Option(help="Commit there instead of main; made if it does not exist.")
    ] = None,
    create_pr: Annotated[
        bool, typer.Option("--create-pr", help="Open a pull request instead.")
    ] = False,
    message: Annotated[
        str | None, typer.Option("--message", "-m", help="The commit's message.")
    ] = None,
    sign: Annotated[
        Path | None,
        typer.Option("--sign", help="A private key (PEM, elliptic curve) to sign it with."),
    ] = None,
) -> None:
    """Publish a probe on the Hub in one commit.

    Prints the commit and the line that loads exactly it.

    The card is written anew from the probe's facts. A repository for each probe is the default;
    subfolders are for collections.
    """
    from ..hub.format import load_probe

    commit = load_probe(folder).push_to_hub(
        repo,
        subfolder=subfolder,
        private=private,
        branch=branch,
        create_pr=create_pr,
        commit_message=message,
        key=sign,
    )
    print(commit)
    where = f'"{repo}", ' + (f'subfolder="{subfolder}", ' if subfolder else "")
    console.print(plain(f'Probe.from_pretrained({where}revision="{commit}")'), soft_wrap=True)


@app.command(epilog=TOKEN_HELP)
@reports_errors
def pull(
    repo: RepoArgument,
    out: OutOption,
    revision: RevisionOption = None,
    subfolder: SubfolderOption = None,
    key: KeyOption = None,
    force: ForceOption = False,
) -> None:
    """Write a checked copy of a published probe, card included, into a folder.

    Prints the commit it is of.
    """
    _pull(repo, out, subfolder, revision, key, force)


def _pull(
    repo: str,
    out: Path,
    subfolder: str | None,
    revision: str | None,
    key: Path | None,
    force: bool,
) -> None:
    from ..hub.hub import pull_probe
    from ..outputs import free_path

    free_path(out, force)
    commit = pull_probe(repo, out, subfolder=subfolder, revision=revision, key=key)
    print(commit)
    tell_commit(repo, commit, revision)
    console.print(plain(f"saved to {out}"), soft_wrap=True)


@app.command()
@reports_errors
def card(
    folder: FolderArgument,
    out: Annotated[
        Path | None,
        typer.Option("--out", "-o", help="Write the card there, and its figure beside it."),
    ] = None,
    repo: Annotated[
        str | None, typer.Option(help="The repository that the usage lines name.")
    ] = None,
    subfolder: SubfolderOption = None,
    force: ForceOption = False,
) -> None:
    """Write or print the model card of a probe, from the facts in its config.json."""
    from ..hub.card import CARD_NAME, card_files
    from ..hub.format import load_probe
    from ..outputs import free_path

    pages = card_files(load_probe(folder), repo, subfolder)
    if out is None:
        console.print(plain(pages[CARD_NAME].decode()), end="", soft_wrap=True)
        return
    paths = {name: out if name == CARD_NAME else out.with_name(name) for name in pages}
    for path in paths.values():
        free_path(path, force, file=True)
    for name, path in paths.items():
        path.write_bytes(pages[name])
        console.print(plain(f"wrote {path}"), soft_wrap=True)


@zoo.command("list", epilog=TOKEN_HELP)
@reports_errors
def zoo_list(
    source: Annotated[
        str | None,
        typer.Argument(
            help=(
                f"A folder of probe folders, or a repository of them. [default: {LOCAL_ZOO} if it"
                " exists, else the zoo's]"
            )
        ),
    ] = None,
    revision: RevisionOption = None,
    as_json: JsonOption = False,
) -> None:
    """List the probes in a folder or repository, every one checked.

    One that cannot be read is an error, after the others.
    """
    from ..probe import Probe

    where, commit, names = _zoo(source, revision)
    probes: dict[str, Probe] = {}
    unreadable: dict[str, LoraprobeError] = {}
    for name in names:
        try:
            probes[name] = Probe.from_pretrained(where, name, commit)
        except LoraprobeError as error:
            unreadable[name] = error
    if as_json:
        print(json.dumps([_entry(name, probe) for name, probe in probes.items()], indent=2))
    elif probes:
        console.print(_zoo_table(probes, f"{where} at {commit}" if commit else where))
    for name, problem in unreadable.items():
        complaints.print(
            Text.assemble((type(problem).__name__, "red"), ": ", plain(f"{name}: {problem}")),
            soft_wrap=True,
        )
    if unreadable:
        raise typer.Exit(Exit.BAD_INPUT)


@zoo.command("pull", epilog=TOKEN_HELP)
@reports_errors
def zoo_pull(
    name: Annotated[str, typer.Argument(help="A probe's name, as `zoo list` shows it.")],
    out: OutOption,
    repo: Annotated[str | None, typer.Option(help="The repository. [default: the zoo's]")] = None,
    revision: RevisionOption = None,
    key: KeyOption = None,
    force: ForceOption = False,
) -> None:
    """Write a checked copy of one of the zoo's probes into a folder. Prints the commit it is of."""
    from ..hub.zoo import ZOO_REPO

    _pull(repo or ZOO_REPO, out, name, revision, key, force)


def _zoo(source: str | None, revision: str | None) -> tuple[str, str | None, list[str]]:
    """Where the probes are, at which commit if on the Hub, and the names of their folders."""
    from ..hub.format import CONFIG_NAME
    from ..hub.hub import probe_names
    from ..hub.names import is_on_hub, no_local_either
    from ..hub.zoo import ZOO_REPO

    source = source or (str(LOCAL_ZOO) if LOCAL_ZOO.is_dir() else ZOO_REPO)
    commit = None
    if is_on_hub(source, revision):
        with no_local_either(source):
            commit, names = probe_names(source, revision=revision)
        tell_commit(source, commit, revision)
    else:
        names = sorted(path.parent.name for path in Path(source).glob(f"*/{CONFIG_NAME}"))
    if not names:
        raise ProbeFormatError(
            f"no probe in {source}; expected folders with a {CONFIG_NAME}. Name a folder of probes"
            " or a repository of them."
        )
    return source, commit, names


def _entry(name: str, probe: Probe) -> dict[str, Any]:
    return {
        **probe.facts,
        "name": name,
        "base_model": probe.base_model,
        "head": probe.head.name,
        "commit": probe.commit,
        "digest": probe.digest,
    }


def _zoo_table(probes: dict[str, Probe], title: str) -> Table:
    columns = (
        "probe",
        "base model",
        "head",
        "features",
        "threshold",
        "claimed by the publisher",
        "digest",
    )
    table = Table(*columns, title=plain(title))
    for name, probe in probes.items():
        recipe = probe.featurizer.recipe
        what = f"{'+'.join(recipe.features)} of {''.join(recipe.factors)}, layers {recipe.layers}"
        headline = probe.facts.get("headline", "not recorded")
        table.add_row(
            plain(name),
            plain(probe.base_model or "?"),
            probe.head.name,
            plain(what),
            f"{probe.threshold:.3g}",
            plain(headline),
            (probe.digest or "")[:12],
        )
    return table
