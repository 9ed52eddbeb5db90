"""`loraprobe report`: a page on what adapters are."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from .options import AnyBaseOption, ForceOption, read_named_probe
from .terminal import app, complaints, console, plain, reports_errors

if TYPE_CHECKING:
    from ..adapters.adapter import Adapter
    from ..probe import Probe, Verdict


@app.command()
@reports_errors
def report(
    adapters: Annotated[
        list[str], typer.Argument(help="Adapters, folders of them, Hub ids, a list.txt, or -.")
    ],
    out: Annotated[Path, typer.Option("--out", "-o", help="The page to write: a new .html.")],
    probe: Annotated[
        str | None,
        typer.Option("--probe", "-p", help="A folder or org/name[@commit], for verdicts."),
    ] = None,
    base: Annotated[
        str | None,
        typer.Option("--base", "-b", help="The adapter that training started from, or 'fresh'."),
    ] = None,
    reference: Annotated[
        Path | None,
        typer.Option(help="A folder of adapters of the same base, drawn behind.", exists=True),
    ] = None,
    figures: Annotated[Path | None, typer.Option(help="A new folder for PNG, PDF and CSV.")] = None,
    seed: Annotated[int, typer.Option(help="Of UMAP.")] = 0,
    any_base: AnyBaseOption = False,
    force: ForceOption = False,
) -> None:
    """Draw adapters: norms, spectra, which layers moved, how alike they are. One HTML file."""
    from ..errors import DataError
    from ..outputs import free_path
    from ..report.analysis import analyse
    from ..report.page import write_report
    from ..scan.facts import Reference
    from ..scan.targets import expand

    if probe is None and (base is not None or any_base):
        raise DataError("got --base or --any-base without --probe, which alone reads them")
    for place in (out, figures):
        if place is not None:
            free_path(place, force, file=place is out)  # before minutes of work
    names = expand(adapters)
    background = expand([str(reference)]) if reference else []
    background = [name for name in background if name not in names]
    loaded = _loaded([*names, *background])
    foreground = {name: adapter for name, adapter in loaded.items() if name in names}
    detector = None if probe is None else read_named_probe(probe)
    verdicts = _verdicts(foreground, detector, base, any_base) if detector else {}
    analysis = analyse(
        loaded,
        verdicts={name: verdict.label for name, verdict in verdicts.items()},
        scores={name: verdict.score for name, verdict in verdicts.items()},
        behind=len(loaded) - len(foreground),
        usual=Reference.of_probe(detector) if detector and not background else None,
        seed=seed,
    )
    for path in write_report(analysis, out, figures, force=force):
        console.print(plain(f"wrote {path}"), soft_wrap=True)


def _loaded(names: list[str]) -> dict[str, Adapter]:
    """The adapters that can be read; what cannot is said and left out."""
    from ..adapters.load import load_adapter
    from ..errors import LoraprobeError

    loaded: dict[str, Adapter] = {}
    for name in names:
        try:
            adapter = load_adapter(name)
            adapter.check_finite()
            loaded[name] = adapter
        except (LoraprobeError, OSError) as error:
            complaints.print(plain(f"left out: {name}: {error}"), soft_wrap=True)
    return loaded


def _verdicts(
    adapters: dict[str, Adapter], detector: Probe, base: str | None, any_base: bool
) -> dict[str, Verdict]:
    from ..adapters.kinds import as_kind
    from ..adapters.load import load_adapter
    from ..errors import LoraprobeError

    before = base if base in (None, "fresh") else load_adapter(str(base))
    verdicts: dict[str, Verdict] = {}
    for name, adapter in adapters.items():
        try:
            change = as_kind(adapter, detector.featurizer.kind_since(before), before)
            verdicts[name] = detector.verdicts([change], check_base=not any_base)[0]
        except LoraprobeError as error:
            complaints.print(plain(f"not scored: {name}: {error}"), soft_wrap=True)
    return verdicts
