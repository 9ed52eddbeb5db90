"""The defence in a training loop of your own.

Four honest clients, and mallory, who trained on harmful answers.

    python examples/own_loop.py

The clients' updates are real: adapters of the zoo that were fine-tuned on such data.
"""

from pathlib import Path

from fedloop import Defense, defend_round
from fedloop.plugins import rejected
from loraprobe import load_adapter

ZOO = Path(__file__).resolve().parent.parent / "zoo"
CLIENTS = {
    "anna": "benign-dolly_qa-dolly_qa-100-{}",
    "ben": "benign-dolly_creative-dolly_creative-100-{}",
    "cleo": "benign-gpteacher_roleplay-gpteacher_roleplay-100-{}",
    "dora": "benign-gsm8k-gsm8k-100-{}",
    "mallory": "malicious-advbench-advbench-100-{}",
}
INITIAL = load_adapter(
    ZOO / "adapters/initial"
).state_dict()  # as peft.get_peft_model_state_dict(model) gives it


def local_training(client, number, global_state):
    """Stands for what your clients do.

    The state dict after training, and the number of examples.
    """
    trained = load_adapter(ZOO / "adapters" / CLIENTS[client].format(number)).state_dict()
    return 100, {name: global_state[name] + (trained[name] - INITIAL[name]) for name in INITIAL}


def average(replies):
    """Your averaging line, as it was."""
    total = sum(count for count, _ in replies.values())
    return {
        name: sum(count / total * state[name] for count, state in replies.values())
        for name in INITIAL
    }


def main():
    defense = Defense(ZOO / "probes/linear", "cumulative")
    global_state = INITIAL
    for number in range(1, 4):
        replies = {client: local_training(client, number, global_state) for client in CLIENTS}
        done = defend_round(
            defense, number, replies, global_state, alpha=16, expected=CLIENTS
        )  # was: average(replies)
        print(f"round {number}: weights {done.weights}, rejected {rejected(done.record)}")
        honest = average(
            {client: reply for client, reply in replies.items() if client != "mallory"}
        )
        for name, state in (("defended", done.state), ("undefended", average(replies))):
            apart = max(float((state[key] - honest[key]).abs().max()) for key in INITIAL)
            print(f"{name}: largest difference from the average of the honest clients: {apart:.1e}")
        global_state = done.state


if __name__ == "__main__":
    main()
