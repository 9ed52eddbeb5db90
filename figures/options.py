"""The command line that the figures of the documentation share."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

from figures.style import PICTURES


def folder_of(name: str, about: str | None, argv: Sequence[str] | None = None) -> Path:
    """The folder that a figure's command line names; figures/pictures if it names none."""
    parser = argparse.ArgumentParser(
        prog=f"python -m figures.{name}", description=(about or "").partition("\n")[0]
    )
    parser.add_argument(
        "--out", type=Path, default=PICTURES, help="folder for the .png and the .pdf"
    )
    folder: Path = parser.parse_args(argv).out
    return folder
