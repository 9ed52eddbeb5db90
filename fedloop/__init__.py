"""fedloop: federated LoRA fine-tuning whose server knows how far to trust each client.

>>> from fedloop import CumulativeLevel
>>> CumulativeLevel().cut(1)
0.8
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from loraprobe._version import __version__ as __version__

if TYPE_CHECKING:
    from .config import Config as Config
    from .defense.defense import Defense as Defense
    from .defense.levels import ClientLevel as ClientLevel
    from .defense.levels import CumulativeLevel as CumulativeLevel
    from .defense.levels import EvidenceLevel as EvidenceLevel
    from .defense.levels import ShadowLevel as ShadowLevel
    from .defense.levels import StepLevel as StepLevel
    from .defense.types import Assessment as Assessment
    from .defense.types import ClientUpdate as ClientUpdate
    from .defense.types import RoundRecord as RoundRecord
    from .defense.weights import aggregation_weights as aggregation_weights
    from .plugins.loop import defend_round as defend_round
    from .rules.attacks import ATTACKS as ATTACKS
    from .rules.rule import AGGREGATORS as AGGREGATORS
    from .rules.rule import make_rule as make_rule
    from .rules.server_optimizers import SERVER_OPTIMIZERS as SERVER_OPTIMIZERS
    from .run.run import RunResult as RunResult
    from .run.simulate import global_model as global_model
    from .run.simulate import resume as resume
    from .run.simulate import simulate as simulate

# As in loraprobe: a name is looked up when it is first used, so that the command line answers
# quickly.
_HOMES = {
    "rules.rule": ("AGGREGATORS", "make_rule"),
    "rules.attacks": ("ATTACKS",),
    "config": ("Config",),
    "defense.defense": ("Defense",),
    "defense.cumulative": ("CumulativeLevel",),
    "defense.paper_levels": ("ClientLevel", "EvidenceLevel", "ShadowLevel", "StepLevel"),
    "run.run": ("RunResult",),
    "run.simulate": ("global_model", "resume", "simulate"),
    "rules.server_optimizers": ("SERVER_OPTIMIZERS",),
    "defense.types": ("Assessment", "ClientUpdate", "RoundRecord"),
    "plugins.loop": ("defend_round",),
    "defense.weights": ("aggregation_weights",),
}
_MODULE_OF = {name: module for module, names in _HOMES.items() for name in names}

__all__ = sorted((*_MODULE_OF, "__version__"))


def __getattr__(name: str) -> Any:
    if name not in _MODULE_OF:
        raise AttributeError(f"module 'fedloop' has no attribute {name!r}")
    try:
        module = import_module(f".{_MODULE_OF[name]}", __name__)
    except ImportError as error:
        from .errors import missing_extra

        raise missing_extra(error, f"fedloop.{name}") from error
    return getattr(module, name)


def __dir__() -> list[str]:
    return __all__
