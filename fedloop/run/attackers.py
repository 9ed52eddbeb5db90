"""Malicious clients of a simulation that change what they send, beside what they trained on."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

import numpy as np
import torch

from loraprobe.adapters.adapter import Adapter
from loraprobe.adapters.deltas import add_delta, factor_delta
from loraprobe.adapters.layout import Layout, pack, unpack
from loraprobe.heads import LinearHead
from loraprobe.probe import Probe

from ..client.client import Trained
from ..config import ClientsConfig
from ..defense.defense import Defense
from ..defense.levels import LOCAL_STEPS
from ..errors import AggregationError, ConfigError
from ..rules.attacks import ProbeEvasion

# Colluding attackers do not send equal bytes, which any server would notice; of an update's norm.
_JITTER = 1e-6


def attacked(
    trained: Mapping[str, Trained],
    malicious: Sequence[str],
    config: ClientsConfig,
    defense: Defense,
    start: Adapter,
    generator: np.random.Generator,
) -> dict[str, Trained]:
    """The round's updates after the malicious clients applied the configured attack.

    They know all honest ones. An attacker also forges the last of its step evidence, so that it equals what it sends.

    Raises:
        AggregationError: the attack cannot be made in this round, for want of honest clients or as
            their updates are not finite.
        ConfigError: the probe has no single direction for "probe_evasion".
    """
    attack = config.make_attack()
    if attack is None or not malicious:
        return dict(trained)
    trajectory = defense.level is not None and defense.level.evidence == LOCAL_STEPS
    layout = Layout.of(next(iter(trained.values())).delta)
    honest = [client for client in trained if client not in malicious]
    if not honest:
        raise AggregationError(
            "got no honest client in this round to make an attack from; expected at least one"
        )
    rows = {
        client: pack(one.delta, layout)[0].numpy().astype(np.float64)
        for client, one in trained.items()
    }
    direction = None
    if isinstance(attack.options, ProbeEvasion) and defense.probe is not None:
        direction = probe_direction(defense.probe, layout)
    sent = attack(
        np.stack([rows[client] for client in honest]),
        len(malicious),
        rng=generator,
        own=np.stack([rows[client] for client in malicious]),
        direction=direction,
    )
    jitter = _JITTER * np.linalg.norm(sent, axis=1, keepdims=True)
    sent = sent + jitter * generator.standard_normal(sent.shape) / np.sqrt(sent.shape[1])
    changed = dict(trained)
    for client, row in zip(malicious, sent, strict=True):
        delta = unpack(
            torch.from_numpy(row.astype(np.float32)), layout, base_model=start.base_model
        )
        changed[client] = _sending(trained[client], delta, start, trajectory)
    return changed


def probe_direction(probe: Probe, layout: Layout) -> np.ndarray:
    """A linear probe's coefficients in the space of packed updates (d,).

    Zero where the probe does not read.

    Raises:
        ConfigError: the probe is not a linear one on flattened slices, so that it has no single
            direction.
    """
    if not isinstance(probe.head, LinearHead) or probe.featurizer.recipe.features != ("slices",):
        raise ConfigError(
            "clients.update_attack 'probe_evasion' needs a linear probe on flattened slices; this"
            " probe has no single direction"
        )
    slots = probe.featurizer.layout.slots
    read = np.split(
        probe.head.coef.astype(np.float64), np.cumsum([slot.size for slot in slots])[:-1]
    )
    coefficients = {
        (slot.module, slot.factor): part for slot, part in zip(slots, read, strict=True)
    }
    return np.concatenate(
        [coefficients.get((slot.module, slot.factor), np.zeros(slot.size)) for slot in layout.slots]
    )


def _sending(one: Trained, delta: Adapter, start: Adapter, trajectory: bool) -> Trained:
    """What a client sends if it replaces its update by another."""
    sent = add_delta(start, delta)
    delta = factor_delta(
        sent, start
    ).load()  # as the server will see it: the sum is rounded to float32
    steps = one.update.steps
    if trajectory and steps:
        last = Adapter(
            {module: delta[module] for module in steps[-1]},
            kind=delta.kind,
            base_model=delta.base_model,
        )
        steps = (*steps[:-1], last)
    return replace(one, delta=delta, update=replace(one.update, adapter=sent, steps=steps))
