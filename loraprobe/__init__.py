"""loraprobe: from LoRA adapters to features and from features to P(malicious).

>>> from loraprobe import FeatureRecipe
>>> FeatureRecipe.paper().factors
('B',)
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from ._version import __version__ as __version__
    from .adapters.adapter import Adapter as Adapter
    from .adapters.deltas import factor_delta as factor_delta
    from .adapters.deltas import weight_delta as weight_delta
    from .adapters.layout import Layout as Layout
    from .adapters.layout import pack as pack
    from .adapters.layout import unpack as unpack
    from .adapters.load import load_adapter as load_adapter
    from .adapters.pair import LoRAPair as LoRAPair
    from .evaluation import EvalReport as EvalReport
    from .evaluation import evaluate as evaluate
    from .featurizer import FeatureRecipe as FeatureRecipe
    from .featurizer import Featurizer as Featurizer
    from .fit.fit import fit_probe as fit_probe
    from .probe import Probe as Probe
    from .probe import Verdict as Verdict

# Importing the numerical libraries takes a second or more; the names are looked up when they are
# first used, so that the command line can print its help without them.
_MODULE_OF = {
    "Adapter": "adapters.adapter",
    "EvalReport": "evaluation",
    "FeatureRecipe": "featurizer",
    "Featurizer": "featurizer",
    "Layout": "adapters.layout",
    "LoRAPair": "adapters.pair",
    "Probe": "probe",
    "Verdict": "probe",
    "evaluate": "evaluation",
    "factor_delta": "adapters.deltas",
    "fit_probe": "fit.fit",
    "load_adapter": "adapters.load",
    "pack": "adapters.layout",
    "unpack": "adapters.layout",
    "weight_delta": "adapters.deltas",
}

__all__ = sorted(_MODULE_OF)


def __getattr__(name: str) -> Any:
    if name == "__version__":
        return import_module("._version", __name__).__version__
    if name not in _MODULE_OF:
        raise AttributeError(f"module 'loraprobe' has no attribute {name!r}")
    return getattr(import_module(f".{_MODULE_OF[name]}", __name__), name)


def __dir__() -> list[str]:
    return __all__
