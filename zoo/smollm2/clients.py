"""Train the clients of a design on SmolLM2, resumably; every adapter becomes a plain PEFT folder.

    python -m zoo.smollm2.clients --base out/smollm2-135m-safe --out out/clients/safe --count 300
    python -m zoo.smollm2.clients ... --worker 0 --workers 2     (in two processes, one thread each)

Prints no example. An interrupted run goes on where it was; a folder that is there is whole.
"""

from __future__ import annotations

import argparse
import csv
import json
import os
import random
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from fedloop.client.training import LoRASettings, attach_lora, load_base, quiet
from fedloop.data.examples import Example
from loraprobe.errors import DataError
from zoo.smollm2 import sources
from zoo.smollm2.design import BASES, BATCH, MODULES, Client, plan
from zoo.smollm2.rounding import ROUNDINGS
from zoo.smollm2.training import Text, tokens_of, train

MANIFEST = "manifest.csv"
Kinds = dict[str, list[Example]]


def load_kinds(data: Path) -> tuple[Kinds, list[str], list[str], list[str]]:
    """Every kind's examples, and the names of the benign, hard and malicious ones."""
    groups = [
        sources.benign_kinds(data),
        sources.hard_negatives(data),
        sources.malicious_sources(data),
    ]
    merged = {name: rows for group in groups for name, rows in group.items()}
    if len(merged) != sum(map(len, groups)):
        raise DataError("got one name for two kinds of data; expected names that differ")
    benign, hard, malicious = (list(group) for group in groups)
    return merged, benign, hard, malicious


def examples_of(client: Client, kinds: Kinds) -> list[Example]:
    """The client's seeded sample in training order; what runs out is shuffled anew."""
    rng = random.Random(client.seed)
    count = client.steps * BATCH
    main = max(1, round(client.share * count))
    chosen = _draw(kinds[client.source], main, rng)
    if client.share < 1.0:
        chosen += _draw(kinds[client.host], count - main, rng)
    rng.shuffle(chosen)
    return chosen


def _draw(rows: Sequence[Example], count: int, rng: random.Random) -> list[Example]:
    drawn: list[Example] = []
    while len(drawn) < count:
        drawn += rng.sample(list(rows), min(len(rows), count - len(drawn)))
    return drawn


def train_client(
    client: Client, model: Any, tokenizer: Any, kinds: Kinds, out: Path
) -> list[float]:
    """Train one client and write its adapter; the model is left as it was."""
    lora = LoRASettings(client.rank, client.alpha, client.dropout, MODULES[client.modules])
    adapted = attach_lora(model, lora, client.initial)
    text = Text.of(tokenizer)
    rows = [tokens_of(e, tokenizer, text, client.length) for e in examples_of(client, kinds)]
    steps = [rows[at : at + BATCH] for at in range(0, len(rows), BATCH)]
    try:
        with torch.random.fork_rng():
            torch.manual_seed(client.seed)
            losses, _ = train(
                adapted,
                steps,
                length=client.length,
                pad=tokenizer.pad_token_id,
                lr=[client.lr] * len(steps),
            )
        part = out / f".{client.name}.{os.getpid()}"
        adapted.save_pretrained(part)
        (part / "README.md").unlink(missing_ok=True)
        path = part / "adapter_model.safetensors"
        save_file({key: value.half() for key, value in load_file(path).items()}, path)
        part.rename(out / client.name)
    finally:
        adapted.unload()
        if hasattr(model, "peft_config"):
            del model.peft_config
    return losses


def run(
    clients: Sequence[Client], base: Path, kinds: Kinds, out: Path, rounding: str, every: int
) -> None:
    """Train the clients that have no folder yet."""
    quiet()
    torch.set_num_threads(1)
    model, tokenizer = load_base(str(base), dtype=torch.bfloat16, template="chat")
    model.set_attn_implementation("eager")  # faster than the fused one at these sizes
    ROUNDINGS[rounding](model)
    out.mkdir(parents=True, exist_ok=True)
    began, done = time.monotonic(), 0
    total = sum(client.steps for client in clients)
    left = [client for client in clients if not (out / client.name).exists()]
    for number, client in enumerate(left, start=1):
        if (out / client.name).exists():  # another process was faster
            continue
        losses = train_client(client, model, tokenizer, kinds, out)
        done += client.steps
        if number % every == 0 or number == len(left):
            each = (time.monotonic() - began) / done
            rest = sum(other.steps for other in left[number:])
            print(
                f"{time.strftime('%H:%M:%S')} {number} of {len(left)} clients, "
                f"{each:.1f} s a step, last loss {losses[0]:.2f} to {losses[-1]:.2f}, "
                f"{rest * each / 60:.0f} min left",
                flush=True,
            )
    print(f"{len(left)} clients, {total} steps: done", flush=True)


def write_manifest(clients: Sequence[Client], out: Path, base: str) -> int:
    """The manifest of the clients that are there, which then name their base; how many."""
    rows = [{**c.to_row(), "base": base} for c in clients if (out / c.name).is_dir()]
    if not rows:
        raise DataError(f"{out} holds none of the {len(clients)} clients; train them first")
    for row in rows:
        path = out / row["path"] / "adapter_config.json"
        config = json.loads(path.read_text(encoding="utf-8"))
        config["base_model_name_or_path"] = base
        path.write_text(json.dumps(config, indent=2, sort_keys=True) + "\n", encoding="utf-8")
    with (out / MANIFEST).open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)
    return len(rows)


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--base", type=Path, required=True, help="of python -m zoo.bases")
    parser.add_argument("--data", type=Path, default=Path("../shared/data"))
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--count", type=int, default=300)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--small", action="store_true", help="ranks 1 and 2, to be committed")
    parser.add_argument("--rounding", choices=sorted(ROUNDINGS), default="none")
    parser.add_argument("--worker", type=int, default=0)
    parser.add_argument("--workers", type=int, default=1)
    parser.add_argument("--manifest", choices=sorted(BASES), help="write it, train nothing")
    options = parser.parse_args()
    kinds, benign, hard, malicious = load_kinds(options.data)
    clients = plan(options.count, benign, hard, malicious, seed=options.seed, small=options.small)
    if options.manifest:
        print(
            write_manifest(clients, options.out, BASES[options.manifest]), "clients in the manifest"
        )
        return
    mine = clients[options.worker :: options.workers]
    run(mine, options.base, kinds, options.out, options.rounding, every=5)


if __name__ == "__main__":
    main()
