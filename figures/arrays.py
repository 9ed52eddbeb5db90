"""The committed numbers that the figures about separability draw, checked when they are read."""

from __future__ import annotations

import json
import zipfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from loraprobe.errors import DataError

RESULTS = Path(__file__).resolve().parent.parent / "paper_repro" / "results"
NUMBERS, COORDINATES = RESULTS / "separability.json", RESULTS / "separability_coordinates.npz"
Row = Mapping[str, Any]


def read_numbers(path: Path = NUMBERS) -> dict[str, Any]:
    """What `python -m paper_repro.separability.run` wrote.

    Raises:
        DataError: the file is missing, damaged or holds no such results.
    """
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
        missing = {
            "about",
            "views",
            "cross_source",
            "mended",
            "sampled",
            "sweeps",
            "transfer",
            "drift",
        } - set(found)
    except (OSError, ValueError, TypeError) as error:
        raise DataError(
            f"cannot read {path}: {error}. Write it with python -m paper_repro.separability.run"
        ) from None
    if missing:
        raise DataError(
            f"{path} has no {', '.join(sorted(missing))}; expected them all. Write it with python"
            " -m paper_repro.separability.run"
        )
    return dict(found)


def read_coordinates(path: Path = COORDINATES) -> dict[str, np.ndarray]:
    """What `python -m paper_repro.separability.coordinates` wrote: name -> array.

    Raises:
        DataError: the file is missing or damaged, or a coordinate is not finite.
    """
    try:
        with (
            zipfile.ZipFile(path),
            np.load(path, allow_pickle=False) as file,
        ):  # ZipFile first: np.load takes .npy files, too
            arrays = {name: file[name] for name in file.files}
    except (OSError, ValueError, zipfile.BadZipFile) as error:
        raise DataError(
            f"cannot read {path}: {error}. Write it with python -m"
            " paper_repro.separability.coordinates"
        ) from None
    for name, array in arrays.items():
        if array.dtype.kind == "f" and not np.isfinite(array).all():
            raise DataError(
                f"{path}: {name} holds NaN or infinity; expected finite numbers. Write it anew"
            )
    return arrays


def chosen(rows: Sequence[Row], **fields: Any) -> list[Row]:
    """The rows with these values, in their order.

    Raises:
        DataError: there is none.
    """
    found = [row for row in rows if all(row.get(name) == value for name, value in fields.items())]
    if not found:
        raise DataError(
            f"got no row with {fields}; expected at least one. The results are of another version:"
            " write them anew"
        )
    return found


def bars(rows: Sequence[Row]) -> tuple[np.ndarray, np.ndarray]:
    """AUROC (n,) of the rows, and how far its interval reaches down and up.

    (2, n), as errorbar takes it.
    """
    values = np.array([row["auroc"] for row in rows])
    ends = np.array([row["auroc_ci"] for row in rows])
    return values, np.maximum(np.stack([values - ends[:, 0], ends[:, 1] - values]), 0.0)
