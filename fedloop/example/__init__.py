"""A federation that runs as it is: a chat model of a million parameters, a probe for it, data.

All of it comes with the package. Nothing is downloaded.
"""

from __future__ import annotations

import json
from pathlib import Path

FOLDER = Path(__file__).parent


def example_config() -> str:
    """The example's configuration, with paths that hold wherever it is saved."""
    text = (FOLDER / "example.toml").read_text(encoding="utf-8")
    for name in ("base", "probe"):
        text = text.replace(f'= "{name}"', f"= {json.dumps(str(FOLDER / name))}")
    return text
