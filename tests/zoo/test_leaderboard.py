"""The leaderboard: its page follows from its file, a row comes out again, any detector fits in."""

from __future__ import annotations

import json

import numpy as np
import pytest

from loraprobe import Adapter
from loraprobe.errors import DataError
from zoo import leaderboard
from zoo.smollm2 import cohorts


class Largest:
    """Learns nothing: the largest entry of any B."""

    def score(self, adapter: Adapter) -> float:
        return max(float(np.abs(np.asarray(pair.B)).max()) for pair in adapter.values())


def test_the_page_is_what_the_file_says() -> None:
    rows = json.loads(leaderboard.RESULTS.read_text(encoding="utf-8"))
    assert set(rows) == set(leaderboard.OURS)
    assert leaderboard.PAGE.read_text(encoding="utf-8") == leaderboard.page(rows)


def test_a_row_comes_out_again() -> None:
    rows = json.loads(leaderboard.RESULTS.read_text(encoding="utf-8"))
    make = leaderboard.detector_of("zoo.detectors:HarmfulDirection")
    again = leaderboard.measured(make, "smollm2-135m-safe")
    assert again == rows["HarmfulDirection"]["smollm2-135m-safe"]


def test_a_detector_that_learns_nothing_is_scored_on_every_split() -> None:
    row = leaderboard.measured(Largest, "smollm2-135m-safe")
    assert row["source and kinds"]["1"]["auroc_all"]["cells"] > 10


def test_what_is_no_detector_is_refused_by_name() -> None:
    for spec in ("nowhere:Detector", "zoo.detectors:Nothing", "zoo.detectors", "builtins:int"):
        with pytest.raises(DataError, match=spec.partition(":")[0]):
            leaderboard.detector_of(spec)


@pytest.mark.parametrize("score", [float("nan"), None, "0.5"])
def test_a_score_that_is_no_finite_number_is_refused(score: object) -> None:
    make = type("Odd", (), {"score": lambda self, adapter: score})
    with pytest.raises(DataError, match="expected a finite number"):
        leaderboard.measured(make, "smollm2-135m-safe")


def test_cuts_of_a_cohort() -> None:
    rng = np.random.default_rng(0)
    benign = rng.normal(0, 1, 200)
    attacked = np.concatenate([np.linspace(-1, 1, 7), [8.0, 8.2, 8.4]])
    for cut in cohorts.CUTS.values():
        assert cut(attacked, benign).tolist() == [False] * 7 + [True] * 3
    quiet = np.linspace(-1, 1, 10)
    assert cohorts.mixture(quiet, benign).any(), "two components always split"
    assert not cohorts.by_bic(quiet, benign).any()
    assert not cohorts.fixed_or_apart(quiet, benign).any()


def test_the_direction_is_the_cosine_of_products() -> None:
    adapters = leaderboard.loaded("smollm2-135m-safe")[1][:2]
    dense = 0.0
    for name in adapters[0].keys() & adapters[1].keys():
        if not name.endswith(cohorts.LEAVES):
            continue
        one, two = (
            np.asarray(a[name].B, np.float64) @ np.asarray(a[name].A, np.float64) for a in adapters
        )
        dense += float(np.vdot(one, two) / np.linalg.norm(one) / np.linalg.norm(two))
    assert cohorts.direction_scores(adapters, 1)[0] == pytest.approx(dense, rel=1e-5)
