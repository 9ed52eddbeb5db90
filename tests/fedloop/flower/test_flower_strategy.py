"""The Flower engine against the in-process one.

The same bits, and the same after everything of the server was lost.

Messages are Flower's own and go through its serialisation; the grid and the nodes are in this
process (`flowered`)."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from flwr.app import Message

from fedloop.errors import ConfigError, EngineError, StateError
from fedloop.flower.nodes import Node, write_nodes
from fedloop.run.checkpoint import load_checkpoint
from fedloop.run.run import RunResult
from fedloop.run.simulate import simulate
from loraprobe.adapters.layout import pack
from loraprobe.adapters.load import load_adapter
from tests.helpers.federated import Files, defended, same_tree, settings
from tests.helpers.flowered import Deployment, Sent, records, vector

AGREED = "round scores factors weights reasons num_examples losses metrics skipped".split()


def outcomes(result: RunResult) -> list[list[Any]]:
    """What both engines have to agree on."""
    return [[getattr(record, name) for name in AGREED] for record in result.records]


# --- the same run as in one process

MEASURED = {"utility": "builtin:heldout_benign", "limit": 2, "max_new_tokens": 2, "every": 1}
ADAM = {"server": "fedadam", "server_options": {"lr": 0.01}}
LEVELS: dict[str, dict[str, Any]] = {
    "step": {"level": "step"},
    "shadow": {"level": "shadow"},
    "shadow gradient": {"level": "shadow", "evidence": "shadow_gradient"},
    "evidence": {"level": "evidence", "min_evidence": 1, "audit_interval": 2},
    "cumulative, sampled, foolsgold, fedadam": {"level": "cumulative"},
    "exact": {"level": "shadow"},
}
EXPERIMENTS: dict[str, dict[str, Any]] = {
    "undefended": {},
    "step": {},
    "shadow": {"training": {"shadow_lr": 1e-3}},
    "shadow gradient": {},
    "evidence": {"rounds": 3},
    "cumulative, sampled, foolsgold, fedadam": {
        "clients": {"sampled": 3},
        "rounds": 3,
        "aggregation": {"rule": "foolsgold", **ADAM},
    },
    "fedprox": {"aggregation": {"server": "fedprox"}, "training": {"proximal": 10.0}},
    "scaffold, frozen A": {
        "aggregation": {"server": "scaffold", "lora": "frozen_a"},
        "rounds": 3,
    },
    "exact": {"aggregation": {"lora": "exact"}, "training": {"lr": 5e-2}, "rounds": 3},
    "attacked, dnc, measured": {
        "clients": {"update_attack": "gaussian"},
        "aggregation": {"rule": "dnc", "options": {"f": 1, "coordinates": 50}},
        "evaluation": MEASURED,
    },
}


@pytest.mark.parametrize("name", EXPERIMENTS)
def test_flower_and_one_process_end_in_the_same_bits(
    name: str, tiny_files: Files, tmp_path: Path
) -> None:
    level = LEVELS.get(name)
    defense = {"defense": defended(tiny_files, **level)} if level else {}
    values = settings(tiny_files, **EXPERIMENTS[name], **defense)
    expected, result = simulate(values), Deployment(tmp_path, values).serve()
    assert torch.equal(vector(result), vector(expected))
    assert outcomes(result) == outcomes(expected)
    for one, other in zip(result.records, expected.records, strict=True):
        assert {kind: one.bytes[kind] for kind in other.bytes} == dict(other.bytes)
        assert one.bytes["to_clients"] >= one.bytes["update"] > 0
        assert other.seconds.keys() | {"exchange"} == one.seconds.keys()
        assert one.seconds["exchange"] >= one.seconds["train"] > 0
    assert torch.equal(pack(load_adapter(tmp_path / "run" / "adapter"))[0], vector(expected))
    assert result.roles == expected.roles


def test_half_precision_halves_the_bytes_and_ends_close_by(
    tiny_files: Files, tmp_path: Path
) -> None:
    values = settings(tiny_files, defense=defended(tiny_files, "step"))
    expected, result = simulate(values), Deployment(tmp_path, values, wire="float16").serve()
    initial, moved = pack(load_adapter(tmp_path / "run" / "initial"))[0], vector(expected)
    apart = float((vector(result) - moved).norm() / (moved - initial).norm())
    assert 0 < apart < 1e-2
    for one, other in zip(result.records, expected.records, strict=True):
        assert all(2 * one.bytes[kind] == other.bytes[kind] for kind in ("update", "evidence"))
        assert one.factors == other.factors
        assert not one.reasons


def test_what_clients_are_told_names_neither_roles_nor_thresholds(
    tiny_files: Files, tmp_path: Path
) -> None:
    defense = {**defended(tiny_files, "step"), "threshold": 0.8125}
    deployed = Deployment(tmp_path, settings(tiny_files, rounds=1, defense=defense))
    grid = deployed.grid()
    deployed.serve(grid=grid)
    told = [dict(message.content.config_records["config"]) for message in grid.asked]
    for secret in ("malicious", "0.8125", "threshold", "builtin:", str(tiny_files.probe)):
        assert secret not in str(told)
    assert len({one["nonce"] for one in told}) == len(told) == 4
    about = {(message.metadata.ttl, message.metadata.group_id) for message in grid.asked}
    assert about == {(60.0, "1")}


def test_a_run_goes_on_after_everything_of_the_server_was_lost(
    tiny_files: Files, tmp_path: Path
) -> None:
    changes: dict[str, Any] = {
        "rounds": 4,
        "clients": {"sampled": 3},
        "defense": defended(tiny_files, "step"),
        "aggregation": {"rule": "foolsgold", "server": "scaffold"},
    }
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
    assert outcomes(result) == outcomes(expected)
    grid = deployed.grid()
    assert deployed.serve(grid=grid).records == result.records
    assert grid.asked == []  # a finished run asks nobody


# --- nobody there


def test_skipped_rounds_keep_the_arrays_and_too_many_empty_ones_end_the_run_with_a_checkpoint(
    tiny_files: Files, tmp_path: Path
) -> None:
    values = settings(tiny_files, rounds=6, defense=defended(tiny_files, "step"))
    deployed = Deployment(tmp_path, values, **{"max-empty-rounds": 2, "round-timeout": 0.3})

    def until(last: int) -> Sent:
        return lambda asked, reply: [reply] if int(asked.metadata.group_id) <= last else []

    with pytest.raises(
        EngineError,
        match=r"in 2 rounds in a row, the last of them round 3: missing: no reply.*start it again",
    ):
        deployed.serve(dict.fromkeys(deployed.nodes, until(1)))
    log = records(deployed.folder)
    assert [(one["round"], one["skipped"]) for one in log] == [(1, False), (2, True), (3, True)]
    assert log[2]["note"] == "skipped: no well-formed update"
    assert set(log[2]["factors"].values()) == {0.0}
    [found] = [load_checkpoint(deployed.folder / "checkpoint")]
    assert found is not None
    (tmp_path / "one").mkdir()
    # the learning rate of round 1 does not depend on their number
    first = Deployment(tmp_path / "one", {**values, "rounds": 1})
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


def test_the_first_round_waits_for_everybody_and_later_ones_for_anybody(
    tiny_files: Files, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
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


def test_who_is_not_there_in_time_is_missing_in_the_first_round_and_nobody_at_all_is_an_empty_round(
    tiny_files: Files, tmp_path: Path
) -> None:
    deployed = Deployment(
        tmp_path, settings(tiny_files, rounds=2), **{"connect-timeout": 0.05, "max-empty-rounds": 1}
    )
    grid = deployed.grid()
    grid.online.remove(1001)
    [one, _] = deployed.serve(grid=grid).records
    assert one.reasons == {"client-01": "missing: its node is not connected"}
    (tmp_path / "empty").mkdir()
    empty = Deployment(
        tmp_path / "empty", settings(tiny_files), **{"connect-timeout": 0.05, "max-empty-rounds": 1}
    )
    grid = empty.grid()
    grid.online.clear()
    with pytest.raises(EngineError, match="missing: its node is not connected"):
        empty.serve(grid=grid)
    assert grid.asked == []


# --- what a server refuses to start with


def test_a_server_refuses_nodes_and_folders_that_do_not_fit(
    tiny_files: Files, tmp_path: Path
) -> None:
    values = settings(tiny_files, rounds=1)
    deployed = Deployment(tmp_path, values)
    write_nodes(tmp_path / "nodes.json", {"only": Node(1, "key")})
    with pytest.raises(
        ConfigError, match=r"clients.count: got 4; expected 1, the number of registered nodes: only"
    ):
        deployed.serve()
    with pytest.raises(ConfigError, match="wire: got 'bfloat16'"):
        Deployment(tmp_path, values, wire="bfloat16").serve()
    Deployment(tmp_path, values).serve()
    with pytest.raises(StateError, match="another configuration"):
        Deployment(tmp_path, settings(tiny_files, seed=3))


def test_a_run_without_known_roles_says_so(tiny_files: Files, tmp_path: Path) -> None:
    deployed = Deployment(tmp_path, settings(tiny_files, rounds=1))
    (deployed.folder / "clients.json").unlink()
    roles = deployed.serve().roles
    assert {role["role"] for role in roles.values()} == {"unknown"}
    assert same_tree(list(roles), list(deployed.nodes))
