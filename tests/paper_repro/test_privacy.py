"""The page says of noise and sums what was measured."""

from __future__ import annotations

import json
from pathlib import Path

from paper_repro.privacy.run import RESULTS, table


def test_the_recipes_have_the_committed_numbers() -> None:
    rows = table(json.loads(RESULTS.read_text(encoding="utf-8")))
    page = Path(__file__).parents[2] / "docs" / "recipes.md"
    assert "\n".join(rows) in page.read_text(encoding="utf-8")
    assert len(rows) == 12
