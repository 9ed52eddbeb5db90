"""How far benign and malicious adapters lie apart: the scatter plot of a 2-D embedding.

    python -m figures.separability coords.npz out.png

coords.npz is what `loraprobe.study.embed.save_coordinates` wrote.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

from figures import common
from loraprobe.study.embed import load_coordinates
from loraprobe.study.picture import plot_embedding


def main(argv: Sequence[str] | None = None) -> None:
    """Read the coordinates named on the command line and write the picture.

    Raises:
        DataError: an unreadable file.
    """
    parser = argparse.ArgumentParser(
        prog="python -m figures.separability", description=__doc__.partition("\n")[0]
    )
    parser.add_argument("coordinates", help="the .npz that save_coordinates wrote")
    parser.add_argument("picture", type=Path, help="the .png to write, or a .pdf")
    options = parser.parse_args(argv)
    fig, axes = common.panels(1, 1, (9.5, 6.0))
    plot_embedding(axes[0, 0], load_coordinates(options.coordinates))
    common.save(fig, options.picture)


if __name__ == "__main__":
    main()
