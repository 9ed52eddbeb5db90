"""`loraprobe verify`: whose a probe is, and whether its card holds."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.table import Table

from ..errors import TrustError
from .options import AnyBaseOption, BaseOption, KeyOption, SeedOption, read_adapters, read_probe
from .terminal import (
    Exit,
    JsonOption,
    RevisionOption,
    SubfolderOption,
    app,
    console,
    plain,
    reports_errors,
)

if TYPE_CHECKING:
    from ..evaluation import EvalReport
    from ..hub.claims import Claim
    from ..probe import Probe


@app.command()
@reports_errors
def verify(
    probe: Annotated[str, typer.Argument(help="A probe's folder or Hub id.")],
    on: Annotated[
        Path | None,
        typer.Option(
            "--on", help="Labelled adapters: a manifest, or a folder with benign/ and malicious/."
        ),
    ] = None,
    key: KeyOption = None,
    revision: RevisionOption = None,
    subfolder: SubfolderOption = None,
    base: BaseOption = None,
    any_base: AnyBaseOption = False,
    seed: SeedOption = 0,
    as_json: JsonOption = False,
) -> None:
    """Measure what a probe's card claims, on adapters of yours, and check its signature.

    Exit code 0 if nothing speaks against the card, 3 if a claim is contradicted, 2 if it is not
    signed by the key.
    """
    if on is None and key is None:
        raise TrustError("got neither --on nor --key; expected labelled adapters or a public key")
    if key is not None:
        _check_key(probe, subfolder, revision, key)
    detector = read_probe(probe, subfolder, revision)
    facts: dict[str, Any] = {"probe": probe, "commit": detector.commit, "digest": detector.digest}
    facts["signed_by"] = None if key is None else str(key)
    claims: Sequence[Claim] = ()
    if on is not None:
        report, claims = _measured(detector, on, base, any_base, seed, as_json)
        facts |= {"report": report.to_dict(), "claims": [asdict(claim) for claim in claims]}
        if not as_json:
            console.print(plain(report.table()), soft_wrap=True)
            console.print(_claims_table(claims) if claims else "the card claims nothing")
    if as_json:
        print(json.dumps(facts, indent=2))
    elif key is not None:
        console.print(plain(f"signed by the owner of {key}"), soft_wrap=True)
    if any(claim.finding == "contradicted" for claim in claims):
        raise typer.Exit(Exit.FLAGGED)


def _check_key(probe: str, subfolder: str | None, revision: str | None, key: Path) -> None:
    from ..hub.hub import pull_probe
    from ..hub.names import is_on_hub
    from ..hub.signing import check_signature

    if not is_on_hub(probe, revision):
        check_signature(Path(probe) / (subfolder or ""), key)
        return
    with TemporaryDirectory(prefix="loraprobe-") as scratch:
        pull_probe(probe, Path(scratch) / "probe", subfolder=subfolder, revision=revision, key=key)


def _measured(
    probe: Probe, on: Path, base: str | None, any_base: bool, seed: int, quiet: bool
) -> tuple[EvalReport, list[Claim]]:
    from ..evaluation import evaluate
    from ..hub.claims import claims_of
    from ..manifest import read_manifest

    rows = read_manifest(on)
    report = evaluate(
        probe,
        read_adapters(rows, probe.featurizer.layout.kind, base, quiet),
        [row.label for row in rows],
        [row.group for row in rows],
        by=[row.source for row in rows],
        seed=seed,
        check_base=not any_base,
    )
    return report, claims_of(probe.facts, report)


def _claims_table(claims: Sequence[Claim]) -> Table:
    table = Table("claimed by the publisher", "metric", "claimed", "n", "measured here", "")
    for claim in claims:
        interval = "" if claim.low is None else f" [{claim.low:.3f}, {claim.high or 1.0:.3f}]"
        here = "not compared"
        if claim.measured is not None:
            value, low, high = claim.measured
            here = f"{value:.3f} [{low:.3f}, {high:.3f}]"
        table.add_row(
            plain(claim.protocol),
            plain(claim.metric),
            f"{claim.value:.3f}{interval}",
            "?" if claim.n is None else str(claim.n),
            here,
            claim.finding,
            style="red" if claim.finding == "contradicted" else None,
        )
    return table
