"""Numbers that describe one adapter, and a cohort of the same base to compare them with."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np

from ..adapters.adapter import Adapter
from ..errors import PolicyError

MAD_TO_DEVIATION = 1.4826  # of a normal distribution
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
    """

    modules: int
    ranks: tuple[int, ...]
    norm: float
    spectral: float
    stable_rank: float
    leaves: tuple[str, ...]

    @classmethod
    def of(cls, adapter: Adapter) -> Facts:
        """Measure an adapter; one module is in memory at a time.

        Raises:
            NonFiniteError: a factor holds NaN or infinity.
        """
        spectra = [np.asarray(pair.svdvals(), dtype=np.float64) for pair in adapter.values()]
        squares = [float(np.square(values).sum()) for values in spectra]
        largest = [float(values.max(initial=0.0)) for values in spectra]
        stable = [total / top**2 for total, top in zip(squares, largest, strict=True) if top > 0]
        return cls(
            modules=len(adapter),
            ranks=tuple(sorted({pair.rank for pair in adapter.values()})),
            norm=math.sqrt(math.fsum(squares)),
            spectral=max(largest),
            stable_rank=float(np.mean(stable)) if stable else 0.0,
            leaves=tuple(sorted({module.rpartition(".")[2] for module in adapter})),
        )

    def compared(self) -> dict[str, float]:
        """The numbers that a cohort is compared in, on a scale where deviations make sense."""
        return {
            "log norm per module": math.log(max(self.norm, 1e-12) / math.sqrt(self.modules)),
            "log spectral norm": math.log(max(self.spectral, 1e-12)),
            "log stable rank": math.log(max(self.stable_rank, 1e-12)),
        }


@dataclass(frozen=True)
class Reference:
    """Median and deviation of a cohort's numbers.

    Attributes:
        base_model: of all adapters of the cohort.
        size: how many adapters it was made from.
        median: number -> its median.
        deviation: number -> 1.4826 times the median absolute deviation, at least 0.05.
    """

    base_model: str | None
    size: int
    median: Mapping[str, float]
    deviation: Mapping[str, float]

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
        return cls(base_model, len(cohort), median, deviation)

    def outliers(self, facts: Facts, limit: float) -> dict[str, float]:
        """Number -> deviations from the cohort's median, of those beyond `limit`."""
        apart = {
            name: (value - self.median[name]) / self.deviation[name]
            for name, value in facts.compared().items()
        }
        return {name: value for name, value in apart.items() if abs(value) > limit}

    def save(self, path: str | Path) -> None:
        """Write JSON."""
        Path(path).write_text(json.dumps(asdict(self), indent=2) + "\n", encoding="utf-8")

    @classmethod
    def load(cls, path: str | Path) -> Reference:
        """Read what `save` wrote.

        Raises:
            PolicyError: it is missing or something else.
        """
        try:
            values = json.loads(Path(path).read_text(encoding="utf-8"))
            reference = cls(
                values["base_model"],
                int(values["size"]),
                {name: float(value) for name, value in values["median"].items()},
                {name: float(value) for name, value in values["deviation"].items()},
            )
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            raise PolicyError(
                f"cannot read the reference {str(path)!r}: {error!r}; expected a file of"
                " --save-reference"
            ) from None
        numbers = [*reference.median.values(), *reference.deviation.values()]
        complete = reference.median.keys() == reference.deviation.keys() == set(_NAMES)
        positive = all(value > 0 for value in reference.deviation.values())
        if not (complete and positive and all(map(math.isfinite, numbers))):
            raise PolicyError(
                f"the reference {str(path)!r} is damaged; expected finite numbers of"
                f" {', '.join(_NAMES)}"
            )
        return reference


_NAMES = tuple(Facts(1, (1,), 1.0, 1.0, 1.0, ()).compared())
