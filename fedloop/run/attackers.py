"""Malicious clients of a simulation that change what they send, beside what they trained on."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch

from loraprobe.adapters.adapter import Adapter
from loraprobe.adapters.layout import Layout, unpack
from loraprobe.heads import LinearHead
from loraprobe.probe import Probe

from ..defense.defense import Defense
from ..defense.levels import LOCAL_STEPS
from ..errors import AggregationError, ConfigError
from ..rules.attacks import ProbeEvasion
from ..sections import ClientsConfig
from .spool import Spool

# Colluding attackers do not send equal bytes, which any server would notice; of an update's norm.
_JITTER = 1e-6


def attack_updates(
    spool: Spool,
    honest: Sequence[str],
    malicious: Sequence[str],
    config: ClientsConfig,
    defense: Defense,
    generator: np.random.Generator,
) -> None:
    """Overwrite what the malicious clients sent by the configured attack.

    They know all honest updates; it takes the memory of all of them. An attacker also forges the
    last of its step evidence, so that it equals what it sends.

    Raises:
        AggregationError: the attack cannot be made in this round, for want of honest clients.
        ConfigError: the probe has no single direction for "probe_evasion".
    """
    attack = config.make_attack()
    if attack is None or not malicious:
        return
    if not honest:
        raise AggregationError(
            "got no honest client in this round to make an attack from; expected at least one"
        )
    direction = None
    if isinstance(attack.options, ProbeEvasion) and defense.probe is not None:
        direction = probe_direction(defense.probe, spool.layout)
    sent = attack(
        _rows(spool, honest),
        len(malicious),
        rng=generator,
        own=_rows(spool, malicious),
        direction=direction,
    )
    jitter = _JITTER * np.linalg.norm(sent, axis=1, keepdims=True)
    sent = sent + jitter * generator.standard_normal(sent.shape) / np.sqrt(sent.shape[1])
    trajectory = defense.level is not None and defense.level.evidence == LOCAL_STEPS
    for client, row in zip(malicious, sent, strict=True):
        delta = unpack(
            torch.from_numpy(row.astype(np.float32)), spool.layout, base_model=spool.base_model
        )
        steps = spool.steps(client)
        if trajectory and steps:
            last = Adapter(
                {module: delta[module] for module in steps[-1]},
                kind=delta.kind,
                base_model=delta.base_model,
            )
            steps = (*steps[:-1], last)
        spool.replace(client, delta, steps)


def _rows(spool: Spool, clients: Sequence[str]) -> np.ndarray:
    return np.stack([spool.vector(client).numpy() for client in clients]).astype(np.float64)


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
            " probe has no single direction. Of one that reads products, use clients.evade_probe."
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
