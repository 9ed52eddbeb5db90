"""Evidence of attacked, undefended federations, recorded once so that ways to read it can be
compared without training anew.

    python -m paper_repro.evidence.record --workers 2

Four of ten clients train on one malicious source at one poison share, one honest client holds
refusals, five hold benign kinds; the server averages them all, so that the global LoRA drifts. Of
every client and round are kept, as the probe reads them (B of all layers): the submitted update,
every step of the shadow branch, and the cheap shadow of 8 and of 2 examples. Nothing that a table
in this folder reports as a defence's result was tuned on its own malicious source.
"""

from __future__ import annotations

import multiprocessing
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch

from fedloop.client.training import LocalTraining, in_training_order, local_steps, shadow_gradient
from fedloop.run.build import build_clients, build_federation
from fedloop.run.plan import client_seed, learning_rate
from loraprobe.adapters.adapter import Adapter
from loraprobe.adapters.layout import pack
from zoo.labelled.client_design import SHARES
from zoo.labelled.sources import MALICIOUS
from zoo.program import documented, write_arrays

from ..common.recording import averaged, read_b
from ..common.setting import federation

OUT = Path("build/federations/evidence")
MALICIOUS_CLIENTS = 4
GRADIENT_EXAMPLES = (8, 2)


def main() -> None:
    """Record every federation that is not recorded yet."""
    parser = documented(__doc__)
    parser.add_argument("--workers", type=int, default=1)
    options = parser.parse_args()
    OUT.mkdir(parents=True, exist_ok=True)
    jobs = [(source, share) for share in (1.0, 0.25, 0.1, 0.5) for source in MALICIOUS]
    if options.workers == 1:
        for job in jobs:
            record(*job)
        return
    with multiprocessing.get_context("spawn").Pool(options.workers) as pool:
        pool.starmap(record, jobs, chunksize=1)


def record(source: str, share: float) -> None:
    """One federation's evidence, to `path(source, share)`."""
    target = path(source, share)
    if target.exists():
        return
    torch.set_num_threads(1)  # one process a core
    config = federation(
        malicious=MALICIOUS_CLIENTS,
        source=source,
        share=share,
        seed=MALICIOUS.index(source) * len(SHARES) + SHARES.index(share),
        clients={
            "hard_negatives": 1,
            "hard_negative_source": str(OUT.parent / "data" / "refusal_short.jsonl"),
        },
    )
    clients, parts = build_clients(config), build_federation(config)
    model, tokenizer = parts.model_for_measuring()
    initial = start = parts.lora
    shadow = LocalTraining(
        config.training.lr,
        config.training.steps,
        config.training.batch_size,
        config.training.max_length,
    )
    evidence: dict[str, list[list[np.ndarray]]] = {
        "update": [],
        "shadow": [],
        **{f"gradient_{count}": [] for count in GRADIENT_EXAMPLES},
    }
    began = time.monotonic()
    for number in range(1, config.rounds + 1):
        training = replace(shadow, lr=learning_rate(config.training, number, config.rounds))
        rows: dict[str, list[np.ndarray]] = {name: [] for name in evidence}
        deltas = []
        for index, client in enumerate(clients):
            seed = client_seed(config.seed, number, index)
            *_, last = local_steps(model, tokenizer, client.examples, start, training, seed)
            deltas.append(pack(last.delta)[0])
            rows["update"].append(_read(last.delta))
            again = local_steps(model, tokenizer, client.examples, initial, shadow, seed)
            rows["shadow"].append(np.stack([_read(step.delta) for step in again]))
            order = in_training_order(client.examples, seed)
            for count in GRADIENT_EXAMPLES:
                rows[f"gradient_{count}"].append(
                    _read(shadow_gradient(model, tokenizer, order[:count], initial, shadow))
                )
        for name, values in rows.items():
            evidence[name].append(np.stack(values))
        start = averaged(start, deltas)
        print(f"{source} {share:.0%}: round {number}, {time.monotonic() - began:.0f} s", flush=True)
    roles = {
        "role": [client.role for client in clients],
        "source": [Path(client.source).stem for client in clients],
    }
    # (rounds, clients, [steps,] p)
    arrays = {name: np.stack(values).astype(np.float16) for name, values in evidence.items()}
    write_arrays(target, share=share, malicious=source, **roles, **arrays)


def path(source: str, share: float) -> Path:
    """Where a federation's evidence is."""
    return OUT / f"{source}-{share:g}.npz"


def _read(delta: Adapter) -> np.ndarray:
    """B of all layers, L2-normalised: what the probe's featurizer makes of it, (p,)."""
    vector = read_b(delta)
    return vector / max(float(np.linalg.norm(vector)), 1e-12)


if __name__ == "__main__":
    main()
