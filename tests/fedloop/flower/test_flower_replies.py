"""What clients may send instead of what was agreed on, and what becomes of it.

A refused client with a reason, and a round that goes on.
"""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from flwr.app import Array, ArrayRecord, ConfigRecord, Error, Message, MetricRecord, RecordDict
from flwr.supercore.inflatable.inflatable_utils import inflate_object_from_contents

from fedloop.flower.nodes import Node, write_nodes
from fedloop.run.simulate import simulate
from tests.helpers.federated import Files, defended, settings
from tests.helpers.flowered import Deployment, Sent, vector


def changed(
    arrays: Callable[[dict[str, Array]], Any] | None = None,
    config: dict[str, Any] | None = None,
    metrics: dict[str, Any] | None = None,
    added: dict[str, Any] | None = None,
    dropped: str = "",
) -> Sent:
    """A client whose reply differs in these parts.

    A value of None removes an entry, `dropped` a record.
    """

    def sent(asked: Message, reply: Message) -> Sequence[Message]:
        old = reply.content
        own = dict(old.array_records["arrays"])
        parts: dict[str, Any] = {"arrays": ArrayRecord((arrays and arrays(own)) or own)}
        kinds = {"config": (ConfigRecord, config), "metrics": (MetricRecord, metrics)}
        for name, (kind, new) in kinds.items():
            merged = {**dict(old[name]), **(new or {})}
            parts[name] = kind({key: value for key, value in merged.items() if value is not None})
        parts |= added or {}
        parts.pop(dropped, None)
        return [Message(RecordDict(parts), reply_to=asked)]

    return sent


def update(change: Callable[[np.ndarray], np.ndarray]) -> Callable[[dict[str, Array]], Any]:
    return lambda own: {**own, "update": Array(change(own["update"].numpy()))}


def raw(**fields: Any) -> Callable[[dict[str, Array]], Any]:
    """The update with other fields than its bytes say."""

    def change(own: dict[str, Array]) -> dict[str, Array]:
        kept = {name: getattr(own["update"], name) for name in ("dtype", "shape", "stype", "data")}
        return {
            **own,
            "update": Array(**kept | {name: of(kept[name]) for name, of in fields.items()}),
        }

    return change


def spoiled(array: np.ndarray, value: float) -> np.ndarray:
    array = array.copy()
    array[7] = value
    return array


def vast(data: bytes) -> bytes:
    """As many bytes, whose header promises four terabytes."""
    return data.replace(b"(896,), }" + b" " * 10, b"(1" + b"0" * 12 + b",), }")


def error(code: int, why: str, sender: int | None = None) -> Sent:
    def sent(asked: Message, reply: Message) -> Sequence[Message]:
        message = Message(Error(code, why), reply_to=asked)
        if sender is not None:
            message.metadata.__dict__["_src_node_id"] = sender
        return [message]

    return sent


def falling_apart(asked: Message, reply: Message) -> Sequence[Message]:
    """Objects that a client uploaded under the right names, and that make no reply."""
    array = b'{"dtype": "float32", "shape": [4], "stype": "n", "arraychunk_ids": [5]}'
    inflate_object_from_contents("x", {"x": b"Array 0 60\x00" + array})
    raise AssertionError("it was put together")


def never_arriving(asked: Message, reply: Message) -> Sequence[Message]:
    """A reply that is announced, and whose parts Flower waits for longer than the round lasts."""
    time.sleep(5)
    raise AssertionError("somebody waited for it")


SMALL = {"kind": "factor_delta", "slots": [["m", "A", [2, 2]]], "scalings": {"m": 1}}
REFUSED: dict[str, tuple[Sent, str]] = {
    "a reply that does not arrive": (
        never_arriving,
        "missing: no reply before the round's deadline",
    ),
    "no reply": (lambda asked, reply: [], "missing: no reply before the round's deadline"),
    "an error": (
        error(3, "<class 'ValueError'>:<'no such file'>"),
        "missing: <class 'ValueError'>:<'no such file'>",
    ),
    "an error for the terminal": (
        error(3, "\x1b[2J\n\r\x00" + "x" * 10_000),  # would clear the screen, and never ends
        "missing:  [2J   xxx",
    ),
    "an error of the SuperLink": (
        error(2, "Node Unavailable", sender=1),  # which names no node but its own
        "missing: Node Unavailable",
    ),
    "a reply that cannot be put together": (falling_apart, "missing: unreadable reply: "),
    "other keys": (
        changed(lambda own: {"base_model.lora_A": own["update"]}),
        "got the arrays ['base_model.lora_A']; expected update",
    ),
    "a key too many": (
        changed(lambda own: {**own, "evidence": own["update"]}),
        "got the arrays ['evidence', 'update']; expected update",
    ),
    "no arrays": (changed(dropped="arrays"), "got no record 'arrays'"),
    "a record too many": (
        changed(added={"extra": ConfigRecord({"a": 1})}),
        "got the records ['arrays', 'config', 'extra', 'metrics']",
    ),
    "float64": (
        changed(update(lambda a: a.astype(np.float64))),
        "expected a numpy.ndarray of float32",
    ),
    "another shape": (
        changed(update(lambda a: a.reshape(2, -1))),
        "expected a numpy.ndarray of float32 and shape (896,)",
    ),
    "NaN": (
        changed(update(lambda a: spoiled(a, math.nan))),
        "1 of 896 numbers are NaN or infinite",
    ),
    "a scale that makes it infinite": (
        changed(update(lambda a: a * 1e6), {"scale": 1e38}),
        "of 896 numbers are NaN or infinite",
    ),
    "no scale": (changed(config={"scale": None}), "got scale None"),
    "another serialisation": (changed(raw(stype=lambda _: "pickle")), "got a pickle of float32"),
    "torn bytes": (changed(raw(data=lambda data: data[:-40])), "bytes that are not 896 numbers"),
    "a header that promises more": (changed(raw(data=vast)), "bytes that are not 896 numbers"),
    "another layout": (changed(config={"layout": json.dumps(SMALL)}), "layout: model.layers.0"),
    "weights": (
        changed(config={"layout": '{"kind": "weights", "slots": [], "scalings": {}}'}),
        "got kind 'weights'",
    ),
    "a layout of nonsense": (
        changed(config={"layout": "[" * 900}),
        "got JSON that is not a layout",
    ),
    "another protocol": (changed(config={"protocol": 99}), "got protocol 99; expected 1"),
    "another round": (changed(config={"round": 7}), "got a reply to round 7; expected round 1"),
    "a count of none": (changed(metrics={"num-examples": 0}), "got num_examples 0"),
    "two replies": (lambda asked, reply: [reply, reply], "duplicate: 2 replies in one round"),
    "no nonce": (changed(config={"nonce": None}), "does not hold the nonce"),
    "somebody else's nonce": (changed(config={"nonce": "0" * 32}), "does not hold the nonce"),
}


@pytest.fixture(scope="module")
def without(tiny_files: Files, tmp_path_factory: pytest.TempPathFactory) -> torch.Tensor:
    """The global LoRA after a round to which the second client sends nothing."""
    deployed = Deployment(
        tmp_path_factory.mktemp("without"), settings(tiny_files, rounds=1), **{"round-timeout": 0.5}
    )
    return vector(deployed.serve({"client-01": REFUSED["no reply"][0]}))


@pytest.mark.parametrize("what", REFUSED)
def test_a_bad_reply_is_a_refused_client_with_a_reason_and_the_round_goes_on(
    what: str, tiny_files: Files, tmp_path: Path, without: torch.Tensor
) -> None:
    sent, why = REFUSED[what]
    timeout = {"round-timeout": 0.5 if "deadline" in why else 60.0}
    result = Deployment(tmp_path, settings(tiny_files, rounds=1), **timeout).serve(
        {"client-01": sent}
    )
    [record] = result.records
    assert record.reasons.keys() == {"client-01"}
    assert why in record.reasons["client-01"]
    assert len(record.reasons["client-01"]) <= 500
    others = ("client-00", "client-02", "client-03")
    assert record.factors == {**dict.fromkeys(others, 1.0), "client-01": 0.0}
    assert record.weights["client-01"] == 0.0
    assert not record.skipped
    assert torch.equal(vector(result), without)


def test_an_honest_client_in_its_place_would_have_counted(
    tiny_files: Files, without: torch.Tensor
) -> None:
    assert not torch.equal(without, vector(simulate(settings(tiny_files, rounds=1))))


def test_a_huge_count_counts_three_times_the_median_at_most_or_what_is_registered(
    tiny_files: Files, tmp_path: Path
) -> None:
    huge = {"client-01": changed(metrics={"num-examples": 10**9})}
    deployed = Deployment(tmp_path, settings(tiny_files, rounds=1))
    [record] = deployed.serve(huge).records
    assert [*record.num_examples.values()] == [4, 12, 4, 4]
    assert record.weights["client-01"] == 0.5
    (tmp_path / "registered").mkdir()
    deployed = Deployment(tmp_path / "registered", settings(tiny_files, rounds=1))
    known = {name: Node(node, name, 10 * (node - 999)) for name, node in deployed.nodes.items()}
    write_nodes(tmp_path / "registered" / "nodes.json", known)
    [record] = deployed.serve(huge).records
    assert [*record.num_examples.values()] == [10, 20, 30, 40]


def evidence(change: Callable[[np.ndarray], np.ndarray | None], **config: Any) -> Sent:
    def arrays(own: dict[str, Array]) -> dict[str, Array]:
        new = change(own.pop("evidence").numpy())
        return own if new is None else {**own, "evidence": Array(new)}

    return changed(arrays, config)


BAD_EVIDENCE: dict[str, tuple[Sent, str]] = {
    "none": (evidence(lambda a: None), "missing evidence: level reads 'local_steps'"),
    "half": (
        evidence(lambda a: a[: a.size // 2]),
        "evidence: got a numpy.ndarray of float32 and shape (384,)",
    ),
    "half, said": (
        evidence(lambda a: a[: a.size // 2], steps=1),
        "got 1 steps of evidence; expected 2",
    ),
    "twice": (
        evidence(lambda a: np.concatenate([a, a]), steps=4),
        "got 4 steps of evidence; expected 2",
    ),
    "NaN": (evidence(lambda a: spoiled(a, math.nan)), "evidence: 1 of 768 numbers are NaN"),
    "another layout": (evidence(lambda a: a, **{"step-layout": "{}"}), "step-layout: "),
    "another way": (evidence(lambda a: -a), "the last step is not the submitted update"),
}


@pytest.mark.parametrize("what", BAD_EVIDENCE)
def test_bad_evidence_is_refused_too(what: str, tiny_files: Files, tmp_path: Path) -> None:
    sent, why = BAD_EVIDENCE[what]
    values = settings(tiny_files, rounds=1, defense=defended(tiny_files, "step"))
    [record] = Deployment(tmp_path, values).serve({"client-02": sent}).records
    assert record.reasons.keys() == {"client-02"}
    assert why in record.reasons["client-02"]
    assert record.factors["client-02"] == 0.0 < record.factors["client-01"]


@pytest.mark.parametrize("beside", [False, True])
def test_an_old_reply_is_refused_and_does_no_harm_beside_the_new_one(
    beside: bool, tiny_files: Files, tmp_path: Path
) -> None:
    values = settings(tiny_files, rounds=2)
    kept: list[RecordDict] = []

    def stale(asked: Message, reply: Message) -> Sequence[Message]:
        kept.append(reply.content)
        old = Message(kept[0], reply_to=asked)
        return [old, reply] if beside and len(kept) > 1 else [old]

    result = Deployment(tmp_path, values).serve({"client-01": stale})
    first, second = result.records
    assert not first.reasons
    if beside:
        assert not second.reasons
        assert torch.equal(vector(result), vector(simulate(values)))
    else:
        assert "does not hold the nonce" in second.reasons["client-01"]


def test_a_reply_that_another_node_forged_neither_counts_nor_shuts_its_victim_out(
    tiny_files: Files, tmp_path: Path
) -> None:
    """Flower passes on what a node says about who sent a reply.

    Only who could read the message knows its nonce.
    """
    values = settings(tiny_files, rounds=1)

    def forging(asked: Message, reply: Message) -> Sequence[Message]:
        forged = Message(reply.content, reply_to=asked)
        forged.metadata.__dict__["_src_node_id"] = 1001  # client-01, with the forger's own nonce
        return [reply, forged]

    result = Deployment(tmp_path, values).serve({"client-00": forging})
    assert not result.records[0].reasons
    assert torch.equal(vector(result), vector(simulate(values)))


def test_a_node_that_nobody_registered_is_never_asked_and_never_heard(
    tiny_files: Files, tmp_path: Path
) -> None:
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
