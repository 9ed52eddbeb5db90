"""defend_round: what it reads, what it refuses, and what the next global state dict looks like."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch

from fedloop import Defense
from fedloop.defense.screening import LONGEST_REASON
from fedloop.errors import AggregationError, ConfigError, EvidenceError
from fedloop.plugins import Reply, defend_round, rejected
from loraprobe.errors import AdapterFormatError, NonFiniteError, UnsupportedAdapterError
from tests.helpers import federated, plugged

State = dict[str, Any]


START = plugged.global_state()
SENT = plugged.replies(START)


def play(sent: Any = SENT, state: Any = START, number: int = 1, **options: Any) -> Any:
    arguments = {"alpha": plugged.ALPHA, **options}
    return defend_round(plugged.defense(), number, sent, state, **arguments)


def same(one: State, other: State) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[key], other[key]) for key in one)


RENAMED: dict[str, Callable[[str], str]] = {
    "without PEFT's prefix": lambda key: key.removeprefix("base_model.model."),
    "with the adapter's name": lambda key: key.replace(".weight", ".default.weight"),
    "below a wrapper": lambda key: f"model.{key}",
    "below two wrappers, named": lambda key: f"module.model.{key}".replace(
        ".weight", ".default.weight"
    ),
}


@pytest.mark.parametrize("clients", RENAMED)
@pytest.mark.parametrize("server", RENAMED)
def test_keys_may_be_spelled_in_every_way_and_the_new_state_has_the_servers(
    server: str, clients: str
) -> None:
    def renamed(who: str, state: State) -> State:
        return {RENAMED[who](key): value for key, value in state.items()}

    sent = {client: (count, renamed(clients, state)) for client, (count, state) in SENT.items()}
    done = play(sent, renamed(server, START))
    assert not rejected(done.record)
    assert list(done.state) == [RENAMED[server](key) for key in START]
    assert same(done.state, renamed(server, play().state))


@pytest.mark.parametrize(
    "dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16], ids=str
)
def test_the_new_state_has_the_types_of_the_former_one_and_leaves_it_alone(
    dtype: torch.dtype,
) -> None:
    state = {key: value.to(dtype) for key, value in START.items()}
    before = {key: value.clone() for key, value in state.items()}
    done, exact = play(plugged.replies(state), state), play().state
    assert not done.record.skipped
    assert {value.dtype for value in done.state.values()} == {dtype}
    for key, value in done.state.items():
        assert torch.allclose(value.float(), exact[key], rtol=0.02, atol=0.05)
    assert same(state, before)


@pytest.mark.parametrize("dtype", [np.float64, np.float32, np.float16])
def test_arrays_in_arrays_out(dtype: Any) -> None:
    state = {key: value.astype(dtype) for key, value in plugged.arrays_of(START).items()}
    for array in state.values():
        array.setflags(write=False)  # as they come out of a buffer
    sent = {client: (count, plugged.arrays_of(of)) for client, (count, of) in SENT.items()}
    done = play(sent, state)
    assert not done.record.skipped
    assert {value.dtype for value in done.state.values()} == {np.dtype(dtype)}
    assert all(not np.array_equal(done.state[key], state[key]) for key in state)


def test_float64_states_keep_their_precision() -> None:
    state = {key: value.double() + 1e-12 for key, value in START.items()}
    assert same(play({"1": (1, dict(state))}, state).state, state)


def test_who_is_not_trusted_can_stand_in_the_mean_as_having_changed_nothing() -> None:
    state = plugged.global_state()
    sent = plugged.replies(state)
    long = {key: state[key] + 40 * (sent["1"][1][key] - state[key]) for key in state}
    sent["1"] = (40, long)
    made = [
        defend_round(
            plugged.defense(max_norm_ratio=1.5), 1, sent, state, alpha=plugged.ALPHA, rejected=how
        )
        for how in ("left_out", "no_change")
    ]
    trust = made[0].record.trust
    assert trust == pytest.approx(np.mean(list(made[0].record.factors.values())))
    assert 0 < trust < 1
    for key, value in state.items():
        moved = [done.state[key] - value for done in made]
        assert torch.allclose(moved[1], trust * moved[0], atol=1e-6)
    denying = plugged.defense()
    denying.deny("1", why="known")
    denied = defend_round(denying, 1, sent, state, alpha=plugged.ALPHA, rejected="no_change")
    assert denied.record.factors["1"] == 0
    assert denied.record.trust == 1  # so whom the operator denies slows nothing down
    with pytest.raises(ConfigError, match="got rejected 'kept'; expected 'left_out' or"):
        play(sent, state, rejected="kept")


JUNK: dict[str, Any] = {
    "none": None,
    "a number": 3,
    "a list": [1, 2],
    "text": "state",
    "keys that are no text": {1: torch.ones(2, 2)},
    "values that are no arrays": {
        "base_model.model.q.lora_A.weight": 1,
        "base_model.model.q.lora_B.weight": [[1.0]],
    },
    "objects": {
        "base_model.model.q.lora_A.weight": np.array([[object()]]),
        "base_model.model.q.lora_B.weight": np.array([[object()]]),
    },
    "whole numbers": {key: value.long() for key, value in START.items()},
    "text in arrays": {key: np.array([["x"]]) for key in START},
    "vectors": {key: value.reshape(-1) for key, value in START.items()},
    "scalars": {key: value.sum() for key, value in START.items()},
    "no numbers": {key: value[:0] for key, value in START.items()},
    "turned": {key: value.T for key, value in START.items()},
    "sparse": {key: value.to_sparse() for key, value in START.items()},
    "without storage": {key: value.to("meta") for key, value in START.items()},
    "terabytes that are one number": {
        key: torch.ones(1, 1).expand(1 << 20, 1 << 20) for key in START
    },
    "the same key twice": {
        prefix + key: value for prefix in ("", "x.") for key, value in START.items()
    },
    "an error": KeyError("arrays"),
    "out of memory": MemoryError("a header said so"),
}


@pytest.mark.parametrize("name", JUNK)
def test_what_cannot_be_read_is_refused_with_a_reason_and_the_round_goes_on(name: str) -> None:
    honest = plugged.replies(START, clients=("1", "2", "3"))
    done = play({**honest, "4": (40, JUNK[name])})
    assert list(done.record.reasons) == ["4"]
    why = done.record.reasons["4"]
    assert 10 < len(why) <= LONGEST_REASON
    assert "Error" in why or "Mismatch" in why
    assert done.weights["4"] == 0
    assert same(done.state, play(honest).state)


@pytest.mark.parametrize(
    "count",
    [None, "many", 0, -3, True, float("nan"), float("inf"), 2.5, [4], 2**60, np.float32(2.5)],
    ids=str,
)
def test_a_count_that_is_no_whole_number_is_refused(count: Any) -> None:
    done = play({**SENT, "4": (count, SENT["4"][1])})
    assert "num_examples" in done.record.reasons["4"]


@pytest.mark.parametrize(
    "count", [40.0, np.float32(40), np.uint8(40), np.array(40), torch.tensor(40)], ids=repr
)
def test_a_whole_number_of_another_type_counts(count: Any) -> None:
    done = play({**SENT, "4": (count, SENT["4"][1])})
    assert not done.record.reasons
    assert done.weights["4"] == pytest.approx(0.2)


def test_a_client_with_one_unreadable_reply_and_one_good_one_sent_two() -> None:
    record = play([*plugged.as_replies(SENT), Reply("2", 40, None)]).record
    assert "duplicate: 2" in record.reasons["2"]


def test_rejected_names_the_refused_the_malicious_the_missing_and_nobody_else() -> None:
    malicious = {key: START[key] + change for key, change in plugged.delta(77, True).items()}
    sent = {**SENT, "2": (40, malicious), "3": (40, {})}
    record = play(sent, expected=[*SENT, "9"]).record
    assert set(rejected(record)) == {"2", "3", "9"}
    assert rejected(record)["2"].startswith("judged malicious by")
    assert rejected(record)["3"] == record.reasons["3"]
    assert rejected(record)["9"] == "missing: asked and sent nothing"


# --- rules


def test_a_rule_that_cannot_be_applied_skips_the_round_and_says_why() -> None:
    done = play(rule="dnc", options={"f": 2, "removed": 9.0})
    assert done.record.skipped
    assert done.weights == {}
    assert "removed=9.0" in done.record.note
    assert all(done.state[key] is START[key] for key in START)


def test_a_round_that_raises_was_not_played(monkeypatch: pytest.MonkeyPatch) -> None:
    state, tested, whole = plugged.global_state(), plugged.defense(), plugged.defense()
    before = tested.state_dict()

    def full(*_: Any, **__: Any) -> None:
        raise MemoryError("n x n")

    with monkeypatch.context() as patch:
        patch.setattr("fedloop.plugins.loop.pack", full)
        with pytest.raises(MemoryError):
            defend_round(
                tested, 1, plugged.replies(state), state, alpha=plugged.ALPHA, rule="foolsgold"
            )
    assert tested.state_dict() == before
    for each in (tested, whole):
        defend_round(each, 1, plugged.replies(state), state, alpha=plugged.ALPHA, rule="foolsgold")
    assert tested.state_dict() == whole.state_dict()


@pytest.mark.parametrize("made", [dict, plugged.arrays_of])
def test_a_sum_too_large_for_the_states_type_skips_the_round(made: Any) -> None:
    state = made({key: value.half() for key, value in START.items()})
    large = {key: torch.full(value.shape, 1e5) for key, value in START.items()}
    done = defend_round(Defense(None), 1, {"1": (1, large)}, state, alpha=plugged.ALPHA)
    assert done.record.skipped
    assert "infinite" in done.record.note


# --- the caller's mistakes


INFINITE = {key: value / 0 for key, value in START.items()}
ROTARY = {**START, "model.rotary_emb.inv_freq": torch.ones(2)}
MISTAKES: list[tuple[dict[str, Any], type[Exception], str]] = [
    ({"rule": "average"}, AggregationError, "mean, median"),
    *(
        ({"sent": sent}, EvidenceError, ".")
        for sent in (
            {b"1": SENT["1"]},
            {None: SENT["1"]},
            {"1": None},
            {"1": (*SENT["1"], {})},
        )
    ),
    *(({"alpha": alpha}, ConfigError, "alpha") for alpha in (None, "16", 0, True)),
    ({"kind": "delta"}, ConfigError, "kind 'delta'"),
    ({"use_rslor": True}, ConfigError, "use_rslor"),
    *(({"options": options}, ConfigError, "options: got") for options in ("f", 3, {3: 1})),
    *(({"seed": seed}, ConfigError, "seed: got") for seed in ("x", -1, None, 1.5)),
    ({"late": "x"}, ConfigError, "late: got 'x'"),
    ({"late": {"1": 3}}, ConfigError, "expected client id -> Late"),
    ({"evidence": "x"}, ConfigError, "evidence: got 'x'"),
    ({"sent": [3]}, EvidenceError, "replies: got int"),
    ({"sent": [], "kind": "factor_delta"}, ConfigError, "in each Reply"),
    ({"sent": [], "evidence": {"1": []}}, ConfigError, "in each Reply"),
    ({"sent": 3}, EvidenceError, "replies: got int"),
    ({"late_updates": "drop"}, ConfigError, "late_updates 'drop'"),
    (
        {"state": {**START, "lm_head.weight": torch.ones(2, 2)}},
        UnsupportedAdapterError,
        r"lm_head\.weight",
    ),
    ({"state": ROTARY}, AdapterFormatError, r"rotary_emb\.inv_freq.*leave it out"),
    ({"state": INFINITE}, NonFiniteError, "."),
    ({"state": [START]}, AdapterFormatError, "type list; expected PEFT key names"),
]


@pytest.mark.parametrize(("arguments", "error", "message"), MISTAKES)
def test_the_callers_mistakes_raise(
    arguments: dict[str, Any], error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        play(**arguments)


def test_whole_numbers_are_ids() -> None:
    numbered = {int(client): reply for client, reply in SENT.items()}
    found = play(numbered, expected=range(1, 6)).record
    assert federated.untimed(found) == federated.untimed(play(expected=[*SENT]).record)


def test_the_arguments_of_the_adapter_reach_it() -> None:
    """alpha / sqrt(4) = 2 with alpha 4 is what the probe was made for.

    Alpha / 4 is another adapter.
    """
    assert not rejected(play(alpha=4, use_rslora=True).record)
    other = play(base_model="another/model").record
    assert all("another/model" in why for why in rejected(other).values())
    assert other.skipped
