"""Who takes part in a round and how they train: from the configuration and the round's number."""

from __future__ import annotations

import math
from typing import NamedTuple

import numpy as np

from ..client.training import LocalTraining
from ..config import Config
from ..sections import TrainingConfig


class RoundPlan(NamedTuple):
    """Who takes part in a round and how they train.

    It follows from the configuration and the round's number alone.

    Attributes:
        chosen: numbers of the clients, rising.
        seeds: one for each of them, of its order of examples and of dropout.
        generator: of what attackers and randomised rules draw.
    """

    number: int
    chosen: tuple[int, ...]
    training: LocalTraining
    seeds: tuple[int, ...]
    generator: np.random.Generator


def plan_round(config: Config, number: int) -> RoundPlan:
    """The plan of a round (from 1)."""
    generator = np.random.default_rng([config.seed, number])
    count = config.clients.count
    sampled = config.clients.sampled or count
    chosen = tuple(sorted(map(int, generator.choice(count, sampled, replace=False))))
    training = LocalTraining(
        learning_rate(config.training, number, config.rounds),
        config.training.steps,
        config.training.batch_size,
        config.training.max_length,
        config.training.max_grad_norm,
    )
    seeds = tuple(client_seed(config.seed, number, index) for index in chosen)
    return RoundPlan(number, chosen, training, seeds, generator)


def client_seed(seed: int, number: int, index: int) -> int:
    """The seed of one client's training in one round: of its order of examples and of dropout."""
    return int(np.random.SeedSequence([seed, number, index]).generate_state(1)[0])


def learning_rate(training: TrainingConfig, number: int, rounds: int) -> float:
    """The learning rate of a round (from 1).

    Along a cosine from `lr` in the first to `min_lr` after the last, or constant.
    """
    if training.schedule == "constant":
        return training.lr
    fallen = (1 + math.cos(math.pi * (number - 1) / rounds)) / 2
    return training.min_lr + (training.lr - training.min_lr) * fallen
