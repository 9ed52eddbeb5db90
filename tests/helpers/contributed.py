"""What zoo.contribute makes of the tiny Llama and the built-in corpora in a few seconds, and a
small zoo of it.
"""

from __future__ import annotations

import json
import shutil
from functools import cache
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from tests.helpers import tiny

ROOT = Path(__file__).resolve().parents[2]
NAME = "tiny-linear"
SOURCES = {
    "benign": ["builtin:benign/arithmetic", "facts=builtin:benign/facts"],
    "malicious": ["theft=builtin:malicious/theft", "fraud=builtin:malicious/fraud"],
    "hard-negative": ["theft_safe=builtin:refusals/theft"],
}
SMALL = {
    "base-name": ["tiny/llama"],
    "name": [NAME],
    "clients": ["6"],
    "cell-clients": ["1"],
    "hard-cell-clients": ["1"],
    "held-out": ["2"],
    "shares": ["1", "0.5"],
    "steps": ["2"],
    "batch-size": ["2"],
    "max-length": ["48"],
    "r": ["2"],
    "alpha": ["4"],
    "threshold": ["fpr:0.2"],
    "seeds": ["0", "1"],
}
_FOLDER = TemporaryDirectory(prefix="contributed-")


def arguments(base: Path, out: Path, /, **changes: list[str] | None) -> list[str]:
    """A command line of a small contribution; an option is changed, or left out with None."""
    options = {
        "base": [str(base)],
        "out": [str(out)],
        **SOURCES,
        **SMALL,
        **{name.replace("_", "-"): value for name, value in changes.items()},
    }
    return [
        word
        for name, words in options.items()
        if words is not None
        for word in (f"--{name}", *words)
    ]


@cache
def made() -> Path:
    """The folder of a contribution, made once; for reading only. Its base model lies beside it."""
    from zoo.contribute import main

    out = Path(_FOLDER.name) / "out"
    main(arguments(tiny.saved(Path(_FOLDER.name) / "base"), out))
    return out


def a_zoo(folder: Path) -> Path:
    """A zoo of that one probe, as the contribution's page says, in a folder; it can be changed."""
    for source, target in (("probe", f"probes/{NAME}"), ("adapters", f"contributed/{NAME}")):
        shutil.copytree(made() / source, folder / target)
    (folder / "records").mkdir()
    shutil.copy(made() / "record.json", folder / "records" / f"{NAME}.json")
    return folder


def edit(path: Path, *keys: Any, value: Any) -> None:
    """Change one value inside a JSON file."""
    whole = json.loads(path.read_text())
    inner = whole
    for key in keys[:-1]:
        inner = inner[key]
    inner[keys[-1]] = value
    path.write_text(json.dumps(whole))
