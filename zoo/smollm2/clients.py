"""Train the clients of a design on SmolLM2, resumably; every adapter becomes a plain PEFT folder.

    python -m zoo.smollm2.clients --base out/smollm2-135m-safe --out out/clients/safe --count 300
    python -m zoo.smollm2.clients ... --worker 0 --workers 2     (in two processes, one thread each)

Prints no example. An interrupted run goes on where it was; a folder that is there is whole.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch

from fedloop.client.training import load_base, quiet
from fedloop.data.examples import Example
from fedloop.kit.clients import train_client, train_missing, write_manifest
from loraprobe.errors import DataError
from zoo.program import documented
from zoo.smollm2 import sources
from zoo.smollm2.design import BASES, MODULES, Client, plan
from zoo.smollm2.rounding import ROUNDINGS

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


def load_eager(base: Path) -> tuple[Any, Any]:
    """The base model in bfloat16 on one thread, and its tokenizer."""
    quiet()
    torch.set_num_threads(1)
    model, tokenizer = load_base(str(base), dtype=torch.bfloat16, template="chat")
    model.set_attn_implementation("eager")  # faster than the fused one at these sizes
    return model, tokenizer


def run(
    clients: Sequence[Client], base: Path, kinds: Kinds, out: Path, rounding: str, every: int
) -> None:
    """Train the clients that have no folder yet."""
    model, tokenizer = load_eager(base)
    ROUNDINGS[rounding](model)
    train_missing(
        clients,
        out,
        lambda client: train_client(client, model, tokenizer, kinds, out, MODULES),
        partial(print, flush=True),
        every,
    )
    print(f"{len(clients)} clients, {sum(c.steps for c in clients)} steps: done", flush=True)


def main() -> None:
    """The command line."""
    parser = documented(__doc__, "data")
    parser.add_argument("--base", type=Path, required=True, help="of python -m zoo.bases")
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
