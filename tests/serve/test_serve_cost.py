"""The benchmark of the service: its page shows its results, and its goal is in them."""

from __future__ import annotations

import json

import numpy as np

from benchmarks import serving
from loraprobe.serve.slices import read_slice


def test_the_page_shows_the_committed_results() -> None:
    result = json.loads(serving.RESULTS.read_text())
    assert f"\n{serving.table(result)}\n<!-- end of serving cost -->" in serving.PAGE.read_text()
    assert {"1 connections", "4 connections"} <= set(result)
    assert serving.table(result) != serving.table({**result, "rounds": result["rounds"] + 1})


def test_a_body_with_a_longer_header_holds_the_same() -> None:
    delta = serving.random_delta()
    featurizer = serving.paper_probe(delta).featurizer
    body = serving.save_slice(featurizer, delta)
    other = serving.with_longer_header(body, 16)
    assert len(other) == len(body) + 16
    assert np.array_equal(featurizer([read_slice(other, featurizer)]), featurizer([delta]))
