"""Where this folder keeps things."""

from __future__ import annotations

from pathlib import Path

FOLDER = Path(__file__).resolve().parents[1]
REPOSITORY = FOLDER.parent
RESULTS = FOLDER / "results"
PROBES = FOLDER / "probes"
CONFIGS = FOLDER / "configs"
