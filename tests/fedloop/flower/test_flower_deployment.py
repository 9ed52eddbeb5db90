"""Flower for real, on 127.0.0.1.

SuperLink, SuperNodes and trainers in processes of their own, TLS, node keys, and what goes wrong
with them.

Processes take long to start. So one deployment lives through everything first (`story`), and the
tests look at what came of it."""

from __future__ import annotations

import os
import re
import signal
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
from flwr.app import Message

from fedloop.flower.deploy.enrol import enrol
from fedloop.flower.deploy.keys import make_certificates, make_node_key
from fedloop.flower.nodes import read_nodes, write_nodes
from fedloop.report.page import write_report
from fedloop.run.folder import read_run
from fedloop.run.run import RunResult
from fedloop.run.simulate import resume, simulate
from loraprobe.adapters.layout import pack
from loraprobe.adapters.load import load_adapter
from tests.fedloop.flower.test_flower_replies import changed, spoiled, update
from tests.helpers.deployed import FEDLOOP, Deployment, Started, finished, wait
from tests.helpers.federated import Files, defended, settings, toml
from tests.helpers.flowered import Deployment as FakeDeployment
from tests.helpers.flowered import Sent, honest, records, telling_probe
from tests.helpers.hostile_nodes import Hostile, HostileNodes

pytestmark = [pytest.mark.slow, pytest.mark.enable_socket]


@dataclass
class Story:
    """What happened.

    Attributes:
        folder: of the run.
        bad: the number of the round that went wrong.
        twin: the same experiment with the same absences on a fake grid, which nobody interrupted.
        killed: how many processes the server had when it was killed, and how many rounds were
            finished then.
        shown: what the run that was interrupted and the one that went on printed, with their exit
            codes.
        refused: what nodes printed that were not let in.
        node_ids: client -> Flower's node id, whenever its node came up.
        attacked: the folder of another run, in which most nodes are hostile.
        expected: the same with the same replies on a fake grid.
        turned_away: client -> the statuses with which the SuperLink refused a reply of it.
    """

    folder: Path
    bad: int = 0
    twin: RunResult | None = None
    killed: tuple[int, int] = (0, 0)
    shown: list[tuple[int, str]] = field(default_factory=list)
    refused: dict[str, str] = field(default_factory=dict)
    node_ids: dict[str, list[str]] = field(default_factory=dict)
    attacked: Path = Path()
    expected: RunResult | None = None
    turned_away: dict[str, list[int]] = field(default_factory=dict)


@pytest.fixture(scope="module")
def story(tiny_files: Files, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Story]:
    """A good round, a bad one in which one straggles and one is killed, then all of the server is
    killed, and everybody comes back.
    """
    values = settings(
        tiny_files, rounds=4, clients={"count": 3}, defense=defended(tiny_files, "step")
    )
    made = Deployment(tmp_path_factory.mktemp("deployment"), values)
    told = Story(made.place / "federation" / "run")
    try:
        made.serve()
        federation = made.app("federation", values, round_timeout=15.0)
        for name, site in made.sites.items():
            enrol(
                federation / "nodes.json",
                name,
                made.place / "keys" / f"{name}.pub",
                None,
                made.address,
                made.authority,
            )
            site.start()
        faults(made, federation, told)
        everybody_returns(made, federation, told, values)
        told.twin = uninterrupted(values, tmp_path_factory.mktemp("twin"), str(told.bad))
        yield told
    finally:
        made.close()


def uninterrupted(values: dict[str, Any], place: Path, bad: str) -> RunResult:
    """What the story has to end in."""

    def absent(asked: Message, reply: Message) -> Sequence[Message]:
        return [] if asked.metadata.group_id == bad else [reply]

    return FakeDeployment(place, values, **{"round-timeout": 1.0}).serve(
        {"client-01": absent, "client-02": absent}
    )


def faults(made: Deployment, folder: Path, told: Story) -> None:
    """A good round, a bad one, and the end of the server."""
    _, straggler, victim = made.sites.values()
    run = made.start(folder)
    run.until(told.folder, 1)
    for site in (straggler, victim):
        os.kill(site.trainer(), signal.SIGSTOP)  # its SuperNode goes on fetching messages
    wait(
        lambda: (
            victim.log().count("Received successfully") > victim.log().count("Sent successfully")
        ),
        "a message in the victim's hands",
    )
    victim.kill()
    wait(lambda: bad_round(told.folder), "a bad round")
    told.bad = bad_round(told.folder)
    doomed = made.server.running()
    for pid in doomed:
        os.kill(pid, signal.SIGKILL)
    told.shown.append((run.code(), run.shown()))
    told.killed = len(doomed), finished(told.folder)
    os.kill(straggler.trainer(), signal.SIGCONT)
    made.server.stop()


def bad_round(folder: Path) -> int:
    """The number of the first round in which somebody was refused; 0 if there is none yet."""
    return next((int(one["round"]) for one in records(folder) if one["reasons"]), 0)


def everybody_returns(made: Deployment, folder: Path, told: Story, values: dict[str, Any]) -> None:
    """A server with the same database, sites with the same keys.

    Two that are not let in, and others that should not have been.
    """
    *others, victim = made.sites.values()
    made.serve()
    make_certificates(made.place / "elsewhere")
    unwelcome = {
        "unregistered": made.unwelcome("stranger", made.authority),
        "another authority": made.unwelcome("astray", made.place / "elsewhere" / "ca.crt"),
    }
    for site in others:
        wait(site.connected, f"{site.name} to find the server again")
    told.refused = {what: site.ended() for what, site in unwelcome.items()}
    victim.start()
    wait(
        victim.keep_up, "the killed node to be let in again"
    )  # the server takes a minute to be sure that its former process is gone
    run = made.start(folder)
    told.shown.append((run.code(), run.shown()))
    told.node_ids = {
        name: re.findall(r"SuperNode ID: (\d+)", site.log()) for name, site in made.sites.items()
    }
    under_attack(
        made, told, values
    )  # last: after a restart of the server, sites take a while to answer again


def doubled(asked: Message, reply: Message) -> Sequence[Message]:
    """The honest reply, and a second one that would count five times as much."""
    [other] = changed(update(lambda numbers: 5 * numbers))(asked, reply)
    return [reply, other]


HOSTILE: dict[str, Sent] = {
    "client-02": changed(lambda own: {"base_model.model.q_proj.lora_A.weight": own["update"]}),
    "client-03": changed(update(lambda numbers: spoiled(numbers, float("nan")))),
    "client-04": changed(metrics={"num-examples": 10**9}),
    "client-05": doubled,
    "client-06": honest,  # but too late
}


def not_at_first(asked: Message, reply: Message) -> Sequence[Message]:
    """Nothing in the first round."""
    return [] if asked.metadata.group_id == "1" else [reply]


def under_attack(made: Deployment, told: Story, values: dict[str, Any]) -> None:
    """A run of two of the sites, and of registered nodes that do not play by the rules.

    And the same on a fake grid.
    """
    values = {
        **values,
        "rounds": 2,
        "defense": {},
        "clients": {**values["clients"], "count": 2 + len(HOSTILE), "malicious": 0},
    }
    folder = made.app(
        "attacked", values, round_timeout=40.0
    )  # all of which the first round waits for the late one; the others need a few seconds
    sites = {
        name: node
        for name, node in read_nodes(made.place / "federation" / "nodes.json").items()
        if name not in HOSTILE
    }
    write_nodes(folder / "nodes.json", sites)
    data = {
        name: {"data": str(made.place / f"{name if name in sites else 'client-02'}.jsonl")}
        for name in (*sites, *HOSTILE)
    }
    nodes = []
    for name, sent in HOSTILE.items():
        key = made.place / "keys" / f"hostile-{name}"
        enrol(folder / "nodes.json", name, make_node_key(key), None, made.address, made.authority)
        nodes.append(Hostile(key, data[name], sent, late=name == "client-06"))
    with HostileNodes(made.address, made.authority, nodes):
        run = made.start(folder)
        assert run.code() == 0, run.shown()
    told.attacked = folder / "run"
    told.turned_away = dict(zip(HOSTILE, (node.turned_away for node in nodes), strict=True))
    (made.place / "fake").mkdir()
    twin = FakeDeployment(made.place / "fake", values, **{"round-timeout": 1.0})
    twin.configs = dict(zip(twin.configs, data.values(), strict=True))
    told.expected = twin.serve({**HOSTILE, "client-05": honest, "client-06": not_at_first})


# --- what came of it


def test_a_run_whose_server_is_killed_whole_ends_where_an_uninterrupted_one_does(
    story: Story,
) -> None:
    processes, rounds = story.killed
    assert processes >= 3  # the SuperLink, Flower's process that starts others, and the ServerApp
    assert story.bad <= rounds < 4
    (code, shown), (code_later, all_shown) = story.shown
    assert code == 2
    assert "EngineError: cannot reach the SuperLink" in shown
    assert code_later == 0, all_shown
    later = all_shown.removeprefix(shown)
    assert "round 4 of 4: mean factor" in later
    assert "round 1 of 4" not in later
    assert story.twin is not None
    same(story.folder, story.twin)


def same(folder: Path, expected: RunResult) -> None:
    """The folder holds the expected run, to 1e-6 and with the same factors.

    The in-process engine and the report take it for their own.
    """
    _, _, found = read_run(folder)
    assert [record.factors for record in found] == [record.factors for record in expected.records]
    assert torch.allclose(
        pack(load_adapter(folder / "adapter"))[0], pack(expected.adapter)[0], rtol=0, atol=1e-6
    )
    assert list(resume(folder).records) == found
    report = write_report(folder).read_text()
    assert all(client in report for client in expected.roles)


def test_a_killed_node_and_a_straggler_are_missing_and_the_round_goes_on(story: Story) -> None:
    found = read_run(story.folder)[2]
    bad = found[story.bad - 1]
    assert story.bad in (2, 3)
    assert bad.reasons.keys() == {"client-01", "client-02"}
    assert all(why.startswith("missing: ") for why in bad.reasons.values())
    assert bad.weights == {"client-00": 1.0, "client-01": 0.0, "client-02": 0.0}
    assert not bad.skipped
    assert bad.seconds["exchange"] == pytest.approx(15, abs=4)
    assert 0 < found[0].seconds["train"] < found[0].seconds["exchange"]


def test_a_node_that_returns_with_its_key_is_the_same_client_with_the_same_trust(
    story: Story,
) -> None:
    found = read_run(story.folder)[2]
    trust = [record.factors["client-00"] for record in found]
    assert trust == sorted(set(trust))  # it grows with every round that was good
    assert found[0].factors == dict.fromkeys(found[0].factors, trust[0])
    assert not found[-1].reasons
    assert found[-1].factors == {
        "client-00": trust[3],
        "client-01": trust[2],
        "client-02": trust[2],
    }  # of their third good round, not of a first
    assert len(story.node_ids["client-02"]) == 2
    assert {len(set(ids)) for ids in story.node_ids.values()} == {1}


def test_who_has_no_registered_key_or_does_not_know_the_server_is_not_let_in(story: Story) -> None:
    assert "Failed to activate SuperNode" in story.refused["unregistered"]
    assert "CERTIFICATE_VERIFY_FAILED" in story.refused["another authority"]
    assert all(
        "SuperNode ID" not in log and "EngineError: the SuperNode ended" in log
        for log in story.refused.values()
    )


def test_hostile_nodes_are_refused_or_capped_and_the_rest_is_averaged_as_if_they_were_not_there(
    story: Story,
) -> None:
    first, second = read_run(story.attacked)[2]
    assert first.reasons.keys() == {"client-02", "client-03", "client-06"}, first.reasons
    for record in (first, second):
        assert (
            "got the arrays ['base_model.model.q_proj.lora_A.weight']; expected update"
            in record.reasons["client-02"]
        )
        assert "1 of 896 numbers are NaN or infinite" in record.reasons["client-03"]
        assert record.weights["client-02"] == record.weights["client-03"] == 0.0
        assert (
            record.num_examples["client-04"] == 3 * record.num_examples["client-00"]
        )  # of the thousand million that it claimed
        assert (
            record.weights["client-05"] == record.weights["client-00"] > 0
        )  # its second reply is nowhere
    assert first.reasons["client-06"].startswith(
        "missing: "
    )  # there was no reply, or Flower says that the message has expired
    assert second.reasons.keys() == {"client-02", "client-03"}
    assert second.weights["client-06"] == second.weights["client-00"]
    assert story.expected is not None
    same(story.attacked, story.expected)


# --- everything on this machine with one command


def belonging_to(folder: Path) -> list[str]:
    """The command lines of all processes that have Flower's home in this folder."""
    found = []
    for entry in Path("/proc").glob("[0-9]*"):
        with suppress(OSError):
            if f"FLWR_HOME={folder}".encode() in (entry / "environ").read_bytes():
                found.append((entry / "cmdline").read_bytes().decode(errors="replace"))
    return found


@pytest.fixture(scope="module")
def values(tiny_files: Files, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """An experiment whose probe tells its malicious client."""
    probe = telling_probe(tiny_files).save_pretrained(tmp_path_factory.mktemp("probe") / "telling")
    defense = {"level": "cumulative", "probe": str(probe), "threshold": 0.5}
    return settings(
        tiny_files,
        training={"steps": 4, "batch_size": 4},
        clients={"count": 3, "examples": 12},
        defense=defense,
    )


def test_one_command_runs_a_federation_as_one_process_would_and_leaves_nothing_behind(
    values: dict[str, Any], tmp_path: Path
) -> None:
    expected, folder = simulate(values), tmp_path / "run"
    (tmp_path / "one.toml").write_text(toml(values))
    run = Started(
        [*FEDLOOP, "run", tmp_path / "one.toml", "--out", folder, "--engine", "flower"],
        tmp_path / "shown.txt",
    )
    started = "3 SuperNodes, and one process that trains for all of them"
    wait(lambda: started in run.shown(), "SuperNodes")
    assert len(belonging_to(folder)) >= 5  # SuperLink, three SuperNodes, the trainer
    run.process.send_signal(signal.SIGINT)
    assert run.code() not in (0, 2)
    assert belonging_to(folder) == []
    again = Started([*FEDLOOP, "resume", folder, "--engine", "flower"], tmp_path / "shown.txt")
    again.until(folder, 1)
    assert len(belonging_to(folder)) >= 7  # and the ServerApp
    assert again.code() == 0, again.shown()
    assert belonging_to(folder) == []
    assert again.shown().count(started) == 2
    same(folder, expected)
    malicious = next(
        client for client, role in expected.roles.items() if role["role"] == "malicious"
    )
    for record in read_run(folder)[2]:
        assert record.weights[malicious] == 0.0
        assert sorted(record.weights.values()) == [0.0, 0.5, 0.5]
        assert record.bytes["update"] == 3 * 4 * pack(expected.adapter)[0].numel()
