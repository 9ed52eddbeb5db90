"""Attacks on updates inside a round.

Attackers send what the attack says, forge what can be forged, and are told apart.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch

from fedloop.defense.defense import Defense
from fedloop.defense.levels import CumulativeLevel, Level, ShadowLevel, StepLevel
from fedloop.defense.types import ClientUpdate
from fedloop.errors import AggregationError, ConfigError
from fedloop.rules.attacks import ATTACKS
from fedloop.run import attackers as poisoning
from fedloop.run.attackers import attack_updates, probe_direction
from fedloop.run.spool import Spool
from fedloop.sections import ClientsConfig
from loraprobe import fit_probe
from loraprobe.adapters.layout import Layout, flattened, pack
from tests.helpers import federated, probes

MALICIOUS = ("c3", "c4")
HONEST = ("c0", "c1", "c2")


def config(name: str | None, **options: Any) -> ClientsConfig:
    return ClientsConfig(
        benign=("builtin:benign",),
        malicious=len(MALICIOUS),
        malicious_source="builtin:malicious",
        update_attack=name,
        update_attack_options=options,
    )


def trained(
    level: Level | None = None, clients: Sequence[str] = federated.CLIENTS
) -> dict[str, ClientUpdate]:
    """What came out of a round's training, of the size of training."""
    result = {}
    for seed, client in enumerate(clients):
        delta = federated.mapped(
            probes.labelled_adapter(seed, client in MALICIOUS, 0.3), lambda tensor: 1e-3 * tensor
        )
        steps = federated.steps_for(level, delta, seed, client in MALICIOUS)
        result[client] = ClientUpdate(client, 40, delta, steps)
    return result


def attacked(
    updates: dict[str, ClientUpdate],
    malicious: Sequence[str],
    chosen: ClientsConfig,
    defense: Defense,
    seed: int = 0,
) -> dict[str, ClientUpdate]:
    """What the server finds in its spool."""
    first = next(iter(updates.values())).adapter
    with Spool(None, Layout.of(first), base_model=first.base_model) as spool:
        for client, update in updates.items():
            spool.add(client, update.adapter, update.steps)
        honest = [client for client in updates if client not in malicious]
        attack_updates(spool, honest, malicious, chosen, defense, np.random.default_rng(seed))
        found = [spool.update(client, 40) for client in updates]
        return {
            one.client_id: replace(
                one, adapter=one.adapter.load(), steps=tuple(step.load() for step in one.steps)
            )
            for one in found
        }


def play(
    name: str | None, level: Level | None = None, seed: int = 0, **options: Any
) -> dict[str, ClientUpdate]:
    probe = probes.tiny_probe("linear", "all_b") if level else None
    return attacked(trained(level), MALICIOUS, config(name, **options), Defense(probe, level), seed)


def row(one: ClientUpdate) -> np.ndarray:
    return pack(one.adapter)[0].double().numpy()


@pytest.mark.parametrize("name", ATTACKS)
def test_attackers_send_what_the_attack_says_and_honest_clients_what_they_trained(
    name: str,
) -> None:
    before, after = trained(), play(name)
    honest, own = (np.stack([row(before[c]) for c in some]) for some in (HONEST, MALICIOUS))
    options: dict[str, Any] = (
        {"own": own} if name in ("scaling", "probe_evasion", "collusion") else {}
    )
    expected = ATTACKS[name](honest, 2, rng=np.random.default_rng(0), **options)
    for client in HONEST:
        assert np.array_equal(row(after[client]), row(before[client]))
    for client, wanted, former in zip(MALICIOUS, expected, own, strict=True):
        sent = row(after[client])
        assert np.linalg.norm(sent - wanted) < 1e-3 * np.linalg.norm(wanted)
        assert np.linalg.norm(sent - former) > 0.05 * np.linalg.norm(former)


def test_colluders_do_not_send_equal_bytes(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("sign_flip", "ipm", "alie", "mimic"):
        record = Defense(None).assess(1, list(play(name).values()))
        assert not record.reasons, name
    monkeypatch.setattr(poisoning, "_JITTER", 0.0)  # negative control
    for name, refused in (("sign_flip", {"c3", "c4"}), ("mimic", {"c3", "c4"})):
        record = Defense(None).assess(1, list(play(name).values()))
        assert refused <= record.reasons.keys(), name
        assert "copy" in record.reasons["c3"]


@pytest.mark.parametrize("name", ["sign_flip", "scaling", "probe_evasion"])
def test_an_attacker_forges_the_end_of_its_trajectory(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    level = StepLevel()
    defense = Defense(probes.tiny_probe("linear", "all_a"), level)
    after = attacked(trained(level), MALICIOUS, config(name), defense)
    record = defense.assess(1, list(after.values()))
    assert not record.reasons
    before = trained(level)
    for client in MALICIOUS:
        for forged, step in zip(after[client].steps[:-1], before[client].steps[:-1], strict=True):
            assert torch.equal(pack(forged)[0], pack(step)[0])
    # negative control: without the forgery they are caught
    monkeypatch.setattr(poisoning, "LOCAL_STEPS", "other")
    honest = attacked(trained(level), MALICIOUS, config(name), defense)
    caught = Defense(probes.tiny_probe("linear", "all_a"), level).assess(1, list(honest.values()))
    assert caught.reasons.keys() == set(MALICIOUS)


def test_shadow_evidence_is_not_forged() -> None:
    level = ShadowLevel()
    before, after = trained(level), play("sign_flip", level)
    for client in MALICIOUS:
        assert [pack(step)[0].tolist() for step in after[client].steps] == [
            pack(step)[0].tolist() for step in before[client].steps
        ]


def test_an_attack_that_cannot_be_made_says_why() -> None:
    everybody = trained()
    with pytest.raises(AggregationError, match="no honest client"):
        attacked(everybody, federated.CLIENTS, config("sign_flip"), Defense(None))
    with pytest.raises(AggregationError, match="at least 2"):
        attacked(trained(None, ("c0", "c3")), ("c3",), config("alie", z=1.0), Defense(None))


def test_probe_evasion_lowers_the_score_of_a_linear_probe() -> None:
    level, probe = CumulativeLevel(graded=True), probes.tiny_probe("linear", "all_b")
    sent = (
        trained(level),
        play("probe_evasion", level),
        play("probe_evasion", level, target=0.0),
        play("probe_evasion"),  # without the probe, the attacker guesses a direction
    )
    for client in MALICIOUS:
        plain, evading, zero, guessed = (float(probe([one[client].adapter])[0]) for one in sent)
        assert evading < 0.5 < 0.8 < plain
        assert zero == pytest.approx(1 / (1 + np.exp(-probe.head.intercept)), abs=1e-3)
        assert guessed < plain


@pytest.mark.parametrize("recipe", ["paper", "all_b", "all_a"])
def test_the_direction_of_a_probe_is_its_logit(recipe: str) -> None:
    probe = probes.tiny_probe("linear", recipe)
    for seed in range(3):
        delta = probes.labelled_adapter(seed, bool(seed % 2))
        vector, layout = pack(delta)
        direction = probe_direction(probe, layout)
        assert direction.shape == vector.shape
        length = np.linalg.norm(flattened(delta, probe.featurizer.layout.slots))
        logit = float(vector.double().numpy() @ direction) / length + probe.head.intercept
        assert 1 / (1 + np.exp(-logit)) == pytest.approx(float(probe([delta])[0]), abs=1e-5)
    ends = np.cumsum([slot.size for slot in layout.slots])
    for slot, part in zip(layout.slots, np.split(direction, ends[:-1]), strict=True):
        assert bool(part.any()) is (slot in probe.featurizer.layout.slots)


def test_other_probes_have_no_direction() -> None:
    layout = Layout.of(probes.labelled_adapter(0))
    data = probes.training_data()
    spectral = fit_probe(data.adapters, data.labels, recipe="spectral", groups=data.groups)
    for probe in (probes.tiny_probe("mlp"), spectral):
        with pytest.raises(ConfigError, match="no single direction"):
            probe_direction(probe, layout)
