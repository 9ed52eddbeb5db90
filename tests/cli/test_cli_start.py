"""Starting the two commands: help is quick, and without the extra they say how to get it."""

from __future__ import annotations

import os
import re

import pytest

from tests.helpers.boxed import PIP_LINE, run

HELP = """
import sys
from {package}.cli import main
sys.argv = ["{package}", *{arguments!r}]
try:
    main()
except SystemExit as leaving:
    assert not leaving.code, leaving.code
heavy = {{"torch", "numpy", "scipy", "sklearn", "safetensors", "transformers", "peft", "huggingface_hub", "matplotlib", "umap", "xgboost"}}
print(sorted(heavy & set(sys.modules)), file=sys.stderr)
"""


@pytest.mark.parametrize(
    ("package", "arguments"),
    [
        ("loraprobe", ["--help"]),
        ("loraprobe", ["push", "--help"]),
        ("fedloop", ["--help"]),
        ("fedloop", ["run", "--help"]),
    ],
)
def test_help_is_quick_and_imports_nothing_heavy(package: str, arguments: list[str]) -> None:
    seconds = []
    for _ in range(3):
        before = os.times()
        done = run("-c", HELP.format(package=package, arguments=arguments))
        # the processor's time, not the clock's: other work on the machine is not the command's
        # fault
        after = os.times()
        seconds.append(
            after.children_user
            + after.children_system
            - before.children_user
            - before.children_system
        )
        assert done.returncode == 0, done.stderr
        assert "Usage:" in done.stdout
        assert done.stderr == "[]\n"
        if seconds[-1] < 1.0:
            break
    assert min(seconds) < 1.0, seconds


BLOCKED = """
import sys

class Absent:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in {blocked!r}:
            raise ModuleNotFoundError(f"No module named {{name!r}}", name=name)

sys.meta_path.insert(0, Absent())
from {package}.cli import main
main()
"""


@pytest.mark.parametrize(
    ("package", "blocked"),
    [("loraprobe", "typer"), ("loraprobe", "rich"), ("fedloop", "typer"), ("fedloop", "rich")],
)
def test_without_the_cli_extra_the_command_says_how_to_get_it(package: str, blocked: str) -> None:
    done = run("-c", BLOCKED.format(package=package, blocked=[blocked]))
    assert done.returncode == 2
    assert done.stdout == ""
    assert re.fullmatch(
        rf"The {package} command needs {blocked}, which is not installed: {PIP_LINE}\n", done.stderr
    )
