"""How far benign and malicious adapters lie apart: the scatter plot of a 2-D embedding.

    python -m figures.separability coords.npz out.png

coords.npz is what `loraprobe.study.embed.save_coordinates` wrote.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence

from matplotlib.axes import Axes

from figures import style
from loraprobe.study.embed import Coordinates, load_coordinates, plot_embedding


def plot(ax: Axes, coords: Coordinates) -> None:
    """Draw coords into ax, which style.figure(style.WIDE) made.

    See loraprobe.study.embed.plot_embedding.
    """
    plot_embedding(ax, coords)


def main(argv: Sequence[str] | None = None) -> None:
    """Read the coordinates named on the command line and write the picture.

    Raises DataError for an unreadable file.
    """
    parser = argparse.ArgumentParser(
        prog="python -m figures.separability", description=__doc__.partition("\n")[0]
    )
    parser.add_argument("coordinates", help="the .npz that save_coordinates wrote")
    parser.add_argument("picture", help="the .png to write")
    args = parser.parse_args(argv)
    fig, ax = style.figure(style.WIDE)
    plot(ax, load_coordinates(args.coordinates))
    style.save(fig, args.picture)


if __name__ == "__main__":
    main()
