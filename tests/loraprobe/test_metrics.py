"""AUROC and its cluster bootstrap, TPR at FPR, calibration and the report.

Definitions, properties, negative controls.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import binom, norm
from sklearn.metrics import roc_auc_score

from loraprobe import metrics
from loraprobe.errors import FitError, NonFiniteError
from loraprobe.evaluation import report
from loraprobe.metrics import auroc, auroc_ci, brier, ece, tpr_at_fpr


def slow_auroc(pairs: list[tuple[bool, float]]) -> float:
    """The definition: the share of (malicious, benign) pairs in the right order, a tie counting
    one half.
    """
    won, total = 0.0, 0
    for label, score in pairs:
        for other_label, other_score in pairs:
            if label and not other_label:
                won += 1.0 if score > other_score else 0.5 if score == other_score else 0.0
                total += 1
    return won / total if total else float("nan")


def slow_resamples(
    y: np.ndarray, s: np.ndarray, groups: np.ndarray, resamples: int, seed: int
) -> np.ndarray:
    """The definition: draw group names, concatenate their rows, take the AUROC."""
    rng, names = np.random.default_rng(seed), np.unique(groups)
    values = []
    for _ in range(resamples):
        drawn = rng.integers(len(names), size=len(names))
        values.append(
            slow_auroc(
                [
                    (bool(y[i]), float(s[i]))
                    for d in drawn
                    for i in np.flatnonzero(groups == names[d])
                ]
            )
        )
    return np.array(values)


# Few distinct scores, so that ties within and across classes are common.
labelled = st.lists(st.tuples(st.booleans(), st.integers(0, 6)), min_size=2, max_size=40).filter(
    lambda rows: 0 < sum(label for label, _ in rows) < len(rows)
)


@given(labelled)
@settings(deadline=None, max_examples=60)
def test_auroc_is_the_definition_and_sklearns_with_ties(rows: list[tuple[bool, int]]) -> None:
    y, s = np.array([r[0] for r in rows]), np.array([r[1] for r in rows]) / 6
    assert auroc(y, s) == pytest.approx(roc_auc_score(y, s), abs=1e-12)
    assert auroc(y, s) == slow_auroc(list(zip(y, s, strict=True)))


def noisy(n: int, n_groups: int, seed: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Rows with a shared group effect.

    Every third group is malicious, and scores are rounded so that some tie.
    """
    rng = np.random.default_rng(seed)
    groups = rng.permutation(np.arange(n) % n_groups)
    y = groups % 3 == 0
    return y, np.round(rng.normal(size=n) + rng.normal(size=n_groups)[groups] + y, 1), groups


@pytest.mark.parametrize("mixed", [False, True])
def test_bootstrap_equals_the_slow_definition(mixed: bool) -> None:
    y, s, groups = noisy(45, 7, seed=1)
    if mixed:  # groups that carry both labels stay together
        y = np.random.default_rng(2).random(45) < 0.4
    low, high = np.nanquantile(slow_resamples(y, s, groups, 40, 3), [0.05, 0.95])
    assert auroc_ci(y, s, groups, resamples=40, level=0.9, seed=3) == pytest.approx(
        (low, high), abs=1e-12
    )


def test_bootstrap_does_not_depend_on_blocks_or_row_order_but_on_the_seed(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    y, s, groups = noisy(90, 15, seed=4)
    whole = auroc_ci(y, s, groups, resamples=200)
    order = np.random.default_rng(0).permutation(90)
    assert auroc_ci(y[order], s[order], groups[order], resamples=200) == whole
    assert auroc_ci(y, s, [f"client {g:02d}" for g in groups], resamples=200) == whole
    assert auroc_ci(y, s, [("run", g) for g in groups], resamples=200) == whole
    assert auroc_ci(y, s, torch.tensor(groups), resamples=200) == whole  # works all the same
    assert auroc_ci(y, s, [g if g else "zero" for g in groups], resamples=200) != auroc_ci(
        y, s, None, resamples=200
    )
    assert auroc_ci(y, s, groups, resamples=200, seed=1) != whole
    monkeypatch.setattr(metrics, "_BLOCK_CELLS", 7 * 90)
    assert auroc_ci(y, s, groups, resamples=200) == whole


def test_copies_within_a_group_widen_the_interval_and_tell_nothing_new() -> None:
    y, s, _ = noisy(60, 60, seed=5)
    copies = 16

    def width(groups: np.ndarray | None, repeat: int) -> float:
        low, high = auroc_ci(np.repeat(y, repeat), np.repeat(s, repeat), groups, resamples=1000)
        return high - low

    honest = width(np.repeat(np.arange(60), copies), copies)
    assert honest == width(None, 1)  # copies under one name change nothing, to the last bit
    # negative control: as rows of their own they fake sqrt(16) times the precision
    assert honest > 3.0 * width(None, copies)


def test_interval_covers_the_true_auroc_of_clustered_normals_and_the_row_bootstrap_does_not() -> (
    None
):
    # Group effects and row noise have variance 1 each, the classes differ by 1: AUROC = Phi(1 /
    # sqrt(2 * 2)).
    truth, rng, covered = norm.cdf(1.0 / 2.0), np.random.default_rng(10), {"groups": 0, "rows": 0}
    groups = np.repeat(np.arange(40), 10)
    y = groups % 2 == 0
    for repetition in range(60):
        s = y + rng.normal(size=40)[groups] + rng.normal(size=400)
        for name, by in (("groups", groups), ("rows", None)):
            low, high = auroc_ci(y, s, by, resamples=300, seed=repetition)
            covered[name] += low <= truth <= high
    # 95 % nominal; the percentile interval has 92 % at 40 groups
    assert covered["groups"] >= binom.ppf(0.001, 60, 0.92)
    assert covered["rows"] < 0.75 * 60


@pytest.mark.parametrize("n_groups", [4, 20, 40])
def test_perfect_separation_still_leaves_room(n_groups: int) -> None:
    groups = np.repeat(np.arange(n_groups), 5)
    y = groups % 2 == 0
    low, high = auroc_ci(y, y + 0.0, groups)
    assert high == 1.0
    # Clopper-Pearson's defining equation
    assert binom.sf(n_groups // 2 - 1, n_groups // 2, low) == pytest.approx(0.025)
    reverse = auroc_ci(y, 1.0 - y, groups)
    assert reverse == pytest.approx((0.0, 1.0 - low))
    values = slow_resamples(y, y + 0.0, groups, 20, 0)
    assert np.nanmin(values) == 1.0  # negative control: the bootstrap alone would claim certainty


def test_pairs_of_mixed_groups_are_counted_once() -> None:
    # 6 groups, each with both labels: 3 disjoint pairs
    y, groups = (np.tile([0, 1], 6), np.repeat(np.arange(6), 2))
    assert auroc_ci(y, y + 0.0, groups)[0] == pytest.approx(0.025 ** (1 / 3))


def test_one_group_of_a_class_says_nothing() -> None:
    assert auroc_ci([0, 0, 1, 1, 1], [0.1, 0.2, 0.3, 0.1, 0.4], ["a", "b", "m", "m", "m"]) == (
        0.0,
        1.0,
    )


@given(labelled, st.sampled_from([0.0, 0.01, 0.05, 0.2, 1 / 3, 0.5, 0.99, 1.0]))
@settings(deadline=None, max_examples=100)
def test_tpr_at_fpr_is_the_best_of_all_thresholds(
    rows: list[tuple[bool, int]], max_fpr: float
) -> None:
    y, s = np.array([r[0] for r in rows]), np.array([float(r[1]) for r in rows])
    rates = [(np.mean(s[~y] >= cut), np.mean(s[y] >= cut)) for cut in [*s, np.inf]]
    assert tpr_at_fpr(y, s, max_fpr) == max(tpr for fpr, tpr in rates if fpr <= max_fpr)


def test_tpr_at_fpr_allows_exactly_the_rate_asked_for() -> None:
    y, s = np.arange(200) >= 100, np.r_[np.arange(100) / 100, np.full(100, 0.705)]
    # 29 benign rows score above 0.705, and 0.29 * 100 is 28.999...
    assert tpr_at_fpr(y, s, 0.29) == 1.0
    assert tpr_at_fpr(y, s, 0.28) == 0.0


@given(
    st.lists(st.tuples(st.booleans(), st.integers(0, 16)), min_size=1, max_size=30),
    st.integers(1, 12),
)
@settings(deadline=None, max_examples=60)
def test_ece_is_its_definition(rows: list[tuple[bool, int]], bins: int) -> None:
    y, p = np.array([r[0] for r in rows]), np.array([r[1] for r in rows]) / 16
    expected = 0.0
    for k in range(bins):
        inside = (p * bins >= k) & ((p * bins < k + 1) | (k == bins - 1))
        if inside.any():
            expected += inside.mean() * abs(y[inside].mean() - p[inside].mean())
    assert ece(y, p, bins) == pytest.approx(expected, abs=1e-12)
    assert brier(y, p) == pytest.approx(
        np.mean([(pi - yi) ** 2 for yi, pi in zip(y, p, strict=True)]), abs=1e-12
    )


def example() -> tuple[np.ndarray, np.ndarray, np.ndarray, list[str]]:
    y, s, groups = noisy(120, 24, seed=12)
    names = [
        (
            "gptfuzz@0.25"
            if g % 6 == 0
            else "advbench"
            if g % 3 == 0
            else "gsm8k"
            if g % 2
            else "dolly_qa"
        )
        for g in groups
    ]
    return y, norm.cdf(s), groups, names


def test_report_agrees_with_the_parts_and_is_json() -> None:
    y, p, groups, names = example()
    made = report(y, p, groups, threshold=0.8, by=names, resamples=300)
    assert (made.auroc, made.auroc_ci) == (auroc(y, p), auroc_ci(y, p, groups, resamples=300))
    assert made.tpr_at_fpr == {0.01: tpr_at_fpr(y, p, 0.01), 0.05: tpr_at_fpr(y, p, 0.05)}
    assert (made.tpr, made.fpr) == (np.mean(p[y] >= 0.8), np.mean(p[~y] >= 0.8))
    assert (made.n, made.n_malicious, made.n_groups) == (120, y.sum(), 24)
    facts = json.loads(json.dumps(made.to_dict(), allow_nan=False))
    assert facts["tpr_at_fpr"] == {"0.01": made.tpr_at_fpr[0.01], "0.05": made.tpr_at_fpr[0.05]}
    assert facts["by"][0]["name"] == "dolly_qa"
    assert facts["auroc_ci"] == list(made.auroc_ci)
    assert made == report(y, p, groups, threshold=0.8, by=names, resamples=300)


def test_report_rows_by_name() -> None:
    y, p, groups, names = example()
    rows = {row.name: row for row in report(y, p, groups, threshold=0.8, by=names, resamples=10).by}
    assert list(rows) == ["dolly_qa", "gsm8k", "advbench", "gptfuzz@0.25"]  # benign first
    mine = np.array(names) == "advbench"
    row = rows["advbench"]
    assert (row.label, row.n, row.n_groups) == (1, mine.sum(), 4)
    assert (row.flagged, row.mean_score) == (np.mean(p[mine] >= 0.8), p[mine].mean())
    assert row.auroc == pytest.approx(
        roc_auc_score(np.r_[np.zeros((~y).sum()), np.ones(mine.sum())], np.r_[p[~y], p[mine]])
    )
    benign = np.array(names) == "gsm8k"
    assert rows["gsm8k"].auroc == pytest.approx(
        roc_auc_score(np.r_[np.zeros(benign.sum()), np.ones(y.sum())], np.r_[p[benign], p[y]])
    )
    both = report(y, p, groups, threshold=0.8, by=["all"] * 120, resamples=10).by[0]
    assert (both.label, both.auroc) == (None, None)


def test_report_table_is_aligned() -> None:
    y, p, groups, names = example()
    made = report(y, p, groups, threshold=0.8, by=names, resamples=10)
    lines = str(made).splitlines()
    assert lines[0].startswith("120 rows")
    assert "does not say what it was fitted on" in lines[1]
    assert f"{made.auroc:.3f}" in lines[2]
    table = lines[lines.index("") + 1 :]
    assert len(table) == 5
    assert len({len(line) for line in table}) == 1
    assert "\n\n" not in report(y, p, groups, threshold=0.8, resamples=10).table()


def test_rate_intervals_count_groups() -> None:
    y, flagged = np.repeat([0, 1], 20), np.tile([1, 0, 0, 0], 10)
    singles = report(y, flagged * 0.9, None, threshold=0.5, resamples=10)
    # 5 of 20: the exact binomial interval
    assert binom.sf(4, 20, singles.tpr_ci[0]) == pytest.approx(0.025)
    assert binom.cdf(5, 20, singles.tpr_ci[1]) == pytest.approx(0.025)
    copied = report(
        np.repeat(y, 8),
        np.repeat(flagged, 8) * 0.9,
        np.repeat(np.arange(40), 8),
        threshold=0.5,
        resamples=10,
    )
    assert copied.tpr_ci == pytest.approx(singles.tpr_ci)
    alone = report(np.repeat(y, 8), np.repeat(flagged, 8) * 0.9, None, threshold=0.5, resamples=10)
    # negative control: rows counted as groups
    assert np.ptp(alone.tpr_ci) < 0.5 * np.ptp(copied.tpr_ci)
    none = report(y, y * 0.9, None, threshold=0.5, resamples=10)
    assert (none.fpr_ci[0], none.tpr_ci[1]) == (0.0, 1.0)
    assert none.fpr_ci[1] == pytest.approx(1 - 0.025 ** (1 / 20))


def test_a_score_equal_to_the_threshold_is_flagged() -> None:
    assert report([0, 1], [0.1, 0.8], None, threshold=0.8, resamples=10).tpr == 1.0


GOOD = ([0, 1], [0.1, 0.9])
BAD: list[tuple[Callable[[], Any], type[Exception], str]] = [
    (lambda: auroc([1, 1], [0.1, 0.9]), FitError, "all 2 rows are malicious"),
    (lambda: auroc([0, 0], [0.1, 0.9]), FitError, "all 2 rows are benign"),
    (lambda: auroc_ci([0, 0], [0.1, 0.9], None), FitError, "both classes"),
    (lambda: report([1, 1], [0.1, 0.9], None, threshold=0.5), FitError, "both classes"),
    (lambda: auroc([], []), FitError, "expected one label"),
    (lambda: auroc([0, 1, 1], [0.1, 0.9]), FitError, r"\(3,\) for 2 rows"),
    (lambda: auroc([[0, 1]], [[0.1, 0.9]]), FitError, "shape"),
    (lambda: auroc([0, 2], [0.1, 0.9]), FitError, "'2'.*expected only 0"),
    (lambda: auroc(["benign", "malicious"], [0.1, 0.9]), FitError, "'malicious'"),
    (lambda: auroc([0.0, float("nan")], [0.1, 0.9]), FitError, "nan"),
    (lambda: auroc([0, 1], ["a", "b"]), FitError, "expected one number a row"),
    (lambda: auroc([0, 1], [0.1, float("nan")]), NonFiniteError, "1 of 2 scores"),
    (lambda: auroc([0, 1], [0.1, float("inf")]), NonFiniteError, "1 of 2 scores"),
    (lambda: report([0, 1], [0.1, 1.5], None, threshold=0.5), FitError, "not logits"),
    (lambda: ece([0, 1], [-0.1, 0.5]), FitError, "not logits"),
    (lambda: ece(*GOOD, bins=0), FitError, "bins"),
    (lambda: brier([0, 1], [0.1, 2.0]), FitError, "not logits"),
    (lambda: tpr_at_fpr(*GOOD, 1.5), FitError, "max_fpr"),
    (lambda: tpr_at_fpr(*GOOD, float("nan")), FitError, "max_fpr"),
    (lambda: auroc_ci(*GOOD, None, resamples=0), FitError, "resamples"),
    (lambda: auroc_ci(*GOOD, None, level=1.0), FitError, "level"),
    (lambda: auroc_ci(*GOOD, ["a"]), FitError, "1 groups for 2 rows"),
    (lambda: auroc_ci(*GOOD, "ab"), FitError, "list of one group a row"),
    (lambda: auroc_ci(*GOOD, ["a", None]), FitError, "none missing"),
    (lambda: auroc_ci(*GOOD, np.zeros((2, 2))), FitError, "none missing"),
    (lambda: auroc_ci(*GOOD, [1.0, float("nan")]), FitError, "none missing"),
    (lambda: report(*GOOD, None, threshold=float("nan")), FitError, "threshold"),
    (lambda: report(*GOOD, None, threshold=0.5, by=["a"]), FitError, "1 names"),
]


@pytest.mark.parametrize(("call", "error", "message"), BAD)
def test_bad_input_is_refused(
    call: Callable[[], Any], error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        call()
