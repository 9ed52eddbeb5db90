"""Featurizer: a recipe tied to the layout seen in training."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from .adapters.adapter import Adapter, Kind, expect_adapter
from .adapters.deltas import check_is_change, incomplete
from .adapters.layout import Layout, layer_of
from .adapters.pair import Array, LoRAPair, all_finite
from .errors import KindMismatch, LayoutMismatch, LoraprobeError, NonFiniteError, RecipeError
from .features import (
    SLOT_FEATURES,
    SPECTRAL_FEATURES,
    l2_normalised,
    leaf_name,
    norms,
    pooled,
    spectra,
)
from .features.initial import InitialAdapter
from .features.invariant import Bases, Coverage, width_of
from .features.recipe import RECIPES, FeatureRecipe, named_recipe

__all__ = ["RECIPES", "FeatureRecipe", "Featurizer", "named_recipe"]


@dataclass(frozen=True)
class Featurizer:
    """A recipe and the layout of the adapters it was fitted on: adapters in, (n, p) float32 out.

    Attributes:
        layout: the matrices that are read.
        modules: every module the training adapters had, also those that are not read. An adapter
            that adapts anything else is refused: what it does there would go unscored.
        bases: the directions that product and gram are projected on; None where neither is read.
        initial: the initial adapter of training, of a recipe that reads factors; None for others,
            and where the training adapters did not say which one it was.
    """

    recipe: FeatureRecipe
    layout: Layout
    modules: frozenset[str]
    bases: Bases | None = None
    initial: InitialAdapter | None = None

    @classmethod
    def fit(cls, recipe: FeatureRecipe | str, adapters: Sequence[Adapter]) -> Featurizer:
        """Resolve the recipe, or the one of this name, against the first adapter and check every
        other one against it.

        Raises:
            RecipeError: nothing in the adapter matches the recipe.
            LayoutMismatch, KindMismatch: the adapters do not all look the same.
        """
        recipe = named_recipe(recipe)
        adapters = _sequence(adapters)
        if recipe.reads_product:
            return cls._fit_products(recipe, adapters)
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
        if not recipe.reads_factors:
            return featurizer
        return replace(featurizer, initial=InitialAdapter.learn(adapters, layout.scalings))

    @classmethod
    def _fit_products(cls, recipe: FeatureRecipe, adapters: Sequence[Adapter]) -> Featurizer:
        """Learn the bases of every module that some adapter has."""
        first: dict[str, LoRAPair] = {}
        for index, adapter in enumerate(adapters):
            with _naming(index, len(adapters)):
                for module, pair in adapter.items():
                    _same_weight(module, pair, first.setdefault(module, pair).shape)
        union = Adapter(first)
        read = _selected(recipe, union)
        bases = Bases.learn(adapters, read, recipe.k or 1, recipe.features)
        return cls(recipe, Layout.of(union, read), frozenset(union), bases)

    def __repr__(self) -> str:
        recipe = self.recipe
        return (
            f"Featurizer({'+'.join(recipe.features)} of {''.join(recipe.factors)}, layers"
            f" {recipe.layers}, {self.layout.kind}, {self.num_features} features)"
        )

    @property
    def num_features(self) -> int:
        """p, the length of a feature vector."""
        if self.recipe.reads_product:
            k = self.recipe.k or 0
            return sum(
                width_of(min(k, d_out), min(k, d_in), self.recipe.features)
                for d_out, d_in in self.weight_shapes.values()
            )
        slot_blocks = sum(name in SLOT_FEATURES for name in self.recipe.features)
        return slot_blocks * self.layout.size + sum(self._spectral_widths())

    def check(self, adapter: Adapter) -> None:
        """Raise unless the adapter fits.

        Raises:
            KindMismatch, LayoutMismatch: see `Layout.check`, or a module is adapted that was not in
                training; a pooled recipe compares only kind, module names and, of spectra, rank.
            DataError: B A of the adapter is not the change of its base (see `check_is_change`).
        """
        check_is_change(adapter)
        unknown = (
            _leaves(list(adapter)) - _leaves(list(self.modules))
            if self.recipe.pool
            else set(adapter) - self.modules
        )
        if unknown:
            raise LayoutMismatch(
                f"the adapter changes {len(unknown)} modules that the training adapters did not,"
                f" first {min(unknown)!r}: they would go unscored. Use a probe made for this kind"
                " of adapter."
            )
        if self.recipe.reads_product:
            self._check_products(adapter)
            return
        if not self.recipe.pool:
            if absent := self.absent(adapter):
                raise LayoutMismatch(incomplete(absent))
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

    def _check_products(self, adapter: Adapter) -> None:
        """Shapes of the weights alone: any rank, scaling and choice of modules will do."""
        if adapter.kind == "factor_delta" and adapter.origin is None:
            raise KindMismatch(
                "got a factor delta by itself; the change of a product B @ A needs the adapter"
                " that training started from too. Take factor_delta(after, before), or give the"
                " weights."
            )
        shapes = self.weight_shapes
        for module in adapter.keys() & shapes.keys():
            _same_weight(module, adapter[module], shapes[module])

    def kind_since(self, before: object) -> Kind:
        """What an adapter has to be made to be read, by what is known of its start.

        Args:
            before: the adapter that training started from, or its path; None or "fresh" if its B
                was zero, or nothing is known.
        """
        has_start = before is not None and before != "fresh"
        return "weight_delta" if has_start and self.recipe.reads_product else self.layout.kind

    @property
    def weight_shapes(self) -> dict[str, tuple[int, int]]:
        """Module -> (d_out, d_in), of the modules that are read as products."""
        sizes = {(slot.module, slot.factor): slot.shape for slot in self.layout.slots}
        return {
            module: (sizes[module, "B"][0], sizes[module, "A"][1])
            for module in self.layout.scalings
        }

    def absent(self, adapter: Adapter) -> list[str]:
        """Modules of the base that the adapter's configuration selects and its file lacks."""
        if (selects := adapter.selects) is None:
            return []
        return [name for name in sorted(self.modules) if name not in adapter and selects(name)]

    def check_unread(self, adapter: Adapter) -> None:
        """Look at every number of an adapter, kind "weights", that `read` does not look at.

        Raises:
            NonFiniteError: a factor holds NaN or infinity; it names the module.
        """
        adapter.check_finite(() if self.bases is None else self.bases.left)

    def __call__(self, adapters: Sequence[Adapter]) -> np.ndarray:
        """Feature vectors, one row an adapter: (n, p) float32. One adapter is in memory at a time.

        Raises:
            KindMismatch, LayoutMismatch: an adapter does not fit; the message says which one.
            NonFiniteError: an adapter holds NaN or infinity.
        """
        return self.read(adapters)[0]

    def read(self, adapters: Sequence[Adapter]) -> tuple[np.ndarray, list[Coverage]]:
        """Feature vectors, and how many of the modules that are read each adapter changes.

        Of recipes that read no product an adapter has all modules, or is refused.

        Raises:
            As `__call__`.
        """
        adapters = _sequence(adapters)
        count = len(self.layout.scalings)
        rows = np.empty((len(adapters), self.num_features), dtype=np.float32)
        coverages = [Coverage(count, count)] * len(adapters)
        for index, adapter in enumerate(adapters):
            with _naming(index, len(adapters)):
                self.check(adapter)
                if self.bases is None:
                    rows[index] = self._vector(adapter)
                else:
                    rows[index], coverages[index] = self.bases.read(adapter, self.recipe.features)
        return rows, coverages

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
        if "spectra" in self.recipe.features:  # norms alone are of any rank
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
        modules = named
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
        modules = [module for module in named if layer_of(module) in wanted]
    if not modules:
        raise RecipeError(
            f"no module matches layers {recipe.layers!r} and modules {recipe.modules!r}; the"
            f" adapter has e.g. {next(iter(adapter))!r}. Name modules that it adapts."
        )
    return modules


def _same_weight(module: str, pair: LoRAPair, expected: tuple[int, int]) -> None:
    if pair.shape != expected:
        raise LayoutMismatch(
            f"{module}: got a change of a weight of shape {pair.shape}; expected {expected}. Use a"
            " probe made for this base model."
        )


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
    for adapter in adapters:
        expect_adapter(adapter)
    return adapters


def _concatenated(rows: dict[tuple[str, str], Array]) -> Array:
    return np.concatenate(list(rows.values()))


def _leaves(modules: Sequence[str]) -> set[str]:
    return {leaf_name(module) for module in modules}
