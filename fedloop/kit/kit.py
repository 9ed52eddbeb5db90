"""From a base model and labelled data to a probe with its card and record.

Everything expensive is kept in the folder: the same call goes on after an interruption.
"""

from __future__ import annotations

import json
import shlex
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from loraprobe._version import __version__
from loraprobe.adapters.adapter import Adapter
from loraprobe.adapters.load import load_adapter
from loraprobe.featurizer import FeatureRecipe, Featurizer
from loraprobe.fit.fit import fit_features
from loraprobe.outputs import free_path
from loraprobe.probe import Probe

from ..client.shared_prefix import Text
from ..client.training import load_base, quiet
from ..errors import ConfigError
from .base import best_dtype, module_sets
from .card import facts
from .clients import MANIFEST, missing, time_steps, train_client, train_missing, write_manifest
from .design import Client
from .features import coordinates, grams
from .folds import Fold, Table, in_distribution, pairs
from .measures import BUDGET, Row, counts, one_head
from .options import HEADS, KEPT, KitOptions, check_folder, check_plan, read_kinds
from .rounds import facts_for_rounds

Say = Callable[[str], None]
PROTOCOLS = {
    "in_distribution": "out of fold by adapter",
    "unseen": "malicious source and benign kinds unseen",
    "everything": "malicious source, benign kinds and initial adapter unseen",
}


@dataclass(frozen=True)
class Trainer:
    """A base model on this machine, and how long its steps take."""

    model: Any
    tokenizer: Any
    kinds: Any
    modules: dict[str, tuple[str, ...]]
    clients: list[Client]
    seconds: dict[str, float]
    loss_of: Any

    @classmethod
    def measured(cls, options: KitOptions, clients: Sequence[Client], kinds: Any) -> Trainer:
        """Load the base and time a few steps of it.

        Args:
            clients: whose `length` is the room beside the template.

        Raises:
            DataError, MissingExtra: the base cannot be loaded, or has no modules for a LoRA.
        """
        quiet()
        model, tokenizer = load_base(
            options.path, dtype=best_dtype(), revision=options.revision, template=options.template
        )
        model.set_attn_implementation("eager")  # faster than the fused one at these lengths
        text = Text.of(tokenizer)
        template = len(text.before) + len(text.after)
        longer = [replace(client, length=client.length + template) for client in clients]
        modules = module_sets(model)
        seconds, loss_of = time_steps(longer, model, tokenizer, kinds, modules)
        return cls(model, tokenizer, kinds, modules, longer, seconds, loss_of)

    @property
    def expected(self) -> float:
        """Seconds that training will take."""
        return sum(client.steps * self.seconds[client.modules] for client in self.clients)

    def budget(self, done: int) -> str:
        """What is to be done and how long it takes, in a few lines."""
        steps = sum(client.steps for client in self.clients)
        each = ", ".join(
            f"{name} ({', '.join(self.modules[name])}) {seconds:.2g} s"
            for name, seconds in self.seconds.items()
        )
        there = f" ({done} are there)" if done else ""
        return (
            f"{len(self.clients)} clients to train{there}, {steps} steps of 8 examples\n"
            f"a step here, {str(self.model.dtype).removeprefix('torch.')} on"
            f" {self.model.device.type}: {each}\n"
            f"expected: {duration(self.expected)} of training, then minutes of studies"
        )

    def train(self, out: Path, say: Say) -> None:
        """Train what is missing."""
        train_missing(
            self.clients,
            out,
            lambda client: train_client(
                client, self.model, self.tokenizer, self.kinds, out, self.modules, self.loss_of
            ),
            say,
        )


def make_kit(
    options: KitOptions,
    say: Say = print,
    agree: Callable[[], bool] = lambda: True,
    *,
    dry_run: bool = False,
    command: str = "",
) -> Path | None:
    """Train, study, fit; the probe's folder, or None where it went no further than the budget.

    Args:
        agree: asked once the expected time has been said.
        dry_run: say it and stop; nothing is written.
        command: for the record.

    Raises:
        ConfigError, DataError, MissingExtra: it cannot work; nothing was trained then, but for data
            or rates at which training diverges.
        LoraprobeError: the probe cannot be fitted on what was trained.
    """
    clients = check_plan(options)
    kinds = read_kinds(options)
    began_with = check_folder(options, kinds)
    if not dry_run:
        free_path(options.out, force=True)  # it can be written to
    _warn(clients, say)
    adapters = options.out / "adapters"
    left = missing(clients, adapters)
    spent = 0.0
    if left:
        with _enough_memory():
            trainer = Trainer.measured(options, left, kinds)
        say(trainer.budget(len(clients) - len(left)))
    if dry_run or (left and not agree()):
        return None
    if left:
        options.out.mkdir(parents=True, exist_ok=True)
        _write(options.out / KEPT, began_with)
        began = time.monotonic()
        with _enough_memory():
            trainer.train(adapters, say)
        spent = time.monotonic() - began
        say(f"trained in {duration(spent)}; {duration(trainer.expected)} were expected")
        del trainer
    write_manifest(clients, adapters, options.name)
    return _finish(options, say, command, spent)


@contextmanager
def _enough_memory() -> Iterator[None]:
    """An accelerator's memory that is too small is an error with what to do.

    Raises:
        ConfigError: the model and a training step do not fit.
    """
    try:
        yield
    except torch.OutOfMemoryError as error:
        raise ConfigError(
            f"the model and a training step do not fit this GPU: {str(error).splitlines()[0]}"
            " Give a smaller --room, or a machine with more memory; what is trained is kept"
        ) from None


def _warn(clients: Sequence[Client], say: Say) -> None:
    benign = sum(client.label == 0 for client in clients)
    if budget_for(benign) > BUDGET:
        say(
            f"with {benign} benign clients a cut can promise no less than"
            f" {budget_for(benign):.0%} of false positives; {BUDGET:.0%} needs 50"
        )


def budget_for(benign: int) -> float:
    """The share of false positives that a cut from this many benign adapters can carry."""
    return max(BUDGET, 1.01 / (benign + 1))


def _finish(options: KitOptions, say: Say, command: str, spent: float) -> Path:
    """Studies, probe, card and record of the clients that are there."""
    say("studying what leaving data out of training does, then fitting")
    table = Table.read(options.out / "adapters" / MANIFEST)
    adapters = [load_adapter(path) for path in table.path]
    began = time.monotonic()
    record: Row = {
        "command": command or f"fedloop probe-kit {shlex.quote(options.base)} ...",
        "version": __version__,
        "base_model": options.name,
        "head": options.head,
        "adapters": counts(table),
        "seconds_of_this_training": round(spent, 1),
        **studies(table, adapters),
    }
    featurizer = Featurizer.fit(FeatureRecipe.invariant(k=8), adapters)
    probe = fit(options, table, featurizer, featurizer(adapters), record)
    folder = probe.save_pretrained(options.out / "probe")
    record["threshold"] = probe.threshold
    record["seconds_of_studies_and_fit"] = round(time.monotonic() - began, 1)
    _write(options.out / "record.json", record)
    for line in summary_lines(options, record):
        say(line)
    return folder


def studies(table: Table, adapters: Sequence[Adapter]) -> Row:
    """Protocol -> head -> summary and cells, by `PROTOCOLS`.

    The bases of the features are learnt on each fold's training adapters alone.

    Raises:
        ConfigError: no fold has both classes to train on and to test.
    """
    folds = {
        "in_distribution": _usable(table, in_distribution(table)),
        "unseen": _usable(table, pairs(table)),
        "everything": _usable(table, pairs(table, initials=2)),
    }
    if not folds["unseen"]:
        raise ConfigError(
            f"got {len(table)} adapters; without a malicious source and some benign kinds too few"
            " are left to fit and test a probe. Raise --clients"
        )
    masks = [fold.train for group in folds.values() for fold in group]
    products = grams(adapters, masks)
    features = {mask.tobytes(): coordinates(x) for mask, x in zip(masks, products, strict=True)}
    return {
        name: {
            head: one_head(
                table,
                group,
                lambda train: features[train.tobytes()],
                head,
                cut=name != "in_distribution",
                by_source=name == "unseen",
            )
            for head in HEADS
        }
        for name, group in folds.items()
    }


def _usable(table: Table, folds: Any) -> list[Fold]:
    """The folds with both classes on both sides."""
    return [
        fold
        for fold in folds
        if all(len(set(table.label[mask].tolist())) == 2 for mask in (fold.train, fold.test))
    ]


def fit(
    options: KitOptions, table: Table, featurizer: Featurizer, features: np.ndarray, record: Row
) -> Probe:
    """The probe, its cut from kinds of data that were left out of its fit.

    Raises:
        LoraprobeError: the head cannot be fitted.
    """
    cumulative = facts_for_rounds(options.head, features, table, np.ones(len(table), bool))
    return fit_features(
        featurizer,
        features,
        table.label,
        head=options.head,
        groups=[path.name for path in table.path],
        threshold=f"fpr:{budget_for(int((table.label == 0).sum())):.4f}",
        kinds=table.kinds,
        base_model=options.name,
        facts=facts(options, record, PROTOCOLS) | {"cumulative": cumulative},
    )


def summary_lines(options: KitOptions, record: Row) -> list[str]:
    """What a kit says at its end."""
    lines = [f"adapters of {options.name}: {record['adapters']['n']}"]
    for name, protocol in PROTOCOLS.items():
        for head in HEADS:
            full = record[name][head]["summary"].get("1", {}).get("auroc_all")
            if full:
                lines.append(
                    f"{protocol}, full poison, {head}: AUROC {full['mean']:.2f}, worst of"
                    f" {full['cells']} cells {full['worst']:.2f}"
                )
    probe = options.out / "probe"
    lines += [
        f"the probe ({options.head}), its card and figure: {probe}",
        f"every cell: {options.out / 'record.json'}",
        f"score:   loraprobe score ADAPTER --probe {probe}",
        f"publish: loraprobe push {probe} ORG/NAME",
    ]
    return lines


def duration(seconds: float) -> str:
    """A time as people say it."""
    if seconds < 100:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 6000 else f"{seconds / 3600:.1f} h"


def _write(path: Path, content: Row) -> None:
    path.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
