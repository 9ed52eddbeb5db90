"""The service beside a page of somebody else's, in a real browser; skipped where there is none.

`pip install` needs nothing for it: Chromium writes down what its page came to.
"""

from __future__ import annotations

import html
import json
import re
import subprocess
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

from tests.helpers import chromium, serving

CHROMIUM = chromium.executable()
pytestmark = [
    pytest.mark.slow,
    pytest.mark.enable_socket,
    pytest.mark.skipif(CHROMIUM is None, reason="no Chromium"),
]

PAGE = """<!doctype html><body><iframe name="away"></iframe><pre id="told">{}</pre><script>
const told = {}, body = new Uint8Array([1, 2, 3]);
const attempts = {
  "read": url => fetch(url + "/v1/probes"),
  "no-cors": url => fetch(url + "/v1/probes", {mode: "no-cors"}),
  "simple post": url => fetch(url + "/v1/score", {method: "POST", mode: "no-cors", body: "x"}),
  "typed post": url => fetch(url + "/v1/score", {method: "POST", body,
    headers: {"Content-Type": "application/octet-stream"}}),
  "beacon": async url => { navigator.sendBeacon(url + "/v1/score", body); return {type: "sent"}; },
  "script": url => new Promise(done => { const tag = document.createElement("script");
    tag.onload = () => done({type: "loaded"});
    tag.onerror = () => done({type: "failed"});
    tag.src = url + "/v1/probes"; document.body.append(tag); }),
  "form": url => new Promise(done => { const form = document.createElement("form");
    form.method = "POST"; form.enctype = "text/plain"; form.target = "away";
    form.action = url + "/v1/score?kind=factor_delta"; document.body.append(form); form.submit();
    setTimeout(() => done({type: "sent"}), 1000); }),
};
(async () => {
  for (const url of TARGETS) for (const [name, attempt] of Object.entries(attempts)) {
    try { told[url + " " + name] = (await attempt(url)).type; }
    catch (error) { told[url + " " + name] = "refused"; } }
  document.getElementById("told").textContent = JSON.stringify(told); document.title = "done";
})();
</script></body>"""


@contextmanager
def stranger(page: str) -> Iterator[int]:
    """The port of a server that answers every path with this page."""

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(200)
            self.send_header("Content-Type", "text/html")
            self.end_headers()
            self.wfile.write(page.encode())

        def log_message(self, *args: Any) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    try:
        yield server.server_port
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


def looked_at(url: str, profile: Path) -> str:
    """The page as it is when its scripts came to rest; every name is this machine's."""
    assert CHROMIUM is not None
    options = "--headless --no-sandbox --disable-gpu --disable-dev-shm-usage --dump-dom".split()
    options += ["--virtual-time-budget=60000", f"--user-data-dir={profile}"]
    rules = "--host-resolver-rules=MAP *.test 127.0.0.1"
    done = subprocess.run(
        [CHROMIUM, *options, rules, url], capture_output=True, text=True, timeout=300, check=True
    )
    return done.stdout


def test_no_page_of_another_origin_learns_or_scores_anything(
    service: serving.Service, tmp_path: Path
) -> None:
    own = f"http://127.0.0.1:{service.port}"
    targets = [own, f"http://localhost:{service.port}", f"http://rebound.test:{service.port}"]
    before = len(service.answered())
    with stranger(PAGE.replace("TARGETS", json.dumps(targets))) as port:
        shown = looked_at(f"http://stranger.test:{port}/", tmp_path / "stranger")
    found = re.search(r'<pre id="told">(.*?)</pre>', shown, re.DOTALL)
    assert found is not None
    told = json.loads(html.unescape(found[1]))
    assert len(told) == len(targets) * 7, told
    assert {came for name, came in told.items() if name.split()[1] in ("read", "typed")} == {
        "refused"
    }
    assert "loaded" not in told.values(), told
    asked = service.answered()[before:]
    assert {line["status"] for line in asked} <= {403, 405, 415, 421}, asked
    assert len(asked) >= 4 * len(targets)  # negative control: the browser did ask
