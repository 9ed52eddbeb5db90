"""Nothing of what is left out is trained on, everything is tested once, and a leak would show."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from loraprobe.adapters.adapter import Adapter
from loraprobe.errors import DataError, FitError, LoraprobeError
from loraprobe.evaluation import evaluate
from loraprobe.featurizer import FeatureRecipe, Featurizer
from loraprobe.fit.fit import fit_features
from loraprobe.manifest import Row
from loraprobe.study import leave_out
from loraprobe.study.folds import Fold, kind_of, pair_folds, value_folds, values_of
from loraprobe.study.leave_out import CUT_FOLDS, RECIPES, Detector, detectors_of, leave_one_out
from tests.helpers import probes

ALL_B = FeatureRecipe.all_b()
LINEAR = Detector("linear", "all_b", "linear", ALL_B)
HARD_SHARE = 0.25
EDGES = (0.0025, 0.0045, 0.0065)


def plan() -> list[Row]:
    """Three benign sources, two malicious ones pure and mixed into every benign one, a safe twin
    of the first, two runs a client.
    """
    cells = [("benign", name, "", 1.0, 4) for name in ("code", "facts", "tales")]
    cells.append(("hard_negative", "theft_safe", "", 1.0, 3))
    cells.append(("hard_negative", "theft_safe", "code", HARD_SHARE, 2))
    cells += [("malicious", name, "", 1.0, 3) for name in ("theft", "fraud")]
    cells += [
        ("malicious", name, host, 0.5, 2)
        for name in ("theft", "fraud")
        for host in ("code", "facts", "tales")
    ]
    rows = []
    for role, source, host, share, count in cells:
        for number in range(2 * count):
            label = int(role == "malicious")
            client = f"{role}-{source}-{host}-{number // 2}"
            row = Row(
                Path(f"{client}-{number}"),
                label,
                client,
                source,
                role,
                host,
                share,
                attack=("", source)[label],
            )
            serial = len(rows)
            rows.append(
                replace(
                    row,
                    lr=0.001 * (1 + serial % 8),
                    recipe=("long", "short")[serial // 2 % 2],
                    seed=str(serial // 2 % 3),
                )
            )
    return rows


@cache
def material() -> tuple[tuple[Row, ...], tuple[Adapter, ...]]:
    """The rows and an adapter for each; mixtures are half as far from the benign ones."""
    rows = tuple(plan())
    found = [
        probes.labelled_adapter(number, bool(row.label), signal=0.5 * (row.share or 1), layers=1)
        for number, row in enumerate(rows)
    ]
    return rows, tuple(found)


def folds_of(field: str, rows: Sequence[Row], **options: Any) -> list[Fold]:
    edges = EDGES if field == "lr" else None
    return value_folds(
        rows, values_of(rows, material()[1], field, edges=edges), field == "source", 3, 0, **options
    )


def carries(row: Row, field: str, value: str) -> bool:
    """Whether a row is of the value that is left out, written out a second time."""
    if field == "lr":
        return value.startswith(f"{1 + (round(row.lr * 1000) - 1) // 2}: ")
    return getattr(row, field) == value or (field == "source" and row.host == value)


# --- folds


@pytest.mark.parametrize("field", ["source", "attack", "lr", "recipe", "seed"])
@pytest.mark.parametrize("keep_twins", [False, True])
def test_no_fold_trains_on_the_value_its_groups_its_twin_or_what_it_tests(
    field: str, keep_twins: bool
) -> None:
    rows = material()[0]
    folds = folds_of(field, rows, keep_twins=keep_twins)
    assert len(folds) == {"source": 6, "attack": 2, "lr": 4, "recipe": 2, "seed": 3}[field]
    for fold in folds:
        twin = (
            f"{fold.left_out}_safe" if field in ("source", "attack") and not keep_twins else "none"
        )
        out = {
            row.group for row in rows if carries(row, field, fold.left_out) or row.source == twin
        }
        tested = [number for part in fold.parts for number in part.test]
        assert len(tested) == len(set(tested))
        for part in fold.parts:
            trained = {rows[number].group for number in part.train}
            assert not trained & out
            assert not trained & {rows[number].group for number in part.test}
        trained_somewhere = {number for part in fold.parts for number in part.train}
        left = set(range(len(rows))) - set(tested) - trained_somewhere
        assert fold.withheld == len(left)


def test_a_value_of_one_class_meets_every_row_of_the_other_once() -> None:
    rows = material()[0]
    for fold in folds_of("source", rows):
        tested = {number for part in fold.parts for number in part.test}
        label = 1 if fold.left_out in ("theft", "fraud") else 0
        assert fold.side == ("benign", "malicious")[label]
        own = {number for number, row in enumerate(rows) if row.source == fold.left_out}
        assert tested == own | {number for number, row in enumerate(rows) if row.label != label}
        assert len(fold.parts) == 3
        for part in fold.parts:  # every part has some of every kind that has three clients or more
            assert {rows[number].label for number in part.test} == {0, 1}
        assert fold.kinds == {kind_of(rows[number]) for number in own}


def test_pairs_are_the_whole_grid() -> None:
    rows = material()[0]
    folds = {fold.left_out: fold.parts[0] for fold in pair_folds(rows)}
    assert set(folds) == {
        f"{bad} | {good}"
        for bad in ("theft", "fraud")
        for good in ("code", "facts", "tales", "theft_safe")
    }
    part = folds["theft | code"]
    assert {(rows[number].source, rows[number].host) for number in part.test} == {
        ("theft", ""),
        ("theft", "code"),
        ("code", ""),
    }
    trained = [rows[number] for number in part.train]
    assert {row.source for row in trained} == {"facts", "tales", "fraud"}
    assert {row.host for row in trained} == {"", "facts", "tales"}
    kept = {fold.left_out: fold.parts[0] for fold in pair_folds(rows, keep_twins=True)}[
        "theft | code"
    ]
    assert "theft_safe" in {rows[number].source for number in kept.train}


# --- what is fitted


@pytest.mark.parametrize(
    ("field", "options"),
    [("source", {}), ("source", {"pairs": True}), ("attack", {}), ("lr", {"edges": EDGES})],
)
def test_no_fit_ever_sees_a_row_that_is_left_out(
    monkeypatch: pytest.MonkeyPatch, field: str, options: dict[str, Any]
) -> None:
    rows, adapters = material()
    features = Featurizer.fit(ALL_B, adapters)(adapters)
    row_of = {vector.tobytes(): row for vector, row in zip(features, rows, strict=True)}
    assert len(row_of) == len(rows)
    current: list[str] = []
    seen: list[tuple[str, Row]] = []
    fit = leave_out.fit_head

    def spy(name: str, x: np.ndarray, *rest: Any, **more: Any) -> Any:
        seen.extend((current[-1], row_of[vector.tobytes()]) for vector in x)
        return fit(name, x, *rest, **more)

    def watched(jobs: Sequence[Any]) -> Iterable[Any]:
        for detector, fold in jobs:
            current.append(fold.left_out)
            yield detector, fold

    monkeypatch.setattr(leave_out, "fit_head", spy)
    monkeypatch.setattr("loraprobe.fit.fit.fit_head", spy)
    report = leave_one_out(
        adapters, rows, field, [LINEAR], folds=3, cuts=("fpr:0.2", 0.8), progress=watched, **options
    )
    assert len(seen) > 10 * len(report.outcomes)
    for value, row in seen:
        for one in value.split(" | "):
            assert not carries(row, field, one), (value, row)
            assert row.source != f"{one}_safe"


def test_scores_and_cuts_are_those_of_a_probe_fitted_on_the_same_rows() -> None:
    rows, adapters = material()
    ordered = sorted(
        range(len(rows)), key=lambda number: (rows[number].group, str(rows[number].path))
    )
    mine, theirs = [rows[number] for number in ordered], [adapters[number] for number in ordered]
    featurizer = Featurizer.fit(ALL_B, theirs)
    by_seed = leave_one_out(
        adapters, rows, "seed", [LINEAR], cuts=("fpr:0.1", 0.5), calibration="platt"
    )
    for outcome in by_seed.outcomes:
        train = [number for number, row in enumerate(mine) if row.seed != outcome.left_out]
        test = [number for number, row in enumerate(mine) if row.seed == outcome.left_out]
        labels, groups = [row.label for row in mine], [row.group for row in mine]
        probe = fit_features(
            featurizer,
            featurizer([theirs[n] for n in train]),
            [labels[n] for n in train],
            groups=[groups[n] for n in train],
            threshold="fpr:0.1",
            calibration="platt",
            folds=CUT_FOLDS,
        )
        expected = evaluate(
            probe, [theirs[n] for n in test], [labels[n] for n in test], [groups[n] for n in test]
        )
        assert outcome.report is not None
        assert (outcome.report.auroc, outcome.report.auroc_ci, outcome.report.ece) == (
            expected.auroc,
            expected.auroc_ci,
            expected.ece,
        )
        conformal, half = outcome.cuts
        assert conformal.thresholds == (probe.threshold, probe.threshold)
        assert (conformal.tpr, conformal.fpr, conformal.tpr_ci, conformal.fpr_ci) == (
            expected.tpr,
            expected.fpr,
            expected.tpr_ci,
            expected.fpr_ci,
        )
        assert half.thresholds == (0.5, 0.5)


# --- what cannot be measured


def two_layouts(field: str, **other: Any) -> tuple[list[Row], list[Adapter]]:
    """Clients of two bases or ranks, half of each malicious."""
    rows, adapters = [], []
    for number in range(40):
        second, label = number % 4 >= 2, number % 2
        options = {
            "layers": 1,
            **(other if second else {}),
            "base_model": ("org/one", "org/two")[second and field == "base"],
        }
        adapters.append(probes.labelled_adapter(number, bool(label), **options))
        rows.append(Row(Path(f"r{number}"), label, f"c{number}", ("plain", "attack")[label]))
    return rows, adapters


@pytest.mark.parametrize(
    ("field", "other", "readable"),
    [
        ("base", {"dims": {"q_proj": (20, 24), "v_proj": (12, 24)}}, {"norm_only", "spectral"}),
        ("rank", {"r": 3}, {"norm_only"}),
    ],
)
def test_what_a_recipe_cannot_read_is_said_and_the_rest_is_measured(
    field: str, other: dict[str, Any], readable: set[str]
) -> None:
    rows, adapters = two_layouts(field, **other)
    recipes = {"all_b": ALL_B, "spectral": FeatureRecipe.spectral()}
    report = leave_one_out(adapters, rows, field, detectors_of(["linear"], recipes), cuts=(0.5,))
    assert {outcome.left_out for outcome in report.outcomes} == (
        {"org/one", "org/two"} if field == "base" else {"2", "3"}
    )
    for outcome in report.outcomes:
        name = outcome.detector if outcome.baseline else outcome.recipe
        assert (outcome.report is not None) == (name in readable), (name, outcome.error)
        assert outcome.error.startswith("LayoutMismatch: ") == (outcome.report is None)
    shown = {(row["detector"], row["recipe"]): row for row in report.to_dict()["summary"]}
    assert shown["linear", "all_b"] | {"measured": 0, "cannot": 2} == shown["linear", "all_b"]
    assert shown["norm_only", "all_b"]["measured"] == 2


def test_a_class_that_is_gone_from_training_is_a_row_that_says_so() -> None:
    rows, adapters = material()
    kept = [number for number, row in enumerate(rows) if row.label == 0 or row.source == "theft"]
    report = leave_one_out(
        [adapters[n] for n in kept],
        [rows[n] for n in kept],
        "source",
        [LINEAR],
        folds=3,
        cuts=(0.8,),
    )
    found = {outcome.left_out: outcome for outcome in report.outcomes}
    assert "left for training are benign; expected both classes" in found["theft"].error
    assert found["theft"].report is None
    assert all(not outcome.error for name, outcome in found.items() if name != "theft")
    with pytest.raises(FitError, match="got 1 values of attack"):
        leave_one_out([adapters[n] for n in kept], [rows[n] for n in kept], "attack", [LINEAR])


def test_hard_negatives_are_reported_apart() -> None:
    rows, adapters = material()
    report = leave_one_out(adapters, rows, "source", [LINEAR], folds=3, cuts=(0.3,))
    [theft] = [outcome for outcome in report.outcomes if outcome.left_out == "theft"]
    [cut] = theft.cuts
    assert theft.report is not None
    assert theft.n_hard == 10
    benign = theft.report.n - theft.report.n_malicious
    assert cut.fpr_hard is not None
    assert cut.fpr_ordinary is not None
    assert cut.fpr * benign == pytest.approx(cut.fpr_hard * 10 + cut.fpr_ordinary * (benign - 10))
    assert theft.auroc_hard is not None
    [code] = [outcome for outcome in report.outcomes if outcome.left_out == "code"]
    assert (code.n_hard, code.auroc_hard, code.cuts[0].fpr_hard) == (0, None, None)


@pytest.mark.parametrize(
    ("field", "change", "options", "error", "says"),
    [
        ("colour", {}, {}, FitError, "got 'colour' to leave out; expected one of source, attack"),
        ("base", {"base": "same"}, {}, FitError, "got 1 values of base"),
        (
            "recipe",
            {"recipe": ""},
            {},
            DataError,
            "70 of 70 rows have no recipe, first .*Fill the manifest's column recipe",
        ),
        (
            "source",
            {"source": "gptfuzz@0.25", "share": None},
            {},
            DataError,
            "the source 'gptfuzz@0.25'; expected the source alone",
        ),
        (
            "source",
            {"share": 0.5, "host": ""},
            {},
            DataError,
            r"is a mixture \(share 0.5\) without a host",
        ),
        ("lr", {}, {"pairs": True}, FitError, "got pairs with lr"),
        ("lr", {}, {"edges": (0.003, 0.002)}, FitError, "expected rising numbers"),
        ("lr", {}, {"bins": 1}, FitError, "got 1 bins"),
        ("source", {}, {"edges": (0.003,)}, FitError, "got edges for source"),
        ("source", {}, {"folds": 1}, FitError, "got folds 1"),
        ("source", {}, {"cuts": ("fnr:0.1",)}, FitError, "got fnr:0.1"),
        ("source", {"label": 0}, {}, FitError, "of 1 classes; expected one each, of both classes"),
    ],
)
def test_what_cannot_be_left_out_is_refused(
    field: str,
    change: dict[str, Any],
    options: dict[str, Any],
    error: type[LoraprobeError],
    says: str,
) -> None:
    rows, adapters = material()
    changed = [replace(row, **change) for row in rows]
    with pytest.raises(error, match=says):
        leave_one_out(adapters, changed, field, [LINEAR], **options)
    for fewer, detectors in ((adapters[:3], [LINEAR]), (adapters, [])):
        with pytest.raises(FitError, match=r"expected (one each|at least one)"):
            leave_one_out(iter(fewer), rows, "source", detectors)


def test_learning_rates_are_cut_at_quantiles_or_given_edges_or_not_at_all() -> None:
    rows, adapters = material()
    assert sorted(set(values_of(rows, adapters, "lr", 8))) == [
        f"{0.001 * n:g}" for n in range(1, 9)
    ]
    assert sorted(set(values_of(rows, adapters, "lr", 2))) == [
        "1: 0.001 to 0.004",
        "2: 0.004 to 0.008",
    ]
    named = values_of(rows, adapters, "lr", edges=(0.002, 0.0075))
    assert {row.lr for value, row in zip(named, rows, strict=True) if value.startswith("3: ")} == {
        0.008
    }


def test_detectors_are_every_head_on_every_recipe_and_the_baselines_once() -> None:
    found = detectors_of(["linear", "mlp"], RECIPES)
    assert [(one.name, one.recipe_name) for one in found if not one.is_baseline] == [
        (h, r) for r in RECIPES for h in ("linear", "mlp")
    ]
    baselines = [(one.head, one.recipe) for one in found if one.is_baseline]
    assert len(baselines) == len({repr(one) for one in baselines})
    assert {one.name for one in found if one.is_baseline} == {"norm_only", "a_only", "cosine"}
    for wrong in ([], ["forest"]):
        with pytest.raises(FitError, match="heads among linear"):
            detectors_of(wrong)
