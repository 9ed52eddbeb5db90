"""The wrapper of Flower strategies.

Stock ones, given hand-made messages, and one whole run in this process.
"""

from __future__ import annotations

import copy
import io
import re
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from flwr.app import ArrayRecord, Message, MetricRecord, RecordDict
from flwr.serverapp.exception import AppExitException
from flwr.serverapp.strategy import (
    DifferentialPrivacyServerSideFixedClipping,
    FedAdagrad,
    FedAdam,
    FedAvg,
    FedAvgM,
    FedMedian,
    FedProx,
    FedTrimmedAvg,
    FedYogi,
    Krum,
    MultiKrum,
    Strategy,
)

from fedloop.defense.levels import ClientLevel, StepLevel
from fedloop.errors import ConfigError, EvidenceError
from fedloop.plugins import rejected
from fedloop.plugins.flower import STEP, defended
from tests.helpers import plugged

State = dict[str, Any]
NAN = float("nan")
STRATEGIES: dict[str, Callable[[], Strategy]] = {
    "FedAvg": FedAvg,
    "FedAvgM": lambda: FedAvgM(server_learning_rate=0.5, server_momentum=0.9),
    "FedProx": lambda: FedProx(proximal_mu=0.1),
    "FedAdam": FedAdam,
    "FedAdagrad": FedAdagrad,
    "FedYogi": FedYogi,
    "FedMedian": FedMedian,
    "FedTrimmedAvg": lambda: FedTrimmedAvg(beta=0.34),
    "Krum": lambda: Krum(num_malicious_nodes=1),
    "MultiKrum": lambda: MultiKrum(num_malicious_nodes=1, num_nodes_to_select=2),
    "clipped": lambda: DifferentialPrivacyServerSideFixedClipping(FedAvg(), 0.0, 50.0, 5),
}


def honest(
    state: State, clients: tuple[str, ...] = plugged.CLIENTS
) -> list[tuple[str, Any, State]]:
    changes = {client: plugged.delta(10 * int(client)) for client in clients}
    return [
        (client, 30 + 10 * int(client), {key: state[key] + change[key] for key in state})
        for client, change in changes.items()
    ]


def malicious(state: State, client: str) -> tuple[str, int, State]:
    return client, 500, {key: state[key] + change for key, change in plugged.delta(7, True).items()}


START = plugged.global_state()
ARRAYS = plugged.arrays_record(START)


def wrapped(strategy: Strategy | None = None, defense: Any = None) -> tuple[Strategy, list[Any]]:
    records: list[Any] = []
    options: dict[str, Any] = {"alpha": plugged.ALPHA, "on_record": records.append}
    return defended(strategy or FedAvg(), defense or plugged.defense(), **options), records


def played(sent: Any, strategy: Strategy | None = None, defense: Any = None) -> tuple[Any, Any]:
    """The arrays after a defended round from START, and its record."""
    defending, records = wrapped(strategy, defense)
    result, _ = plugged.flower_round(defending, 1, ARRAYS, sent)
    return result, records[0]


def undefended(sent: Any, strategy: Strategy | None = None) -> Any:
    return plugged.flower_round(strategy or FedAvg(), 1, ARRAYS, sent)[0]


def close(one: ArrayRecord, other: ArrayRecord, tolerance: float = 1e-6) -> bool:
    return list(one) == list(other) and all(
        np.allclose(one[key].numpy(), other[key].numpy(), rtol=0, atol=tolerance) for key in one
    )


@pytest.mark.parametrize("name", STRATEGIES)
def test_a_stock_strategy_does_with_the_accepted_what_it_does_without_the_wrapper(
    name: str,
) -> None:
    """Two rounds, so that momentum and second moments count.

    Without bad clients, and with two, the inner strategy sees the same.
    """
    ways = [STRATEGIES[name](), *(wrapped(STRATEGIES[name]())[0] for _ in range(2))]
    arrays = [ARRAYS] * 3
    for number in (1, 2):
        before = plugged.tensors_of(arrays[0])
        good = honest(before, ("1", "2", "3"))
        infinite = ("5", 40, {key: value / 0 for key, value in START.items()})
        bad = [malicious(before, "4"), infinite]
        sent = [good, good, [*bad, *good]]
        rounds = zip(ways, arrays, sent, strict=True)
        arrays = [plugged.flower_round(way, number, *one)[0] for way, *one in rounds]
        assert close(arrays[0], arrays[1], 1e-5)
        assert close(arrays[1], arrays[2], 1e-5)
        assert all(array.dtype == "float32" for array in arrays[2].values())
    assert not close(arrays[2], ARRAYS, 1e-3)


@pytest.mark.parametrize("name", ["FedAdam", "FedTrimmedAvg"])
def test_without_the_wrapper_bad_replies_spoil_the_model_or_end_the_run(name: str) -> None:
    """The negative control of the test above.

    FedTrimmedAvg can trim NaN, and is moved by a malicious reply all the same.
    """
    good, nan = honest(START, ("1", "2", "3")), {key: value * NAN for key, value in START.items()}
    spoilt = undefended([*good, ("4", 40, nan)], STRATEGIES[name]())
    has_nan = any(np.isnan(array.numpy()).any() for array in spoilt.values())
    assert has_nan == (name != "FedTrimmedAvg")
    moved = undefended([*good, malicious(START, "4")], STRATEGIES[name]())
    assert not close(moved, undefended(good, STRATEGIES[name]()), 1e-3)
    with pytest.raises(AppExitException):
        undefended([*good, ("4", 40, dict(list(START.items())[2:]))], STRATEGIES[name]())


@pytest.mark.parametrize("name", ["FedAdam", "FedTrimmedAvg"])
def test_replies_are_left_as_they_came_although_strategies_take_arrays_out_of_them(
    name: str,
) -> None:
    messages = [plugged.reply(*one) for one in honest(START)]
    before = [copy.deepcopy(message.content) for message in messages]
    assert not played(messages, STRATEGIES[name]())[1].reasons
    assert [message.content for message in messages] == before


class Watching(FedAvg):
    """Keeps what it is given to aggregate."""

    def aggregate_train(self, server_round: int, replies: Any) -> Any:
        self.seen = list(replies)
        return super().aggregate_train(server_round, self.seen)


def test_the_strategy_gets_scaled_counts_in_the_order_of_the_clients_and_not_the_rejected() -> None:
    inner = Watching()
    sent = [*reversed(honest(START, ("1", "2", "3"))), malicious(START, "4"), ("5", 40, {})]
    _, record = played(sent, inner, plugged.defense(ClientLevel()))
    assert [message.metadata.src_node_id for message in inner.seen] == [1, 2, 3, 4]
    factors, counted = record.factors, record.num_examples
    assert counted["4"] == 150  # three times the median
    assert 0 < factors["4"] < 0.1
    assert [message.content["metrics"]["num-examples"] for message in inner.seen] == [
        factors[client] * counted[client] for client in "1234"
    ]


def test_the_strategys_own_name_for_the_count_is_used() -> None:
    messages = [plugged.reply(client, 1, of, size=count) for client, count, of in honest(START)]
    _, record = played(messages, FedAvg(weighted_by_key="size"))
    assert record.num_examples == {"1": 40, "2": 50, "3": 60, "4": 70, "5": 80}


@pytest.mark.parametrize(
    "sent",
    [[], [malicious(START, client) for client in plugged.CLIENTS], [plugged.failure("1")]],
    ids=["nothing", "malicious", "an error"],
)
def test_a_skipped_round_returns_the_arrays_that_were_sent_and_does_not_ask_the_strategy(
    sent: Any,
) -> None:
    strategy, records = wrapped(FedAdam())
    result, metrics = plugged.flower_round(strategy, 1, ARRAYS, sent)
    assert result is ARRAYS
    assert metrics is None
    assert records[-1].skipped


MISSING = dict.fromkeys(("4", "5"), "missing: asked and sent nothing")
FLOOD = [plugged.reply("4", 40, plugged.delta(seed), other=1.0) for seed in range(9)]


@pytest.mark.parametrize(
    ("sent", "reasons"),
    [
        ([*honest(START, ("1", "2", "3")), plugged.failure("4")], MISSING),
        (
            [*honest(START), ("9", 40, START)],
            {"9": "not asked: nobody asked this client in this round"},
        ),
        # nine replies with other metrics do not outvote three honest ones
        ([*FLOOD, *honest(START, ("1", "2", "3"))], {**MISSING, "4": "duplicate: 9 updates"}),
    ],
    ids=["errors and silence", "nobody asked", "a flood"],
)
def test_who_is_missing_not_asked_or_sends_too_much_is_refused(sent: Any, reasons: Any) -> None:
    _, record = played(sent)
    assert record.reasons.keys() == reasons.keys() == rejected(record).keys()
    assert all(record.reasons[client].startswith(why) for client, why in reasons.items())
    assert not record.skipped


def content(**records: Any) -> Message:
    return Message(RecordDict(records), reply_to=plugged.instruction("4"))


def _damaged(**changes: Callable[[Any], Any]) -> Any:
    """A reply of whose first array these attributes are changed."""
    arrays = plugged.arrays_record(START)
    first = next(iter(arrays.values()))
    for name, change in changes.items():
        setattr(first, name, change(getattr(first, name)))
    return content(arrays=arrays, metrics=ONE)


def _header_of_a_petabyte() -> bytes:
    file = io.BytesIO()
    np.lib.format.write_array_header_1_0(
        file, {"descr": "<f4", "fortran_order": False, "shape": (1 << 48,)}
    )
    return file.getvalue()


ONE = MetricRecord({"num-examples": 40})
SENT = plugged.arrays_record(plugged.delta(1))
ODD: dict[str, tuple[Callable[[], Message], str]] = {
    "empty": (lambda: content(), "metrics"),
    "no arrays": (lambda: content(metrics=ONE), r"ArrayRecords \[\]"),
    "two of arrays": (lambda: content(a=SENT, b=SENT, metrics=ONE), "ArrayRecords"),
    "no metrics": (lambda: content(arrays=SENT), "metrics"),
    "two of metrics": (lambda: content(arrays=SENT, metrics=ONE, more=ONE), "metrics"),
    "other metrics": (lambda: plugged.reply("4", 40, plugged.delta(1), loss=1.0), "metrics"),
    "a list for a count": (
        lambda: content(arrays=SENT, metrics=MetricRecord({"num-examples": [40]})),
        "metrics",
    ),
    "truncated": (lambda: _damaged(data=lambda data: data[:-10]), "Error"),
    "no bytes": (lambda: _damaged(data=lambda _: b""), "Error"),
    "pickled": (lambda: _damaged(data=lambda _: b"\x80\x04N."), "Error"),
    "a petabyte": (lambda: _damaged(data=lambda _: _header_of_a_petabyte()), "Error"),
    "another serialisation": (lambda: _damaged(stype=lambda _: "x"), "TypeError"),
    "evidence by another name": (
        lambda: content(arrays=SENT, metrics=ONE, **{f"{STEP}first": SENT}),
        "ValueError",
    ),
}


@pytest.mark.parametrize("name", ODD)
def test_a_reply_that_would_end_the_run_is_refused_with_a_reason_and_the_round_goes_on(
    name: str,
) -> None:
    odd, why = ODD[name]
    good = honest(START, ("1", "2", "3"))
    result, record = played([*good, odd()])
    assert set(record.reasons) == {"4", "5"}
    assert re.search(why, record.reasons["4"])
    assert close(result, undefended(good))


def test_other_float_types_are_widened_for_the_strategy_and_the_result_has_the_global_ones() -> (
    None
):
    sent, inner = honest(START), Watching()
    sent[1] = (*sent[1][:2], {key: value.double() for key, value in sent[1][2].items()})
    sent[2] = (*sent[2][:2], {key: value.half() for key, value in sent[2][2].items()})
    result, record = played(sent, inner)
    assert not record.reasons
    seen = [next(iter(message.content["arrays"].values())).dtype for message in inner.seen]
    assert seen == ["float32", "float64", *["float32"] * 3]
    assert {array.dtype for array in result.values()} == {"float32"}
    assert close(result, undefended(honest(START)), 1e-2)


class Spoiling(FedAvg):
    """Returns what it is told to, whatever came."""

    def __init__(self, result: ArrayRecord | None) -> None:
        super().__init__()
        self.result = result

    def aggregate_train(self, server_round: int, replies: Any) -> Any:
        return self.result, MetricRecord({"loss": 1.0})


def test_an_unusable_result_of_the_strategy_is_a_skipped_round_and_no_result_is_none() -> None:
    infinite = plugged.arrays_record({key: value / 0 for key, value in START.items()})
    for spoiled in (infinite, ArrayRecord()):
        result, record = played(honest(START), Spoiling(spoiled))
        assert result is ARRAYS
        assert record.skipped
        assert record.note.startswith("skipped: the strategy's result is unusable")
    result, record = played(honest(START), Spoiling(None))
    assert result is None
    assert not record.skipped


def test_a_strategy_that_raises_leaves_the_defence_as_it_was(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    defense = plugged.defense()
    defending, _ = wrapped(FedAvg(), defense)
    former = defense.state_dict()
    monkeypatch.setattr(FedAvg, "aggregate_train", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        plugged.flower_round(defending, 1, ARRAYS, honest(START))
    monkeypatch.undo()
    assert defense.state_dict() == former
    plugged.flower_round(defending, 1, ARRAYS, honest(START))
    assert defense.round == 1


def test_evidence_is_sent_in_array_records_of_its_own_which_the_strategy_does_not_see() -> None:
    inner, messages = Watching(), [plugged.reply(*honest(START, ("4",))[0])]
    for client, count, of in honest(START, ("1", "2", "3")):
        change = plugged.delta(10 * int(client))
        records: dict[str, Any] = {"metrics": MetricRecord({"num-examples": count})}
        records["arrays"] = plugged.arrays_record(of)
        for number in (2, 12, 6):
            step = {key: number / 12 * value for key, value in change.items()}
            records[f"{STEP}{number}"] = plugged.arrays_record(step)
        messages.append(Message(RecordDict(records), reply_to=plugged.instruction(client)))
    _, record = played(messages, inner, plugged.defense(StepLevel()))
    assert "missing evidence" in record.reasons["4"]
    # 2, 6, 12: in the order of the numbers the last one is the update
    assert "1" not in record.reasons
    assert [set(message.content) for message in inner.seen] == [{"arrays", "metrics"}] * 3


def test_evaluation_goes_on_when_one_node_reports_other_metrics() -> None:
    reported = {"1": {"loss": 1.0}, "2": {"loss": 3.0}, "3": {"lost": 1.0}}
    messages = [
        Message(
            RecordDict({"metrics": MetricRecord({"num-examples": 10, **metrics})}),
            reply_to=plugged.instruction(client),
        )
        for client, metrics in reported.items()
    ]
    messages.append(plugged.failure("4"))
    with pytest.raises(AppExitException):
        FedAvg().aggregate_evaluate(1, messages)
    metrics = wrapped()[0].aggregate_evaluate(1, messages)
    assert metrics is not None
    assert metrics["loss"] == pytest.approx(2.0)


def test_flower_counts_from_1_after_every_start_and_the_defence_goes_on() -> None:
    strategy, records = wrapped()
    with pytest.raises(EvidenceError, match="without a configure_train"):
        strategy.aggregate_train(1, [])
    for number in (1, 2, 1, 2):
        plugged.flower_round(strategy, number, ARRAYS, honest(START))
    assert [record.round for record in records] == [1, 2, 3, 4]
    with pytest.raises(EvidenceError, match="once for every round"):
        strategy.aggregate_train(2, [plugged.reply(*one) for one in honest(START)])


def test_a_strategy_that_starts_in_its_own_way_is_refused() -> None:
    own = type("Own", (FedAvg,), {"start": lambda self, *_, **__: None})
    with pytest.raises(ConfigError, match="Own has its own start"):
        wrapped(own())
