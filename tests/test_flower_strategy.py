"""The Flower engine against the in-process one, and against clients that send anything but what was agreed on.

Messages are Flower's own and go through its serialisation; the grid and the nodes are in this process (`flowered`)."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from federated import Files, defended, same_tree, settings
from flowered import Deployment, FakeGrid, Sent, records
from flwr.app import Array, ArrayRecord, ConfigRecord, Error, Message, MetricRecord, RecordDict
from flwr.supercore.inflatable.inflatable_utils import inflate_object_from_contents

from fedloop.checkpoint import load_checkpoint
from fedloop.errors import ConfigError, EngineError, StateError
from fedloop.flower import strategy as module
from fedloop.rounds import RunResult, simulate
from fedloop.types import RoundRecord
from loraprobe.adapter import pack
from loraprobe.peft_io import load_adapter


@pytest.fixture(autouse=True)
def _impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_POLL", 0.001)


def outcome(record: RoundRecord) -> tuple[Any, ...]:
    """What both engines have to agree on."""
    return (
        record.round,
        record.scores,
        record.factors,
        record.weights,
        record.reasons,
        record.num_examples,
        record.losses,
        record.metrics,
        record.skipped,
    )


def vector(result: RunResult) -> torch.Tensor:
    return pack(result.adapter)[0]


# --- the same run as in one process ----------------------------------------------------------------------------------------------------

EXPERIMENTS: dict[str, Callable[[Files], dict[str, Any]]] = {
    "undefended": lambda files: {},
    "step": lambda files: {"defense": defended(files, "step")},
    "shadow": lambda files: {"defense": defended(files, "shadow"), "training": {"shadow_lr": 1e-3}},
    "shadow gradient": lambda files: {"defense": defended(files, "shadow", evidence="shadow_gradient")},
    "evidence": lambda files: {"defense": defended(files, "evidence", min_evidence=1, audit_interval=2), "rounds": 3},
    "cumulative, sampled, foolsgold, fedadam": lambda files: {
        "defense": defended(files, "cumulative"), "clients": {"sampled": 3}, "rounds": 3,
        "aggregation": {"rule": "foolsgold", "server": "fedadam", "server_options": {"lr": 0.01}},
    },
    "fedprox": lambda files: {"aggregation": {"server": "fedprox"}, "training": {"proximal": 10.0}},
    "scaffold, frozen A": lambda files: {"aggregation": {"server": "scaffold", "lora": "frozen_a"}, "rounds": 3},
    "exact": lambda files: {"aggregation": {"lora": "exact"}, "training": {"lr": 5e-2}, "defense": defended(files, "shadow"), "rounds": 3},
    "attacked, dnc, measured": lambda files: {
        "clients": {"update_attack": "gaussian"}, "aggregation": {"rule": "dnc", "options": {"f": 1, "coordinates": 50}},
        "evaluation": {"utility": "builtin:heldout_benign", "limit": 2, "max_new_tokens": 2, "every": 1},
    },
}  # fmt: skip


@pytest.mark.parametrize("name", EXPERIMENTS)
def test_flower_and_one_process_end_in_the_same_bits(name: str, tiny_files: Files, tmp_path: Path) -> None:
    values = settings(tiny_files, **EXPERIMENTS[name](tiny_files))
    expected, result = simulate(values), Deployment(tmp_path, values).serve()
    assert torch.equal(vector(result), vector(expected))
    assert [outcome(record) for record in result.records] == [outcome(record) for record in expected.records]
    for one, other in zip(result.records, expected.records, strict=True):
        assert {kind: one.bytes[kind] for kind in other.bytes} == dict(other.bytes)
        assert one.bytes["to_clients"] >= one.bytes["update"] > 0
        assert other.seconds.keys() | {"exchange"} == one.seconds.keys()
        assert one.seconds["exchange"] >= one.seconds["train"] > 0
    assert torch.equal(pack(load_adapter(tmp_path / "run" / "adapter"))[0], vector(expected))
    assert result.roles == expected.roles


def test_half_precision_halves_the_bytes_and_ends_close_by(tiny_files: Files, tmp_path: Path) -> None:
    values = settings(tiny_files, defense=defended(tiny_files, "step"))
    expected, deployed = simulate(values), Deployment(tmp_path, values, wire="float16")
    result = deployed.serve()
    initial, moved = pack(load_adapter(tmp_path / "run" / "initial"))[0], vector(expected)
    apart = float((vector(result) - moved).norm() / (moved - initial).norm())
    assert 0 < apart < 1e-2
    for one, other in zip(result.records, expected.records, strict=True):
        assert (2 * one.bytes["update"], 2 * one.bytes["evidence"]) == (other.bytes["update"], other.bytes["evidence"])
        assert one.factors == other.factors
        assert not one.reasons


def test_what_clients_are_told_names_neither_roles_nor_thresholds(tiny_files: Files, tmp_path: Path) -> None:
    values = settings(tiny_files, rounds=1, defense={**defended(tiny_files, "step"), "threshold": 0.8125})
    deployed = Deployment(tmp_path, values)
    grid = deployed.grid()
    deployed.serve(grid=grid)
    told = [str(dict(message.content.config_records["config"])) for message in grid.asked]
    assert not any(word in text for text in told for word in ("malicious", "0.8125", "threshold", "builtin:", str(tiny_files.probe)))
    nonces = [message.content.config_records["config"]["nonce"] for message in grid.asked]
    assert len(set(nonces)) == len(nonces) == 4
    assert all(message.metadata.ttl == 60.0 and message.metadata.group_id == "1" for message in grid.asked)


def test_a_run_goes_on_after_everything_of_the_server_was_lost(tiny_files: Files, tmp_path: Path) -> None:
    changes: dict[str, Any] = {
        "rounds": 4, "clients": {"sampled": 3}, "defense": defended(tiny_files, "step"), "aggregation": {"rule": "foolsgold", "server": "scaffold"}
    }  # fmt: skip
    values = settings(tiny_files, **changes)
    expected, deployed = simulate(values), Deployment(tmp_path, values)

    def lost(asked: Message, reply: Message) -> Sequence[Message]:
        if asked.metadata.group_id == "3":
            raise KeyboardInterrupt
        return [reply]

    with pytest.raises(KeyboardInterrupt):
        deployed.serve(dict.fromkeys(deployed.nodes, lost))
    found = load_checkpoint(deployed.folder / "checkpoint")
    assert found is not None
    assert found[0] == 2
    result = deployed.serve()
    assert torch.equal(vector(result), vector(expected))
    assert [outcome(record) for record in result.records] == [outcome(record) for record in expected.records]
    grid = deployed.grid()
    assert deployed.serve(grid=grid).records == result.records
    assert grid.asked == []  # a finished run asks nobody


# --- replies that are not what was agreed on --------------------------------------------------------------------------------------------


def changed(
    arrays: Callable[[dict[str, Array]], Any] | None = None, config: dict[str, Any] | None = None, metrics: dict[str, Any] | None = None,
    added: dict[str, Any] | None = None, dropped: str = "",
) -> Sent:  # fmt: skip
    """A client whose reply differs in these parts; a value of None removes an entry, `dropped` a record."""

    def sent(asked: Message, reply: Message) -> Sequence[Message]:
        old = reply.content
        own = dict(old.array_records["arrays"])
        if arrays is not None:
            own = arrays(own) or own
        parts: dict[str, Any] = {"arrays": ArrayRecord(own)}
        for name, kind, new in (("config", ConfigRecord, config), ("metrics", MetricRecord, metrics)):
            merged = {**dict(old[name]), **(new or {})}
            parts[name] = kind({key: value for key, value in merged.items() if value is not None})
        content = RecordDict({name: record for name, record in {**parts, **(added or {})}.items() if name != dropped})
        return [Message(content, reply_to=asked)]

    return sent


def update(change: Callable[[np.ndarray], np.ndarray]) -> Callable[[dict[str, Array]], Any]:
    return lambda own: {**own, "update": Array(change(own["update"].numpy()))}


def raw(**fields: Any) -> Callable[[dict[str, Array]], Any]:
    """The update with other fields than its bytes say."""

    def change(own: dict[str, Array]) -> dict[str, Array]:
        old = own["update"]
        kept = {"dtype": old.dtype, "shape": old.shape, "stype": old.stype, "data": old.data}
        return {**own, "update": Array(**{**kept, **{name: of(kept[name]) for name, of in fields.items()}})}

    return change


def spoiled(array: np.ndarray, value: float) -> np.ndarray:
    array = array.copy()
    array[7] = value
    return array


def vast(data: bytes) -> bytes:
    """As many bytes, whose header promises four terabytes."""
    return data.replace(b"(896,), }" + b" " * 10, b"(1" + b"0" * 12 + b",), }")


def failing(asked: Message, reply: Message) -> Sequence[Message]:
    return [Message(Error(3, "<class 'ValueError'>:<'no such file'>"), reply_to=asked)]


def of_superlink(asked: Message, reply: Message) -> Sequence[Message]:
    """The error that the SuperLink makes up for a node that is gone: it names no node but its own."""
    error = Message(Error(2, "Node Unavailable"), reply_to=asked)
    error.metadata.__dict__["_src_node_id"] = 1
    return [error]


def falling_apart(asked: Message, reply: Message) -> Sequence[Message]:
    """Objects that a client uploaded under the right names, and that make no reply."""
    contents = {"x": b"Array 0 60\x00" + b'{"dtype": "float32", "shape": [4], "stype": "n", "arraychunk_ids": [5]}'}
    inflate_object_from_contents("x", contents)
    raise AssertionError("it was put together")


def never_arriving(asked: Message, reply: Message) -> Sequence[Message]:
    """A reply that is announced, and whose parts Flower waits for longer than the round lasts."""
    time.sleep(5)
    raise AssertionError("somebody waited for it")


REFUSED: dict[str, tuple[Sent, str]] = {
    "a reply that does not arrive": (never_arriving, "missing: no reply before the round's deadline"),
    "no reply": (lambda asked, reply: [], "missing: no reply before the round's deadline"),
    "an error": (failing, "missing: <class 'ValueError'>:<'no such file'>"),
    "an error of the SuperLink": (of_superlink, "missing: Node Unavailable"),
    "a reply that cannot be put together": (falling_apart, "missing: unreadable reply: "),
    "other keys": (changed(lambda own: {"base_model.lora_A": own["update"]}), "got the arrays ['base_model.lora_A']; expected update"),
    "a key too many": (changed(lambda own: {**own, "evidence": own["update"]}), "got the arrays ['evidence', 'update']; expected update"),
    "no arrays": (changed(dropped="arrays"), "got no record 'arrays'"),
    "a record too many": (changed(added={"extra": ConfigRecord({"a": 1})}), "got the records ['arrays', 'config', 'extra', 'metrics']"),
    "no metrics": (changed(dropped="metrics"), "got no record 'metrics'"),
    "float64": (changed(update(lambda a: a.astype(np.float64))), "expected a numpy.ndarray of float32"),
    "integers": (changed(update(lambda a: np.zeros(a.shape, np.int32))), "of int32"),
    "another shape": (changed(update(lambda a: a.reshape(2, -1))), "expected a numpy.ndarray of float32 and shape (896,)"),
    "too short": (changed(update(lambda a: a[:-1])), "shape (895,)"),
    "NaN": (changed(update(lambda a: spoiled(a, math.nan))), "1 of 896 numbers are NaN or infinite"),
    "infinity": (changed(update(lambda a: spoiled(a, math.inf))), "1 of 896 numbers are NaN or infinite"),
    "a scale that makes it infinite": (changed(update(lambda a: a * 1e6), {"scale": 1e38}), "of 896 numbers are NaN or infinite"),
    "an infinite scale": (changed(config={"scale": math.inf}), "got scale inf"),
    "no scale": (changed(config={"scale": None}), "got scale None"),
    "another serialisation": (changed(raw(stype=lambda _: "pickle")), "got a pickle of float32"),
    "torn bytes": (changed(raw(data=lambda data: data[:-40])), "bytes that are not 896 numbers"),
    "a header that promises more": (changed(raw(data=vast)), "bytes that are not 896 numbers"),
    "a huge array that says it is small": (changed(raw(data=lambda data: data + b"\0" * 10_000)), "bytes that are not 896 numbers"),
    "another layout": (changed(config={"layout": '{"kind": "factor_delta", "slots": [["m", "A", [2, 2]]], "scalings": {"m": 1}}'}), "layout: model.layers.0"),
    "weights": (changed(config={"layout": '{"kind": "weights", "slots": [], "scalings": {}}'}), "got kind 'weights'"),
    "no layout": (changed(config={"layout": None}), "expected the layout as JSON"),
    "a layout of nonsense": (changed(config={"layout": "[" * 900}), "got JSON that is not a layout"),
    "another protocol": (changed(config={"protocol": 99}), "got protocol 99; expected 1"),
    "another round": (changed(config={"round": 7}), "got a reply to round 7; expected round 1"),
    "no count": (changed(metrics={"num-examples": None}), "got num_examples of type NoneType"),
    "a count of none": (changed(metrics={"num-examples": 0}), "got num_examples 0"),
    "a negative count": (changed(metrics={"num-examples": -4}), "got num_examples -4"),
    "a fraction": (changed(metrics={"num-examples": 4.0}), "got num_examples of type float"),
    "a list of counts": (changed(metrics={"num-examples": [4, 4]}), "got num_examples of type list"),
    "two replies": (lambda asked, reply: [reply, reply], "duplicate: 2 replies to one message"),
    "no nonce": (changed(config={"nonce": None}), "does not hold the nonce"),
    "somebody else's nonce": (changed(config={"nonce": "0" * 32}), "does not hold the nonce"),
}  # fmt: skip


@pytest.fixture(scope="module")
def without(tiny_files: Files, tmp_path_factory: pytest.TempPathFactory) -> torch.Tensor:
    """The global LoRA after a round to which the second client sends nothing."""
    deployed = Deployment(tmp_path_factory.mktemp("without"), settings(tiny_files, rounds=1), **{"round-timeout": 0.5})
    return vector(deployed.serve({"client-01": REFUSED["no reply"][0]}))


@pytest.mark.parametrize("what", REFUSED)
def test_a_bad_reply_is_a_refused_client_with_a_reason_and_the_round_goes_on(
    what: str, tiny_files: Files, tmp_path: Path, without: torch.Tensor
) -> None:
    sent, why = REFUSED[what]
    deployed = Deployment(tmp_path, settings(tiny_files, rounds=1), **{"round-timeout": 0.5 if "deadline" in why else 60.0})
    result = deployed.serve({"client-01": sent})
    [record] = result.records
    assert record.reasons.keys() == {"client-01"}
    assert why in record.reasons["client-01"]
    assert len(record.reasons["client-01"]) <= 500
    assert record.factors == {"client-00": 1.0, "client-01": 0.0, "client-02": 1.0, "client-03": 1.0}
    assert record.weights["client-01"] == 0.0
    assert not record.skipped
    assert torch.equal(vector(result), without)


def test_an_honest_client_in_its_place_would_have_counted(tiny_files: Files, without: torch.Tensor) -> None:
    assert not torch.equal(without, vector(simulate(settings(tiny_files, rounds=1))))


def test_a_huge_count_counts_three_times_the_median_at_most(tiny_files: Files, tmp_path: Path) -> None:
    result = Deployment(tmp_path, settings(tiny_files, rounds=1)).serve({"client-01": changed(metrics={"num-examples": 10**9})})
    [record] = result.records
    assert record.num_examples == {"client-00": 4, "client-01": 12, "client-02": 4, "client-03": 4}
    assert record.weights["client-01"] == 0.5


def test_registered_counts_stand_in_for_claims(tiny_files: Files, tmp_path: Path) -> None:
    from fedloop.flower.nodes import Node, write_nodes

    deployed = Deployment(tmp_path, settings(tiny_files, rounds=1))
    write_nodes(tmp_path / "nodes.json", {name: Node(node, name, 10 * (node - 999)) for name, node in deployed.nodes.items()})
    [record] = deployed.serve({"client-01": changed(metrics={"num-examples": 10**9})}).records
    assert record.num_examples == {"client-00": 10, "client-01": 20, "client-02": 30, "client-03": 40}


def evidence(change: Callable[[np.ndarray], np.ndarray | None], **config: Any) -> Sent:
    def arrays(own: dict[str, Array]) -> dict[str, Array]:
        new = change(own.pop("evidence").numpy())
        return own if new is None else {**own, "evidence": Array(new)}

    return changed(arrays, config)


@pytest.mark.parametrize(
    ("sent", "why"),
    [
        (evidence(lambda a: None), "missing evidence: level reads 'local_steps'"),
        (evidence(lambda a: a[: a.size // 2]), "evidence: got a numpy.ndarray of float32 and shape (384,)"),
        (evidence(lambda a: a[: a.size // 2], steps=1), "got 1 steps of evidence; expected 2"),
        (evidence(lambda a: np.concatenate([a, a]), steps=4), "got 4 steps of evidence; expected 2"),
        (evidence(lambda a: spoiled(a, math.nan)), "evidence: 1 of 768 numbers are NaN"),
        (evidence(lambda a: a, **{"step-layout": "{}"}), "step-layout: "),
        (evidence(lambda a: -a), "the last step is not the submitted update"),
    ],
)
def test_bad_evidence_is_refused_too(sent: Sent, why: str, tiny_files: Files, tmp_path: Path) -> None:
    deployed = Deployment(tmp_path, settings(tiny_files, rounds=1, defense=defended(tiny_files, "step")))
    [record] = deployed.serve({"client-02": sent}).records
    assert record.reasons.keys() == {"client-02"}
    assert why in record.reasons["client-02"]
    assert record.factors["client-02"] == 0.0 < record.factors["client-01"]


def test_an_old_reply_is_refused_and_does_no_harm_beside_the_new_one(tiny_files: Files, tmp_path: Path) -> None:
    values = settings(tiny_files, rounds=2)
    kept: list[RecordDict] = []

    def stale(again: bool) -> Sent:
        def sent(asked: Message, reply: Message) -> Sequence[Message]:
            kept.append(reply.content)
            old = Message(kept[0], reply_to=asked)
            return [old, reply] if again else [old]

        return sent

    (tmp_path / "alone").mkdir(), (tmp_path / "beside").mkdir()
    first, second = Deployment(tmp_path / "alone", values).serve({"client-01": stale(again=False)}).records
    assert not first.reasons
    assert "does not hold the nonce" in second.reasons["client-01"]
    kept.clear()
    result = Deployment(tmp_path / "beside", values).serve(
        {"client-01": lambda asked, reply: stale(again=True)(asked, reply)[asked.metadata.group_id == "1" :]}
    )
    assert all(not record.reasons for record in result.records)
    assert torch.equal(vector(result), vector(simulate(values)))


def test_a_reply_that_another_node_forged_neither_counts_nor_shuts_its_victim_out(tiny_files: Files, tmp_path: Path) -> None:
    """Flower passes on what a node says about who sent a reply; only who could read the message knows its nonce."""
    values = settings(tiny_files, rounds=1)
    own: list[Message] = []

    def forging(asked: Message, reply: Message) -> Sequence[Message]:
        own.append(reply)
        forged = Message(reply.content, reply_to=asked)
        forged.metadata.__dict__["_src_node_id"] = 1001  # client-01, with the forger's own nonce
        return [reply, forged]

    result = Deployment(tmp_path, values).serve({"client-00": forging})
    assert not result.records[0].reasons
    assert torch.equal(vector(result), vector(simulate(values)))


def test_a_node_that_nobody_registered_is_never_asked_and_never_heard(tiny_files: Files, tmp_path: Path) -> None:
    values = settings(tiny_files, rounds=1)
    deployed = Deployment(tmp_path, values)
    grid = deployed.grid()
    grid.online.add(777)

    def speaking_for_777(asked: Message, reply: Message) -> Sequence[Message]:
        stranger = Message(reply.content, reply_to=asked)
        stranger.metadata.__dict__["_src_node_id"] = 777
        return [stranger, reply]

    grid.behaviour = {1000: speaking_for_777}
    result = deployed.serve(grid=grid)
    assert {message.metadata.dst_node_id for message in grid.asked} == set(deployed.nodes.values())
    assert result.records[0].note == "1 replies came from nodes that were not asked"
    assert torch.equal(vector(result), vector(simulate(values)))


# --- nobody there -----------------------------------------------------------------------------------------------------------------------


def test_skipped_rounds_keep_the_arrays_and_too_many_empty_ones_end_the_run_with_a_checkpoint(tiny_files: Files, tmp_path: Path) -> None:
    values = settings(tiny_files, rounds=6, defense=defended(tiny_files, "step"))
    deployed = Deployment(tmp_path, values, **{"max-empty-rounds": 2, "round-timeout": 0.3})

    def until(last: int) -> Sent:
        return lambda asked, reply: [reply] if int(asked.metadata.group_id) <= last else []

    with pytest.raises(EngineError, match=r"in 2 rounds in a row, the last of them round 3: missing: no reply.*start it again"):
        deployed.serve(dict.fromkeys(deployed.nodes, until(1)))
    log = records(deployed.folder)
    assert [(one["round"], one["skipped"]) for one in log] == [(1, False), (2, True), (3, True)]
    assert log[2]["note"] == "skipped: nobody sent anything usable"
    assert set(log[2]["factors"].values()) == {0.0}
    [found] = [load_checkpoint(deployed.folder / "checkpoint")]
    assert found is not None
    (tmp_path / "one").mkdir()
    first = Deployment(tmp_path / "one", {**values, "rounds": 1})  # the learning rate of round 1 does not depend on their number
    assert found[0] == 3
    assert torch.equal(found[1]["state"]["lora"], vector(first.serve()))
    result = deployed.serve()  # they are back: rounds 4, 5, 6
    assert [record.skipped for record in result.records] == [False, True, True, False, False, False]


def test_one_usable_reply_is_enough_to_go_on(tiny_files: Files, tmp_path: Path) -> None:
    values = settings(tiny_files, rounds=3, defense={"min_mean_factor": 0.0})
    deployed = Deployment(tmp_path, values, **{"max-empty-rounds": 1, "round-timeout": 0.5})
    silent: Sent = lambda asked, reply: []  # noqa: E731
    result = deployed.serve({name: silent for name in deployed.nodes if name != "client-03"})
    assert [record.weights["client-03"] for record in result.records] == [1.0, 1.0, 1.0]
    assert [record.skipped for record in result.records] == [False, False, False]


def test_the_first_round_waits_for_everybody_and_later_ones_for_anybody(tiny_files: Files, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    deployed = Deployment(tmp_path, settings(tiny_files, rounds=3), **{"connect-timeout": 0.4})
    grid, looks = deployed.grid(), [0]

    def late() -> Sequence[int]:
        looks[0] += 1
        return [node for node in grid.online if node != 1002 or looks[0] > 5]

    monkeypatch.setattr(grid, "get_node_ids", late)

    def leaving(asked: Message, reply: Message) -> Sequence[Message]:
        grid.online.discard(1003)  # after the first round
        return [reply]

    grid.behaviour = {1003: leaving}
    first, second, third = deployed.serve(grid=grid).records
    assert looks[0] == 6 + 2
    assert not first.reasons
    assert second.reasons == third.reasons == {"client-03": "missing: its node is not connected"}


def test_who_is_not_there_in_time_is_missing_in_the_first_round_and_nobody_at_all_is_an_empty_round(tiny_files: Files, tmp_path: Path) -> None:
    deployed = Deployment(tmp_path, settings(tiny_files, rounds=2), **{"connect-timeout": 0.05, "max-empty-rounds": 1})
    grid = deployed.grid()
    grid.online.remove(1001)
    [one, _] = deployed.serve(grid=grid).records
    assert one.reasons == {"client-01": "missing: its node is not connected"}
    (tmp_path / "empty").mkdir()
    empty = Deployment(tmp_path / "empty", settings(tiny_files), **{"connect-timeout": 0.05, "max-empty-rounds": 1})
    grid = empty.grid()
    grid.online.clear()
    with pytest.raises(EngineError, match="missing: its node is not connected"):
        empty.serve(grid=grid)
    assert grid.asked == []


# --- what a server refuses to start with ----------------------------------------------------------------------------------------------


def test_a_server_refuses_nodes_and_folders_that_do_not_fit(tiny_files: Files, tmp_path: Path) -> None:
    from fedloop.flower.nodes import Node, write_nodes

    deployed = Deployment(tmp_path, settings(tiny_files))
    write_nodes(tmp_path / "nodes.json", {"only": Node(1, "key")})
    with pytest.raises(ConfigError, match=r"clients.count: got 4; expected 1, the number of registered nodes: only"):
        deployed.serve()
    (tmp_path / "nodes.json").write_text("{}")
    with pytest.raises(ConfigError, match="names no node"):
        deployed.serve()
    for wrong, message in (({"wire": "bfloat16"}, "wire: got 'bfloat16'"), ({"round-timeout": 0}, "round-timeout: got 0")):
        with pytest.raises(ConfigError, match=message):
            Deployment(tmp_path, settings(tiny_files), **wrong).serve()
    other = Deployment(tmp_path, settings(tiny_files, rounds=1))
    other.serve()
    with pytest.raises(StateError, match="another configuration"):
        Deployment(tmp_path, settings(tiny_files, seed=3))


def test_a_strategy_is_not_given_replies_to_a_round_that_it_did_not_ask_for(
    tiny_files: Files, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    deployed = Deployment(tmp_path, settings(tiny_files, rounds=1))
    made: list[Any] = []
    original = module.DefendedStrategy.start
    monkeypatch.setattr(module.DefendedStrategy, "start", lambda self, grid: made.append(self) or original(self, grid))
    deployed.serve()
    with pytest.raises(EngineError, match="got replies to round 2; expected configure_train of that round first"):
        made[0].aggregate_train(2, [])
    assert list(made[0].configure_evaluate(1, ArrayRecord(), ConfigRecord(), deployed.grid())) == []


def test_a_run_without_known_roles_says_so(tiny_files: Files, tmp_path: Path) -> None:
    deployed = Deployment(tmp_path, settings(tiny_files, rounds=1))
    (deployed.folder / "clients.json").unlink()
    roles = deployed.serve().roles
    assert {role["role"] for role in roles.values()} == {"unknown"}
    assert same_tree(list(roles), list(deployed.nodes))


def test_a_grid_of_one_serves_flowers_own_types(tiny_files: Files, tmp_path: Path) -> None:
    """What the others above rest on: the messages here are what Flower would deliver."""
    deployed = Deployment(tmp_path, settings(tiny_files, rounds=1))
    grid = deployed.grid()
    deployed.serve(grid=grid)
    assert isinstance(grid, FakeGrid)
    reply = grid.reply(grid.asked[0])
    assert reply.metadata.src_node_id == 1000
    assert reply.metadata.reply_to_message_id == grid.asked[0].metadata.message_id
