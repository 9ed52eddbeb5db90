"""The defence in OpenFedLLM: one line after the import of global_aggregate.

Four honest clients, and client 4, who is not.

    python examples/openfedllm_hook.py

OpenFedLLM cannot be installed as a package, so its call is played here by a function of the same
signature and effect. The clients' updates are real: adapters of the zoo that were fine-tuned on
such data.
"""

from pathlib import Path
from types import SimpleNamespace

from fedloop import Defense
from fedloop.plugins import rejected
from fedloop.plugins.openfedllm import defended
from loraprobe import load_adapter

ZOO = Path(__file__).resolve().parent.parent / "zoo"
CLIENTS = (
    "benign-dolly_qa-dolly_qa benign-dolly_context-dolly_context benign-gsm8k-gsm8k"
    " benign-dolly_creative-dolly_creative".split()
)
CLIENTS.append("malicious-harmbench-harmbench")


def global_aggregate(
    fed_args,
    global_dict,
    local_dict_list,
    sample_num_list,
    clients_this_round,
    round_idx,
    proxy_dict=None,
    opt_proxy_dict=None,
    auxiliary_info=None,
):
    """In your copy of OpenFedLLM: from federated_learning import global_aggregate."""
    total = sum(sample_num_list[client] for client in clients_this_round)
    for key in global_dict:  # in place, as there
        global_dict[key] = sum(
            local_dict_list[client][key] * sample_num_list[client] / total
            for client in clients_this_round
        )
    return global_dict, None


def show(record):
    print(f"round {record.round}: weights {record.weights}, rejected {rejected(record)}")


def main():
    defense = Defense(ZOO / "probes/linear", "cumulative")
    aggregate = defended(
        global_aggregate, defense, alpha=16, on_record=show
    )  # the line; alpha is script_args.peft_lora_alpha there
    fed_args, initial = (
        SimpleNamespace(fed_alg="fedavg"),
        load_adapter(ZOO / "adapters/initial").state_dict(),
    )
    global_dict = initial
    for number in range(3):
        trained = [
            load_adapter(ZOO / f"adapters/{name}-100-{number}").state_dict() for name in CLIENTS
        ]
        local_dict_list = [
            {key: global_dict[key] + (one[key] - initial[key]) for key in initial}
            for one in trained
        ]  # stands for training
        honest, _ = global_aggregate(
            fed_args, dict(global_dict), local_dict_list, [100] * 5, [0, 1, 2, 3], number
        )
        for name, call in (("undefended", global_aggregate), ("defended", aggregate)):
            after, _ = call(
                fed_args, dict(global_dict), local_dict_list, [100] * 5, [0, 1, 2, 3, 4], number
            )
            apart = max(float((after[key] - honest[key]).abs().max()) for key in initial)
            print(f"{name}: largest difference from the average of the honest clients: {apart:.1e}")
        global_dict = after


if __name__ == "__main__":
    main()
