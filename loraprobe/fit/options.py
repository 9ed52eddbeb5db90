"""The options of every head's fit: frozen, and checked when they are made."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, fields
from typing import Any, ClassVar

from ..errors import FitError, quoted


def _option(default: Any, holds: Callable[[Any], bool], expected: str) -> Any:
    """A field that is checked when its dataclass is made."""
    return field(default=default, metadata={"holds": holds, "expected": expected})


def _number(default: float, high: float = math.inf, *, reaches: tuple[float, ...] = ()) -> Any:
    """A finite number between 0 and `high`; of the bounds, those that it may reach."""

    def holds(value: Any) -> bool:
        plain = isinstance(value, int | float) and not isinstance(value, bool)
        return plain and (0 < value < high or value in reaches)

    bounds = "above 0" if math.isinf(high) else f"between 0 and {high:g}"
    return _option(default, holds, f"a number {bounds}")


def _whole(default: int) -> Any:
    """A whole number of at least 1."""
    return _option(default, _is_count, "a whole number of at least 1")


def _is_count(value: Any) -> bool:
    return type(value) is int and value >= 1


@dataclass(frozen=True)
class _Options:
    """Raises FitError when it is made of a value that no fit could use."""

    head: ClassVar[str] = ""

    def __post_init__(self) -> None:
        for option in fields(self):
            got, valid = getattr(self, option.name), option.metadata
            if not valid["holds"](got):
                raise FitError(
                    f"head {self.head!r}, option {option.name}: got {quoted(got)}; expected"
                    f" {valid['expected']}"
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
    C: float = _number(100.0)
    max_iter: int = _whole(2000)
    standardize: bool = _option(False, lambda value: isinstance(value, bool), "True or False")


@dataclass(frozen=True)
class LinearPaperOptions(_Options):
    """Of `fit_linear_paper`; every constant is the paper's.

    Source: arXiv:2601.07177, LoRA-Probe; constants of its official code.
    """

    head: ClassVar[str] = "linear_paper"
    lr: float = _number(0.01)
    weight_decay: float = _number(2.0, reaches=(0,))
    batch_size: int = _whole(256)
    max_epochs: int = _whole(100)
    patience: int = _whole(15)
    min_delta: float = _number(1e-4, reaches=(0,))
    clip: float = _number(0.5)
    val_fraction: float = _number(0.1, 1)


@dataclass(frozen=True)
class MLPOptions(_Options):
    """Of `fit_mlp`.

    Attributes:
        hidden: widths of the hidden layers.
        dropout: share of hidden units left out of a training step.
    """

    head: ClassVar[str] = "mlp"
    lr: float = _number(1e-3)
    weight_decay: float = _number(0.01, reaches=(0,))
    batch_size: int = _whole(64)
    max_epochs: int = _whole(200)
    patience: int = _whole(20)
    min_delta: float = _number(1e-4, reaches=(0,))
    clip: float = _number(1.0)
    val_fraction: float = _number(0.2, 1)
    hidden: tuple[int, ...] = _option(
        (64,),
        lambda widths: isinstance(widths, tuple | list) and all(map(_is_count, widths)),
        "a list of widths, whole numbers of at least 1",
    )
    dropout: float = _number(0.1, 1, reaches=(0,))


@dataclass(frozen=True)
class XGBoostOptions(_Options):
    """Of `fit_xgboost`, by XGBoost's own names where it has one."""

    head: ClassVar[str] = "xgboost"
    max_depth: int = _whole(3)
    eta: float = _number(0.1, 1, reaches=(1,))
    subsample: float = _number(0.8, 1, reaches=(1,))
    colsample: float = _number(0.2, 1, reaches=(1,))
    n_estimators: int = _whole(300)
    early_stopping: int = _whole(20)
    val_fraction: float = _number(0.2, 1)
    nthread: int = _whole(1)


@dataclass(frozen=True)
class CosineOptions(_Options):
    """`fit_cosine` has none."""

    head: ClassVar[str] = "cosine"


@dataclass(frozen=True)
class MassMeanOptions(_Options):
    """`fit_mass_mean` has none."""

    head: ClassVar[str] = "mass_mean"


HEAD_OPTIONS: dict[str, type[_Options]] = {
    options_type.head: options_type
    for options_type in (
        LinearOptions,
        LinearPaperOptions,
        MLPOptions,
        XGBoostOptions,
        CosineOptions,
        MassMeanOptions,
    )
}


def head_options(head: str, options: Mapping[str, Any] | None = None) -> Any:
    """The checked options of a head, its defaults where nothing is given.

    Raises:
        FitError: no such head or option, or a value of a wrong type or range.
    """
    if not isinstance(head, str) or head not in HEAD_OPTIONS:
        raise FitError(f"head: got {quoted(head)}; expected one of {', '.join(HEAD_OPTIONS)}")
    if options is not None and not isinstance(options, Mapping):
        raise FitError(
            f"options of head {head!r}: got {quoted(options)}; expected a dictionary of options"
        )
    names = {field.name for field in fields(HEAD_OPTIONS[head])}
    if unknown := sorted(map(str, set(options or ()) - names)):
        raise FitError(
            f"head {head!r}: got the unknown options {quoted(unknown)}; expected"
            f" {f'some of {sorted(names)}' if names else 'none'}"
        )
    return HEAD_OPTIONS[head](**(options or {}))
