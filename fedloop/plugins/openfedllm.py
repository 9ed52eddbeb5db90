"""The defence before OpenFedLLM's `global_aggregate`, in its own terms.

Clients are numbers, rounds count from 0.

    from fedloop.plugins.openfedllm import defended

    global_aggregate = defended(global_aggregate, defense, alpha=script_args.peft_lora_alpha)

or, to see what happens, `before_aggregate` in front of the call. To scale `sample_num_list` would
not be enough: the adaptive optimisers do not read it, 0 x NaN is NaN, and a round in which
everybody counts 0 makes every tensor the number 0.

Source: https://github.com/rui-ye/OpenFedLLM, federated_learning/fed_global.py.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from loraprobe.errors import AdapterFormatError, NonFiniteError

from ..defense.defense import Defense
from ..defense.types import Assessment, RoundRecord
from ..errors import ConfigError, EvidenceError
from .replies import GlobalState, LoRAOptions, Reply, StateDict, assess

EQUAL_WEIGHTS = ("fedadagrad", "fedyogi", "fedadam")  # whatever sample_num_list says
Tensors = dict[str, Tensor]


@dataclass(frozen=True)
class Kept:
    """What to aggregate of a round.

    Attributes:
        record: who was refused and why, scores, weights; keys are the clients' numbers as strings.
    """

    record: RoundRecord
    _arguments: tuple[Tensors, list[Any], list[Any], list[int]]

    @property
    def arguments(self) -> tuple[Tensors, list[Any], list[Any], list[int]]:
        """`global_dict, local_dict_list, sample_num_list, clients_this_round` for
        `global_aggregate`.

        The global dict is a copy, because `global_aggregate` writes into it.

        Raises:
            EvidenceError: the round is skipped (`record.skipped`): keep the former global dict and
                do not aggregate.
        """
        if self.record.skipped:
            raise EvidenceError(
                "this round is skipped; keep the former global_dict and do not call"
                " global_aggregate, which would zero it"
            )
        return self._arguments


def before_aggregate(
    defense: Defense,
    fed_args: Any,
    global_dict: Tensors,
    local_dict_list: Sequence[Any],
    sample_num_list: Sequence[int],
    clients_this_round: Sequence[int],
    round_idx: int,
    *,
    alpha: float,
    auxiliary_info: Any = None,
    evidence: Mapping[int, Sequence[StateDict]] | None = None,
    **lora: Any,
) -> Kept:
    """Judge a round and choose what `global_aggregate` gets to see.

    Nothing that was passed is changed.

    Rejected clients leave `clients_this_round`, the others' `sample_num_list` is their counted
    examples times their security factor. The adaptive optimisers take a plain mean of the clients
    instead: for them a client's change is scaled by its factor, in relation to the mean factor, so
    that a factor of one half counts half. Of algorithms that a fork added, those that read
    `sample_num_list` are served; to the others an accepted client is an accepted client.

    Args:
        local_dict_list: by client number, as in OpenFedLLM; None for a client that sent nothing.
        round_idx: as in OpenFedLLM; the defence counts by itself, and goes on where a script that
            was restarted starts from 0 again.
        alpha: PEFT's lora_alpha.
        auxiliary_info: what `global_aggregate` gets; a client whose SCAFFOLD control variate is
            missing, of another shape or not finite is rejected. How large it is, nobody checks.
        evidence: client number -> what a level needs beyond the update: PEFT state dicts of factor
            deltas.
        lora: further arguments of `Adapter.from_state_dict`: use_rslora, alpha_pattern,
            rank_pattern, base_model.

    Raises:
        ConfigError: SCAFFOLD without its control variates.
        AdapterFormatError, UnsupportedAdapterError, NonFiniteError: `global_dict` is not a plain,
            finite LoRA.
    """
    start = GlobalState(global_dict, LoRAOptions.of(alpha, lora))
    if fed_args.fed_alg == "scaffold" and auxiliary_info is None:
        raise ConfigError(
            "got fed_alg 'scaffold' and no auxiliary_info; expected what global_aggregate gets:"
            " control variates are checked, too"
        )
    variates = auxiliary_info[1] if fed_args.fed_alg == "scaffold" else None
    replies = []
    for client in clients_this_round:
        state = local_dict_list[client]
        if state is None:
            continue
        if variates is not None:
            state = _unless_broken(state, variates[client], global_dict)
        replies.append(
            Reply(
                str(client), sample_num_list[client], state, tuple((evidence or {}).get(client, ()))
            )
        )
    expected = [str(client) for client in clients_this_round]
    assessment = assess(defense, defense.round + 1, replies, start, expected)
    arguments = _arguments(
        assessment, start, global_dict, fed_args.fed_alg, local_dict_list, sample_num_list
    )
    return Kept(assessment.record(rule=fed_args.fed_alg), arguments)


def defended(
    global_aggregate: Callable[..., Any],
    defense: Defense,
    *,
    alpha: float,
    on_record: Callable[[RoundRecord], None] | None = None,
    **lora: Any,
) -> Callable[..., Any]:
    """OpenFedLLM's `global_aggregate`, of the same signature, behind the defence.

    A skipped round returns the former global dict.

    Args:
        alpha: PEFT's lora_alpha.
        on_record: called with every round's record.
        lora: as in `before_aggregate`.

    Raises:
        ConfigError: an option of the LoRA is unknown or not valid, or something else is no
            aggregation or no defence.
    """

    LoRAOptions.of(alpha, lora)
    if not callable(global_aggregate) or not isinstance(defense, Defense):
        raise ConfigError(
            f"got a global_aggregate of type {type(global_aggregate).__name__} and a defence of"
            f" type {type(defense).__name__}; expected OpenFedLLM's function and a Defense"
        )

    def aggregate(
        fed_args: Any,
        global_dict: Tensors,
        local_dict_list: Sequence[Any],
        sample_num_list: Sequence[int],
        clients_this_round: Sequence[int],
        round_idx: int,
        proxy_dict: Tensors | None = None,
        opt_proxy_dict: Tensors | None = None,
        auxiliary_info: Any = None,
    ) -> Any:
        with defense.undone_on_error():
            judged = before_aggregate(
                defense,
                fed_args,
                global_dict,
                local_dict_list,
                sample_num_list,
                clients_this_round,
                round_idx,
                alpha=alpha,
                auxiliary_info=auxiliary_info,
                **lora,
            )
            if on_record is not None:
                on_record(judged.record)
            if judged.record.skipped:
                return global_dict, auxiliary_info[0] if auxiliary_info else None
            others = {
                "proxy_dict": proxy_dict,
                "opt_proxy_dict": opt_proxy_dict,
                "auxiliary_info": auxiliary_info,
            }
            return global_aggregate(fed_args, *judged.arguments, round_idx, **others)

    return aggregate


def _arguments(
    assessment: Assessment,
    start: GlobalState,
    global_dict: Tensors,
    fed_alg: str,
    local_dict_list: Sequence[Any],
    sample_num_list: Sequence[int],
) -> tuple[Tensors, list[Any], list[Any], list[int]]:
    clients = sorted(map(int, assessment.accepted))
    mean = sum(assessment.factors[str(client)] for client in clients) / max(1, len(clients))
    states: list[Any] = list(local_dict_list)
    counts: list[Any] = list(sample_num_list)
    for client in clients:
        factor = assessment.factors[str(client)]
        counts[client] = assessment.num_examples[str(client)] * factor
        states[client] = start.renamed(states[client])
        if fed_alg in EQUAL_WEIGHTS and factor != mean:
            states[client] = {
                key: old + (factor / mean) * (states[client][key] - old)
                for key, old in global_dict.items()
            }
    return copy.deepcopy(dict(global_dict)), states, counts, clients


def _unless_broken(state: Any, variate: Any, like: Tensors) -> Any:
    """The client's state dict, or the error that its SCAFFOLD control variate is."""
    if not isinstance(variate, Mapping):
        return AdapterFormatError(
            f"got a control variate of type {type(variate).__name__}; expected a dict of tensors"
        )
    for key, tensor in like.items():
        if not isinstance(variate.get(key), Tensor) or variate[key].shape != tensor.shape:
            return AdapterFormatError(
                f"the control variate of {key!r} is missing or has another shape; expected"
                f" {tuple(tensor.shape)}"
            )
        if not torch.isfinite(variate[key]).all():
            return NonFiniteError(f"the control variate of {key!r} holds NaN or infinity")
    return state
