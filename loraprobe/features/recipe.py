"""FeatureRecipe: which numbers a probe computes of an adapter."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any, Literal, get_args

from ..adapters.pair import Factor
from ..errors import RecipeError, quoted
from . import FEATURES, SPECTRAL_FEATURES
from .invariant import PRODUCT_FEATURES

Normalisation = Literal["l2", "none"]
MIN_COVERAGE = 0.25  # paper_repro/initial_adapter/page.md: what a part of the modules tells


@dataclass(frozen=True)
class FeatureRecipe:
    """Which numbers make up a feature vector. Blocks are concatenated in the order of `features`.

    Attributes:
        features: any of "slices", "canonical", "spectra", "norms" (see loraprobe.features), or
            any of "product", "gram" (see loraprobe.features.invariant); the two sorts do not mix.
        layers: "all", "first" (the lowest-numbered adapted layer), "last", or layer numbers.
        factors: which of the factors A and B slices and canonical forms hold, and which factor
            deltas spectra and norms are taken of.
        modules: names of adapted modules ("q_proj"), None for all.
        normalize: "l2" divides every block but norms by its L2 norm; "none" leaves sizes in.
        pool: spectra and norms only: mean and deviation over layers instead of every layer's own
            values, which makes the recipe independent of the base model's width and depth.
        k: product and gram only: how many directions are kept a side and module.
        min_coverage: product and gram only: which share of the probe's modules an adapter has to
            change for its verdict to be more than inconclusive.

    Raises:
        RecipeError: an unknown or empty choice, or options of features that are not chosen.
    """

    features: tuple[str, ...] = ("slices",)
    layers: str | tuple[int, ...] = "all"
    factors: tuple[Factor, ...] = ("A", "B")
    modules: tuple[str, ...] | None = None
    normalize: Normalisation = "l2"
    pool: bool = False
    k: int | None = None
    min_coverage: float | None = None

    def __post_init__(self) -> None:
        for name in ("features", "factors", "modules", "layers"):
            value = getattr(self, name)
            if isinstance(value, list):
                object.__setattr__(self, name, tuple(value))
        if not isinstance(self.pool, bool):
            raise RecipeError(f"got pool {self.pool!r}; expected True or False")
        _check_names("features", self.features, (*FEATURES, *PRODUCT_FEATURES))
        _check_names("factors", self.factors, get_args(Factor))
        _check_names("normalize", (self.normalize,), get_args(Normalisation))
        if isinstance(self.layers, str):
            _check_names("layers", (self.layers,), ("all", "first", "last"))
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

        self._check_product_options()

    def _check_product_options(self) -> None:
        """Options of product and gram, and what cannot be combined with them."""
        if not self.reads_product:
            if (self.k, self.min_coverage) != (None, None):
                raise RecipeError(
                    f"got k {self.k!r} and min_coverage {self.min_coverage!r} with features"
                    f" {self.features}; expected them with {' or '.join(PRODUCT_FEATURES)}"
                )
            return
        if not set(self.features) <= set(PRODUCT_FEATURES) or self.factors != ("A", "B"):
            raise RecipeError(
                f"got features {self.features} of the factors {self.factors}; expected"
                f" {' and '.join(PRODUCT_FEATURES)} by themselves, of both factors"
            )
        if type(self.k) is not int or self.k < 1:
            raise RecipeError(f"got k {self.k!r}; expected a whole number of directions >= 1")
        share = self.min_coverage
        if isinstance(share, bool) or not isinstance(share, float | int) or not 0 <= share <= 1:
            raise RecipeError(f"got min_coverage {share!r}; expected a number from 0 to 1")

    @property
    def reads_product(self) -> bool:
        """Whether it reads the product B A and nothing else, whatever modules an adapter has."""
        return bool(set(self.features) & set(PRODUCT_FEATURES))

    @property
    def reads_factors(self) -> bool:
        """Whether it reads A or B as they are, which mean something in one initial adapter only."""
        return "slices" in self.features

    @property
    def any_modules(self) -> bool:
        """Whether adapters of several choices of modules can be read."""
        return self.pool or self.reads_product

    @classmethod
    def invariant(cls, k: int = 8, min_coverage: float = MIN_COVERAGE) -> FeatureRecipe:
        """Projected product and left Gram matrix of every module, `k` directions a side.

        Unchanged by another initial adapter, rank, alpha or factorisation; see `invariant`.
        """
        return cls(features=PRODUCT_FEATURES, k=k, min_coverage=min_coverage)

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
        """JSON-ready. Options of product and gram are left out where those are not read."""
        values = asdict(self)
        return values if self.reads_product else _without(values, "k", "min_coverage")

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
    "invariant": FeatureRecipe.invariant,
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


def _without(values: dict[str, Any], *names: str) -> dict[str, Any]:
    return {name: value for name, value in values.items() if name not in names}


def _filled(values: object) -> bool:
    """Whether it is a tuple with something in it; a bare string would be read letter by letter."""
    return isinstance(values, tuple) and bool(values)


def _check_names(field: str, values: tuple[str, ...], valid: tuple[str, ...]) -> None:
    if (
        not _filled(values)
        or any(value not in valid for value in values)
        or len(set(values)) != len(values)
    ):
        raise RecipeError(
            f"got {field} {values!r}; expected some of {', '.join(valid)}, each at most once"
        )
