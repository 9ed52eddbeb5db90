"""A TCP forwarder on 127.0.0.1 that counts what passes.

The wire between nodes and a server, without root and without other traffic.
"""

from __future__ import annotations

import mmap
import socket
import struct
import threading
from contextlib import suppress
from pathlib import Path
from types import TracebackType

_COUNTERS = struct.Struct("<QQ")
_BUFFER = 1 << 20


class CountedWire:
    """Passes every connection to its port on to another one, and keeps two totals in a file that
    other processes may read.

    What is counted is what TCP carries: TLS, headers and polling included, TCP's and IP's own
        headers not.

    Args:
        target: the server's port.
        counters: the file; `carried` reads it.

    Attributes:
        port: where clients connect.
    """

    def __init__(self, target: int, counters: Path) -> None:
        self._target, self._lock, self._closed = target, threading.Lock(), False
        self._totals = [0, 0]
        counters.write_bytes(_COUNTERS.pack(0, 0))
        with counters.open("r+b") as file:
            self._shared = mmap.mmap(file.fileno(), _COUNTERS.size)
        self._listener = socket.create_server(("127.0.0.1", 0), backlog=128)
        self.port: int = self._listener.getsockname()[1]
        threading.Thread(target=self._accept, daemon=True).start()

    def _accept(self) -> None:
        while not self._closed:
            with suppress(
                OSError
            ):  # closed, or a server that is gone: the client sees a closed connection
                client, _ = self._listener.accept()
                try:
                    server = socket.create_connection(("127.0.0.1", self._target))
                except OSError:
                    client.close()
                    raise
                for direction, (source, sink) in enumerate(((client, server), (server, client))):
                    source.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
                    threading.Thread(
                        target=self._pass, args=(source, sink, direction), daemon=True
                    ).start()

    def _pass(self, source: socket.socket, sink: socket.socket, direction: int) -> None:
        buffer = memoryview(bytearray(_BUFFER))
        with suppress(OSError):  # one end has gone; the other is told by the shutdown
            while count := source.recv_into(buffer):
                sink.sendall(buffer[:count])
                with self._lock:
                    self._totals[direction] += count
                    _COUNTERS.pack_into(self._shared, 0, *self._totals)
        with suppress(OSError):
            sink.shutdown(socket.SHUT_WR)

    def __enter__(self) -> CountedWire:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._closed = True
        self._listener.close()


def carried(counters: Path) -> tuple[int, int]:
    """Bytes from the clients to the server, and back, so far."""
    up, down = _COUNTERS.unpack(counters.read_bytes())
    return up, down
