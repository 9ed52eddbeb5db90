"""The options of every head's fit: frozen, and checked when they are made."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any, ClassVar

from ..errors import FitError, quoted


@dataclass(frozen=True)
class _Options:
    """Raises FitError when it is made of a value that no fit could use."""

    head: ClassVar[str] = ""

    def _number(self, name: str, low: float, high: float, *, closed: str = "") -> None:
        """A finite number between two bounds; `closed` names those that it may reach."""
        value = getattr(self, name)
        is_number = isinstance(value, int | float) and not isinstance(value, bool)
        inside = is_number and low <= value <= high and math.isfinite(value)
        at_bound = inside and (
            (value == low and "low" not in closed) or (value == high and "high" not in closed)
        )
        if not inside or at_bound:
            bounds = f"above {low:g}" if math.isinf(high) else f"between {low:g} and {high:g}"
            self._refuse(name, f"a number {bounds}")

    def _whole(self, name: str, value: Any, low: int = 1) -> None:
        if type(value) is not int or value < low:
            self._refuse(name, f"a whole number of at least {low}")

    def _refuse(self, name: str, expected: str) -> None:
        raise FitError(
            f"head {self.head!r}, option {name}: got {quoted(getattr(self, name))}; expected"
            f" {expected}"
        )


@dataclass(frozen=True)
class LinearOptions(_Options):
    """Of `fit_linear`.

    Attributes:
        C: inverse strength of the penalty. 100, not scikit-learn's 1: the rows are L2-normalised,
            so logits of useful size need coefficients far larger than 1.
        max_iter: iterations of the solver.
        standardize: fit on columns of mean 0 and deviation 1, and fold both into the result. For
            features of several units, such as log norms beside ranks; flattened unit vectors lose
            what their common scale says.
    """

    head: ClassVar[str] = "linear"
    C: float = 100.0
    max_iter: int = 2000
    standardize: bool = False

    def __post_init__(self) -> None:
        self._number("C", 0, math.inf)
        self._whole("max_iter", self.max_iter)
        if not isinstance(self.standardize, bool):
            self._refuse("standardize", "True or False")


@dataclass(frozen=True)
class _TorchOptions(_Options):
    """How fast and how long a head that torch trains is trained."""

    lr: float = 0.01
    weight_decay: float = 2.0
    batch_size: int = 256
    max_epochs: int = 100
    patience: int = 15
    min_delta: float = 1e-4
    clip: float = 0.5
    val_fraction: float = 0.1

    def __post_init__(self) -> None:
        for name in ("lr", "clip"):
            self._number(name, 0, math.inf)
        for name in ("weight_decay", "min_delta"):
            self._number(name, 0, math.inf, closed="low")
        for name in ("batch_size", "max_epochs", "patience"):
            self._whole(name, getattr(self, name))
        self._number("val_fraction", 0, 1)


@dataclass(frozen=True)
class LinearPaperOptions(_TorchOptions):
    """Of `fit_linear_paper`; every constant is the paper's.

    Source: arXiv:2601.07177, LoRA-Probe; constants of its official code.
    """

    head: ClassVar[str] = "linear_paper"


@dataclass(frozen=True)
class MLPOptions(_TorchOptions):
    """Of `fit_mlp`.

    Attributes:
        hidden: widths of the hidden layers.
        dropout: share of hidden units left out of a training step.
    """

    head: ClassVar[str] = "mlp"
    lr: float = 1e-3
    weight_decay: float = 0.01
    batch_size: int = 64
    max_epochs: int = 200
    patience: int = 20
    clip: float = 1.0
    val_fraction: float = 0.2
    hidden: tuple[int, ...] = (64,)
    dropout: float = 0.1

    def __post_init__(self) -> None:
        super().__post_init__()
        self._number("dropout", 0, 1, closed="low")
        if not isinstance(self.hidden, tuple | list):
            self._refuse("hidden", "a list of widths")
        for width in self.hidden:
            self._whole("hidden", width)
        object.__setattr__(self, "hidden", tuple(self.hidden))


@dataclass(frozen=True)
class XGBoostOptions(_Options):
    """Of `fit_xgboost`, by XGBoost's own names where it has one."""

    head: ClassVar[str] = "xgboost"
    max_depth: int = 3
    eta: float = 0.1
    subsample: float = 0.8
    colsample: float = 0.2
    n_estimators: int = 300
    early_stopping: int = 20
    val_fraction: float = 0.2
    nthread: int = 1

    def __post_init__(self) -> None:
        for name in ("max_depth", "n_estimators", "early_stopping", "nthread"):
            self._whole(name, getattr(self, name))
        for name in ("eta", "subsample", "colsample"):
            self._number(name, 0, 1, closed="high")
        self._number("val_fraction", 0, 1)


@dataclass(frozen=True)
class CosineOptions(_Options):
    """`fit_cosine` has none."""

    head: ClassVar[str] = "cosine"


@dataclass(frozen=True)
class MassMeanOptions(_Options):
    """`fit_mass_mean` has none."""

    head: ClassVar[str] = "mass_mean"


HEAD_OPTIONS: dict[str, type[_Options]] = {
    made.head: made
    for made in (
        LinearOptions,
        LinearPaperOptions,
        MLPOptions,
        XGBoostOptions,
        CosineOptions,
        MassMeanOptions,
    )
}


def head_options(head: str, given: Mapping[str, Any] | None = None) -> Any:
    """The checked options of a head, its defaults where nothing is given.

    Raises:
        FitError: no such head or option, or a value of a wrong type or range.
    """
    if not isinstance(head, str) or head not in HEAD_OPTIONS:
        raise FitError(f"head: got {quoted(head)}; expected one of {', '.join(HEAD_OPTIONS)}")
    if given is not None and not isinstance(given, Mapping):
        raise FitError(
            f"options of head {head!r}: got {quoted(given)}; expected a dictionary of options"
        )
    known = {field.name for field in fields(HEAD_OPTIONS[head])}
    if unknown := sorted(map(str, set(given or ()) - known)):
        raise FitError(
            f"head {head!r}: got the unknown options {quoted(unknown)}; expected"
            f" {f'some of {sorted(known)}' if known else 'none'}"
        )
    return HEAD_OPTIONS[head](**(given or {}))
