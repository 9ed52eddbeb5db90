"""Short client trainings under other settings, to see what telling clients apart depends on.

    python -m paper_repro.separability.sweeps --data ../shared/data  # about 12 minutes on one core;
                                                                     # goes on where it stopped

One thing differs from `CENTRE` at a time: the LoRA's rank, which modules it adapts, the learning
rate, the number of local steps, the initial adapter. Every setting trains the same clients, those
of `zoo.labelled.client_design.plan` for `PER_SOURCE` and `PER_CELL` without half of the
mixtures. Each holds 40 examples however many steps it makes: one step sees 8 of them, twenty see
all four times.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path

import torch

from fedloop.client.training import LoRASettings
from zoo.labelled.client_design import LORA, TRAINING, Client, Design, plan
from zoo.labelled.deltas import Base, DeltaSet, make_deltas, read_deltas
from zoo.labelled.sources import load_sources
from zoo.program import documented
from zoo.train_base import BASE_NAME

from ..common.held_out import base_model

WORK = Path("build/separability/sweeps")
PER_SOURCE, PER_CELL, EXAMPLES = 3, 1, 40
# unlike any replicate's: transfer is measured on clients that no probe of the zoo was fitted on
CLIENTS_SEED = 3
ATTENTION = ("k_proj", "o_proj", "q_proj", "v_proj")
MLP = ("down_proj", "gate_proj", "up_proj")


@dataclass(frozen=True)
class SweepDesign(Design):
    """A design whose clients hold the same number of examples at every number of steps."""

    @property
    def examples(self) -> int:
        """How many examples a client holds."""
        return EXAMPLES


CENTRE = SweepDesign(
    shares=(1.0, 0.25, 0.1),
    lr_range=(TRAINING.lr, TRAINING.lr),
    per_source=PER_SOURCE,
    per_cell=PER_CELL,
    per_hard_cell=1,
    all_steps=False,
)


@dataclass(frozen=True)
class Setting:
    """How the clients of one setting train.

    Attributes:
        axis: what differs from the centre; "centre" for itself, which belongs to every axis.
        value: what it is here.
        initial_seed: of the adapter that clients start from.
        transfers: whether a probe of the centre's layout can read these updates at all.
    """

    name: str
    axis: str
    value: str
    design: SweepDesign
    initial_seed: int = 0
    transfers: bool = True

    @property
    def folder(self) -> Path:
        """Where its deltas are."""
        return WORK / self.name

    @property
    def clients(self) -> list[Client]:
        """Who trains: of the mixed clients of a plan, hard negatives are left out and every other
        host of a malicious source, to save time.
        """
        return [
            client
            for client in plan(self.design, CLIENTS_SEED)
            if client.share == 1.0 or _is_kept(self.design, client)
        ]

    @property
    def trained(self) -> bool:
        """Whether every client has been trained."""
        return all((self.folder / f"{client.name}.npy").exists() for client in self.clients)

    def deltas(self) -> DeltaSet:
        """What was trained. Raises DataError if some client was not."""
        return read_deltas(self.folder, self.clients, BASE_NAME, self.design)


def _is_kept(design: Design, client: Client) -> bool:
    return (
        client.role == "malicious"
        and (design.benign.index(client.host) + design.malicious.index(client.source)) % 2 == 0
    )


def _rank(r: int) -> SweepDesign:
    """Alpha follows the rank, so that the product's scaling stays 2."""
    return replace(CENTRE, lora=LoRASettings(r, 2 * r, LORA.dropout, LORA.target_modules))


def _modules(*names: str) -> SweepDesign:
    return replace(CENTRE, lora=replace(LORA, target_modules=names))


def _lr(value: float) -> SweepDesign:
    return replace(CENTRE, training=replace(TRAINING, lr=value), lr_range=(value, value))


def _steps(count: int) -> SweepDesign:
    return replace(CENTRE, training=replace(TRAINING, steps=count))


AXES = {
    "rank": "8",
    "modules": "q, v",
    "learning rate": "0.005",
    "local steps": "5",
    "initial adapter": "seed 0",
}
"""Axis -> what the centre has there."""
SETTINGS = (
    Setting("centre", "centre", "", CENTRE),
    Setting("rank_2", "rank", "2", _rank(2), transfers=False),
    Setting("rank_32", "rank", "32", _rank(32), transfers=False),
    Setting("lr_low", "learning rate", "0.001", _lr(1e-3)),
    Setting("lr_high", "learning rate", "0.015", _lr(1.5e-2)),
    Setting("steps_1", "local steps", "1", _steps(1)),
    Setting("initial_1", "initial adapter", "seed 1", CENTRE, initial_seed=1),
    Setting("attention", "modules", "attention", _modules(*ATTENTION), transfers=False),
    Setting(
        "attention_mlp", "modules", "attention, MLP", _modules(*ATTENTION, *MLP), transfers=False
    ),
    Setting("steps_20", "local steps", "20", _steps(20)),
)


def main() -> None:
    """Train every client of every setting that is not trained yet."""
    parser = documented(__doc__, "data")
    options = parser.parse_args()
    torch.set_num_threads(1)
    sources, base = load_sources(options.data), Base(str(base_model()), BASE_NAME)
    for setting in SETTINGS:
        make_deltas(
            base,
            sources,
            setting.clients,
            setting.folder,
            design=setting.design,
            seed=setting.initial_seed,
        )


if __name__ == "__main__":
    main()
