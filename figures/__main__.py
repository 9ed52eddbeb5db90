"""Draw figures again from the committed numbers, as .png and .pdf.

python -m figures                   # all of them, into figures/pictures
python -m figures layers mixed      # these
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

from matplotlib.figure import Figure

from figures import (
    attackers,
    cross_source,
    drift,
    embeddings,
    federation,
    initial_adapter,
    layers,
    mixed,
    parts,
    rounds,
    sweeps,
    trust,
)
from figures.common import DPI, PICTURES, UNDATED, save
from zoo.program import documented

# name -> what draws its pictures, and their dots an inch
FIGURES: dict[str, tuple[Callable[[], dict[str, Figure]], int]] = {
    "attackers": (attackers.pictures, 110),
    "cross_source": (cross_source.pictures, 120),
    "drift": (drift.pictures, 110),
    "embeddings": (embeddings.pictures, 90),
    "federation": (federation.pictures, 110),
    "initial_adapter": (initial_adapter.pictures, 110),
    "layers": (layers.pictures, DPI),
    "mixed": (mixed.pictures, 110),
    "parts": (parts.pictures, 120),
    "rounds": (rounds.pictures, 100),
    "sweeps": (sweeps.pictures, 110),
    "trust": (trust.pictures, 110),
}


def main(arguments: Sequence[str] | None = None) -> None:
    """Write what is asked for."""
    parser = documented(__doc__)
    parser.prog = "python -m figures"
    parser.add_argument("name", nargs="*", help=f"{', '.join(FIGURES)} [default: all]")
    parser.add_argument("--out", type=Path, default=PICTURES, help="folder of the pictures")
    options = parser.parse_args(arguments)
    if unknown := set(options.name) - FIGURES.keys():
        parser.error(f"got {', '.join(sorted(unknown))}; expected some of {', '.join(FIGURES)}")
    options.out.mkdir(parents=True, exist_ok=True)
    for name in options.name or FIGURES:
        pictures, dpi = FIGURES[name]
        for picture, figure in pictures().items():
            for ending in UNDATED:
                save(figure, options.out / f"{picture}{ending}", dpi)


if __name__ == "__main__":
    main()
