"""What drift does to features.

Attacked, undefended federations, each update seen from the round's global LoRA and from the fixed
initial one.

    python -m paper_repro.separability.drift --data ../shared/data  # about 10 minutes on one core;
                                                                    # goes on where it stopped

Ten clients, all in every round: four malicious ones of one source, one honest client of refusals,
five of one benign kind each. Nobody defends, so the global LoRA drifts. Of every client and round
are kept B of all layers, after every local step, as changes since the round's global LoRA (what
step- and client-level read), and the same of the shadow branch, which trains on the same batches
from the initial LoRA. In the first round the two are one and the same training.
"""

from __future__ import annotations

import time
from pathlib import Path

import numpy as np
import torch

from fedloop.client.training import (
    LocalTraining,
    attach_lora,
    load_base,
    local_steps,
    quiet,
    read_adapter,
)
from fedloop.run.plan import client_seed
from loraprobe.adapters.deltas import factor_delta
from loraprobe.adapters.layout import pack
from zoo.labelled.client_design import LORA, TRAINING, Client
from zoo.labelled.deltas import examples_of
from zoo.labelled.sources import Source, load_sources
from zoo.program import documented, write_arrays
from zoo.train_base import BASE_NAME

from ..common.held_out import UNSEEN_BENIGN, base_model
from ..common.recording import averaged, read_b
from ..common.setting import BENIGN

WORK = Path("build/separability/drift")
SOURCES = ("jailbreakbench", "harmbench", "advbench", "gptfuzz")
SHARES = (1.0, 0.25)
ROUNDS, EXAMPLES, MALICIOUS_CLIENTS, HARD_NEGATIVE = 6, 100, 4, "refusal_short"
LR = 1.5e-2  # as in the federations of README.md: few rounds show the drift that many would
# benign kinds that the probe of a federation never met, beside the malicious source and its twin
UNSEEN = UNSEEN_BENIGN


def main() -> None:
    """Record every federation that is not recorded yet."""
    parser = documented(__doc__, "data")
    options = parser.parse_args()
    torch.set_num_threads(1)
    quiet()
    sources = load_sources(options.data)
    for malicious in SOURCES:
        for share in SHARES:
            record(sources, malicious, share)


def federation(malicious: str, share: float) -> list[Client]:
    """The ten clients; the benign kinds go round, so that each honest client holds another one."""
    seed = 1000 * SOURCES.index(malicious) + 100 * SHARES.index(share)
    clients = []
    for number in range(2 * len(BENIGN)):
        host = BENIGN[number % len(BENIGN)]
        role, source, own = "benign", host, 1.0
        if number < MALICIOUS_CLIENTS:
            role, source, own = "malicious", malicious, share
        elif number == MALICIOUS_CLIENTS:
            role, source = "hard_negative", HARD_NEGATIVE
        clients.append(
            Client(
                f"{number:02d}", role, source, host if own < 1 else source, own, LR, seed + number
            )
        )
    return clients


def record(sources: dict[str, Source], malicious: str, share: float) -> None:
    """One federation's features, to `path(malicious, share)`.

    Arrays (rounds, clients, steps, p) float32.
    """
    target = path(malicious, share)
    if target.exists():
        return
    causal_lm, tokenizer = load_base(str(base_model()))
    model = attach_lora(causal_lm, LORA, seed=0)
    initial = start = read_adapter(model, BASE_NAME)
    training = LocalTraining(LR, TRAINING.steps, TRAINING.batch_size, TRAINING.max_length)
    clients = federation(malicious, share)
    data = {client.name: examples_of(client, sources, EXAMPLES) for client in clients}
    kept: dict[str, list[np.ndarray]] = {"update": [], "shadow": [], "global": []}
    began = time.monotonic()
    for number in range(1, ROUNDS + 1):
        kept["global"].append(read_b(factor_delta(start, initial)))
        updates, shadows, deltas = [], [], []
        for index, client in enumerate(clients):
            seed = client_seed(client.seed, number, index)
            steps = [
                step.delta
                for step in local_steps(model, tokenizer, data[client.name], start, training, seed)
            ]
            updates.append(np.stack([read_b(delta) for delta in steps]))
            again = local_steps(model, tokenizer, data[client.name], initial, training, seed)
            shadows.append(np.stack([read_b(step.delta) for step in again]))
            deltas.append(pack(steps[-1])[0])
        kept["update"].append(np.stack(updates))
        kept["shadow"].append(np.stack(shadows))
        start = averaged(start, deltas)
        print(
            f"{malicious} {share:.0%}: round {number}, {time.monotonic() - began:.0f} s", flush=True
        )
    arrays = {name: np.stack(rows) for name, rows in kept.items()}
    write_arrays(target, labels=[client.label for client in clients], **arrays)


def path(malicious: str, share: float) -> Path:
    """Where a federation's features are."""
    return WORK / f"{malicious}-{share:g}.npz"


def recorded_sources() -> list[str]:
    """The malicious sources whose federations are recorded at every share."""
    return [source for source in SOURCES if all(path(source, share).exists() for share in SHARES)]


if __name__ == "__main__":
    main()
