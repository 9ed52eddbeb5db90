"""Recipes and featurizers.

The paper's recipe, widths, misfits by name, and what a row may depend on.
"""

from __future__ import annotations

import itertools
import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from loraprobe.adapters.adapter import Adapter
from loraprobe.adapters.deltas import factor_delta, weight_delta
from loraprobe.adapters.load import load_adapter
from loraprobe.adapters.pair import LoRAPair
from loraprobe.errors import KindMismatch, LayoutMismatch, NonFiniteError, RecipeError
from loraprobe.featurizer import FeatureRecipe, Featurizer
from tests.helpers import make

NAMED = {
    name: getattr(FeatureRecipe, name)()
    for name in ("paper", "all_b", "all_a", "norm_only", "spectral")
}
BASE = make.adapter()


def adapters(kind: str, n: int = 3, **shape: Any) -> list[Adapter]:
    before = make.adapter(seed=99, **shape)
    after = [make.adapter(seed=seed, **shape) for seed in range(n)]
    if kind == "weights":
        return after
    return [
        factor_delta(a, before) if kind == "factor_delta" else weight_delta(a, before)
        for a in after
    ]


# --- the paper's recipe


def test_the_papers_recipe_is_b_of_the_first_layer_normalised() -> None:
    deltas = adapters("factor_delta", layers=3)
    x = Featurizer.fit(FeatureRecipe.paper(), deltas)(deltas)
    assert (x.dtype, x.shape) == (np.float32, (3, 10 * 4 + 6 * 4))
    for row, delta in zip(x, deltas, strict=True):
        factors = [delta[make.module(name)].B.flatten() for name in ("q_proj", "v_proj")]
        expected = np.concatenate(factors).astype(float)
        np.testing.assert_allclose(row, expected / np.linalg.norm(expected), rtol=1e-6)
        assert np.linalg.norm(row) == pytest.approx(1, abs=1e-6)


def test_the_papers_recipe_gives_the_officially_recorded_features(vectors: Path) -> None:
    recorded = np.load(vectors / "official_features.npz")
    base = load_adapter(vectors / "base.safetensors", alpha=8)
    deltas = [
        factor_delta(load_adapter(vectors / f"client_{i}.safetensors", alpha=8), base)
        for i in range(6)
    ]
    for recipe, key in (
        (FeatureRecipe.paper(), "first_B_l2"),
        (FeatureRecipe(normalize="none"), "all_layers"),
    ):
        np.testing.assert_allclose(
            Featurizer.fit(recipe, deltas)(deltas), recorded[key], rtol=0, atol=1e-6
        )


def test_first_and_last_go_by_the_number_of_the_layer() -> None:
    pairs = {make.module(layer=layer): make.pair(seed=layer) for layer in (9, 10, 2)} | {
        "lm_head": make.pair(seed=50)
    }
    adapter = Adapter(pairs)
    for layers, module in (
        ("first", make.module(layer=2)),
        ("last", make.module(layer=10)),
        ((9,), make.module(layer=9)),
    ):
        featurizer = Featurizer.fit(FeatureRecipe(layers=layers), [adapter])
        assert list(featurizer.layout.scalings) == [module]
    assert len(Featurizer.fit(FeatureRecipe(), [adapter]).layout.scalings) == 4


# --- widths

some_features = st.sampled_from(
    [
        names
        for n in range(1, 5)
        for names in itertools.permutations(("slices", "canonical", "spectra", "norms"), n)
    ]
)
some_adapters = {
    (kind, name): adapters(kind, **shape)
    for kind in ("weights", "factor_delta", "weight_delta")
    for name, shape in {
        "usual": {"layers": 3},
        "thin": {"r": 7, "dims": {"q_proj": (3, 12), "v_proj": (9, 2)}},
    }.items()
}


@given(
    which=st.sampled_from(sorted(some_adapters)),
    features=some_features,
    layers=st.sampled_from(["all", "first", "last", (1,), (0, 1)]),
    factors=st.sampled_from([("A",), ("B",), ("A", "B"), ("B", "A")]),
    modules=st.sampled_from([None, ("q_proj",), ("v_proj", "q_proj")]),
    normalize=st.sampled_from(["l2", "none"]),
    pool=st.booleans(),
)
@settings(deadline=None, max_examples=80)
def test_the_width_is_known_before_and_rows_are_finite_and_independent(
    which: tuple[str, str], **fields: Any
) -> None:
    fields["pool"] = fields["pool"] and set(fields["features"]) <= {"spectra", "norms"}
    recipe, given_adapters = FeatureRecipe(**fields), some_adapters[which]
    if which[0] == "factor_delta" and "canonical" in recipe.features:
        with pytest.raises(KindMismatch, match="use weight_delta"):
            Featurizer.fit(recipe, given_adapters)
        return
    featurizer = Featurizer.fit(recipe, given_adapters)
    x = featurizer(given_adapters)
    vector = featurizer._vector(given_adapters[0])
    assert vector.shape == (featurizer.num_features,)  # what is made, before it is put into a row
    assert (x.dtype, x.shape) == (np.float32, (3, featurizer.num_features))
    assert np.isfinite(x).all()
    assert np.array_equal(featurizer(given_adapters[::-1]), x[::-1])
    assert np.array_equal(featurizer(given_adapters[1:2]), x[1:2])
    assert not np.array_equal(x[0], x[1])  # the control: rows are of the adapters


def test_blocks_are_in_the_order_of_the_recipe_and_all_but_norms_have_length_one() -> None:
    one = [BASE]
    blocks = {
        name: Featurizer.fit(FeatureRecipe(features=(name,)), one)(one)[0]
        for name in ("slices", "canonical", "spectra", "norms")
    }
    for order in itertools.permutations(blocks, 3):
        recipe = FeatureRecipe(features=order)
        assert np.array_equal(
            Featurizer.fit(recipe, one)(one)[0], np.concatenate([blocks[name] for name in order])
        )
    assert [name for name, block in blocks.items() if abs(np.linalg.norm(block) - 1) > 1e-6] == [
        "norms"
    ]


def test_normalising_hides_the_size_of_a_change_and_norms_show_it() -> None:
    double = Adapter(
        {name: LoRAPair(pair.A, 2 * pair.B, pair.scaling) for name, pair in BASE.items()}
    )
    for recipe in (
        FeatureRecipe.paper(),
        FeatureRecipe.all_b(),
        FeatureRecipe(features=("spectra",)),
    ):
        x = Featurizer.fit(recipe, [BASE])([BASE, double])
        np.testing.assert_allclose(x[1], x[0], rtol=1e-6)
    sizes = Featurizer.fit(FeatureRecipe(features=("norms",)), [BASE])([BASE, double]).reshape(
        2, 4, 5
    )
    np.testing.assert_allclose((sizes[1] - sizes[0])[:, :3], math.log(2), rtol=1e-5)
    unscaled = Featurizer.fit(FeatureRecipe(factors=("B",), normalize="none"), [BASE])(
        [BASE, double]
    )
    np.testing.assert_allclose(unscaled[1], 2 * unscaled[0])


# --- adapters that do not fit

MISFITS: dict[str, tuple[Adapter, type[Exception], str]] = {
    "rank": (
        make.adapter(r=8),
        LayoutMismatch,
        r"model\.layers\.0\.self_attn\.q_proj: got B of shape \(10, 8\); expected \(10, 4\)",
    ),
    "first layer": (
        Adapter({m: p for m, p in make.adapter().items() if ".0." not in m}),
        LayoutMismatch,
        r"lacks 2 of 2 modules",
    ),
    "kind": (
        make.adapter(kind="factor_delta"),
        KindMismatch,
        "kind 'factor_delta'; expected 'weights'",
    ),
}


@pytest.mark.parametrize("misfit", MISFITS)
def test_an_adapter_that_does_not_fit_is_refused_and_counted_off(misfit: str) -> None:
    adapter, error, says = MISFITS[misfit]
    featurizer = Featurizer.fit(FeatureRecipe.paper(), [BASE])
    assert len(featurizer([BASE, make.adapter(seed=3)])) == 2  # the control
    with pytest.raises(error, match=says):
        featurizer([adapter])
    with pytest.raises(error, match=r"^adapter 1 of 3"):
        featurizer([BASE, adapter, BASE])
    with pytest.raises(error, match=r"^adapter 2 of 3"):
        Featurizer.fit(FeatureRecipe.paper(), [BASE, BASE, adapter])


def test_one_adapter_instead_of_several_is_refused_and_so_is_none() -> None:
    featurizer = Featurizer.fit(FeatureRecipe.paper(), [BASE])
    for wrong, says in ((BASE, r"write \[adapter\]"), ([], "no adapter at all")):
        with pytest.raises(LayoutMismatch, match=says):
            featurizer(wrong)
        with pytest.raises(LayoutMismatch, match=says):
            Featurizer.fit(FeatureRecipe.paper(), wrong)


def test_features_that_overflow_are_refused_not_returned() -> None:
    enormous = Adapter(
        {name: LoRAPair(pair.A * 1e37, pair.B * 1e37, pair.scaling) for name, pair in BASE.items()}
    )
    unscaled = Featurizer.fit(FeatureRecipe(features=("spectra",), normalize="none"), [BASE])
    with pytest.raises(NonFiniteError, match="overflow float32"):
        unscaled([enormous])
    # the control: relative ones do not
    assert np.isfinite(Featurizer.fit(FeatureRecipe.spectral(), [BASE])([enormous])).all()


# --- pooled recipes


@pytest.mark.parametrize("kind", ["weights", "factor_delta", "weight_delta"])
@pytest.mark.parametrize("name", ["spectral", "norm_only"])
def test_a_pooled_recipe_has_one_length_for_every_width_and_depth(name: str, kind: str) -> None:
    small = adapters(kind)
    large = adapters(kind, layers=5, dims={"q_proj": (40, 24), "v_proj": (9, 24)})
    featurizer = Featurizer.fit(NAMED[name], small)
    x = featurizer(small + large)
    assert x.shape == (6, featurizer.num_features)
    assert np.array_equal(Featurizer.fit(NAMED[name], large)(small + large), x)
    with pytest.raises(LayoutMismatch):  # the control: not pooled, the width matters
        Featurizer.fit(FeatureRecipe(features=("spectra",)), small)(large)


@pytest.mark.parametrize(
    ("adapter", "error", "says"),
    [
        (make.adapter(r=8), LayoutMismatch, r"got ranks \[8\]; expected \[4\]"),
        (
            make.with_pairs(make.adapter(), {make.module(): make.pair(r=5)}),
            LayoutMismatch,
            r"got ranks \[4, 5\]; expected \[4\]",
        ),
        (
            make.adapter(dims={"k_proj": (10, 12), "v_proj": (6, 12)}),
            LayoutMismatch,
            "first 'k_proj': they would go unscored",
        ),
        (make.adapter(dims={"q_proj": (10, 12)}), LayoutMismatch, r"got module names \['q_proj'\]"),
        (
            make.adapter(dims={**make.DIMS, "o_proj": (10, 10)}),
            LayoutMismatch,
            "first 'o_proj': they would go unscored",
        ),
        (
            make.adapter(kind="weight_delta"),
            KindMismatch,
            "kind 'weight_delta'; expected 'weights'",
        ),
    ],
)
def test_a_pooled_recipe_refuses_other_ranks_names_and_kinds(
    adapter: Adapter, error: type[Exception], says: str
) -> None:
    featurizer = Featurizer.fit(FeatureRecipe.spectral(), [BASE])
    with pytest.raises(error, match=says):
        featurizer([adapter])


@pytest.mark.parametrize(
    "recipe",
    [
        FeatureRecipe(features=("norms",), pool=True, layers=(1,)),
        FeatureRecipe(features=("norms",), pool=True, modules=("q_proj",)),
    ],
)
def test_an_adapter_without_what_a_pooled_recipe_reads_is_a_misfit_not_a_bad_recipe(
    recipe: FeatureRecipe,
) -> None:
    featurizer = Featurizer.fit(recipe, [BASE])
    with pytest.raises(LayoutMismatch, match=r"which the adapter does not have|no module matches"):
        featurizer([make.adapter(layers=1, dims={"v_proj": (6, 12)})])


# --- recipes


@pytest.mark.parametrize(
    ("recipe", "says"),
    [
        (
            FeatureRecipe(layers=(0, 7)),
            r"layers \[7\], which the adapter does not have; it has \[0, 1\]",
        ),
        (
            FeatureRecipe(modules=("o_proj",)),
            "no module matches layers 'all' and modules .'o_proj',.",
        ),
        (FeatureRecipe(modules=("proj",)), "no module matches"),
    ],
)
def test_a_recipe_that_matches_nothing_is_refused_at_fitting(
    recipe: FeatureRecipe, says: str
) -> None:
    with pytest.raises(RecipeError, match=says):
        Featurizer.fit(recipe, [BASE])
    with pytest.raises(RecipeError, match="no module matches layers 'first'"):
        Featurizer.fit(FeatureRecipe.paper(), [Adapter({"lm_head": make.pair()})])


recipes = [
    *NAMED.values(),
    FeatureRecipe(layers=(0, 3), modules=("q_proj",), normalize="none"),
    FeatureRecipe(features=("norms", "slices")),
]


@pytest.mark.parametrize("recipe", recipes)
def test_a_recipe_survives_json(recipe: FeatureRecipe) -> None:
    back = FeatureRecipe.from_dict(json.loads(json.dumps(recipe.to_dict())))
    assert back == recipe
    assert hash(back) == hash(recipe)  # lists became tuples again
    assert sum(back == other for other in recipes) == 1  # the control


WRONG_FIELDS: dict[str, list[Any]] = {
    "features": [[], "slices", None, {"slices": 1}, ["slices", "slices"], ["Slices"], [None]],
    "factors": [[], "B", None, 3, ["B", "B"], ["C"]],
    "layers": ["middle", [], None, 3, True, [True], [-1], [0.0], ["0"], {"0": 1}],
    "modules": ["q_proj", [], [""], [3], False],
    "normalize": ["L2", None, ["l2"]],
    "pool": ["true", 1, None],
    "unknown": [1],
}


@pytest.mark.parametrize(
    ("field", "value"), [(field, value) for field in WRONG_FIELDS for value in WRONG_FIELDS[field]]
)
def test_a_field_of_the_wrong_type_or_value_is_a_recipe_error_that_names_it(
    field: str, value: object
) -> None:
    assert FeatureRecipe.from_dict({}) == FeatureRecipe()  # the control
    with pytest.raises(RecipeError, match=field):
        FeatureRecipe.from_dict({field: value})


def test_a_recipe_is_an_object_and_pools_spectra_and_norms_only() -> None:
    for values in ([], None, "paper", ["features"]):
        with pytest.raises(RecipeError, match="expected an object"):
            FeatureRecipe.from_dict(values)
    for features in (("slices",), ("canonical",), ("spectra", "slices")):
        with pytest.raises(RecipeError, match="only spectra and norms can be pooled"):
            FeatureRecipe(features=features, pool=True)


@pytest.mark.parametrize(
    "recipe", [FeatureRecipe.paper(), FeatureRecipe.all_b(), FeatureRecipe.spectral()]
)
def test_modules_that_training_never_saw_are_refused_and_missing_unread_ones_are_not(
    recipe: FeatureRecipe,
) -> None:
    known = make.adapter(kind="factor_delta")
    featurizer = Featurizer.fit(recipe, [known])
    extra = dict(known.items())
    extra["model.layers.0.mlp.down_proj"] = next(iter(known.values()))
    with pytest.raises(LayoutMismatch, match="would go unscored"):
        featurizer([Adapter(extra, kind="factor_delta")])
    read = {module: pair for module, pair in known.items() if module in featurizer.layout.scalings}
    assert featurizer([Adapter(read, kind="factor_delta")]).tolist() == featurizer([known]).tolist()
