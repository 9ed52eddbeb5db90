"""`loraprobe scan`: one decision an adapter, for people and for CI."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from ..errors import PolicyError
from ..hub.names import named_revision
from .options import AnyBaseOption, ForceOption, tell_commit
from .terminal import app, console, counting, plain, reports_errors

if TYPE_CHECKING:
    from ..probe import Probe
    from ..scan.policy import Policy
    from ..scan.scan import ScanResult

UNREADABLE = 2
BLOCKED = 3
REVIEW = 4
FORMATS = ("text", "json", "sarif")


@app.command()
@reports_errors
def scan(
    adapters: Annotated[
        list[str],
        typer.Argument(
            help="Adapters, folders of them, Hub ids (org/name@revision, org/*), a list.txt, or -."
        ),
    ],
    probe: Annotated[
        list[str] | None, typer.Option("--probe", "-p", help="A probe; repeat it for more.")
    ] = None,
    policy: Annotated[Path | None, typer.Option(help="A TOML file: see docs/scan.md.")] = None,
    base: Annotated[
        str | None,
        typer.Option("--base", "-b", help="The adapter that training started from, or 'fresh'."),
    ] = None,
    format: Annotated[str, typer.Option("--format", help="text, json or sarif.")] = "text",
    out: Annotated[Path | None, typer.Option("--out", "-o", help="Write to a file.")] = None,
    fail_on: Annotated[
        str, typer.Option(help="block, or review: a review then ends with exit code 4.")
    ] = "block",
    quiet: Annotated[bool, typer.Option("--quiet", "-q", help="A line a file.")] = False,
    workers: Annotated[int, typer.Option(min=1, help="Processes.")] = 1,
    cache: Annotated[
        Path | None, typer.Option(help="Results by digest: an interrupted scan goes on.")
    ] = None,
    save_reference: Annotated[
        Path | None, typer.Option(help="Write what is usual among these adapters, for a policy.")
    ] = None,
    any_base: AnyBaseOption = False,
    force: ForceOption = False,
) -> None:
    """Allow, review or block adapters: exit code 0 nothing to block, 3 some blocked, 2 some
    unreadable, 4 some to review with --fail-on review. The gravest applies: 3, 2, 4.
    """
    from ..outputs import free_path
    from ..scan.batch import scan_many
    from ..scan.targets import expand

    for place in (out, save_reference):
        if place is not None:
            free_path(place, force, file=True)
    if cache is not None:
        free_path(cache, force=True, file=True)  # a scan goes on with it
    _check("--format", format, FORMATS)
    _check("--fail-on", fail_on, ("block", "review"))
    rules = _policy(policy, probe or [], any_base)
    targets = expand(adapters)
    with counting("scanning", len(targets), least=20) as advance:
        results = scan_many(
            targets,
            rules,
            base=base,
            workers=workers,
            cache=cache,
            done=lambda result: advance(),
            loaded=_tell_commits,
        )
    code = exit_code(results, fail_on)
    if save_reference is not None:
        _save_reference(results, save_reference)
    _show(results, format, out, quiet, code)
    raise typer.Exit(code)


def exit_code(results: list[ScanResult], fail_on: str) -> int:
    """The gravest that applies: a block outweighs what is unreadable, and that a review."""
    if any(result.decision == "block" and not result.unreadable for result in results):
        return BLOCKED
    if any(result.unreadable for result in results):
        return UNREADABLE
    if fail_on == "review" and any(result.decision == "review" for result in results):
        return REVIEW
    return 0


def _check(option: str, value: str, valid: tuple[str, ...]) -> None:
    if value not in valid:
        raise PolicyError(f"{option}: got {value!r}; expected one of {', '.join(valid)}")


def _policy(path: Path | None, probes: list[str], any_base: bool) -> Policy:
    from ..scan.policy import Policy

    policy = Policy.read(path) if path else Policy()
    named = tuple(dict.fromkeys([*policy.probes, *probes]))
    return replace(policy, probes=named, any_base=policy.any_base or any_base)


def _tell_commits(probes: Mapping[str, Probe]) -> None:
    for name, probe in probes.items():
        source, revision = named_revision(name)
        tell_commit(source, probe.commit, revision, f"{source}@{probe.commit}")


def _save_reference(results: list[ScanResult], path: Path) -> None:
    from ..scan.facts import Reference

    bases = {result.base_model for result in results if result.facts}
    if len(bases) != 1:
        names = ", ".join(sorted(map(repr, bases)))
        raise PolicyError(f"got adapters of the base models {names}; expected those of one")
    Reference.fit([result.facts for result in results if result.facts], bases.pop()).save(path)


def _show(results: list[ScanResult], format: str, out: Path | None, quiet: bool, code: int) -> None:
    from ..scan import output

    if format == "json":
        text = json.dumps(output.as_json(results, code), indent=2)
    elif format == "sarif":
        text = json.dumps(output.as_sarif(results), indent=2)
    else:
        lines = [output.line(result) for result in results]
        text = "\n".join(lines if quiet else [*lines, output.total(results)])
    if out is not None:
        out.write_text(text + "\n", encoding="utf-8")
    elif format == "text":
        console.print(plain(text), soft_wrap=True)
    else:
        print(text)
