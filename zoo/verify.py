"""Measure again what the zoo's records say, and fail where anything else comes out.

    python -m zoo.verify                        # seconds, from a fresh clone
    python -m zoo.verify --only linear paper    # these probes

Every probe loads, its recipe, head, threshold, metrics and facts are those of its record, its card
is what these facts give, the held-out clients are scored again, and the pages' tables are those of
the records. Exit code 1 and one line a difference. The studies behind a record are measured again
by the record's own command.
"""

from __future__ import annotations

import json
import re
import sys
import time
from collections import Counter
from dataclasses import dataclass
from itertools import zip_longest
from pathlib import Path

from fedloop.errors import FedloopError
from loraprobe.errors import DataError, LoraprobeError, MissingExtra
from loraprobe.hub.card import CARD_NAME, card_files
from loraprobe.hub.card_figure import FIGURE_NAME, can_draw
from loraprobe.hub.format import PROBE_FILES
from loraprobe.probe import Probe

from .labelled.client_design import Design, plan
from .labelled.diff_records import Comparison, short
from .labelled.held_out import held_out_clients
from .labelled.records import Record, drawn_with, facts_of, fitted_facts, read_record
from .labelled.study import ENTRIES, Entry, by_share
from .program import documented, stale_pages
from .report import ZOO, texts

TOLERANCE = 1e-6


@dataclass(frozen=True)
class Shown:
    """A probe that is shown.

    Its folder, its record, and the folder in which the record's adapters are.
    """

    name: str
    probe: Path
    record: Path
    root: Path


def main() -> None:
    """Verify everything that was asked for; exit code 1 if anything differs."""
    parser = documented(__doc__)
    parser.add_argument("--only", nargs="+", metavar="NAME", help="these probes")
    only = parser.parse_args().only
    shown = zoo_probes(ZOO)
    names = {one.name for one in shown}
    if unknown := sorted(set(only or ()) - names):
        sys.exit(f"got --only {' '.join(unknown)}; expected some of {', '.join(sorted(names))}")
    began, comparison = time.monotonic(), Comparison(TOLERANCE)
    for one in shown:
        if not only or one.name in only:
            verify_probe(one, comparison)
    verify_pages(ZOO, comparison)
    print("\n".join([*comparison.lines, comparison.outcome()]), flush=True)
    print(f"{time.monotonic() - began:.0f} s")
    sys.exit(1 if comparison.lines else 0)


def zoo_probes(zoo: Path) -> list[Shown]:
    """Every probe and every record of a zoo, those that lack the other included: they will fail.

    Folders of probes, as those of zoo.smollm2, have records of their own.
    """
    folders = [path for path in (zoo / "probes").iterdir() if path.is_dir()]
    names = {path.name for path in folders if not any(path.glob("*/config.json"))} | {
        path.stem for path in (zoo / "records").glob("*.json")
    }
    return [
        Shown(name, zoo / "probes" / name, zoo / "records" / f"{name}.json", zoo)
        for name in sorted(names)
    ]


def adapters_of(shown: Shown, record: Record) -> Path:
    """The folder of the held-out adapters.

    Raises:
        DataError: the record names a place outside of the zoo.
    """
    place = str(record["adapters"])
    if not re.fullmatch(r"[\w-][\w.-]*(/[\w-][\w.-]*)?", place):
        raise DataError(
            f"{shown.record} names the adapters {place!r}; expected a folder of the zoo"
        )
    return shown.root / place


def verify_probe(shown: Shown, comparison: Comparison) -> None:
    """Whether a probe, its card and its record belong together, and whether the held-out clients
    are scored as the record says.
    """
    try:
        record = read_record(shown.record)
        probe = Probe.from_pretrained(shown.probe)
        _compare_probe(shown, record, probe, comparison)
        found = held_out_clients(
            probe, adapters_of(shown, record), Design.from_dict(record["data"]["design"])
        )
        comparison.add(
            f"{shown.name}: held_out_clients",
            record["held_out_clients"],
            json.loads(json.dumps(found)),
        )
    except (LoraprobeError, FedloopError) as error:
        comparison.lines.append(f"{shown.name}: {type(error).__name__}: {error}")
    except (LookupError, TypeError) as error:
        comparison.lines.append(
            f"{shown.name}: {shown.record} is not a record of this version ({error!r}); run what it"
            " names as its command again"
        )


def _compare_probe(shown: Shown, record: Record, probe: Probe, comparison: Comparison) -> None:
    name, training = shown.name, probe.facts["training"]
    exact = Comparison()
    exact.add(f"{name}: name", record["probe"], name)
    exact.add(f"{name}: base_model", record["base_model"], probe.base_model)
    exact.add(
        f"{name}: recipe",
        record["recipe"],
        json.loads(json.dumps(probe.featurizer.recipe.to_dict())),
    )
    exact.add(f"{name}: head", record["head"], training["head"])
    rule = training["threshold_rule"] if isinstance(record["threshold"], str) else probe.threshold
    exact.add(f"{name}: threshold", record["threshold"], rule)
    exact.add(
        f"{name}: calibration",
        record["calibration"],
        probe.calibration.method if probe.calibration else None,
    )
    exact.add(f"{name}: fitted", record["fitted"], fitted_facts(probe, shown.probe))
    exact.add(
        f"{name}: facts",
        {**facts_of(record), "training": record["fitted"]["training"]},
        dict(probe.facts),
    )
    if name in (own := {entry.name: entry for entry in ENTRIES}):
        exact.add(
            f"{name}: zoo.labelled.study.ENTRIES",
            {field: record[field] for field in Entry.FIELDS},
            own[name].to_dict(),
        )
    _compare_with_itself(name, record, exact)
    _compare_pages(shown, record, probe, exact)
    comparison.join(exact)


def _compare_with_itself(name: str, record: Record, exact: Comparison) -> None:
    """The summaries of a record follow from its cells, and its counts from its design."""
    roles = [client.role for client in plan(Design.from_dict(record["data"]["design"]))]
    exact.add(f"{name}: data.clients", record["data"]["clients"], dict(Counter(roles)))
    for studied in (record["replicates"], *record["baselines"].values()):
        for result in studied:
            found = json.loads(json.dumps(by_share(result["cells"])))
            exact.add(
                f"{name}: unseen_sources of replicate {result['replicate']}",
                result["unseen_sources"],
                found,
            )


def _compare_pages(shown: Shown, record: Record, probe: Probe, exact: Comparison) -> None:
    """The card is what the probe's facts give.

    So is the figure, where the matplotlib that drew it is installed.
    """
    if not can_draw():
        raise MissingExtra("matplotlib", "figures", "Comparing cards, which have a figure,")
    pages, allowed = card_files(probe), {*PROBE_FILES, FIGURE_NAME}
    exact.same(
        f"{shown.name}: other files in its folder",
        [],
        sorted(path.name for path in shown.probe.iterdir() if path.name not in allowed),
    )
    path = shown.probe / CARD_NAME
    said, found = (
        path.read_text(encoding="utf-8").splitlines() if path.is_file() else [],
        pages[CARD_NAME].decode().splitlines(),
    )
    differing = [
        (number, *lines)
        for number, lines in enumerate(zip_longest(said, found), start=1)
        if lines[0] != lines[1]
    ]
    exact.compared += len(found)
    for number, written, meant in differing[:1]:
        exact.lines.append(
            f"{shown.name}: line {number} of the card is {short(written)}; card() writes"
            f" {short(meant)}"
        )
    if record["figure_drawn_with"] != drawn_with():
        print(
            f"{shown.name}: the figure was drawn with {record['figure_drawn_with']}, here is"
            f" {drawn_with()}: not compared",
            flush=True,
        )
        return
    figure = shown.probe / FIGURE_NAME
    exact.same(
        f"{shown.name}: whether {FIGURE_NAME} is what the facts give",
        True,
        figure.is_file() and figure.read_bytes() == pages[FIGURE_NAME],
    )


def verify_pages(zoo: Path, comparison: Comparison) -> None:
    """Whether the pages' tables are those of the records."""
    try:
        stale = stale_pages(texts(zoo))
    except (LoraprobeError, LookupError, TypeError, ValueError) as error:
        comparison.lines.append(f"the pages' tables cannot be made from the records: {error!r}")
        return
    comparison.compared += 2
    comparison.lines += [
        f"{page}: its tables are not those of the records; run python -m zoo.report"
        for page in stale
    ]


if __name__ == "__main__":
    try:
        main()
    except (LoraprobeError, MissingExtra) as error:
        sys.exit(f"{type(error).__name__}: {error}")
