"""Attackers who know the defence.

What their moves keep and change, what a replay lets through, and that the page says what was
measured.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import replace
from functools import cache

import numpy as np
import pytest

from loraprobe.adapters.layout import Layout, pack
from paper_repro.attackers import moves, newcomers
from paper_repro.attackers import products as replays
from paper_repro.attackers import run as attackers
from paper_repro.attackers.moves import Schedule
from paper_repro.attackers.record import ROUNDS
from paper_repro.attackers.replay import Attack, Guard, Known, Outcome, RoundView, replay
from paper_repro.common.setting import CLIENTS
from tests.helpers import probes

MEMBERS = (1, 4, 7)
HONEST = [index for index in range(CLIENTS) if index not in MEMBERS]
LAYOUT = Layout.of(probes.labelled_adapter(1))


@cache
def packed(seed: int, malicious: bool) -> np.ndarray:
    return pack(probes.labelled_adapter(seed, malicious))[0].numpy().astype(np.float64)


def read(row: np.ndarray) -> np.ndarray:
    """B of a packed update."""
    return row[moves._is_b(LAYOUT)]


class Round:
    """Recorded clients of the kinds that the tests' probe tells apart."""

    def __init__(self, number: int) -> None:
        self._number, self.start = number, np.zeros(LAYOUT.size)

    def benign(self, clients: Sequence[int]) -> np.ndarray:
        return np.stack([packed(1000 * self._number + client, False) for client in clients])

    def malicious(self, what: str = "update") -> np.ndarray:
        rows = np.stack([packed(1000 * self._number + 500 + client, True) for client in MEMBERS])
        return np.where(moves._is_b(LAYOUT), 0.0, rows) if what == "through_a" else rows

    def benign_evidence(self, kind: str, client: int) -> np.ndarray:
        return np.stack([share * read(self.benign([client])[0]) for share in (0.5, 1.0)])

    def malicious_evidence(self, kind: str, row: int) -> np.ndarray:
        return np.stack([share * read(self.malicious()[row]) for share in (0.5, 1.0)])


class Recording:
    members, layout, initial = MEMBERS, LAYOUT, np.zeros(LAYOUT.size)

    def play(self, number: int, start: np.ndarray) -> Round:
        return Round(number)


@cache
def known() -> Known:
    probe = probes.tiny_probe(recipe="all_b")
    return Known.of({"published": probe, "private": probe}, probe, LAYOUT)


def played(attack: Attack, guard: Guard) -> Outcome:
    return replay(Recording(), attack, guard, known(), seed=0)


def view() -> RoundView:
    one = Round(1)
    one.start = packed(9, False)
    return RoundView(one, list(MEMBERS), one.benign(HONEST), known(), LAYOUT, 0)


def products(view: RoundView, sent: np.ndarray) -> list[np.ndarray]:
    """B A of every module after the update was applied."""
    parts = np.split(view.start + sent, np.cumsum([slot.size for slot in LAYOUT.slots])[:-1])
    factors = {
        (slot.module, slot.factor): part.reshape(slot.shape)
        for slot, part in zip(LAYOUT.slots, parts, strict=True)
    }
    return [factors[module, "B"] @ factors[module, "A"] for module in LAYOUT.scalings]


def cosine(one: np.ndarray, other: np.ndarray) -> float:
    return float(one @ other / np.linalg.norm(one) / np.linalg.norm(other))


# --- moves


@pytest.mark.parametrize(
    ("move", "strength", "none"), [(moves.rotated, 1.0, 0.0), (moves.unbalanced, 2.0, 1.0)]
)
def test_refactorisation_changes_the_factors_and_no_product(
    move: moves.Move, strength: float, none: float
) -> None:
    seen = view()
    for own, row in zip(seen.own, move(seen, strength), strict=True):
        for before, after in zip(products(seen, own), products(seen, row), strict=True):
            np.testing.assert_allclose(after, before, atol=1e-9)
        assert np.linalg.norm(read(row) - read(own)) > 0.1 * np.linalg.norm(read(own))
    # nothing turned, nothing changed
    np.testing.assert_allclose(move(seen, none), seen.own, atol=1e-9)


def test_noise_that_cancels_leaves_the_sum_and_hides_every_row() -> None:
    seen = view()
    sent = moves.cancelling(seen, 4.0)
    np.testing.assert_allclose(sent.sum(axis=0), seen.own.sum(axis=0), atol=1e-9)
    pairs = zip(sent, seen.own, strict=True)
    assert max(cosine(read(row), read(own)) for row, own in pairs) < 0.5
    # agreed on beforehand
    np.testing.assert_array_equal(sent, moves.cancelling(seen, 4.0))


def test_projection_takes_away_what_the_probe_reads() -> None:
    seen = view()
    assert (seen.own @ seen.direction).min() > 0
    np.testing.assert_allclose(moves.projected(seen, 1.0) @ seen.direction, 0.0, atol=1e-9)
    assert (moves.projected(seen, 1.5) @ seen.direction).max() < 0
    seen.surrogate = np.random.default_rng(0).normal(size=LAYOUT.size)
    # a wrong guess leaves most of it
    assert (moves.projected_by_surrogate(seen, 1.0) @ seen.direction).min() > 0


def test_mimicry_goes_all_the_way_and_blending_keeps_the_poison() -> None:
    seen = view()
    centre, n = seen.honest.mean(axis=0), len(seen.own)
    np.testing.assert_allclose(moves.mimicry(seen, 1.0), np.tile(centre, (n, 1)))
    np.testing.assert_allclose(moves.blended(seen, 0.75), seen.own + 3 * centre)
    np.testing.assert_allclose(moves.mimicry_of_one(seen, 1.0), seen.honest[:n])


def test_poison_in_a_leaves_b_benign() -> None:
    seen = view()
    sent, is_b = moves.unread(seen, 2.0), moves._is_b(LAYOUT)
    np.testing.assert_array_equal(sent[:, is_b], seen.benign[:, is_b])
    np.testing.assert_array_equal(sent[:, ~is_b], 2 * seen.through_a[:, ~is_b])


# --- replays


def test_without_a_defence_everything_is_averaged() -> None:
    outcome = played(Attack("poison", 1.0), Guard())
    rounds = map(Round, range(1, ROUNDS + 1))
    sums = [one.benign(HONEST).sum(axis=0) + one.malicious().sum(axis=0) for one in rounds]
    np.testing.assert_allclose(outcome.lora, sum(sums) / CLIENTS, rtol=1e-6)
    assert outcome.factors.shape == outcome.alone.shape == (ROUNDS, CLIENTS)
    assert outcome.factors.all()
    assert outcome.poisoned.all()


def test_rejected_poison_does_not_move_the_model() -> None:
    outcome = played(Attack("poison", 1.0), Guard("cumulative"))
    assert not outcome.factors[:, MEMBERS].any()
    means = [Round(number).benign(HONEST).mean(axis=0) for number in range(1, ROUNDS + 1)]
    np.testing.assert_allclose(outcome.lora, sum(means), rtol=1e-6)


def test_one_who_waits_is_trusted_by_the_mean_and_caught_by_the_round() -> None:
    late = Attack("late", 7, schedule=Schedule((7, 8)))
    lagging, instant = (played(late, Guard("cumulative", instant=at)) for at in (False, True))
    assert lagging.factors[6, MEMBERS].all()  # seven rounds' mean is benign
    assert not instant.factors[6:, MEMBERS].any()
    assert instant.factors[:6, MEMBERS].all()
    assert lagging.poisoned.tolist() == [False] * 6 + [True] * 2


def test_a_bound_on_length_takes_away_what_was_made_longer() -> None:
    long, none = Schedule((8,), scale=8.0), Attack("no attack", 0.0, schedule=Schedule(()))
    attack = Attack("long", 1.0, schedule=long)
    free, bound = (played(attack, guard).lora for guard in (Guard(), Guard(longest=1.5)))
    calm = played(none, Guard()).lora
    assert np.linalg.norm(bound - calm) < 0.4 * np.linalg.norm(free - calm)
    np.testing.assert_array_equal(played(none, Guard(longest=3.0)).lora, calm)


@pytest.mark.parametrize("level", ["shadow", "evidence"])
def test_a_forged_shadow_is_believed(level: str) -> None:
    attack = Attack("poison", 1.0)
    assert played(attack, Guard(level)).factors[:, MEMBERS].max() < 0.1
    assert played(replace(attack, forged=True), Guard(level)).factors[:, MEMBERS].min() > 0.9


def test_forged_steps_end_in_what_was_sent() -> None:
    true, forged = (
        played(Attack("poison", 1.0, forged=lying), Guard("step")).factors[:, MEMBERS]
        for lying in (False, True)
    )
    assert true.max() < forged.min()
    assert (forged > 0).all()  # not refused: the last step is the update
    assert forged.max() < 0.75  # and it alone is flagged, one of two


def test_every_cell_is_tried_once_and_no_result_is_of_another_grid() -> None:
    cells = [(attack, attackers.digest(attack, guards)) for attack, guards in attackers.attacks()]
    names = {(attack.name, attack.strength) for attack, _ in cells}
    digests = {digest for _, digest in cells}
    assert len(names) == len(digests) == len(cells)
    lines = [*attackers.read_results(), *attackers.read_results(attackers.LIVE)]
    assert {(line["attack"], line["strength"]) for line in lines} <= names
    assert {line["digest"] for line in attackers.read_results()} <= digests
    assert len(attackers.LIVE_CELLS) == sum(len(guards) for _, guards in attackers.live_cells())


def test_what_newcomers_count_comes_out_again() -> None:
    found = {"attackers": newcomers.attackers(), "honest": newcomers.honest()}
    assert json.loads(newcomers.RESULTS.read_text()) == json.loads(json.dumps(found))


def test_what_attackers_send_is_what_they_say() -> None:
    """Products stay, parts sum to the poison, and the known probe reads what was aimed at."""
    table = replays.Table()
    reader = replays.Reader("linear")
    rng = np.random.default_rng(0)
    own = table.adapters[table.of("malicious", 1.0)[0]]
    scene = replays.Scene(own, table.donor(own, rng), reader, table.aim(reader), rng)
    whole = replays.length(own)
    for attack in replays.ATTACKS[len(replays.SHARES) :]:
        parts = attack.send(scene)
        mean = replays.mean_of(parts)
        rest = replays.length(replays.mixed((1.0, mean), (-1.0, own))) / whole
        if attack.send is replays.refactored or attack.name.startswith("two parts, benign"):
            assert rest < 1e-2
        if attack.send is replays.evading:
            assert reader.logit_of(mean) == pytest.approx(scene.aim, abs=0.1)
            assert reader.logit_of(own) > scene.aim + 5  # negative control
        stays = replays.inner(mean, own) / whole**2
        assert stays > 0.85
    probabilities = 1 / (1 + np.exp(-reader.logit_of(own)))
    assert reader.scores([own])[0] == pytest.approx(probabilities, abs=1e-5)


def test_the_pages_row_comes_out_again() -> None:
    table = replays.Table()
    found = json.loads(replays.RESULTS.read_text())
    assert replays.decoys(table) == found["decoys"]
    seen = replays._seen(
        replays.Reader("linear"), [[table.adapters[at]] for at in table.of("hard_negative")], 0
    )
    row = next(row for row in found["attacks"] if "hard" in row["attack"])
    assert {name: row[name] for name in seen} == pytest.approx(seen)
