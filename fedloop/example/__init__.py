"""A federation that runs as it is: a chat model of a million parameters, a probe for it, data.

And labelled adapters of that model, to train a probe on and to measure it on.

All of it comes with the package. Nothing is downloaded.
"""

from __future__ import annotations

import csv
import json
import shutil
from pathlib import Path

from loraprobe.outputs import free_path

FOLDER = Path(__file__).parent
_CLIENTS = ("-100-0", "-100-1", "-100-2")  # of every source; the package holds no others


def example_config() -> str:
    """The example's configuration, with paths that hold wherever it is saved."""
    text = (FOLDER / "example.toml").read_text(encoding="utf-8")
    for name in ("base", "probe"):
        text = text.replace(f'= "{name}"', f"= {json.dumps(str(FOLDER / name))}")
    return text


def write_adapters(out: Path, force: bool = False) -> list[Path]:
    """Copy the labelled adapters into a folder: train.csv and held-out.csv, which name them.

    Of every source of data the last client is held out. All are of clients that the example's
    probe was not fitted on.

    Raises:
        OutputError: the folder holds something, and `force` is False.
    """
    free_path(out, force)
    with (FOLDER / "adapters/manifest.csv").open(newline="", encoding="utf-8") as file:
        rows = [row for row in csv.DictReader(file) if (FOLDER / "adapters" / row["path"]).is_dir()]
    rows = [row for row in rows if row["path"].endswith(_CLIENTS)]
    for row in rows:
        row["source"] = row["source"].partition("@")[0]  # the share of malicious data: all of it
        shutil.copytree(FOLDER / "adapters" / row["path"], out / row["path"], dirs_exist_ok=True)
    written = []
    for name, held_out in (("train.csv", False), ("held-out.csv", True)):
        with (out / name).open("w", newline="", encoding="utf-8") as file:
            table = csv.DictWriter(file, rows[0].keys(), lineterminator="\n")
            table.writeheader()
            table.writerows(row for row in rows if row["path"].endswith(_CLIENTS[-1]) == held_out)
        written.append(out / name)
    return written
