"""One HTML page about a run.

What it was, what came out, whom it trusted and why, and what the defence cost. The page is one file
without scripts or references to others, and it is the same whenever it is written from the same
records. Client ids and reasons come from clients: the template escapes every text.
"""

from __future__ import annotations

import json
from pathlib import Path

from ..errors import FedloopError, StateError
from ..run.folder import read_run
from .clients import clients_section, decisions_section, refusals_section
from .content import Section, Table, render
from .costs import losses_section, overhead_section
from .result import metrics_section, tiles_of
from .run import ReportedRun, checked_run
from .setup import in_a_sentence, setup_rows
from .trust import trust_section

_SECTIONS = {
    "Result": metrics_section,
    "Trust": trust_section,
    "Clients": clients_section,
    "Who counted nothing, and why": decisions_section,
    "Skipped rounds and refused updates": refusals_section,
    "Training": losses_section,
    "Overhead": overhead_section,
}


def write_report(run: Path, out: Path | None = None) -> Path:
    """Write the page about a run, finished or not, and return its path.

    `out`, or report.html in the run's folder.

    Raises:
        StateError: it is not the folder of a run, or a file of it is damaged.
        MissingExtra: matplotlib or jinja2 is not installed.
        FedloopError: the page cannot be written there.
    """
    try:
        config, about, records = read_run(run)
    except (OSError, UnicodeDecodeError) as error:
        raise StateError(
            f"cannot read the records of {run}: {error}. Expected the folder of a run that `fedloop"
            " run` wrote."
        ) from error
    page = _page(checked_run(run, config, about, records))
    path = run / "report.html" if out is None else out
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(page, encoding="utf-8", newline="\n")
    except OSError as error:
        raise FedloopError(
            f"cannot write the report to {path}: {error}. Give a path that can be written with"
            " --out."
        ) from error
    return path


def _page(run: ReportedRun) -> str:
    done, wanted = len(run.records), run.config.rounds
    banner = (
        f"This run is unfinished: {done} of {wanted} rounds are recorded, and all that follows is"
        " about these."
    )
    sections: list[Section] = [(name, make(run)) for name, make in _SECTIONS.items() if done]
    sections.insert(1, ("Setup", [Table("hl", (), list(setup_rows(run)))]))
    return render(
        title=run.config.name,
        lead=in_a_sentence(run),
        banner=banner if done < wanted else "",
        tiles=tiles_of(run) if done else [],
        sections=sections,
        configuration=json.dumps(run.config.model_dump(mode="json"), indent=2),
    )
