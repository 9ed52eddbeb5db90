"""One contract for all plugins.

The same updates give the same weights, refusals, memory and new adapter, whatever the engine.
"""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch

from fedloop.defense.levels import ClientLevel, CumulativeLevel, Level
from tests.helpers import plugged

ROOT = Path(__file__).resolve().parents[3]

# Read by hand, these raise before the defence sees them, which is what the plugins are for.
UNREADABLE = {"other rank", "other keys", "not LoRA", "half a pair", "nothing in it"}
REFUSED = {  # the start of the reason in every record
    "nan": "NonFiniteError",
    "infinite": "NonFiniteError",
    "other rank": "LayoutMismatch",
    "missing": "missing",
    "duplicate": "duplicate",
    "impossible count": "EvidenceError",
    "no count": "EvidenceError",
    "half a count": "EvidenceError",
    "other keys": "LayoutMismatch",
    "not LoRA": "UnsupportedAdapterError",
    "half a pair": "AdapterFormatError",
    "nothing in it": "AdapterFormatError",
    "copies": "copy",
}


def check_same(
    got: plugged.Played, expected: plugged.Played, *, exact: bool, reasons: bool
) -> None:
    """Records, final state and memory agree.

    Not bit for bit, because the sums are not the same: a change of a float32 weight is rounded when
    the weight is sent and once more when the global state is taken off it again, and Flower and
    OpenFedLLM average the weights themselves in float32.
    """
    for one, other in zip(
        map(plugged.comparable, got.records), map(plugged.comparable, expected.records), strict=True
    ):
        if not reasons:  # of changes and of weights, errors are worded differently
            assert {client: why.split(":")[0] for client, why in one.reasons.items()} == {
                c: why.split(":")[0] for c, why in other.reasons.items()
            }
        assert one.reasons == other.reasons or not reasons
        assert (one.weights, one.factors, one.num_examples, one.skipped) == (
            other.weights,
            other.factors,
            other.num_examples,
            other.skipped,
        )
        assert one.scores.keys() == other.scores.keys()
        assert all(
            score == pytest.approx(other.scores[client], abs=1e-4)
            for client, score in one.scores.items()
        )
    assert got.state.keys() == expected.state.keys()
    for key, value in expected.state.items():
        assert got.state[key].dtype == value.dtype
        assert (
            torch.equal(got.state[key], value)
            if exact
            else float((got.state[key] - value).abs().max() / value.abs().max()) < 1e-6
        )
    assert plugged.close_tree(got.memory, expected.memory, 0.0 if exact else 1e-5)


@pytest.mark.parametrize("way", plugged.WAYS)
@pytest.mark.parametrize("name", plugged.ADAPTERS)
def test_every_plugin_does_with_the_same_updates_what_every_other_does(
    name: str, way: str, tmp_path: Path
) -> None:
    rounds, state = plugged.rounds(way), plugged.global_state()
    expected = plugged.in_a_loop(plugged.defense(), rounds, dict(state), tmp_path)
    got = plugged.ADAPTERS[name](plugged.defense(), rounds, dict(state), tmp_path)
    check_same(
        got,
        expected,
        exact=name in ("defend_round", "nvflare, full"),
        reasons="full" in name or name in ("openfedllm", "flower"),
    )


@pytest.mark.parametrize("way", [way for way in plugged.WAYS if way not in UNREADABLE])
@pytest.mark.parametrize("level", [CumulativeLevel(), ClientLevel()], ids=["cumulative", "client"])
def test_the_plugins_do_what_asking_the_defence_by_hand_does(
    way: str, level: Level, tmp_path: Path
) -> None:
    rounds, state = plugged.rounds(way), plugged.global_state()
    expected = plugged.by_hand(plugged.defense(level), rounds, dict(state), tmp_path)
    got = plugged.in_a_loop(plugged.defense(level), rounds, dict(state), tmp_path)
    check_same(got, expected, exact=False, reasons=True)


@pytest.mark.parametrize(
    "way", [way for way in plugged.WAYS if way not in UNREADABLE | {"duplicate"}]
)
def test_the_plugins_do_what_fedloops_own_engines_do_bit_for_bit(way: str, tmp_path: Path) -> None:
    rounds, state = plugged.rounds(way), plugged.global_state()
    expected = plugged.in_process(plugged.defense(), rounds, dict(state), tmp_path)
    got = plugged.in_a_loop(plugged.defense(), rounds, dict(state), tmp_path)
    check_same(got, expected, exact=True, reasons=True)


@pytest.mark.parametrize("name", plugged.ADAPTERS)
def test_factors_between_0_and_1_reach_every_engines_average(name: str, tmp_path: Path) -> None:
    rounds, state = plugged.rounds("malicious"), plugged.global_state()
    expected = plugged.by_hand(plugged.defense(ClientLevel()), rounds, dict(state), tmp_path)
    check_same(
        plugged.ADAPTERS[name](plugged.defense(ClientLevel()), rounds, dict(state), tmp_path),
        expected,
        exact=False,
        reasons=False,
    )
    assert {0 < factor < 1 for factor in expected.records[-1].factors.values()} == {True}
    assert len({round(weight, 6) for weight in expected.records[-1].weights.values()}) > 2


@pytest.mark.parametrize("way", plugged.WAYS)
def test_bad_clients_are_refused_for_what_they_did_and_honest_ones_never(
    way: str, tmp_path: Path
) -> None:
    played = plugged.in_a_loop(
        plugged.defense(), plugged.rounds(way), plugged.global_state(), tmp_path
    )
    for record in played.records:
        assert {client for client, factor in record.factors.items() if factor == 0} == (
            set(plugged.BAD) if way in REFUSED or way == "malicious" else set()
        )
        assert {
            client: why.split(":")[0] for client, why in record.reasons.items()
        } == dict.fromkeys(plugged.BAD if way in REFUSED else (), REFUSED.get(way))
        assert not record.skipped
    assert way in {"honest", "huge count", "malicious"} | REFUSED.keys()


@pytest.mark.parametrize("way", ["malicious", "nan", "missing"])
@pytest.mark.parametrize("name", plugged.ADAPTERS)
def test_a_skipped_round_leaves_the_global_state_bit_for_bit(
    name: str, way: str, tmp_path: Path
) -> None:
    state = plugged.global_state()
    played = plugged.ADAPTERS[name](
        plugged.defense(), plugged.rounds(way, plugged.CLIENTS), dict(state), tmp_path
    )
    assert [record.skipped for record in played.records] == [True] * plugged.ROUNDS
    assert played.state.keys() == state.keys()
    assert all(torch.equal(played.state[key], state[key]) for key in state)


@pytest.mark.parametrize("name", plugged.ADAPTERS)
def test_what_a_client_sent_is_not_changed(name: str, tmp_path: Path) -> None:
    rounds, state = plugged.rounds("malicious"), plugged.global_state()
    before = [
        [{key: value.clone() for key, value in sent.delta.items()} for sent in round]
        for round in rounds
    ]
    first = {key: value.clone() for key, value in state.items()}
    plugged.ADAPTERS[name](plugged.defense(), rounds, state, tmp_path)
    assert all(torch.equal(state[key], first[key]) for key in first)
    for sent, kept in zip(
        (sent for round in rounds for sent in round),
        (kept for round in before for kept in round),
        strict=True,
    ):
        assert all(torch.equal(sent.delta[key], kept[key]) for key in kept)


@pytest.mark.parametrize(("engine", "extra"), [("flwr", "flower"), ("nvflare", "nvflare")])
def test_a_missing_engine_is_named_with_its_pip_line_and_the_other_plugins_need_none(
    engine: str, extra: str
) -> None:
    script = f"""
import sys
import fedloop.plugins, fedloop.plugins.openfedllm
print([name for name in ("flwr", "nvflare") if name in sys.modules])
sys.modules[{engine!r}] = None
import fedloop.plugins.{extra}
"""
    done = subprocess.run(
        [sys.executable, "-c", script],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.stdout == "[]\n"
    assert (
        f"needs {engine}, which is not installed: pip install 'loraprobe[{extra}]'"
        in done.stderr.splitlines()[-1]
    )
