"""Train the clients of a design, resumably; every adapter becomes a plain PEFT folder.

A folder that is there is whole: it is written beside its place and renamed. No example is shown.
"""

from __future__ import annotations

import csv
import json
import math
import os
import random
import shutil
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from ..client.shared_prefix import Text, batch_of, exact_loss, response_loss, tokens_of, train
from ..client.training import LoRASettings, attach_lora
from ..data.examples import Example
from ..errors import DataError
from .design import BATCH, Client

MANIFEST = "manifest.csv"
TIMED_STEPS = 2  # of every set of modules, after one that warms up
Kinds = Mapping[str, Sequence[Example]]
Modules = Mapping[str, tuple[str, ...]]


def examples_of(client: Client, kinds: Kinds) -> list[Example]:
    """The client's seeded sample in training order; what runs out is shuffled anew."""
    rng = random.Random(client.seed)
    count = client.steps * BATCH
    main = max(1, round(client.share * count))
    examples = _draw(kinds[client.source], main, rng)
    if client.share < 1.0:
        examples += _draw(kinds[client.host], count - main, rng)
    rng.shuffle(examples)
    return examples


def _draw(rows: Sequence[Example], count: int, rng: random.Random) -> list[Example]:
    drawn: list[Example] = []
    while len(drawn) < count:
        drawn += rng.sample(list(rows), min(len(rows), count - len(drawn)))
    return drawn


def _settle(part: Path, folder: Path) -> None:
    """Give a whole adapter its name, unless another process was faster."""
    try:
        part.rename(folder)
    except OSError:
        if not folder.is_dir():
            raise
        shutil.rmtree(part)


def train_client(
    client: Client,
    model: Any,
    tokenizer: Any,
    kinds: Kinds,
    out: Path,
    modules: Modules,
    loss_of: Any = response_loss,
) -> list[float]:
    """Train one client and write its adapter in float16; the model is left as it was.

    Returns:
        The loss of every step.
    """
    adapted = _attached(client, model, modules)
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
                loss_of=loss_of,
            )
        if not math.isfinite(sum(losses)):
            raise DataError(
                f"client {client.name} diverged at the learning rate {client.lr}; lower the rates"
            )
        part = out / f".{client.name}.{os.getpid()}"
        adapted.save_pretrained(part)
        (part / "README.md").unlink(missing_ok=True)
        path = part / "adapter_model.safetensors"
        save_file({key: value.half() for key, value in load_file(path).items()}, path)
        _settle(part, out / client.name)
    finally:
        _detach(adapted, model)
    return losses


def _attached(client: Client, model: Any, modules: Modules) -> Any:
    lora = LoRASettings(client.rank, client.alpha, client.dropout, modules[client.modules])
    return attach_lora(model, lora, client.initial)


def _detach(adapted: Any, model: Any) -> None:
    adapted.unload()
    if hasattr(model, "peft_config"):
        del model.peft_config


def time_steps(
    clients: Iterable[Client], model: Any, tokenizer: Any, kinds: Kinds, modules: Modules
) -> tuple[dict[str, float], Any]:
    """Seconds of a training step of this model on this machine, by set of modules.

    One client of each set takes a few steps; nothing is written.

    Returns:
        The seconds, and which loss this model trains with (`exact_loss`).
    """
    text, loss_of = Text.of(tokenizer), None
    seconds: dict[str, float] = {}
    for client in sorted(clients, key=lambda client: -client.length):
        if client.modules in seconds:
            continue
        adapted = _attached(client, model, modules)
        examples = examples_of(client, kinds)[:BATCH]
        rows = [tokens_of(example, tokenizer, text, client.length) for example in examples]
        options: dict[str, Any] = {"length": client.length, "pad": tokenizer.pad_token_id}
        try:
            if loss_of is None:
                ids, labels, shared = batch_of(rows, **options)
                on = adapted.device
                loss_of = exact_loss(adapted, ids.to(on), labels.to(on), shared)
            train(adapted, [rows], lr=[client.lr], loss_of=loss_of, **options)
            began = time.perf_counter()
            train(adapted, [rows] * TIMED_STEPS, lr=[client.lr] * 2, loss_of=loss_of, **options)
            seconds[client.modules] = (time.perf_counter() - began) / TIMED_STEPS
        finally:
            _detach(adapted, model)
    return seconds, loss_of


def missing(clients: Iterable[Client], out: Path) -> list[Client]:
    """The clients that have no folder yet."""
    return [client for client in clients if not (out / client.name).exists()]


def train_missing(
    clients: Sequence[Client],
    out: Path,
    train_one: Callable[[Client], list[float]],
    say: Callable[[str], None],
    every: int = 5,
) -> None:
    """Train the clients that have no folder yet, saying now and then how long it will take.

    Args:
        train_one: trains a client and writes its folder; see `train_client`.
    """
    out.mkdir(parents=True, exist_ok=True)
    began, done = time.monotonic(), 0
    left = missing(clients, out)
    for number, client in enumerate(left, start=1):
        if (out / client.name).exists():  # another process was faster
            continue
        losses = train_one(client)
        done += client.steps
        if number % every == 0 or number == len(left):
            each = (time.monotonic() - began) / done
            rest = sum(other.steps for other in left[number:])
            say(
                f"{time.strftime('%H:%M:%S')} {number} of {len(left)} clients, "
                f"{each:.1f} s a step, last loss {losses[0]:.2f} to {losses[-1]:.2f}, "
                f"{rest * each / 60:.0f} min left"
            )


def write_manifest(clients: Sequence[Client], out: Path, base: str) -> int:
    """The manifest of the clients that are there, which then name their base; how many.

    Raises:
        DataError: none of them is there.
    """
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
