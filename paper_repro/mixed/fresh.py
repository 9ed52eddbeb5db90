"""The rule on fresh federations.

Threshold and floor as `paper_repro.mixed.accumulated` committed them, other clients than it was
made on.

    python -m paper_repro.mixed.federations --draws 1 2  # 24 federations, 3 to 5 minutes each on
                                                         # one core of its own
    python -m paper_repro.mixed.fresh                    # writes results/mixed_fresh.json; minutes;
                                                         # needs .labelled too

Nothing of these clients was looked at when the reader, its probe's recipe or the rule was chosen.
As there, a client is scored by a probe that knows neither the malicious source nor the client's own
kinds, and the rule of a source was made on federations of the other three.

Beside it every way of `.cuts`, made on the other fresh draw. On the second base model that is the
first which has federations that nothing breaks.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from zoo.labelled.client_design import plan
from zoo.labelled.deltas import read_deltas
from zoo.program import documented, write_rows

from ..common.paths import FOLDER
from .accumulated import Recorded, aurocs, committed_rule, counted
from .cuts import WAYS, above
from .federations import path
from .labelled import DESIGN
from .readers import READERS, Reading
from .setting import FRESH, MODELS, Model

RESULTS = FOLDER / "results" / "mixed_fresh.json"
DRAWS = (1, 2)


def main() -> None:
    """Measure every draw on every base model."""
    documented(__doc__).parse_args()
    places = [
        path(model, *federation, draw)
        for model in MODELS.values()
        for federation in FRESH
        for draw in DRAWS
    ]
    if absent := [str(place) for place in places if not place.exists()]:
        draws = " ".join(map(str, DRAWS))
        raise SystemExit(
            f"not recorded yet: {', '.join(absent)}; run python -m paper_repro.mixed.federations"
            f" --draws {draws}"
        )
    rows = [row for model in MODELS.values() for row in measured(model)]
    write_rows(RESULTS, rows)


def measured(model: Model) -> Iterator[dict[str, Any]]:
    """One row a federation.

    Its clients' scores by the mass-mean reader, and what the committed rule and every way made on
    the other draw flag.
    """
    reading = Reading(
        read_deltas(model.folder / "labelled", plan(DESIGN), model.name, DESIGN), READERS[-1]
    )
    recorded = {
        draw: [Recorded(model, *federation, reading, draw) for federation in FRESH]
        for draw in DRAWS
    }
    for draw, other in (DRAWS, DRAWS[::-1]):
        for federation in recorded[draw]:
            unknown = federation.malicious
            scored, level = federation.scored(unknown), committed_rule(model.key, unknown)
            others = [one.scored(unknown) for one in recorded[other] if one.malicious != unknown]
            yield {
                "model": model.key,
                "reader": READERS[-1].name,
                "malicious": unknown,
                "averaged": federation.averaged,
                "draw": draw,
                "auroc": list(aurocs(scored)),
                "threshold": level.threshold,
                "floor": level.floor,
                "flagged": counted(scored, above(scored.mean, level)),
                "other_draw": {
                    name: counted(scored, way(scored, others)) for name, way in WAYS.items()
                },
            }
            print(f"{model.key}: {unknown}, {federation.averaged}, draw {draw}", flush=True)


if __name__ == "__main__":
    main()
