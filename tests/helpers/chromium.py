"""Headless Chromium over its debugging pipe.

The DevTools protocol as JSON messages, each ended by a zero byte, on file descriptors 3 and 4.
"""

from __future__ import annotations

import base64
import fcntl
import json
import os
import select
import shutil
import subprocess
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

NAMES = ("chromium", "chromium-browser", "google-chrome")


def executable() -> str | None:
    """Where Chromium is, None if it is not installed."""
    return next((path for name in NAMES if (path := shutil.which(name))), None)


class Page:
    """One tab. `problems` collects uncaught exceptions, errors on the console and violations of
    the page's security policy.
    """

    def __init__(self, commands: int, answers: int) -> None:
        self._commands, self._answers, self._buffer, self._number, self._session = (
            commands,
            answers,
            b"",
            0,
            "",
        )
        self.problems: list[str] = []
        self.requested: list[str] = []
        target = self.call("Target.createTarget", url="about:blank")["targetId"]
        self._session = self.call("Target.attachToTarget", targetId=target, flatten=True)[
            "sessionId"
        ]
        for domain in ("Page", "Runtime", "Log", "Network", "DOM"):
            self.call(f"{domain}.enable")

    def call(self, method: str, **params: Any) -> dict[str, Any]:
        """One command and its result."""
        self._number += 1
        message = {
            "id": self._number,
            "method": method,
            "params": params,
            **({"sessionId": self._session} if self._session else {}),
        }
        os.write(self._commands, json.dumps(message).encode() + b"\0")
        while True:
            answer = self._next()
            if answer.get("id") == self._number:
                assert "error" not in answer, (method, answer["error"])
                return dict(answer["result"])
            self._note(answer)

    def open(self, url: str, *, width: int = 1000, height: int = 900, dark: bool = False) -> None:
        """Load a page in a window of this size, in a light or dark colour scheme."""
        self.call(
            "Emulation.setDeviceMetricsOverride",
            width=width,
            height=height,
            deviceScaleFactor=1,
            mobile=False,
        )
        self.call(
            "Emulation.setEmulatedMedia",
            features=[{"name": "prefers-color-scheme", "value": "dark" if dark else "light"}],
        )
        self.call("Page.navigate", url=url)
        self.until("document.readyState === 'complete' && location.href !== 'about:blank'")

    def run(self, script: str) -> Any:
        """The value of a JavaScript expression."""
        result = self.call(
            "Runtime.evaluate", expression=script, returnByValue=True, awaitPromise=True
        )
        assert "exceptionDetails" not in result, result["exceptionDetails"]
        return result["result"].get("value")

    def until(self, condition: str, seconds: float = 20) -> None:
        """Wait for a JavaScript expression to be true."""
        deadline = time.monotonic() + seconds
        while not self.run(condition):
            assert time.monotonic() < deadline, (
                f"{condition} did not become true: {self.run('document.body.innerText')}"
                f" {self.problems}"
            )
            time.sleep(0.02)

    def choose(self, selector: str, *paths: Path) -> None:
        """Choose files in a file input, as its user would."""
        root = self.call("DOM.getDocument")["root"]["nodeId"]
        node = self.call("DOM.querySelector", nodeId=root, selector=selector)["nodeId"]
        self.call("DOM.setFileInputFiles", nodeId=node, files=[str(path) for path in paths])

    def type(self, selector: str, text: str) -> None:
        """Replace the text of a field by key presses."""
        self.run(
            f"document.querySelector({json.dumps(selector)}).select();"
            f" document.querySelector({json.dumps(selector)}).focus()"
        )
        self.call("Input.insertText", text=text)

    def click(self, selector: str) -> None:
        """Click into the middle of an element."""
        middle = "({x, y, width, height}) => [x + width / 2, y + height / 2]"
        element = f"document.querySelector({json.dumps(selector)})"
        box = self.run(
            f"{element}.scrollIntoView({{block: 'center'}});"
            f" ({middle})({element}.getBoundingClientRect())"
        )
        for kind in ("mousePressed", "mouseReleased"):
            self.call(
                "Input.dispatchMouseEvent",
                type=kind,
                x=box[0],
                y=box[1],
                button="left",
                clickCount=1,
            )

    def press(self, key: str) -> None:
        """Press Tab or Enter."""
        code, text = {"Tab": (9, {}), "Enter": (13, {"text": "\r"})}[key]
        self.call(
            "Input.dispatchKeyEvent",
            type="keyDown",
            key=key,
            code=key,
            windowsVirtualKeyCode=code,
            **text,
        )
        self.call(
            "Input.dispatchKeyEvent", type="keyUp", key=key, code=key, windowsVirtualKeyCode=code
        )

    def picture(self, path: Path) -> None:
        """Save the whole page as a PNG."""
        shot = self.call(
            "Page.captureScreenshot",
            captureBeyondViewport=True,
            clip=self.run(
                "({x: 0, y: 0, width: document.documentElement.clientWidth, height:"
                " document.documentElement.scrollHeight, scale: 1})"
            ),
        )
        path.write_bytes(base64.b64decode(shot["data"]))

    def _next(self) -> dict[str, Any]:
        while b"\0" not in self._buffer:
            ready, _, _ = select.select([self._answers], [], [], 60)
            data = os.read(self._answers, 1 << 20) if ready else b""
            assert data, "Chromium did not answer"
            self._buffer += data
        message, _, self._buffer = self._buffer.partition(b"\0")
        return dict(json.loads(message))

    def _note(self, event: dict[str, Any]) -> None:
        method, params = event.get("method"), event.get("params", {})
        if method == "Runtime.exceptionThrown":
            self.problems.append(str(params["exceptionDetails"]))
        elif (
            method == "Log.entryAdded"
            and params["entry"]["level"] == "error"
            and params["entry"]["source"] != "network"
        ):
            self.problems.append(params["entry"]["text"])
        elif method == "Runtime.consoleAPICalled" and params["type"] == "error":
            self.problems.append(str(params["args"]))
        elif method == "Network.requestWillBeSent":
            self.requested.append(params["request"]["url"])


@contextmanager
def browser(profile: Path) -> Iterator[Page]:
    """A running Chromium with one tab."""
    path = executable()
    assert path is not None
    (read_commands, commands), (answers, write_answers) = os.pipe(), os.pipe()
    # clear of 3 and 4, which they become
    theirs = [fcntl.fcntl(end, fcntl.F_DUPFD, 20) for end in (read_commands, write_answers)]
    options = (
        "--headless --no-sandbox --disable-gpu --disable-dev-shm-usage --no-first-run"
        " --hide-scrollbars --remote-debugging-pipe"
    )
    process = subprocess.Popen(
        [path, *options.split(), f"--user-data-dir={profile}"],
        pass_fds=(3, 4),
        preexec_fn=_as_three_and_four(*theirs),
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    for end in (read_commands, write_answers, *theirs):
        os.close(end)
    try:
        yield Page(commands, answers)
    finally:
        process.terminate()
        process.wait(20)
        os.close(commands)
        os.close(answers)


def _as_three_and_four(commands: int, answers: int) -> Callable[[], None]:
    def move() -> None:
        os.dup2(commands, 3)
        os.dup2(answers, 4)

    return move
