"""The defence inside other people's federated-learning code.

- `defend_round` (`.loop`): a plain function for any loop; `rejected` says of a record who counts
  nothing and why.
- `.nvflare`: an aggregator for NVIDIA FLARE.
- `.openfedllm`: a function before OpenFedLLM's `global_aggregate`.
- `.flower`: a wrapper of any Flower strategy.

All of them read what clients sent through `.replies` and ask the same `Defense`: the same updates
    give the same weights.
"""

from ..errors import missing_extra

try:
    from ..defense.explain import rejected
    from .loop import Defended, Late, defend_round
    from .replies import Reply, StateDict
except ImportError as error:
    raise missing_extra(error, __name__) from error

__all__ = ["Defended", "Late", "Reply", "StateDict", "defend_round", "rejected"]
