"""Starting the two commands: quick help, the pip line of what is missing, how they end."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

import loraprobe
from tests.helpers.boxed import ROOT, run

HELP = """
import sys
from {package}.cli.main import main
sys.argv = ["{package}", *{arguments!r}]
try:
    main()
except SystemExit as leaving:
    assert not leaving.code, leaving.code
heavy = {{
    "torch", "numpy", "scipy", "sklearn", "safetensors", "transformers", "peft",
    "huggingface_hub", "matplotlib", "umap", "xgboost",
}}
print(sorted(heavy & set(sys.modules)), file=sys.stderr)
"""


@pytest.mark.parametrize(
    ("package", "arguments"),
    [
        ("loraprobe", ["push", "--help"]),
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


@pytest.mark.parametrize("package", ["loraprobe", "fedloop"])
def test_the_version_is_that_of_the_package(package: str) -> None:
    done = run("-m", f"{package}.cli.main", "--version")
    assert (done.returncode, done.stdout) == (0, f"{package} {loraprobe.__version__}\n")


ENDING = """
import sys
from loraprobe.cli.main import main
from loraprobe.cli import probes, terminal

@terminal.app.command()
@terminal.reports_errors
def probe_end():
    {body}

sys.argv = ["loraprobe", "probe-end"]
main()
"""


@pytest.mark.parametrize(
    ("body", "code", "stderr"),
    [
        ("raise KeyboardInterrupt", 130, "interrupted\n"),
        ("raise PermissionError('locked')", 2, "PermissionError: locked\n"),
        ("raise terminal.LoraprobeError('a\\x1b[2Jb')", 2, "LoraprobeError: a\\x1b[2Jb\n"),
        ("raise terminal.typer.Exit(3)", 3, ""),
        ("terminal.console.print('\u00e9\u4e2d')", 0, ""),
    ],
)
def test_how_a_command_ends(body: str, code: int, stderr: str) -> None:
    done = run("-c", ENDING.format(body=body), PYTHONIOENCODING="ascii")
    assert (done.returncode, done.stderr) == (code, stderr)


@pytest.mark.parametrize("body", ["print('x' * 10)", "print('x' * 10**6)"])
def test_a_reader_that_has_gone_is_no_traceback_and_no_success(body: str) -> None:
    reader, writer = os.pipe()
    os.close(reader)
    with os.fdopen(writer, "w") as closed:
        done = subprocess.run(
            [sys.executable, "-c", ENDING.format(body=body)],
            stdout=closed,
            stderr=subprocess.PIPE,
            text=True,
            check=False,
            cwd=ROOT,
        )
    assert (done.returncode, done.stderr) == (141, "")
