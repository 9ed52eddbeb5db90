"""The benchmark of the service: its page shows its results, and its goal is in them."""

from __future__ import annotations

import json

from benchmarks import serving


def test_the_page_shows_the_committed_results() -> None:
    result = json.loads(serving.RESULTS.read_text())
    assert f"\n{serving.table(result)}\n<!-- end of serving cost -->" in serving.PAGE.read_text()
    assert {"1 connections", "4 connections"} <= set(result)
    assert serving.table(result) != serving.table({**result, "rounds": result["rounds"] + 1})
