"""fedloop: federated LoRA fine-tuning whose server knows how far to trust each client.

>>> from fedloop import CumulativeLevel
>>> CumulativeLevel().cut(1)
0.8
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from loraprobe._version import __version__

if TYPE_CHECKING:
    from .config import Config
    from .defense.defense import Defense
    from .defense.levels import ClientLevel, CumulativeLevel, EvidenceLevel, ShadowLevel, StepLevel
    from .defense.types import Assessment, ClientUpdate, RoundRecord
    from .defense.weights import aggregation_weights
    from .plugins.loop import defend_round
    from .rules.attacks import ATTACKS
    from .rules.rule import AGGREGATORS, make_rule
    from .rules.server_optimizers import SERVER_OPTIMIZERS
    from .run.run import RunResult
    from .run.simulate import global_model, resume, simulate

# As in loraprobe: a name is looked up when it is first used, so that the command line answers
# quickly.
_HOMES = {
    "rules.rule": ("AGGREGATORS", "make_rule"),
    "rules.attacks": ("ATTACKS",),
    "config": ("Config",),
    "defense.defense": ("Defense",),
    "defense.levels": (
        "ClientLevel",
        "CumulativeLevel",
        "EvidenceLevel",
        "ShadowLevel",
        "StepLevel",
    ),
    "run.run": ("RunResult",),
    "run.simulate": ("global_model", "resume", "simulate"),
    "rules.server_optimizers": ("SERVER_OPTIMIZERS",),
    "defense.types": ("Assessment", "ClientUpdate", "RoundRecord"),
    "plugins.loop": ("defend_round",),
    "defense.weights": ("aggregation_weights",),
}
_MODULE_OF = {name: module for module, names in _HOMES.items() for name in names}

__all__ = [
    "AGGREGATORS",
    "ATTACKS",
    "SERVER_OPTIMIZERS",
    "Assessment",
    "ClientLevel",
    "ClientUpdate",
    "Config",
    "CumulativeLevel",
    "Defense",
    "EvidenceLevel",
    "RoundRecord",
    "RunResult",
    "ShadowLevel",
    "StepLevel",
    "__version__",
    "aggregation_weights",
    "defend_round",
    "global_model",
    "make_rule",
    "resume",
    "simulate",
]


def __getattr__(name: str) -> Any:
    if name not in _MODULE_OF:
        raise AttributeError(f"module 'fedloop' has no attribute {name!r}")
    try:
        module = import_module(f".{_MODULE_OF[name]}", __name__)
    except ModuleNotFoundError as error:
        if error.name != "torch":
            raise
        from .errors import MissingExtra

        raise MissingExtra("torch", "fed", f"fedloop.{name}") from error
    return getattr(module, name)


def __dir__() -> list[str]:
    return __all__
