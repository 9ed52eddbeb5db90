"""loraprobe: from LoRA adapters to features and from features to P(malicious).

>>> from loraprobe import FeatureRecipe
>>> FeatureRecipe.paper().factors
('B',)
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .adapters.adapter import Adapter, Layout, factor_delta, pack, unpack, weight_delta
    from .adapters.pair import LoRAPair
    from .adapters.peft_io import load_adapter
    from .featurizer import FeatureRecipe, Featurizer
    from .metrics import EvalReport
    from .probe import Probe, Verdict, evaluate, fit_probe
    from .study.leave_out import detectors_of, leave_one_out
    from .study.report import LeaveOneOutReport

# Importing torch takes a second or more; the names are looked up when they are first used, so that
# the command line can print its help without it.
_HOMES = {
    "adapters.adapter": ("Adapter", "Layout", "factor_delta", "pack", "unpack", "weight_delta"),
    "featurizer": ("FeatureRecipe", "Featurizer"),
    "study.leave_out": ("detectors_of", "leave_one_out"),
    "study.report": ("LeaveOneOutReport",),
    "metrics": ("EvalReport",),
    "adapters.pair": ("LoRAPair",),
    "adapters.peft_io": ("load_adapter",),
    "probe": ("Probe", "Verdict", "evaluate", "fit_probe"),
}
_MODULE_OF = {name: module for module, names in _HOMES.items() for name in names}

__all__ = [
    "Adapter",
    "EvalReport",
    "FeatureRecipe",
    "Featurizer",
    "Layout",
    "LeaveOneOutReport",
    "LoRAPair",
    "Probe",
    "Verdict",
    "detectors_of",
    "evaluate",
    "factor_delta",
    "fit_probe",
    "leave_one_out",
    "load_adapter",
    "pack",
    "unpack",
    "weight_delta",
]


def __getattr__(name: str) -> Any:
    if name not in _MODULE_OF:
        raise AttributeError(f"module 'loraprobe' has no attribute {name!r}")
    return getattr(import_module(f".{_MODULE_OF[name]}", __name__), name)


def __dir__() -> list[str]:
    return __all__
