"""What the tests of the command line share."""

from __future__ import annotations

from pathlib import Path

import pytest

from fedloop.cli import run as fed_commands
from loraprobe.cli import commands
from tests.helpers.boxed import filled_box


@pytest.fixture(scope="session")
def box(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return filled_box(tmp_path_factory.mktemp("box"))


@pytest.fixture(autouse=True)
def _wide(monkeypatch: pytest.MonkeyPatch) -> None:
    """Tables and messages on one line each."""
    for console in (commands.console, fed_commands.console):
        monkeypatch.setattr(console, "width", 1000)
