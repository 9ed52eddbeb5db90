"""The benchmark of what a round on Flower costs.

Its wire counts, its ways play whole rounds, and its page shows its results.
"""

from __future__ import annotations

import json
import socket
import threading
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pytest
import torch
from flwr.app import ArrayRecord, ConfigRecord, Context, Error, Message, RecordDict

from benchmarks.flower import apps as apps
from benchmarks.flower import cost as flower_cost
from benchmarks.flower.counted_wire import CountedWire, carried
from fedloop.errors import EngineError
from fedloop.flower import strategy
from fedloop.flower.nodes import Node, write_nodes
from tests.helpers.flowered import FakeGrid, wired


@pytest.mark.enable_socket
def test_the_wire_passes_everything_on_and_counts_it(tmp_path: Path) -> None:
    server = socket.create_server(("127.0.0.1", 0))

    def shout() -> None:
        connection, _ = server.accept()
        with connection:
            received = b""
            while part := connection.recv(65536):
                received += part
            connection.sendall(2 * received)

    thread = threading.Thread(target=shout)
    thread.start()
    with (
        CountedWire(server.getsockname()[1], tmp_path / "counters") as wire,
        socket.create_connection(("127.0.0.1", wire.port)) as client,
    ):
        sent = bytes(range(256)) * 9000  # more than one buffer
        client.sendall(sent)
        client.shutdown(socket.SHUT_WR)
        back = b""
        while part := client.recv(65536):
            back += part
        assert back == 2 * sent
        assert carried(tmp_path / "counters") == (len(sent), 2 * len(sent))
    thread.join()
    server.close()


class CostGrid(FakeGrid):
    """Nodes that answer as the benchmark's clients do."""

    def __init__(self, ours: bool) -> None:
        super().__init__({1000: {}, 1001: {}})
        self._app = apps.our_client if ours else apps.stock_client()

    def reply(self, message: Message) -> Message:
        """Without training."""
        identity = message.metadata.message_id
        if identity not in self._replies:
            self._replies[identity] = self._app(
                wired(message), Context(1, message.metadata.dst_node_id, {}, RecordDict(), {})
            )
        return self._replies[identity]

    def send_and_receive(
        self, messages: Iterable[Message], *, timeout: float | None = None
    ) -> Iterable[Message]:
        """What FedAvg calls."""
        return [
            reply
            for identity in self.push_messages(messages)
            for reply in self.pull_messages([identity])
        ]


@pytest.mark.parametrize("name", apps.WAYS)
def test_a_way_takes_its_turn_and_writes_down_every_round(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(strategy, "_POLL", 0.001)
    monkeypatch.setenv("FLWR_HOME", str(tmp_path))
    way = apps.WAYS[name]
    write_nodes(
        tmp_path / "nodes.json",
        {f"node-{number}": Node(1000 + number, "key") for number in range(apps.CLIENTS)},
    )
    (tmp_path / "counters").write_bytes(bytes(16))
    (tmp_path / "turn").write_text("other")
    for kind in (apps.TimedDefended, apps.TimedFedAvg):
        monkeypatch.setattr(
            kind, "turns", apps.Turns(tmp_path, name, [name, "other"]), raising=False
        )
        monkeypatch.setattr(kind, "log", tmp_path / "log.jsonl", raising=False)
        monkeypatch.setattr(kind, "counters", tmp_path / "counters", raising=False)
    stop, passed = threading.Event(), []

    def other() -> None:
        """Passes the turn back, and sees that it comes once a round."""
        mine = apps.Turns(tmp_path, "other", [name, "other"])
        while not stop.is_set():
            if (tmp_path / "turn").read_text() == "other":
                passed.append(
                    len((tmp_path / "log.jsonl").read_text().splitlines()) if passed else 0
                )
                mine.pass_on()
            time.sleep(0.001)

    thread = threading.Thread(target=other)
    thread.start()
    grid = CostGrid(way.ours)
    if way.ours:
        apps.play_ours(grid, way, 1, 2, tmp_path / "run", tmp_path / "nodes.json", 60.0)
    else:
        apps.play_stock(grid, way, 1, 2, 60.0)
    time.sleep(0.05)
    stop.set()
    thread.join()
    assert passed == [0, 1, 2]
    rows = [json.loads(line) for line in (tmp_path / "log.jsonl").read_text().splitlines()]
    assert [row["round"] for row in rows] == [1, 2]
    assert all(row["seconds"] > 0 for row in rows)
    asked = grid.asked[0].content.array_records["arrays"]
    assert len(asked) == (1 if way.packed else 448)
    assert sum(len(array.data) for array in asked.values()) >= apps.TENSORS * apps.WIDTH * (
        2 if way.wire == "float16" else 4
    )


def test_a_round_in_which_a_client_is_missing_is_written_down_and_does_not_count(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "counters").write_bytes(bytes(16))
    (tmp_path / "turn").write_text("FedAvg")
    monkeypatch.setattr(
        apps.TimedFedAvg,
        "turns",
        apps.Turns(tmp_path, "FedAvg", ["FedAvg", "other"]),
        raising=False,
    )
    monkeypatch.setattr(apps.TimedFedAvg, "log", tmp_path / "log.jsonl", raising=False)
    monkeypatch.setattr(apps.TimedFedAvg, "counters", tmp_path / "counters", raising=False)
    fedavg = apps.TimedFedAvg(fraction_evaluate=0.0)
    grid, arrays = CostGrid(ours=False), ArrayRecord({"adapter": torch.zeros(3)})
    replies = list(grid.send_and_receive(fedavg.configure_train(1, arrays, ConfigRecord(), grid)))
    lost = Message(Error(code=0, reason="the push session expired"), reply_to=grid.asked[1])
    fedavg.aggregate_train(1, [replies[0], lost])
    [row] = [json.loads(line) for line in (tmp_path / "log.jsonl").read_text().splitlines()]
    assert (row["replies"], row["errors"]) == (1, ["the push session expired"])
    assert not flower_cost.complete({"rounds": [row]})
    assert flower_cost.complete({"rounds": [{**row, "replies": apps.CLIENTS}]})
    assert (tmp_path / "turn").read_text() == "other"


def test_a_round_that_was_not_over_in_time_is_one_that_was_not_complete(tmp_path: Path) -> None:
    (tmp_path / "turn").write_text("late")
    for name in ("late", "early"):
        (tmp_path / f"{name}.jsonl").write_text(
            json.dumps({"round": 1, "seconds": 1.0, "replies": 2, "errors": []}) + "\n"
        )
    rows = flower_cost.begun(tmp_path, "late", 3, "time was up")
    assert [(row["round"], row["errors"]) for row in rows] == [(1, []), (2, ["time was up"])]
    assert len(flower_cost.complete({"rounds": rows})) == 1
    assert len(flower_cost.begun(tmp_path, "early", 3, "time was up")) == 1
    with pytest.raises(SystemExit, match="had not begun"):
        flower_cost.begun(tmp_path, "third", 3, "time was up")


def test_a_size_ends_when_it_is_over_or_its_time_is_up_or_a_superlink_breaks_down(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def broken() -> bool:
        raise EngineError("refused: HTTP 500")

    assert flower_cost.wait(lambda: True) == "over"
    assert flower_cost.wait(broken) == "refused: HTTP 500"
    monkeypatch.setattr(flower_cost, "PATIENCE", 0.0)
    assert "not over" in flower_cost.wait(lambda: False)


def test_the_page_shows_the_results_if_there_are_any() -> None:
    text = flower_cost.PAGE.read_text()
    shown = text.partition("by python -m benchmarks.flower.cost -->\n")[2].partition(
        "<!-- end of flower cost -->"
    )[0]
    assert shown == (flower_cost.table() + "\n" if flower_cost.RESULTS.exists() else "")


def test_a_size_that_was_measured_again_takes_the_place_of_its_former_rows(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "page.md").write_text(flower_cost.PAGE.read_text())
    monkeypatch.setattr(flower_cost, "PAGE", tmp_path / "page.md")
    monkeypatch.setattr(flower_cost, "RESULTS", tmp_path / "results.json")

    def case(rank: int, stock: float) -> dict[str, Any]:
        took = dict(zip(apps.WAYS, (2.0, 1.0, stock, 4.0), strict=True))
        row = {"to_server": 3_000_000, "to_clients": 1_000_000}
        whole = [
            *zip((1, 3, 2), (2, 2, 2), strict=True),
            (9, 1),
        ]  # (factor, replies): the last round is not complete
        ways = {
            name: {
                "rounds": [
                    {**row, "replies": replies, "seconds": factor * took[name]}
                    for factor, replies in whole
                ]
            }
            for name in flower_cost.RANKS[rank][0]
        }
        return {"rank": rank, "bytes": 4 * apps.TENSORS * apps.WIDTH * rank, "ways": ways}

    for rank, stock in ((56, 8.0), (8, 6.0), (56, 16.0)):
        flower_cost.save(case(rank, stock))
    lines = [
        line.split(" | ")
        for line in (tmp_path / "page.md").read_text().splitlines()
        if " MB" not in line and "fedloop, float" in line
    ]
    assert [(line[0], line[2], line[4]) for line in lines] == [
        ("| 14.3", "4.0 [2.0, 6.0]", "3.0 times as long"),
        ("| 14.3", "2.0 [1.0, 3.0]", "6.0 times as long"),
        ("| 100.4", "4.0 [2.0, 6.0]", "8.0 times as long"),
        ("| 100.4", "2.0 [1.0, 3.0]", "16.0 times as long"),
    ]


def test_the_adapter_has_448_tensors_of_the_size_that_the_table_says() -> None:
    tensors = apps.adapter(8).state_dict().values()
    assert len(tensors) == apps.TENSORS == 448
    assert 4 * sum(tensor.numel() for tensor in tensors) == 14_336_000
