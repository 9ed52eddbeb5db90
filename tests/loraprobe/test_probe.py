"""Probes learn what is there alone, keep groups apart, and refuse what they cannot score."""

from __future__ import annotations

from dataclasses import FrozenInstanceError, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from loraprobe import (
    Adapter,
    FeatureRecipe,
    LoRAPair,
    Probe,
    evaluate,
    fit_probe,
    weight_delta,
)
from loraprobe.adapters.load import save_adapter
from loraprobe.errors import (
    AdapterFormatError,
    BaseModelMismatch,
    FitError,
    KindMismatch,
    LayoutMismatch,
    LoraprobeError,
    NonFiniteError,
    RecipeError,
)
from loraprobe.evaluation import report
from loraprobe.fit.baselines import baseline_recipes
from loraprobe.fit.calibration import fpr_threshold
from loraprobe.fit.fit import fit_features, held_out_scores
from loraprobe.heads import Head, LinearHead
from loraprobe.metrics import auroc
from tests.helpers import make
from tests.helpers.probes import (
    BASE,
    HEAD_OPTIONS,
    RECIPES,
    Labelled,
    labelled,
    labelled_adapter,
    new_data,
    tiny_probe,
    training_data,
)


def fitted(data: Labelled, **options: Any) -> Probe:
    return fit_probe(data.adapters, data.labels, groups=data.groups, **options)


def zeroed(adapter: Adapter, factors: str = "AB") -> Adapter:
    """The adapter with these factors all zero."""
    a, b = ("A" not in factors, "B" not in factors)
    pairs = {name: LoRAPair(p.A * a, p.B * b, p.scaling) for name, p in adapter.items()}
    return make.with_pairs(adapter, pairs)


def test_facts_record_the_training_and_probes_cannot_be_edited() -> None:
    probe = tiny_probe("mlp", threshold="fpr:0.2")
    expected = {"head": "mlp", "n": 32, "n_malicious": 16, "n_groups": 16, "folds": 5, "seed": 0}
    training = probe.facts["training"]
    assert expected.items() <= training.items()
    assert training["threshold_rule"] == "fpr:0.2"
    assert training["head_options"]["max_epochs"] == 60
    assert probe.base_model == BASE
    more = probe.with_facts(title="t")
    assert (more.facts["title"], "title" in probe.facts) == ("t", False)
    with pytest.raises(FrozenInstanceError):
        probe.threshold = 0.0


def test_out_of_fold_scores_do_not_leak_the_group() -> None:
    rng = np.random.default_rng(0)
    groups = np.repeat(np.arange(60), 6)
    y = rng.permutation(np.arange(60) % 2)[groups]
    # says which group a row is of, and nothing else
    x = (np.eye(60)[groups] + 0.03 * rng.normal(size=(360, 60))).astype(np.float32)
    apart = auroc(y, held_out_scores(x, y, groups.tolist(), head="linear"))
    mixed = auroc(y, held_out_scores(x, y, list(range(360)), head="linear"))
    assert abs(apart - 0.5) < 0.15
    assert mixed > 0.98  # negative control: rows of one group on both sides


def test_out_of_fold_scores_need_enough_groups() -> None:
    data = training_data()
    few = [
        f"m{row % 3}" if label else group
        for row, (group, label) in enumerate(zip(data.groups, data.labels, strict=True))
    ]
    with pytest.raises(FitError, match=r"got 3 malicious groups; .* need at least 5"):
        fit_probe(data.adapters, data.labels, groups=few, threshold="fpr:0.2")
    with pytest.raises(FitError, match="folds 1"):
        fitted(data, threshold="fpr:0.2", folds=1)
    fit_probe(data.adapters, data.labels, groups=few)  # a fixed threshold needs none


@pytest.mark.parametrize("calibration", [None, "platt", "isotonic"])
def test_cuts_and_the_recorded_distribution_are_of_the_calibrated_out_of_fold_scores(
    calibration: Any,
) -> None:
    data = labelled(24, 2, signal=0.2)
    cuts = {"threshold": "fpr:0.25", "benign_below": "fnr:0.2"}
    options: dict[str, Any] = {"calibration": calibration, "unit": "update", **cuts}
    probe = fitted(data, **options)
    features = probe.featurizer(data.adapters)
    scores = held_out_scores(features, data.labels, data.groups, head="linear")
    what = "out-of-fold scores"
    if probe.calibration is not None:
        assert probe.threshold != fpr_threshold(0.25, scores, data.labels, data.groups)
        scores, what = probe.calibration(scores), f"{what}, {calibration}-calibrated"
    assert probe.threshold == fpr_threshold(0.25, scores, data.labels, data.groups)
    assert 0 < probe.lower_cut <= probe.threshold
    rows = list(zip(data.groups, scores, data.labels, strict=True))
    flagged = {group for group, score, label in rows if label == 0 and score >= probe.threshold}
    below = {group for group, score, label in rows if label == 1 and score < probe.lower_cut}
    if calibration != "isotonic":  # whose scores tie
        assert len(flagged) == 2  # of 12 benign clients: 12 - ceil(13 * 0.75)
        assert len(below) == 1  # of 12 malicious clients: 12 - ceil(13 * 0.8)
    found = probe.facts["training"]["score_distribution"]
    assert (found["what"], found["unit"]) == (what, "update")
    for label, name in enumerate(("benign", "malicious")):
        bins = np.minimum((scores[data.labels == label] * 40).astype(int), 39)  # 1.0 in the last
        assert found["counts"][name] == np.bincount(bins, minlength=40).tolist()
    assert found["counts"]["benign"] != found["counts"]["malicious"]
    nothing_held_out = fitted(data)
    assert "score_distribution" not in nothing_held_out.facts["training"]


def test_benign_below_never_exceeds_the_threshold() -> None:
    data = training_data()  # separable: every malicious score lies above every benign one
    probe = fitted(data, threshold=0.1, benign_below="fnr:0.2")
    assert probe.lower_cut == 0.1


def test_verdicts_follow_the_cuts() -> None:
    new = new_data()
    scores = tiny_probe()(new.adapters)
    low, high = np.quantile(scores, [0.3, 0.7], method="nearest")  # a score at each cut
    probe = replace(tiny_probe(), threshold=high, benign_below=low)
    verdicts = probe.verdicts(new.adapters)
    assert {verdict.label for verdict in verdicts} == {"benign", "malicious", "inconclusive"}
    for score, verdict in zip(scores, verdicts, strict=True):
        assert verdict.score == score
        assert verdict.label == (
            "malicious" if score >= high else "benign" if score < low else "inconclusive"
        )
        assert verdict.reason == (
            f"between {low:.3g} and {high:.3g}" if verdict.label == "inconclusive" else ""
        )
    one_cut = replace(probe, benign_below=None, threshold=0.5)
    assert {one.label for one in one_cut.verdicts(new.adapters)} == {"benign", "malicious"}


@pytest.mark.parametrize("recipe", RECIPES)
def test_a_delta_of_zero_is_inconclusive_whatever_its_score(recipe: str) -> None:
    adapter = new_data().adapters[1]
    for threshold in (0.0, 1.0):
        probe = replace(tiny_probe("linear", recipe), threshold=threshold)
        zero, other = probe.verdicts([zeroed(adapter), adapter])
        assert zero.label == "inconclusive"
        assert "changed" in zero.reason
        assert other.label == ("malicious" if threshold == 0.0 else "benign")


@pytest.mark.parametrize("recipe", [*RECIPES, "canonical"])
def test_a_weight_delta_of_nothing_is_inconclusive(recipe: str) -> None:
    """Its factors, [B, -B] and [A; A], are not zero; their product is."""
    before, data = labelled_adapter(99, kind="weights"), labelled(12, kind="weights")
    chosen = FeatureRecipe(features=("canonical",)) if recipe == "canonical" else RECIPES[recipe]
    changes = [weight_delta(adapter, before) for adapter in data.adapters]
    probe = replace(fit_probe(changes, data.labels, recipe=chosen), threshold=0.0)
    same, other = probe.verdicts([weight_delta(before, before), changes[0]])
    assert (same.label, other.label) == ("inconclusive", "malicious")


def test_a_probe_of_b_alone_sees_no_change_where_only_a_moved() -> None:
    adapter = new_data().adapters[0]
    assert tiny_probe("linear", "all_b").verdicts([zeroed(adapter, "B")])[0].label == "inconclusive"
    assert tiny_probe("linear", "all_b").verdicts([zeroed(adapter, "A")])[0].label != "inconclusive"
    assert tiny_probe("linear", "all_a").verdicts([zeroed(adapter, "B")])[0].label != "inconclusive"


@pytest.mark.parametrize(
    "cuts",
    [
        *({"threshold": wrong} for wrong in (-0.1, np.nan, "0.5", True)),
        *({"benign_below": wrong} for wrong in (-0.1, np.nan, "0.5", True)),
        {"threshold": 1.1},
        {"threshold": 0.5, "benign_below": 0.6},
    ],
)
def test_cuts_outside_their_range_are_refused(cuts: dict[str, float]) -> None:
    replace(tiny_probe(), threshold=float(np.nextafter(1.0, 2.0)), benign_below=0.0)
    with pytest.raises(FitError, match="expected a number"):
        replace(tiny_probe(), **{"benign_below": None, **cuts})


@pytest.mark.parametrize("method", ["platt", "isotonic"])
@pytest.mark.parametrize("head", ["linear_paper", "linear"])
def test_calibrated_probes_keep_the_order_and_record_the_unit(head: str, method: Any) -> None:
    data, new = labelled(40, 2, signal=0.15), labelled(40, 2, seed=1, signal=0.15)
    options: dict[str, Any] = {"unit": "client update", "head_options": HEAD_OPTIONS[head]}
    plain, calibrated = (
        fitted(data, head=head, calibration=one, **options) for one in (None, method)
    )
    made = calibrated.calibration
    assert plain.calibration is None
    assert made is not None
    assert (made.unit, made.rows, made.groups) == ("client update", 80, 40)
    before = evaluate(plain, new.adapters, new.labels)
    after = evaluate(calibrated, new.adapters, new.labels)
    assert after.auroc == pytest.approx(before.auroc, abs=1e-12 if method == "platt" else 0.05)
    assert before.auroc > 0.7
    assert after.ece < 0.2


def test_base_models_are_compared() -> None:
    probe, adapter = tiny_probe(), new_data().adapters[0]
    known = probe([adapter])
    other = Adapter(adapter, kind=adapter.kind, base_model="org/other")
    with pytest.raises(BaseModelMismatch, match=r"org/other.*org/base"):
        probe([adapter, other])
    with pytest.raises(BaseModelMismatch):
        probe.verdicts([other])
    with pytest.raises(BaseModelMismatch):
        evaluate(probe, [adapter, other], [0, 1])
    assert probe([other], check_base=False) == known
    assert probe([Adapter(adapter, kind=adapter.kind)]) == known  # a state dict cannot say
    assert replace(probe, base_model=None)([other]) == known


@pytest.mark.parametrize("other", ["org/other", None])
def test_mixed_base_models_are_refused_at_fit(other: str | None) -> None:
    data = training_data()
    last = Adapter(data.adapters[-1], kind="factor_delta", base_model=other)
    with pytest.raises(BaseModelMismatch, match="several base models"):
        fit_probe([*data.adapters[:-1], last], data.labels)


@pytest.mark.parametrize("recipe", RECIPES)
def test_adapters_that_do_not_fit_are_refused(recipe: str) -> None:
    probe = tiny_probe("linear", recipe)
    nan = labelled_adapter(3)
    for pair in nan.values():
        pair.A[0, 0] = pair.B[0, 0] = np.nan
    cases: list[tuple[Any, type[LoraprobeError]]] = [
        (labelled_adapter(3, kind="weights"), KindMismatch),
        (labelled_adapter(3, kind="weight_delta"), KindMismatch),
        (labelled_adapter(3, dims={"k_proj": (10, 12)}), LayoutMismatch),
        (nan, NonFiniteError),
    ]
    if recipe != "norm_only":  # norms pooled over layers are of any rank
        cases.append((labelled_adapter(3, r=3), LayoutMismatch))
    for adapter, error in cases:
        with pytest.raises(error):
            probe([new_data().adapters[0], adapter])
        with pytest.raises(error):
            probe.verdicts([adapter])
    with pytest.raises(LayoutMismatch):
        probe([])


def test_training_data_that_cannot_be_fitted_is_refused() -> None:
    data = training_data()
    for labels in ([0] * 32, [2, *data.labels[1:]], data.labels[:-1], ["a"] * 32, [np.nan] * 32):
        with pytest.raises(FitError):
            fit_probe(data.adapters, labels)
    with pytest.raises(FitError, match="31 groups"):
        fit_probe(data.adapters, data.labels, groups=data.groups[:-1])
    for groups in ("a" * 32, dict(enumerate(data.groups)), 3):
        with pytest.raises(FitError, match="list of one group a row"):
            fit_probe(data.adapters, data.labels, groups=groups)
    features = tiny_probe().features(data.adapters).tolist()  # a list is an array too
    budget = {"threshold": "fpr:0.2", "groups": data.groups}
    assert fit_features(tiny_probe().featurizer, features, data.labels, **budget).threshold < 1
    tensors = fit_probe(data.adapters, data.labels, groups=torch.arange(32) // 4)  # equal by value
    assert tensors.facts["training"]["n_groups"] == 8
    with pytest.raises(FitError, match="linear"):
        fit_probe(data.adapters, data.labels, head="forest")
    with pytest.raises(FitError, match="both classes"):
        fit_probe(data.adapters[0], [0])
    with pytest.raises(LayoutMismatch):
        fit_probe([*data.adapters[:-1], labelled_adapter(3, r=3)], data.labels, recipe="paper")


def test_a_head_of_another_width_makes_no_probe() -> None:
    wide: Head = LinearHead(np.ones(tiny_probe().head.num_features + 1, np.float32), 0.0)
    with pytest.raises(LayoutMismatch, match="features"):
        replace(tiny_probe(), head=wide)


def test_evaluate_is_the_report_on_the_scores() -> None:
    new = new_data()
    probe = tiny_probe("linear", threshold=0.6)
    by = ["first", "second"] * 12
    found = evaluate(probe, new.adapters, new.labels, new.groups, by=by, seed=4)
    assert found.n_fitted == 0
    assert replace(found, n_fitted=None) == report(
        new.labels, probe(new.adapters), new.groups, threshold=0.6, by=by, seed=4
    )
    assert found.n_groups == 12
    assert found != evaluate(
        replace(probe, threshold=0.9), new.adapters, new.labels, new.groups, by=by, seed=4
    )
    # groups are what is resampled
    assert found.auroc_ci != evaluate(probe, new.adapters, new.labels, None, seed=4).auroc_ci
    with pytest.raises(FitError):
        evaluate(probe, new.adapters, new.labels[:-1])


@pytest.mark.parametrize("recipe", RECIPES)
def test_every_recipe_has_baselines_that_can_be_fitted(recipe: str) -> None:
    data = training_data()
    found = {
        name: fitted(data, head=head, recipe=baseline)
        for name, (baseline, head) in baseline_recipes(RECIPES[recipe]).items()
    }
    read = tiny_probe("linear", recipe).featurizer.layout.scalings
    assert list(found) == ["norm_only", "a_only", "cosine"]
    for probe in found.values():
        assert probe.featurizer.layout.scalings.keys() == read.keys()
        assert auroc(data.labels, probe(data.adapters)) > 0.9
    # what each is blind to: a flipped direction, and the B factors
    new = new_data().adapters[0]
    flipped = make.with_pairs(
        new, {name: LoRAPair(pair.A, -pair.B, pair.scaling) for name, pair in new.items()}
    )
    assert found["norm_only"]([flipped]) == pytest.approx(found["norm_only"]([new]))
    assert found["a_only"]([flipped]) == found["a_only"]([new])


class Unread:
    """Adapters that must not be looked at."""

    def __iter__(self) -> Any:
        raise AssertionError("an adapter was read before the options were checked")


@pytest.mark.parametrize(
    ("options", "error"),
    [
        *(({"threshold": one}, FitError) for one in ("fpr=0.01", "fpr:0", "high", True, 1.5)),
        *(({"benign_below": one}, FitError) for one in ("fpr:0.1", 0.9)),
        *(({"head_options": one}, FitError) for one in ({"calibratoin": 1}, {"C": "much"})),
        *(({name: -1}, FitError) for name in ("folds", "seed")),
        *(({name: "unknown"}, FitError) for name in ("head", "calibration")),
        *(({"recipe": one}, RecipeError) for one in ("all_c", 3)),
    ],
)
def test_options_are_checked_before_anything_is_read(
    options: dict[str, Any], error: type[LoraprobeError]
) -> None:
    with pytest.raises(error, match=r"got .*expected|unknown"):
        fit_probe(Unread(), [0, 1], **options)
    with pytest.raises(AssertionError, match="read before"):  # negative control
        fit_probe(Unread(), [0, 1])


def test_adapters_are_taken_by_path_and_alone(tmp_path: Path) -> None:
    data = labelled(16, 1, kind="weights")
    probe = fit_probe(data.adapters, data.labels, recipe="all_b", groups=data.groups)
    for row in (0, 1):
        save_adapter(data.adapters[row], tmp_path / str(row))
    expected = probe(data.adapters[:2])
    assert expected[0] != expected[1]
    for asked in (
        [tmp_path / "0", str(tmp_path / "1")],
        (tmp_path / "0", data.adapters[1]),
        iter(data.adapters[:2]),
    ):
        assert probe(asked) == pytest.approx(expected, abs=1e-12)
    assert probe(data.adapters[1]) == pytest.approx(expected[1:], abs=1e-12)
    assert probe(str(tmp_path / "1")) == pytest.approx(expected[1:], abs=1e-12)
    assert (probe.predict_proba(data.adapters) == probe(data.adapters)).all()
    assert probe.predict(data.adapters).tolist() == data.labels.tolist()
    assert probe.verdicts(tmp_path / "1")[0].score == pytest.approx(expected[1], abs=1e-12)
    assert evaluate(probe, [tmp_path / "0", tmp_path / "1"], [0, 1]).auroc == 1.0


@pytest.mark.parametrize("wrong", [3, None, [3], {"lora_A": 1}, b"folder", ["nowhere"]])
def test_what_is_no_adapter_is_refused_by_its_type(wrong: Any) -> None:
    with pytest.raises(AdapterFormatError, match=r"got|no file or folder"):
        tiny_probe()(wrong)


def test_every_repr_is_one_short_line() -> None:
    probe = tiny_probe()
    report_of = evaluate(probe, new_data().adapters, new_data().labels)
    for thing in (probe, probe.featurizer, new_data().adapters[0], report_of):
        assert len(repr(thing)) < 200
        assert "\n" not in repr(thing)
    assert "linear head" in repr(probe)
    assert "org/base" in repr(probe)
