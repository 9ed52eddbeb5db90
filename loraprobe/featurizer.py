"""FeatureRecipe says what to compute.

Featurizer is a recipe tied to the layout seen in training.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from typing import Any, Literal, get_args

import numpy as np

from .adapters.adapter import Adapter
from .adapters.layout import Layout, layer_of
from .adapters.pair import Array, Factor, all_finite
from .errors import (
    KindMismatch,
    LayoutMismatch,
    LoraprobeError,
    NonFiniteError,
    RecipeError,
    quoted,
)
from .features import (
    FEATURES,
    SLOT_FEATURES,
    SPECTRAL_FEATURES,
    l2_normalised,
    leaf_name,
    norms,
    pooled,
    spectra,
)

Normalisation = Literal["l2", "none"]


@dataclass(frozen=True)
class FeatureRecipe:
    """Which numbers make up a feature vector. Blocks are concatenated in the order of `features`.

    Attributes:
        features: any of "slices", "canonical", "spectra", "norms" (see loraprobe.features).
        layers: "all", "first" (the lowest-numbered adapted layer), "last", or layer numbers.
        factors: which of the factors A and B slices and canonical forms hold, and which factor
            deltas spectra and norms are taken of.
        modules: names of adapted modules ("q_proj"), None for all.
        normalize: "l2" divides every block but norms by its L2 norm; "none" leaves sizes in.
        pool: spectra and norms only: mean and deviation over layers instead of every layer's own
            values, which makes the recipe independent of the base model's width and depth.

    Raises:
        RecipeError: an unknown or empty choice, or pool with slices or canonical forms.
    """

    features: tuple[str, ...] = ("slices",)
    layers: str | tuple[int, ...] = "all"
    factors: tuple[Factor, ...] = ("A", "B")
    modules: tuple[str, ...] | None = None
    normalize: Normalisation = "l2"
    pool: bool = False

    def __post_init__(self) -> None:
        for name in ("features", "factors", "modules", "layers"):
            value = getattr(self, name)
            if isinstance(value, list):
                object.__setattr__(self, name, tuple(value))
        if not isinstance(self.pool, bool):
            raise RecipeError(f"got pool {self.pool!r}; expected True or False")
        _known("features", self.features, FEATURES)
        _known("factors", self.factors, get_args(Factor))
        _known("normalize", (self.normalize,), get_args(Normalisation))
        if isinstance(self.layers, str):
            _known("layers", (self.layers,), ("all", "first", "last"))
        elif not (
            _filled(self.layers) and all(type(layer) is int and layer >= 0 for layer in self.layers)
        ):
            raise RecipeError(
                f"got layers {self.layers!r}; expected 'all', 'first', 'last' or at least one layer"
                " number >= 0"
            )
        if self.modules is not None and not (
            _filled(self.modules) and all(isinstance(name, str) and name for name in self.modules)
        ):
            raise RecipeError(
                f"got modules {self.modules!r}; expected None or at least one module name such as"
                " 'q_proj'"
            )
        if self.pool and not set(self.features) <= set(SPECTRAL_FEATURES):
            raise RecipeError(
                f"got pool=True with features {self.features}; only"
                f" {' and '.join(SPECTRAL_FEATURES)} can be pooled over layers"
            )

    @classmethod
    def paper(cls) -> FeatureRecipe:
        """The paper's first_B: B of the first layer, flattened, L2-normalised (arXiv:2601.07177,
        Sec. 3).
        """
        return cls(layers="first", factors=("B",))

    @classmethod
    def all_b(cls) -> FeatureRecipe:
        """B of every layer, flattened, L2-normalised."""
        return cls(factors=("B",))

    @classmethod
    def all_a(cls) -> FeatureRecipe:
        """A of every layer, flattened, L2-normalised; a baseline."""
        return cls(factors=("A",))

    @classmethod
    def norm_only(cls) -> FeatureRecipe:
        """How large the change is and nothing else; a baseline."""
        return cls(features=("norms",), pool=True, normalize="none")

    @classmethod
    def spectral(cls) -> FeatureRecipe:
        """Relative spectra and log norms pooled over layers.

        Free of the base model's dimensions.
        """
        return cls(features=("spectra", "norms"), pool=True)

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready."""
        return asdict(self)

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> FeatureRecipe:
        """The inverse of `to_dict`.

        Raises:
            RecipeError: a field is unknown or has a value that is not valid.
        """
        if not isinstance(values, dict):
            raise RecipeError(
                f"got a recipe of type {type(values).__name__}; expected an object of recipe fields"
            )
        unknown = set(values) - set(cls.__dataclass_fields__)
        if unknown:
            raise RecipeError(
                f"unknown recipe fields {sorted(unknown)}; expected some of"
                f" {sorted(cls.__dataclass_fields__)}"
            )
        return cls(**values)


RECIPES: dict[str, Callable[[], FeatureRecipe]] = {
    "paper": FeatureRecipe.paper,
    "all_b": FeatureRecipe.all_b,
    "all_a": FeatureRecipe.all_a,
    "norm_only": FeatureRecipe.norm_only,
    "spectral": FeatureRecipe.spectral,
}
"""Recipes by the name that `fit_probe` and the command line take."""


def named_recipe(recipe: FeatureRecipe | str) -> FeatureRecipe:
    """A recipe by its name; one that is a recipe already as it is.

    Raises:
        RecipeError: there is none of that name.
    """
    if isinstance(recipe, FeatureRecipe):
        return recipe
    if not isinstance(recipe, str) or recipe not in RECIPES:
        raise RecipeError(
            f"got recipe {quoted(recipe)}; expected a FeatureRecipe or one of {', '.join(RECIPES)}"
        )
    return RECIPES[recipe]()


@dataclass(frozen=True)
class Featurizer:
    """A recipe and the layout of the adapters it was fitted on: adapters in, (n, p) float32 out.

    Attributes:
        layout: the matrices that are read.
        modules: every module the training adapters had, also those that are not read. An adapter
            that adapts anything else is refused: what it does there would go unscored.
    """

    recipe: FeatureRecipe
    layout: Layout
    modules: frozenset[str]

    @classmethod
    def fit(cls, recipe: FeatureRecipe, adapters: Sequence[Adapter]) -> Featurizer:
        """Resolve the recipe against the first adapter and check every other one against it.

        Raises:
            RecipeError: nothing in the adapter matches the recipe.
            LayoutMismatch, KindMismatch: the adapters do not all look the same.
        """
        adapters = _sequence(adapters)
        layout = Layout.of(adapters[0], _selected(recipe, adapters[0]), recipe.factors)
        if layout.kind == "factor_delta" and "canonical" in recipe.features:
            raise KindMismatch(
                "got factor deltas; canonical features are those of a product B @ A: use"
                " weight_delta(after, before)"
            )
        featurizer = cls(recipe, layout, frozenset(adapters[0]))
        for index, adapter in enumerate(adapters):
            with _naming(index, len(adapters)):
                featurizer.check(adapter)
        return featurizer

    def __repr__(self) -> str:
        recipe = self.recipe
        return (
            f"Featurizer({'+'.join(recipe.features)} of {''.join(recipe.factors)}, layers"
            f" {recipe.layers}, {self.layout.kind}, {self.num_features} features)"
        )

    @property
    def num_features(self) -> int:
        """p, the length of a feature vector."""
        slot_blocks = sum(name in SLOT_FEATURES for name in self.recipe.features)
        return slot_blocks * self.layout.size + sum(self._spectral_widths())

    def check(self, adapter: Adapter) -> None:
        """Raise unless the adapter fits.

        Raises:
            KindMismatch, LayoutMismatch: see `Layout.check`, or a module is adapted that was not in
                training; a pooled recipe compares only kind, module names and, of spectra, rank.
        """
        unknown = (
            _leaves(list(adapter)) - _leaves(list(self.modules))
            if self.recipe.pool
            else adapter.keys() - self.modules
        )
        if unknown:
            raise LayoutMismatch(
                f"the adapter changes {len(unknown)} modules that the training adapters did not,"
                f" first {min(unknown)!r}: they would go unscored. Use a probe made for this kind"
                " of adapter."
            )
        if not self.recipe.pool:
            self.layout.check(adapter)
            return
        if adapter.kind != self.layout.kind:
            raise KindMismatch(
                f"got an adapter of kind {adapter.kind!r}; expected {self.layout.kind!r}"
            )
        try:
            modules = _selected(self.recipe, adapter)
        except RecipeError as error:
            raise LayoutMismatch(str(error)) from None
        checks: list[tuple[str, set[Any], set[Any]]] = [
            ("module names", _leaves(modules), _leaves(list(self.layout.scalings)))
        ]
        if "spectra" in self.recipe.features:  # as many values as the rank; norms are of any
            checks.append(("ranks", {adapter[module].rank for module in modules}, {self._rank()}))
        for what, got, expected in checks:
            if got != expected:
                raise LayoutMismatch(
                    f"got {what} {sorted(got)}; expected {sorted(expected)} as in training. Use a"
                    " probe made for this kind of adapter."
                )

    def __call__(self, adapters: Sequence[Adapter]) -> np.ndarray:
        """Feature vectors, one row an adapter: (n, p) float32. One adapter is in memory at a time.

        Raises:
            KindMismatch, LayoutMismatch: an adapter does not fit; the message says which one.
            NonFiniteError: an adapter holds NaN or infinity.
        """
        adapters = _sequence(adapters)
        rows = np.empty((len(adapters), self.num_features), dtype=np.float32)
        for index, adapter in enumerate(adapters):
            with _naming(index, len(adapters)):
                self.check(adapter)
                rows[index] = self._vector(adapter)
        return rows

    def _vector(self, adapter: Adapter) -> Array:
        blocks: dict[str, Array] = {
            name: make(adapter, self.layout.slots)
            for name, make in SLOT_FEATURES.items()
            if name in self.recipe.features
        }
        if set(self.recipe.features) & set(SPECTRAL_FEATURES):
            blocks |= self._spectral_blocks(adapter)
        if self.recipe.normalize == "l2":
            blocks = {
                name: block if name == "norms" else l2_normalised(block)
                for name, block in blocks.items()
            }
        with np.errstate(over="ignore"):
            parts = [blocks[name].astype(np.float32, copy=False) for name in self.recipe.features]
        vector = parts[0] if len(parts) == 1 else np.concatenate(parts)
        if not all_finite(vector):
            raise NonFiniteError(
                "the features overflow float32: the factors or their scaling are far beyond any"
                " trained adapter. Do not use it."
            )
        return vector

    def _spectral_blocks(self, adapter: Adapter) -> dict[str, Array]:
        modules = (
            _selected(self.recipe, adapter) if self.recipe.pool else list(self.layout.scalings)
        )
        values = spectra(adapter, modules, self.recipe.factors)
        rows = {"norms": {key: norms(row) for key, row in values.items()}}
        # A matrix thinner than the rank has fewer singular values: the missing ones are zero.
        rows["spectra"] = {
            key: np.pad(row, (0, self._rank() - len(row))) for key, row in values.items()
        }
        combine = pooled if self.recipe.pool else _concatenated
        return {
            name: combine(rows[name]) for name in SPECTRAL_FEATURES if name in self.recipe.features
        }

    def _spectral_widths(self) -> list[int]:
        matrices = len(self.recipe.factors) if self.layout.kind == "factor_delta" else 1
        modules = list(self.layout.scalings)
        copies = 2 * len(_leaves(modules)) if self.recipe.pool else len(modules)
        widths = {"spectra": self._rank(), "norms": 5}
        return [widths[name] * matrices * copies for name in self.recipe.features if name in widths]

    def _rank(self) -> int:
        return max(
            slot.shape[0] if slot.factor == "A" else slot.shape[1] for slot in self.layout.slots
        )


def _selected(recipe: FeatureRecipe, adapter: Adapter) -> list[str]:
    """The modules of an adapter that a recipe reads, in sorted order."""
    named = [
        module
        for module in adapter
        if recipe.modules is None or leaf_name(module) in recipe.modules
    ]
    layers = {layer for module in named if (layer := layer_of(module)) is not None}
    if recipe.layers == "all":
        chosen = named
    else:
        wanted = (
            {min(layers, default=-1)} if recipe.layers == "first" else {max(layers, default=-1)}
        )
        if not isinstance(recipe.layers, str):
            wanted = set(recipe.layers)
            if absent := sorted(wanted - layers):
                raise RecipeError(
                    f"the recipe reads layers {absent}, which the adapter does not have; it has"
                    f" {sorted(layers)}"
                )
        chosen = [module for module in named if layer_of(module) in wanted]
    if not chosen:
        raise RecipeError(
            f"no module matches layers {recipe.layers!r} and modules {recipe.modules!r}; the"
            f" adapter has e.g. {next(iter(adapter))!r}. Name modules that it adapts."
        )
    return chosen


@contextmanager
def _naming(index: int, count: int) -> Iterator[None]:
    """Says in an error which of several adapters it is about."""
    try:
        yield
    except LoraprobeError as error:
        if count == 1:
            raise
        raise type(error)(f"adapter {index} of {count} (from 0): {error}") from None


def _sequence(adapters: Sequence[Adapter]) -> Sequence[Adapter]:
    if isinstance(adapters, Adapter):
        raise LayoutMismatch("got one Adapter; expected a sequence of adapters: write [adapter]")
    adapters = list(adapters)
    if not adapters:
        raise LayoutMismatch("got no adapter at all; expected at least one")
    return adapters


def _concatenated(rows: dict[tuple[str, str], Array]) -> Array:
    return np.concatenate(list(rows.values()))


def _leaves(modules: Sequence[str]) -> set[str]:
    return {leaf_name(module) for module in modules}


def _filled(values: object) -> bool:
    """Whether it is a tuple with something in it; a bare string would be read letter by letter."""
    return isinstance(values, tuple) and bool(values)


def _known(field: str, values: tuple[str, ...], valid: tuple[str, ...]) -> None:
    if (
        not _filled(values)
        or any(value not in valid for value in values)
        or len(set(values)) != len(values)
    ):
        raise RecipeError(
            f"got {field} {values!r}; expected some of {', '.join(valid)}, each at most once"
        )
