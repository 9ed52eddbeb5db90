"""The benchmark of what a round on Flower costs.

Its wire counts, its ways play whole rounds, and its page shows its results.
"""

from __future__ import annotations

import socket
import threading
from pathlib import Path

import pytest

from benchmarks.flower import apps as apps
from benchmarks.flower import cost as flower_cost
from benchmarks.flower.counted_wire import CountedWire, carried


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


def test_the_page_shows_the_results_if_there_are_any() -> None:
    text = flower_cost.PAGE.read_text()
    shown = text.partition("by python -m benchmarks.flower.cost -->\n")[2].partition(
        "<!-- end of flower cost -->"
    )[0]
    assert shown == (flower_cost.table() + "\n" if flower_cost.RESULTS.exists() else "")


def test_the_adapter_has_448_tensors_of_the_size_that_the_table_says() -> None:
    tensors = apps.adapter(8).state_dict().values()
    assert len(tensors) == apps.TENSORS == 448
    assert 4 * sum(tensor.numel() for tensor in tensors) == 14_336_000
