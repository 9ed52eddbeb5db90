"""What the tests of the command line share.

Commands are imported in the fixtures: a conftest is read before warnings of Typer are let through.
"""

from __future__ import annotations

from pathlib import Path

import pytest


@pytest.fixture(scope="session")
def box(tmp_path_factory: pytest.TempPathFactory) -> Path:
    from tests.helpers.boxed import filled_box

    return filled_box(tmp_path_factory.mktemp("box"))


@pytest.fixture(autouse=True)
def _wide(monkeypatch: pytest.MonkeyPatch) -> None:
    """Tables and messages on one line each."""
    from fedloop.cli import run
    from loraprobe.cli import commands

    for module in (commands, run):
        monkeypatch.setattr(module.console, "width", 1000)
