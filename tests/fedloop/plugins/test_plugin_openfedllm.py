"""The hook before OpenFedLLM's global_aggregate, against our own function of the same behaviour."""

from __future__ import annotations

import re
from typing import Any

import pytest
import torch

from fedloop.defense.levels import ClientLevel, StepLevel
from fedloop.errors import ConfigError
from fedloop.plugins import rejected
from fedloop.plugins.openfedllm import before_aggregate, defended
from tests.helpers import openfedllm, plugged

CLIENTS = [0, 1, 2, 3]
COUNTS = [40, 50, 60, 70, 80]

State = dict[str, Any]


def local_dicts(state: State, malicious: tuple[int, ...] = (), seed: int = 0) -> list[Any]:
    """By client number, as in OpenFedLLM; client 4 took part in a former round and is stale."""
    changes = [plugged.delta(seed + 10 * client, client in malicious) for client in range(5)]
    return [{key: state[key] + change[key] for key in state} for change in changes]


def clone(state: State) -> State:
    return {key: value.clone() for key, value in state.items()}


def same(one: State, other: State, tolerance: float = 0.0) -> bool:
    return one.keys() == other.keys() and all(
        torch.allclose(one[key], other[key], rtol=0, atol=tolerance) for key in one
    )


def play(
    fed_alg: str,
    state: State,
    local: Any,
    clients: list[int],
    aggregate: Any = openfedllm.global_aggregate,
    counts: Any = COUNTS,
) -> State:
    """One first round; the arguments are copied, because the function writes into them."""
    fed_args = openfedllm.arguments(fed_alg, num_clients=5)
    return aggregate(
        fed_args,
        clone(state),
        local,
        list(counts),
        clients,
        0,
        **openfedllm.memories(fed_args, state),
    )[0]


@pytest.mark.parametrize("fed_alg", openfedllm.ALGORITHMS)
def test_with_honest_clients_every_algorithm_does_what_it_does_without_the_hook(
    fed_alg: str,
) -> None:
    state = plugged.global_state()
    local = local_dicts(state)
    hooked = defended(openfedllm.global_aggregate, plugged.defense(), alpha=plugged.ALPHA)
    assert same(
        play(fed_alg, state, local, CLIENTS, hooked), play(fed_alg, state, local, CLIENTS), 1e-6
    )


@pytest.mark.parametrize("bad", ["malicious", "nan"])
@pytest.mark.parametrize("fed_alg", openfedllm.ALGORITHMS)
def test_a_bad_client_moves_no_algorithm_and_scaling_its_count_alone_would_not_do(
    fed_alg: str, bad: str
) -> None:
    """Some algorithms ignore the counts, and zero times NaN is NaN."""
    state = plugged.global_state()
    local = local_dicts(state, malicious=(3,) if bad == "malicious" else ())
    if bad == "nan":
        next(iter(local[3].values()))[0, 0] = float("nan")
    hooked = defended(openfedllm.global_aggregate, plugged.defense(), alpha=plugged.ALPHA)
    without_it = play(fed_alg, state, local, CLIENTS[:3])
    assert same(play(fed_alg, state, local, CLIENTS, hooked), without_it, 1e-6)
    assert not same(play(fed_alg, state, local, CLIENTS), without_it, 1e-4)
    scaled_only = play(fed_alg, state, local, CLIENTS, counts=[40, 50, 60, 0, 80])
    reads_counts = fed_alg not in ("fedadagrad", "fedyogi", "fedadam")
    assert same(scaled_only, without_it, 1e-6) == (bad == "malicious" and reads_counts)


@pytest.mark.parametrize("fed_alg", openfedllm.ALGORITHMS)
def test_a_factor_of_a_half_counts_half_in_every_algorithm(fed_alg: str) -> None:
    """ClientLevel never rejects.

    The algorithms that ignore sample_num_list get its factors all the same.
    """
    state = plugged.global_state()
    local = local_dicts(state, malicious=(3,))
    defense, records = plugged.defense(ClientLevel()), []
    got = play(
        fed_alg,
        state,
        local,
        CLIENTS,
        defended(
            openfedllm.global_aggregate, defense, alpha=plugged.ALPHA, on_record=records.append
        ),
    )
    factors = [records[0].factors[str(client)] for client in CLIENTS]
    assert 0 < factors[3] < 0.1 < 0.9 < factors[0] < 1
    if fed_alg in ("fedadagrad", "fedyogi", "fedadam"):
        mean = {
            key: (
                sum(f * (local[c][key] - state[key]) for c, f in zip(CLIENTS, factors, strict=True))
                / sum(factors)
            )
            for key in state
        }
        expected = play(fed_alg, state, [{key: state[key] + mean[key] for key in state}], [0])
    else:
        expected = play(
            fed_alg,
            state,
            local,
            CLIENTS,
            counts=[factor * count for factor, count in zip(factors, COUNTS, strict=False)],
        )
    assert same(got, expected, 1e-5)
    assert not same(got, play(fed_alg, state, local, CLIENTS[:3]), 1e-7)


@pytest.mark.parametrize("fed_alg", openfedllm.ALGORITHMS)
def test_a_skipped_round_returns_the_former_global_dict_untouched(fed_alg: str) -> None:
    state = plugged.global_state()
    before, fed_args = clone(state), openfedllm.arguments(fed_alg, num_clients=5)
    memories = openfedllm.memories(fed_args, state)

    def never(*_: Any, **__: Any) -> Any:
        raise AssertionError("aggregated a skipped round")

    hooked = defended(never, plugged.defense(), alpha=plugged.ALPHA)
    result, variate = hooked(
        fed_args, state, local_dicts(state, (0, 1, 2, 3)), COUNTS, CLIENTS, 0, **memories
    )
    assert same(result, before)
    assert variate is memories["auxiliary_info"][0]


def test_before_aggregate_changes_nothing_that_it_was_given_and_copies_what_is_written_into() -> (
    None
):
    state = plugged.global_state()
    local, counts, clients = local_dicts(state, malicious=(1,)), list(COUNTS), list(CLIENTS)
    before, local_before = clone(state), [clone(one) for one in local]
    kept = before_aggregate(
        plugged.defense(),
        openfedllm.arguments("fedadam"),
        state,
        local,
        counts,
        clients,
        0,
        alpha=plugged.ALPHA,
    )
    global_dict, local_dict_list, sample_num_list, clients_this_round = kept.arguments
    assert clients_this_round == [0, 2, 3]
    assert sample_num_list == [40, 50, 60, 70, 80]
    assert (counts, clients) == (COUNTS, CLIENTS)
    for value in global_dict.values():
        value.fill_(7.0)
    assert same(state, before)
    assert all(same(one, other) for one, other in zip(local, local_before, strict=True))
    assert len(local_dict_list) == 5
    assert rejected(kept.record)["1"].startswith("judged malicious")


def test_the_defence_counts_rounds_and_goes_on_where_a_script_starts_again() -> None:
    state = plugged.global_state()
    defense = plugged.defense()
    arguments = (openfedllm.arguments(), state, local_dicts(state), COUNTS, CLIENTS)
    assert [
        before_aggregate(defense, *arguments, number, alpha=plugged.ALPHA).record.round
        for number in (0, 1, 0)
    ] == [1, 2, 3]


def test_keys_with_the_adapters_name_are_put_under_those_of_the_global_dict() -> None:
    """Without that, global_aggregate would end with a KeyError."""
    state = plugged.global_state()
    local = local_dicts(state)
    named = [
        (
            {key.replace(".weight", ".default.weight"): value for key, value in one.items()}
            if c == 1
            else one
        )
        for c, one in enumerate(local)
    ]
    hooked = defended(openfedllm.global_aggregate, plugged.defense(), alpha=plugged.ALPHA)
    assert same(
        play("fedavg", state, named, CLIENTS, hooked), play("fedavg", state, local, CLIENTS), 1e-6
    )
    with pytest.raises(KeyError):
        play("fedavg", state, named, CLIENTS)


@pytest.mark.parametrize(
    ("variate", "why"),
    [
        (
            lambda one: {key: value + float("nan") for key, value in one.items()},
            "control variate of .* holds NaN",
        ),
        (lambda one: dict(list(one.items())[1:]), "control variate of .* is missing"),
        (lambda one: {key: value[:1] for key, value in one.items()}, "another shape"),
        (lambda one: None, "control variate of type NoneType"),
        (lambda one: dict.fromkeys(one, 0.0), "is missing or has another shape"),
    ],
    ids=["nan", "missing key", "shape", "none", "no tensor"],
)
def test_a_client_with_a_broken_scaffold_variate_is_rejected(variate: Any, why: str) -> None:
    state = plugged.global_state()
    fed_args, records = openfedllm.arguments("scaffold", num_clients=5), []
    memories = openfedllm.memories(fed_args, state)
    memories["auxiliary_info"][1][2] = variate(memories["auxiliary_info"][1][2])
    hooked = defended(
        openfedllm.global_aggregate,
        plugged.defense(),
        alpha=plugged.ALPHA,
        on_record=records.append,
    )
    _, auxiliary = hooked(
        fed_args, clone(state), local_dicts(state), COUNTS, CLIENTS, 0, **memories
    )
    assert list(rejected(records[0])) == ["2"]
    assert pytest.approx(0) == sum(float(value.abs().sum()) for value in auxiliary.values())
    assert re.search(why, records[0].reasons["2"])


def test_scaffold_without_its_variates_is_a_mistake_of_the_callers() -> None:
    state = plugged.global_state()
    with pytest.raises(ConfigError, match="no auxiliary_info"):
        before_aggregate(
            plugged.defense(),
            openfedllm.arguments("scaffold"),
            state,
            local_dicts(state),
            COUNTS,
            CLIENTS,
            0,
            alpha=plugged.ALPHA,
        )


def test_evidence_is_given_by_client_number() -> None:
    state = plugged.global_state()
    evidence = {client: [plugged.delta(10 * client, client == 3)] for client in CLIENTS}
    arguments = (openfedllm.arguments(), state, local_dicts(state, (3,)), COUNTS, CLIENTS, 0)
    record = before_aggregate(
        plugged.defense(StepLevel()), *arguments, alpha=plugged.ALPHA, evidence=evidence
    ).record
    assert not record.reasons
    assert record.factors["3"] < 0.1 < 0.9 < record.factors["0"]
    record = before_aggregate(plugged.defense(StepLevel()), *arguments, alpha=plugged.ALPHA).record
    assert all("missing evidence" in why for why in record.reasons.values())
