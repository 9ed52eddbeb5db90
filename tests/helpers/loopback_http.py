"""The HTTP under the loopback Hub.

Bodies in, replies and files out, a log of every request, faults on the way.
"""

from __future__ import annotations

import json
import re
import threading
import traceback
from dataclasses import asdict, dataclass
from http.server import BaseHTTPRequestHandler
from pathlib import Path
from socketserver import ThreadingTCPServer
from typing import Any
from urllib.parse import parse_qs, unquote, urlsplit

from tests.helpers.loopback_faults import BODY_KINDS, Fault, Faults


@dataclass
class Entry:
    """One request as it came in.

    `status` is 0 until it was answered, and stays 0 where no answer was given.
    """

    origin: str  # "hub" or "storage"
    method: str
    path: str
    token: bool
    agent: str
    range: str | None = None
    status: int = 0


class Refusal(Exception):
    """An answer that the client maps to an error by its headers."""

    def __init__(
        self, status: int, message: str, code: str | None = None, commit: str | None = None
    ) -> None:
        super().__init__(message)
        self.status = status
        self.headers = {
            "X-Error-Message": message,
            **({"X-Error-Code": code} if code else {}),
            **({"X-Repo-Commit": commit} if commit else {}),
        }


class Served:
    """What the two origins share: the log, the faults, and the word to stop."""

    def __init__(self) -> None:
        self.faults = Faults()
        self.log: list[Entry] = []
        self.crashes: list[str] = []
        self.closing = threading.Event()

    def entries(self) -> list[dict[str, Any]]:
        """The log, JSON-ready."""
        return [asdict(entry) for entry in list(self.log)]


class Server(ThreadingTCPServer):
    """One origin on the loopback interface."""

    allow_reuse_address = daemon_threads = True
    request_queue_size = 64

    def __init__(self, port: int, handler: type[Handler], served: Served) -> None:
        self.served = served
        super().__init__(("127.0.0.1", port), handler)
        self.url = f"http://127.0.0.1:{self.server_address[1]}"

    def start(self) -> None:
        threading.Thread(
            target=self.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True
        ).start()

    def handle_error(self, request: Any, client_address: Any) -> None:
        """A client that hangs up is no news; anything else is a mistake of this server."""
        error = traceback.format_exc()
        if not any(
            name in error
            for name in ("ConnectionResetError", "BrokenPipeError", "ConnectionAbortedError")
        ):
            self.served.crashes.append(error)


class Handler(BaseHTTPRequestHandler):
    """Finds the route of a request, applies the faults, and writes what the route returns or
    refuses.
    """

    protocol_version = "HTTP/1.1"
    timeout = 60
    server: Server
    origin: str
    routes: tuple[
        tuple[str, str, str], ...
    ]  # methods, regular expression for the path as it was sent, name of what answers

    def do_GET(self) -> None:
        split = urlsplit(self.path)
        self.query = {name: values[-1] for name, values in parse_qs(split.query).items()}
        agent, token = self.headers.get("User-Agent", ""), "Authorization" in self.headers
        self.entry = Entry(
            self.origin, self.command, self.path, token, agent, self.headers.get("Range")
        )
        if not split.path.startswith("/__"):
            self.server.served.log.append(self.entry)
        self.body = self._read_body()
        try:
            for methods, pattern, name in self.routes:
                match = re.fullmatch(pattern, split.path)
                if match and self.command in methods.split():
                    return self._answer(
                        name,
                        {
                            key: unquote(value)
                            for key, value in match.groupdict().items()
                            if value is not None
                        },
                    )
            raise Refusal(404, f"no such route: {self.command} {split.path}")
        except Refusal as refusal:
            self.reply_json(refusal.status, {"error": str(refusal)}, refusal.headers)
        except ConnectionError:
            self.close_connection = True
        except Exception:  # noqa: BLE001  # a mistake of this server; tests look for it
            self.server.served.crashes.append(traceback.format_exc())
            self.reply_json(500, {"error": "the loopback Hub itself is at fault"}, {})

    do_HEAD = do_POST = do_PUT = do_DELETE = do_GET  # noqa: N815  # the names http.server looks for

    def _answer(self, name: str, arguments: dict[str, str]) -> None:
        self.route, self.subject = name, arguments.get("path") or unquote(urlsplit(self.path).path)
        if not name.startswith("admin"):
            if fault := self.fault("hang"):
                self.server.served.closing.wait(fault.value)
                if fault.value is None:
                    return self._hang_up()
            if self.fault("drop"):
                return self._hang_up()
            if fault := self.fault("status"):
                raise Refusal(
                    int(fault.value), f"the loopback Hub was told to answer {fault.value}"
                )
            if fault := self.fault("redirect"):
                return self.reply(302, b"", {"Location": str(fault.value)})
        getattr(self, name)(**arguments)
        return None

    def fault(self, *kinds: str) -> Fault | None:
        """A fault of these kinds that is switched on for the request at hand."""
        return self.server.served.faults.take(kinds, self.route, self.command, self.subject)

    def reply(self, status: int, body: bytes, headers: dict[str, str]) -> None:
        self.entry.status = status
        self.send_response(status)
        for name, value in {"Content-Length": str(len(body)), **headers}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def reply_json(self, status: int, value: Any, headers: dict[str, str] | None = None) -> None:
        self.reply(
            status,
            json.dumps(value).encode(),
            {"Content-Type": "application/json; charset=utf-8", **(headers or {})},
        )

    def reply_file(self, path: Path, headers: dict[str, str]) -> None:
        """A file or the part of it that was asked for, under the faults that concern bodies."""
        data = path.read_bytes()
        fault = self.fault(*BODY_KINDS) if self.command == "GET" else None
        if fault and fault.kind == "flip":
            data = fault.flipped(data)
        if fault and fault.kind == "longer":
            data += b"\n" * int(fault.value)
        start, end = self._wanted(len(data))
        headers = {"Content-Type": "application/octet-stream", "Accept-Ranges": "bytes", **headers}
        if (start, end) == (0, len(data)):
            status = 200
        else:
            status, headers["Content-Range"] = 206, f"bytes {start}-{end - 1}/{len(data)}"
        headers["Content-Length"] = str(end - start)
        if fault and fault.kind in ("die", "stall"):
            self.reply(status, data[start : max(start, min(end, int(fault.value or 0)))], headers)
            self.entry.status = 0
            if fault.kind == "stall":
                self.wfile.flush()
                self.server.served.closing.wait()
            return self._hang_up()
        return self.reply(status, data[start:end], headers)

    def _wanted(self, size: int) -> tuple[int, int]:
        """The half-open range of bytes that the request wants."""
        match = re.fullmatch(r"bytes=(\d*)-(\d*)", self.headers.get("Range", ""))
        if not match or not any(match.groups()):
            return 0, size
        first, last = match.groups()
        start, end = (
            (max(0, size - int(last)), size)
            if not first
            else (int(first), min(size, int(last) + 1) if last else size)
        )
        if start >= end:
            raise Refusal(416, f"the file has {size} bytes")
        return start, end

    def _read_body(self) -> bytes:
        if self.headers.get("Transfer-Encoding", "").lower() != "chunked":
            return self.rfile.read(int(self.headers.get("Content-Length", 0)))
        chunks = []
        while size := int(self.rfile.readline().split(b";")[0] or b"-1", 16):
            if size < 0:
                raise ConnectionResetError("the client hung up in the middle of a body")
            chunks.append(self.rfile.read(size))
            self.rfile.readline()
        while self.rfile.readline().strip():  # trailers
            pass
        return b"".join(chunks)

    def _hang_up(self) -> None:
        self.close_connection = True

    def log_message(self, format: str, *arguments: Any) -> None:
        """The log is a list; nothing is printed."""
