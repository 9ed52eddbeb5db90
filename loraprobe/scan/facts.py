"""Numbers that describe one adapter, and a cohort of the same base to compare them with."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from ..adapters.adapter import Adapter
from ..adapters.layout import layer_of
from ..adapters.pair import Array, LoRAPair
from ..errors import NonFiniteError, PolicyError
from ..features import leaf_name
from ..limits import SCAN_REFERENCE, read_limited
from ..probe import Probe

MAD_TO_DEVIATION = 1.4826  # of a normal distribution
QUANTILES = (0.1, 0.5, 0.9)
FACT = "cohort"  # under this key of a probe's facts is what is usual among adapters of its base
SMALLEST_DEVIATION = 0.05  # in a cohort of near-copies every new adapter would be an outlier


@dataclass(frozen=True)
class Facts:
    """What is measured of one adapter.

    Attributes:
        modules: how many modules it changes.
        ranks: the ranks that occur.
        norm: Frobenius norm of BA over all modules.
        spectral: the largest spectral norm of a module's BA.
        stable_rank: mean over modules of (Frobenius / spectral)², over those that change.
        leaves: last parts of the module names.
        layers: number of a layer, as text -> Frobenius norm of BA over its modules.
    """

    modules: int
    ranks: tuple[int, ...]
    norm: float
    spectral: float
    stable_rank: float
    leaves: tuple[str, ...]
    layers: Mapping[str, float] = field(default_factory=dict)

    @classmethod
    def of(cls, adapter: Adapter) -> Facts:
        """Measure an adapter; one module is in memory at a time.

        Raises:
            NonFiniteError: a factor holds NaN or infinity; it names the module.
        """
        spectra = [_spectrum(module, pair) for module, pair in adapter.items()]
        squares = [float(np.square(values).sum()) for values in spectra]
        largest = [float(values.max(initial=0.0)) for values in spectra]
        stable = [total / top**2 for total, top in zip(squares, largest, strict=True) if top > 0]
        layers: dict[int, float] = {}
        for module, square in zip(adapter, squares, strict=True):
            layer = layer_of(module)
            if layer is not None:
                layers[layer] = layers.get(layer, 0.0) + square
        return cls(
            modules=len(adapter),
            ranks=tuple(sorted({pair.rank for pair in adapter.values()})),
            norm=math.sqrt(math.fsum(squares)),
            spectral=max(largest),
            stable_rank=float(np.mean(stable)) if stable else 0.0,
            leaves=tuple(sorted(set(map(leaf_name, adapter)))),
            layers={str(layer): math.sqrt(layers[layer]) for layer in sorted(layers)},
        )

    def compared(self) -> dict[str, float]:
        """The numbers that a cohort is compared in, on a scale where deviations make sense."""
        return {
            "log norm per module": math.log(max(self.norm, 1e-12) / math.sqrt(self.modules)),
            "log spectral norm": math.log(max(self.spectral, 1e-12)),
            "log stable rank": math.log(max(self.stable_rank, 1e-12)),
        }


def _spectrum(module: str, pair: LoRAPair) -> Array:
    try:
        return np.asarray(pair.svdvals(), dtype=np.float64)
    except NonFiniteError as error:
        raise NonFiniteError(f"{module}: {error}") from None


@dataclass(frozen=True)
class Reference:
    """Median and deviation of a cohort's numbers.

    Attributes:
        base_model: of all adapters of the cohort.
        size: how many adapters it was made from.
        median: number -> its median.
        deviation: number -> 1.4826 times the median absolute deviation, at least 0.05.
        layers: number of a layer, as text -> 10 %, 50 % and 90 % point of the norm of its change.
    """

    base_model: str | None
    size: int
    median: Mapping[str, float]
    deviation: Mapping[str, float]
    layers: Mapping[str, tuple[float, ...]] = field(default_factory=dict)

    @classmethod
    def fit(cls, cohort: Sequence[Facts], base_model: str | None) -> Reference:
        """Learn a reference from the facts of at least ten adapters.

        Raises:
            PolicyError: there are fewer.
        """
        if len(cohort) < 10:
            raise PolicyError(f"got {len(cohort)} adapters; expected at least 10 for a reference")
        rows = [facts.compared() for facts in cohort]
        median: dict[str, float] = {}
        deviation: dict[str, float] = {}
        for name in rows[0]:
            values = np.array([row[name] for row in rows])
            median[name] = float(np.median(values))
            spread = MAD_TO_DEVIATION * float(np.median(np.abs(values - median[name])))
            deviation[name] = max(spread, SMALLEST_DEVIATION)
        numbers = sorted({layer for facts in cohort for layer in facts.layers}, key=int)
        layers = {
            layer: tuple(
                np.quantile(
                    [facts.layers[layer] for facts in cohort if layer in facts.layers], QUANTILES
                ).tolist()
            )
            for layer in numbers
        }
        return cls(base_model, len(cohort), median, deviation, layers)

    def outliers(self, facts: Facts, limit: float) -> dict[str, float]:
        """Number -> deviations from the cohort's median, of those beyond `limit`."""
        apart = {
            name: (value - self.median[name]) / self.deviation[name]
            for name, value in facts.compared().items()
        }
        return {name: value for name, value in apart.items() if abs(value) > limit}

    def save(self, path: str | Path) -> None:
        """Write JSON."""
        Path(path).write_text(json.dumps(self.to_dict(), indent=2) + "\n", encoding="utf-8")

    @classmethod
    def load(cls, path: str | Path) -> Reference:
        """Read what `save` wrote.

        Raises:
            PolicyError: it is missing or something else.
        """
        try:
            return cls.from_dict(json.loads(read_limited(Path(path), SCAN_REFERENCE, PolicyError)))
        except (OSError, ValueError) as error:
            raise PolicyError(
                f"cannot read the reference {str(path)!r}: {error}; expected a file of"
                " --save-reference"
            ) from None

    @classmethod
    def of_probe(cls, probe: Probe) -> Reference | None:
        """The cohort that a probe states in its facts, if it does.

        Raises:
            PolicyError: it states something else.
        """
        values = probe.facts.get(FACT)
        return None if values is None else cls.from_dict(values)

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready; a probe's facts hold it under the key "cohort"."""
        return json.loads(json.dumps(asdict(self)))  # type: ignore[no-any-return]

    @classmethod
    def from_dict(cls, values: Any) -> Reference:
        """The inverse of `to_dict`; the values may be a stranger's.

        Raises:
            PolicyError: a field is missing, or not what it should be.
        """
        try:
            reference = cls(
                values["base_model"],
                int(values["size"]),
                {name: float(value) for name, value in values["median"].items()},
                {name: float(value) for name, value in values["deviation"].items()},
                {
                    str(int(layer)): tuple(float(value) for value in points)
                    for layer, points in values.get("layers", {}).items()
                },
            )
            numbers = [*reference.median.values(), *reference.deviation.values()]
            numbers += [value for points in reference.layers.values() for value in points]
            complete = reference.median.keys() == reference.deviation.keys() == set(_NAMES)
            positive = all(value > 0 for value in reference.deviation.values())
            points = all(len(row) == len(QUANTILES) for row in reference.layers.values())
            if complete and positive and points and all(map(math.isfinite, numbers)):
                return reference
        except (KeyError, TypeError, AttributeError, ValueError, OverflowError):
            pass
        raise PolicyError(
            f"got a reference that is damaged; expected finite numbers of {', '.join(_NAMES)}"
        )


_NAMES = tuple(Facts(1, (1,), 1.0, 1.0, 1.0, ()).compared())
