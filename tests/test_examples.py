"""The examples run as they stand from a clone, say what happened, and the attack does not come
through; the page is up to date.
"""

from __future__ import annotations

import ast
import importlib
import inspect
import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest

from fedloop import ClientUpdate
from fedloop.plugins.flower import STEP
from fedloop.plugins.nvflare import RECORDS, STEPS
from loraprobe import Adapter, Probe

ROOT = Path(__file__).resolve().parents[1]
EXAMPLES = sorted((ROOT / "examples").glob("*.py"))
SLOW = {"nvflare_simulator.py"}
# Differences from the honest average: rounding, and what one malicious client of three to five
# moves.
SMALL, LARGE = (1e-6, 1e-3)


def run(path: Path, tmp_path: Path) -> str:
    """What it prints, started elsewhere and without anybody's settings.

    It may write nowhere but into a temporary folder.
    """
    # Short: sockets of a simulator lie in it, and their paths may have about a hundred characters.
    temporary = Path(tempfile.mkdtemp())
    environment = {
        "PATH": os.environ["PATH"],
        "HOME": str(tmp_path / "home"),
        "TMPDIR": str(temporary),
        "OMP_NUM_THREADS": "1",
    }
    done = subprocess.run(
        [sys.executable, str(path)],
        cwd=tmp_path,
        env=environment,
        capture_output=True,
        text=True,
        timeout=240,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert {left.name for left in tmp_path.iterdir()} <= {"home"}
    temporary.rmdir()  # raises if anything was left in it
    return done.stdout


@pytest.mark.parametrize(
    "path",
    [pytest.param(path, marks=pytest.mark.slow if path.name in SLOW else ()) for path in EXAMPLES],
    ids=lambda path: path.name,
)
def test_an_example_runs_and_the_new_adapter_is_the_honest_one_and_not_the_attacked_one(
    path: Path, tmp_path: Path
) -> None:
    printed = run(path, tmp_path)
    apart = {
        name: [
            float(number) for number in re.findall(rf"^{name}: .*: (\S+)$", printed, re.MULTILINE)
        ]
        for name in ("defended", "undefended")
    }
    assert apart["defended"], printed
    assert max(apart["defended"]) < SMALL < LARGE < min(apart["undefended"]), printed
    assert re.search(r"['\"](mallory|4|site-3)['\"]: 0\.0[,}]", printed), printed


@pytest.mark.parametrize("path", EXAMPLES, ids=lambda path: path.name)
def test_an_example_is_short_and_says_how_it_is_run(path: Path) -> None:
    text = path.read_text(encoding="utf-8")
    assert text.count("\n") < 100
    assert f"python examples/{path.name}" in text


def test_there_is_an_example_for_every_engine() -> None:
    assert {path.name for path in EXAMPLES} >= {
        *"own_loop.py nvflare_simulator.py openfedllm_hook.py flower_strategy.py".split()
    }


PAGE = ROOT / "docs/plug-in.md"
BLOCKS = [
    block
    for page in (PAGE, ROOT / "docs/recipes.md")
    for block in re.findall(r"```python\n(.*?)```", page.read_text(encoding="utf-8"), re.DOTALL)
]


@pytest.mark.parametrize("block", BLOCKS, ids=range(len(BLOCKS)))
def test_the_code_on_the_page_names_what_is_there(block: str) -> None:
    """Its imports of ours resolve, and every keyword argument of theirs exists."""
    tree, ours = (
        ast.parse(block),
        {"Adapter": Adapter, "ClientUpdate": ClientUpdate, "Probe": Probe},
    )
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom):
            package = str(node.module).split(".")[0]
            if package in sys.stdlib_module_names:
                continue
            assert package in ("fedloop", "loraprobe")
            ours |= {
                alias.name: getattr(importlib.import_module(str(node.module)), alias.name)
                for alias in node.names
            }
    for call in (
        node
        for node in ast.walk(tree)
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name)
    ):
        if call.func.id in ours:
            names = set(inspect.signature(ours[call.func.id]).parameters)
            assert {keyword.arg for keyword in call.keywords} <= names


def test_a_name_that_is_not_there_would_be_seen() -> None:
    with pytest.raises(AttributeError):
        test_the_code_on_the_page_names_what_is_there("from fedloop.plugins import defend_rounds")
    with pytest.raises(AssertionError):
        test_the_code_on_the_page_names_what_is_there(
            "from fedloop.plugins import defend_round\ndefend_round(1, alfa=16)"
        )


def test_the_page_names_every_example_and_the_constants_as_they_are() -> None:
    text = PAGE.read_text(encoding="utf-8")
    assert all(f"`python examples/{path.name}`" in text for path in EXAMPLES)
    assert {f"`{RECORDS}`", f'`FLModel.meta["{STEPS}"]`', f"`{STEP}1`"} <= set(
        re.findall(r"`[^`\n]+`", text)
    )
    assert len(BLOCKS) >= 8
