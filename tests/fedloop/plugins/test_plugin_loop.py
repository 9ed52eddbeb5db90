"""defend_round: what it reads, what it refuses, and what the next global state dict looks like."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import array_shapes, arrays

from fedloop import Defense
from fedloop.defense.levels import ShadowLevel, StepLevel
from fedloop.defense.screening import LONGEST_REASON
from fedloop.errors import AggregationError, ConfigError, EvidenceError
from fedloop.plugins import Late, Reply, defend_round, rejected
from loraprobe.errors import AdapterFormatError, NonFiniteError, UnsupportedAdapterError
from tests.helpers import federated, plugged

State = dict[str, Any]


def replies(
    state: State, seed: int = 0, clients: tuple[str, ...] = plugged.CLIENTS
) -> dict[str, tuple[int, State]]:
    """What honest clients send."""
    changes = {client: plugged.delta(seed + 10 * index) for index, client in enumerate(clients)}
    return {
        client: (40, {key: state[key] + change[key] for key in state})
        for client, change in changes.items()
    }


def play(sent: Any, state: State, number: int = 1, **options: Any) -> Any:
    arguments = {"alpha": plugged.ALPHA, **options}
    return defend_round(plugged.defense(), number, sent, state, **arguments)


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
    state = plugged.global_state()
    plain = play(replies(state), state)
    renamed = {
        client: (count, {RENAMED[clients](key): value for key, value in sent.items()})
        for client, (count, sent) in replies(state).items()
    }
    done = play(renamed, {RENAMED[server](key): value for key, value in state.items()})
    assert list(done.state) == [RENAMED[server](key) for key in state]
    assert not rejected(done.record)
    assert all(
        torch.equal(done.state[RENAMED[server](key)], value) for key, value in plain.state.items()
    )


@pytest.mark.parametrize(
    "dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16], ids=str
)
def test_the_new_state_has_the_types_of_the_former_one_and_leaves_it_alone(
    dtype: torch.dtype,
) -> None:
    state = {key: value.to(dtype) for key, value in plugged.global_state().items()}
    before = {key: value.clone() for key, value in state.items()}
    exact = play(replies(plugged.global_state()), plugged.global_state()).state
    done = play(replies(state), state)
    assert not done.record.skipped
    assert {value.dtype for value in done.state.values()} == {dtype}
    assert all(
        torch.allclose(done.state[key].float(), exact[key], rtol=0.02, atol=0.05) for key in state
    )
    assert all(torch.equal(state[key], before[key]) for key in state)


@pytest.mark.parametrize("dtype", [np.float64, np.float32, np.float16])
def test_arrays_in_arrays_out(dtype: Any) -> None:
    state = {
        key: value.astype(dtype) for key, value in plugged.arrays_of(plugged.global_state()).items()
    }
    sent = {
        client: (count, plugged.arrays_of(of))
        for client, (count, of) in replies(plugged.global_state()).items()
    }
    for array in state.values():
        array.setflags(write=False)  # as they come out of a buffer
    done = play(sent, state)
    assert not done.record.skipped
    assert {value.dtype for value in done.state.values()} == {np.dtype(dtype)}
    assert all(not np.array_equal(done.state[key], state[key]) for key in state)


def test_float64_states_keep_their_precision() -> None:
    state = {key: value.double() + 1e-12 for key, value in plugged.global_state().items()}
    done = play(
        {client: (1, {key: value.clone() for key, value in state.items()}) for client in ("1",)},
        state,
    )
    assert all(torch.equal(done.state[key], value) for key, value in state.items())


def test_who_is_not_trusted_can_stand_in_the_mean_as_having_changed_nothing() -> None:
    state = plugged.global_state()
    sent = replies(state)
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
    "whole numbers": {key: value.long() for key, value in plugged.global_state().items()},
    "text in arrays": {key: np.array([["x"]]) for key in plugged.global_state()},
    "vectors": {key: value.reshape(-1) for key, value in plugged.global_state().items()},
    "scalars": {key: value.sum() for key, value in plugged.global_state().items()},
    "no numbers": {key: value[:0] for key, value in plugged.global_state().items()},
    "turned": {key: value.T for key, value in plugged.global_state().items()},
    "sparse": {key: value.to_sparse() for key, value in plugged.global_state().items()},
    "without storage": {key: value.to("meta") for key, value in plugged.global_state().items()},
    "terabytes that are one number": {
        key: torch.ones(1, 1).expand(1 << 20, 1 << 20) for key in plugged.global_state()
    },
    "the same key twice": {
        prefix + key: value
        for prefix in ("", "x.")
        for key, value in plugged.global_state().items()
    },
    "an error": KeyError("arrays"),
    "out of memory": MemoryError("a header said so"),
}


@pytest.mark.parametrize("name", JUNK)
def test_what_cannot_be_read_is_refused_with_a_reason_and_the_round_goes_on(name: str) -> None:
    state = plugged.global_state()
    honest = replies(state, clients=("1", "2", "3"))
    done = play({**honest, "4": (40, JUNK[name])}, state)
    assert list(done.record.reasons) == ["4"]
    assert 10 < len(done.record.reasons["4"]) <= LONGEST_REASON
    assert "Error" in done.record.reasons["4"] or "Mismatch" in done.record.reasons["4"]
    assert done.weights["4"] == 0
    alone = play(honest, state)
    assert all(torch.equal(done.state[key], alone.state[key]) for key in state)


VALUES = st.one_of(
    st.none(),
    st.integers(),
    st.floats(),
    st.text(max_size=5),
    st.lists(st.integers(), max_size=2),
    arrays(
        st.sampled_from([np.float32, np.float16, np.int64, np.bool_, np.complex64, "U3"]),
        array_shapes(min_dims=0, max_dims=3, max_side=4),
    ),
    st.sampled_from(
        [
            torch.zeros(0),
            torch.ones(4, 32),
            torch.ones(4, 32).to_sparse(),
            torch.full((4, 32), float("inf")),
            torch.ones(2, 2).bool(),
        ]
    ),
)
KEYS = st.one_of(
    st.sampled_from(
        [*plugged.global_state(), "lm_head.weight", "a.lora_A.weight", ".lora_B.weight"]
    ),
    st.text(max_size=8),
    st.integers(),
)
STATES = st.one_of(VALUES, st.dictionaries(KEYS, VALUES, max_size=9))


@settings(max_examples=150, deadline=None)
@given(
    count=st.one_of(st.integers(), st.floats(), st.none(), st.text(max_size=3)),
    state=STATES,
    steps=st.one_of(VALUES, st.lists(STATES, max_size=3)),
)
def test_no_reply_whatsoever_ends_the_round_or_gets_a_weight(
    count: Any, state: Any, steps: Any
) -> None:
    start = plugged.global_state()
    honest = [
        Reply(client, number, of)
        for client, (number, of) in replies(start, clients=("1", "2", "3")).items()
    ]
    done = play([*honest, Reply("4", count, state, steps)], start)
    assert done.weights["4"] == 0
    assert list(done.record.reasons) == ["4"]
    assert all(torch.isfinite(value).all() for value in done.state.values())


@pytest.mark.parametrize(
    "count",
    [None, "many", 0, -3, True, float("nan"), float("inf"), 2.5, [4], 2**60, np.float32(2.5)],
    ids=str,
)
def test_a_count_that_is_no_whole_number_is_refused(count: Any) -> None:
    state = plugged.global_state()
    sent = replies(state)
    done = play({**sent, "4": (count, sent["4"][1])}, state)
    assert "num_examples" in done.record.reasons["4"]


@pytest.mark.parametrize("count", [40.0, np.int64(40), np.float32(40), np.uint8(40)], ids=repr)
def test_a_whole_number_of_another_type_counts(count: Any) -> None:
    state = plugged.global_state()
    sent = replies(state)
    done = play({**sent, "4": (count, sent["4"][1])}, state)
    assert not done.record.reasons
    assert done.weights["4"] == pytest.approx(0.2)


def test_clients_that_were_asked_and_are_not_there_are_missing() -> None:
    state = plugged.global_state()
    record = play(
        replies(state, clients=("1", "2", "3")), state, expected=["1", "2", "3", "4"]
    ).record
    assert rejected(record) == {"4": "missing: asked and sent nothing"}


def test_a_client_with_one_unreadable_reply_and_one_good_one_sent_two() -> None:
    state = plugged.global_state()
    good = [Reply(client, count, sent) for client, (count, sent) in replies(state).items()]
    record = play([*good, Reply("2", 40, None)], state).record
    assert "duplicate: 2" in record.reasons["2"]


def test_rejected_names_the_refused_the_malicious_and_nobody_else() -> None:
    state = plugged.global_state()
    sent = replies(state)
    sent["2"] = (40, {key: state[key] + change for key, change in plugged.delta(77, True).items()})
    sent["3"] = (40, {})
    record = play(sent, state).record
    assert set(rejected(record)) == {"2", "3"}
    assert rejected(record)["2"].startswith("judged malicious by")
    assert rejected(record)["3"] == record.reasons["3"]


# --- rules


def test_a_rule_that_cannot_be_applied_skips_the_round_and_says_why() -> None:
    state = plugged.global_state()
    done = play(replies(state), state, rule="dnc", options={"f": 2, "removed": 9.0})
    assert done.record.skipped
    assert done.weights == {}
    assert "removed=9.0" in done.record.note
    assert all(done.state[key] is state[key] for key in state)


def test_a_sum_too_large_for_the_states_type_skips_the_round() -> None:
    state = {key: value.half() for key, value in plugged.global_state().items()}
    large = {key: torch.full(value.shape, 1e5) for key, value in state.items()}
    done = defend_round(
        plugged.Defense(None, None), 1, {"1": (1, large)}, state, alpha=plugged.ALPHA
    )
    assert done.record.skipped
    assert "infinite" in done.record.note
    arrays = plugged.arrays_of(state)
    done = defend_round(
        plugged.Defense(None, None), 1, {"1": (1, large)}, arrays, alpha=plugged.ALPHA
    )
    assert done.record.skipped


# --- the caller's mistakes


def test_the_callers_mistakes_raise() -> None:
    state = plugged.global_state()
    sent = replies(state)
    with pytest.raises(AggregationError, match="mean, median"):
        play(sent, state, rule="average")
    for wrong in ({b"1": sent["1"]}, {None: sent["1"]}, {"1": None}, {"1": (*sent["1"], {})}):
        with pytest.raises(EvidenceError):
            play(wrong, state)
    numbered = {int(client): reply for client, reply in sent.items()}
    assert federated.untimed(
        play(numbered, state, expected=range(1, 6)).record
    ) == federated.untimed(play(sent, state, expected=["1", "2", "3", "4", "5"]).record)
    for alpha in (None, "16", 0, True):
        with pytest.raises(ConfigError, match="alpha"):
            play(sent, state, alpha=alpha)
    with pytest.raises(ConfigError, match="kind 'delta'"):
        play(sent, state, kind="delta")
    with pytest.raises(UnsupportedAdapterError, match=r"lm_head\.weight"):
        play(sent, {**state, "lm_head.weight": torch.ones(2, 2)})
    with pytest.raises(AdapterFormatError, match=r"rotary_emb\.inv_freq.*leave it out"):
        play(sent, {**state, "model.rotary_emb.inv_freq": torch.ones(2)})
    with pytest.raises(NonFiniteError):
        play(sent, {key: value / 0 for key, value in state.items()})
    with pytest.raises(ConfigError, match="use_rslor"):
        play(sent, state, use_rslor=True)
    with pytest.raises(AdapterFormatError, match="type list; expected PEFT key names"):
        play(sent, [state])


def test_the_arguments_of_the_adapter_reach_it() -> None:
    """alpha / sqrt(4) = 2 with alpha 4 is what the probe was made for.

    Alpha / 4 is another adapter.
    """
    state = plugged.global_state()
    done = defend_round(plugged.defense(), 1, replies(state), state, alpha=4, use_rslora=True)
    assert not rejected(done.record)
    other = defend_round(
        plugged.defense(), 1, replies(state), state, alpha=plugged.ALPHA, base_model="another/model"
    )
    assert all("another/model" in why for why in rejected(other.record).values())
    assert other.record.skipped


# --- evidence


def evidence_of(
    changes: dict[str, State], level: Any, malicious: tuple[str, ...] = ()
) -> dict[str, list[State]]:
    """What clients send besides: the way to their update, or shadow steps of their class."""
    if isinstance(level, StepLevel):
        return {
            client: [{key: share * value for key, value in change.items()} for share in (0.5, 1.0)]
            for client, change in changes.items()
        }
    return {
        client: [
            plugged.delta(900 + 10 * int(client) + step, client in malicious) for step in range(2)
        ]
        for client in changes
    }


@pytest.mark.parametrize("level", [StepLevel(), ShadowLevel()], ids=["step", "shadow"])
def test_levels_that_read_evidence_get_it(level: Any) -> None:
    state = plugged.global_state()
    changes = {
        client: plugged.delta(10 * index, client == "5")
        for index, client in enumerate(plugged.CLIENTS)
    }
    sent = {
        client: (40, {key: state[key] + change[key] for key in state})
        for client, change in changes.items()
    }
    evidence = evidence_of(changes, level, ("5",))
    record = defend_round(
        plugged.defense(level), 1, sent, state, alpha=plugged.ALPHA, evidence=evidence
    ).record
    assert not record.reasons
    assert record.factors["5"] < 0.1 < 0.9 < record.factors["1"]
    assert all(len(scores) == 2 for scores in record.scores.values())
    without = {client: steps for client, steps in evidence.items() if client != "1"}
    record = defend_round(
        plugged.defense(level), 1, sent, state, alpha=plugged.ALPHA, evidence=without
    ).record
    assert "missing evidence" in record.reasons["1"]


@pytest.mark.parametrize(
    ("steps", "why"),
    [
        (5, "steps of type int"),
        (None, "steps of type NoneType"),
        ([None], "state dict of type NoneType"),
        ("ab", "state dict of type str"),
        ([{"a": np.ones((2, 2))}], "not a LoRA factor"),
        ([plugged.delta(3)] * 4, "got 4 steps of evidence; expected at most 3"),
        ([plugged.delta(3)] * 5000, "got 4 steps of evidence; expected at most 3"),
        ([plugged.delta(3)], "the last step is not the submitted update"),
    ],
    ids=[
        *"number none nothing text".split(),
        "other keys",
        "too many",
        "far too many",
        "another trajectory",
    ],
)
def test_evidence_that_cannot_be_used_is_a_reason(steps: Any, why: str) -> None:
    state = plugged.global_state()
    sent = [Reply(client, count, of) for client, (count, of) in replies(state).items()]
    odd = Reply(
        "6", 40, {key: state[key] + change for key, change in plugged.delta(60).items()}, steps
    )
    record = defend_round(
        plugged.defense(StepLevel(), max_steps=3), 1, [*sent, odd], state, alpha=plugged.ALPHA
    ).record
    assert why in record.reasons["6"]


@pytest.mark.parametrize("late_updates", ["refuse", "count"])
def test_a_late_update_is_refused_or_counts_as_the_change_that_it_was(late_updates: Any) -> None:
    start = plugged.global_state()
    later = {key: value + 1 for key, value in start.items()}
    sent = replies(later, clients=("a", "slow"))
    overdue = {
        client: Late(*replies(start, clients=("a",))["a"], start) for client in ("a", "slow")
    }
    overdue["slow"] = Late(*replies(start, 500, clients=("slow",))["slow"], start)
    done = defend_round(
        Defense(None),
        7,
        {"a": sent["a"]},
        later,
        alpha=plugged.ALPHA,
        expected=["a"],
        late=overdue,
        late_updates=late_updates,
    )
    if late_updates == "refuse":
        assert "late: an update of an earlier round" in done.record.reasons["slow"]
        assert dict(done.weights) == {"a": 1.0, "slow": 0.0}
        return
    assert dict(done.weights) == {"a": 0.5, "slow": 0.5}
    for key, value in later.items():
        changes = sent["a"][1][key] - value, overdue["slow"].state[key] - start[key]
        assert torch.allclose(done.state[key], value + sum(changes) / 2, atol=1e-6)


def test_a_wrong_option_for_late_updates_is_said() -> None:
    with pytest.raises(ConfigError, match="late_updates 'drop'"):
        play(replies(plugged.global_state()), plugged.global_state(), late_updates="drop")
