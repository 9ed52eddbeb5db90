"""What OpenFedLLM's `global_aggregate` does, in our words.

The same call, the same effects on its arguments, the same pitfalls.

Written from its behaviour (https://github.com/rui-ye/OpenFedLLM), which cannot be installed as a
package.
"""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import torch

ALGORITHMS = ("fedavg", "scaffold", "fedavgm", "fedadagrad", "fedyogi", "fedadam")
SECOND_MOMENT = {
    "fedadagrad": lambda second, square, beta: second + square,
    "fedyogi": lambda second, square, beta: (
        second - (1 - beta) * square * torch.sign(second - square)
    ),
    "fedadam": lambda second, square, beta: beta * second + (1 - beta) * square,
}


def arguments(fed_alg: str = "fedavg", num_clients: int = 6) -> SimpleNamespace:
    """OpenFedLLM's fed_args, with its defaults."""
    return SimpleNamespace(
        fed_alg=fed_alg,
        num_clients=num_clients,
        fedopt_tau=1e-3,
        fedopt_eta=1e-3,
        fedopt_beta1=0.9,
        fedopt_beta2=0.99,
    )


def memories(fed_args: Any, global_dict: dict[str, torch.Tensor]) -> dict[str, Any]:
    """The keyword arguments of a first round."""
    zeros = {key: torch.zeros_like(value) for key, value in global_dict.items()}
    variates = [
        {key: torch.zeros_like(value) for key, value in global_dict.items()}
        for _ in range(fed_args.num_clients)
    ]
    adaptive = fed_args.fed_alg in SECOND_MOMENT
    return {
        "proxy_dict": dict(zeros) if adaptive or fed_args.fed_alg == "fedavgm" else None,
        "opt_proxy_dict": (
            {key: torch.full_like(value, fed_args.fedopt_tau**2) for key, value in zeros.items()}
            if adaptive
            else None
        ),
        "auxiliary_info": (
            (dict(zeros), variates)
            if fed_args.fed_alg == "scaffold"
            else (None, [None] * fed_args.num_clients)
        ),
    }


def global_aggregate(
    fed_args: Any,
    global_dict: Any,
    local_dict_list: Any,
    sample_num_list: Any,
    clients_this_round: Any,
    round_idx: int,
    proxy_dict: Any = None,
    opt_proxy_dict: Any = None,
    auxiliary_info: Any = None,
) -> Any:
    """Writes into global_dict and the memories.

    Returns global_dict and SCAFFOLD's global variate.
    """
    total, variate = sum(sample_num_list[client] for client in clients_this_round), None
    for key in global_dict:
        old = global_dict[key]
        if fed_args.fed_alg in SECOND_MOMENT:
            change = sum(local_dict_list[client][key] - old for client in clients_this_round) / len(
                clients_this_round
            )
            fresh = round_idx == 0 or fed_args.fed_alg == "fedadagrad"
            proxy_dict[key] = (
                change
                if fresh
                else fed_args.fedopt_beta1 * proxy_dict[key] + (1 - fed_args.fedopt_beta1) * change
            )
            opt_proxy_dict[key] = SECOND_MOMENT[fed_args.fed_alg](
                opt_proxy_dict[key], proxy_dict[key] ** 2, fed_args.fedopt_beta2
            )
            # in place
            old += (
                fed_args.fedopt_eta
                * proxy_dict[key]
                / (opt_proxy_dict[key].sqrt() + fed_args.fedopt_tau)
            )
        elif fed_args.fed_alg == "fedavgm":
            change = sum(
                (local_dict_list[client][key] - old) * sample_num_list[client] / total
                for client in clients_this_round
            )
            proxy_dict[key] = (
                change
                if round_idx == 0
                else fed_args.fedopt_beta1 * proxy_dict[key] + (1 - fed_args.fedopt_beta1) * change
            )
            global_dict[key] = old + proxy_dict[key]
        else:
            global_dict[key] = sum(
                local_dict_list[client][key] * sample_num_list[client] / total
                for client in clients_this_round
            )
    if fed_args.fed_alg == "scaffold":
        variate, changes = auxiliary_info
        for key in variate:
            variate[key] += (
                sum(changes[client][key] for client in clients_this_round) / fed_args.num_clients
            )
    return global_dict, variate
