"""What the programs of the zoo and of the studies share."""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

DATA = Path("../shared/data")
_STANDARD: dict[str, dict[str, Any]] = {
    "data": {"type": Path, "default": DATA, "help": "folder of the datasets, one sub-folder each"},
    "work": {
        "type": Path,
        "default": Path("build/zoo"),
        "help": "what `make zoo` keeps: replicate-0 holds the labelled updates",
    },
    "workers": {"type": int, "default": 2, "help": "processes, one a core"},
    "check": {"action": "store_true", "help": "change nothing; fail if a page is out of date"},
}


def documented(about: str | None, *options: str) -> argparse.ArgumentParser:
    """A parser whose help is a module's docstring as it stands.

    Args:
        options: those of "data", "work", "workers" and "check" that the program has.
    """
    parser = argparse.ArgumentParser(
        description=about, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    for name in options:
        parser.add_argument(f"--{name}", **_STANDARD[name])
    return parser


def stale_pages(pages: Mapping[Path, str]) -> dict[Path, str]:
    """The pages whose text on disk is another, or that are not there."""
    return {
        path: text
        for path, text in pages.items()
        if not path.is_file() or path.read_text(encoding="utf-8") != text
    }


def write_pages(pages: Mapping[Path, str], command: str, *, check: bool) -> None:
    """Write the pages that are out of date, or only say so.

    Args:
        command: what writes them.

    Raises:
        SystemExit: `check`, and a page is out of date.
    """
    stale = stale_pages(pages)
    if check and stale:
        raise SystemExit(f"out of date: {', '.join(map(str, stale))}; run {command}")
    for path, text in stale.items():
        path.write_text(text, encoding="utf-8")


def read_lines(path: Path) -> list[dict[str, Any]]:
    """The rows of a file with one JSON object a line; none if it is not there."""
    if not path.exists():
        return []
    return [json.loads(line) for line in path.read_text(encoding="utf-8").split("\n") if line]


def append_lines(path: Path, rows: Iterable[Mapping[str, Any]]) -> None:
    """Add rows to such a file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a", encoding="utf-8") as file:
        file.write("".join(f"{json.dumps(row)}\n" for row in rows))


def write_arrays(path: Path, **arrays: Any) -> None:
    """An .npz file; one that is there is whole."""
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_suffix(".part")
    with part.open("wb") as file:
        np.savez(file, **arrays)
    part.replace(path)


def write_rows(path: Path, rows: Iterable[Any]) -> None:
    """A JSON list with a line a row, so that a change shows as the lines that changed."""
    lines = ",\n".join(json.dumps(row) for row in rows)
    path.write_text(f"[\n{lines}\n]\n", encoding="utf-8")
