"""Who may import whom, what stays out of the top level, and that the public names are there."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from graphlib import CycleError, TopologicalSorter
from pathlib import Path
from typing import NamedTuple

import pytest

import fedloop
import loraprobe

ROOT = Path(__file__).resolve().parents[1]
# The floors of loraprobe: a part imports from its own floor and those below. A part is a
# sub-package or a module of the top level.
FLOORS = (
    {"errors", "_version", "colours", "limits", "outputs"},
    {"adapters", "distribution", "overlap", "trust"},
    {"features"},
    {"featurizer", "heads", "metrics", "calibration"},
    {"probe", "evaluation"},
    {"fit", "hub", "manifest"},
    {"study", "scan"},
    {"report", "serve"},
    {"cli"},
)
# Calls upwards, made when a function runs: constructors that name the formats they read.
UPWARDS = {("adapters", "hub"), ("probe", "hub"), ("probe", "adapters")}
# fedloop's numbers in, numbers out: usable without loraprobe.
NUMBERS_ONLY = (
    *("fedloop.checks", "fedloop.rules", "fedloop.defense.levels", "fedloop.defense.paper_levels"),
    *("fedloop.defense.cumulative", "fedloop.defense.trust", "fedloop.defense.accumulate"),
    "fedloop.defense.weights",
)
ENGINES = {"flwr", "nvflare"}
HEAVY = {
    *("torch", "transformers", "peft", "umap", "xgboost", "sklearn", "matplotlib", "jinja2"),
    *("fastapi", "uvicorn", "prometheus_client"),
    *ENGINES,
}
OUTSIDE = {"zoo", "figures", "paper_repro", "benchmarks", "fuzz", "examples", "tests"}
FLOWER_PUBLIC = {"app", "clientapp", "serverapp", "common", "client", "server"}


class Import(NamedTuple):
    target: str  # absolute, "loraprobe.adapters.pair"
    when: str  # "import", "call" or "typing"


def imports(source: str, module: str, is_package: bool = False) -> list[Import]:
    """Every import of a module's source, relative ones resolved, and when it happens."""
    package = module.split(".") if is_package else module.split(".")[:-1]
    nodes = _import_nodes(ast.parse(source), "import")
    return [Import(target, when) for node, when in nodes for target in _targets(node, package)]


def _import_nodes(node: ast.AST, when: str) -> Iterator[tuple[ast.Import | ast.ImportFrom, str]]:
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.Import | ast.ImportFrom):
            yield child, when
        elif isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda):
            yield from _import_nodes(child, "call")
        elif isinstance(child, ast.If) and "TYPE_CHECKING" in ast.unparse(child.test):
            yield from _import_nodes(ast.Module(child.body, []), "typing")
            yield from _import_nodes(ast.Module(child.orelse, []), when)
        else:
            yield from _import_nodes(child, when)


def _targets(node: ast.Import | ast.ImportFrom, package: list[str]) -> list[str]:
    if isinstance(node, ast.Import):
        return [alias.name for alias in node.names]
    start = package[: len(package) - node.level + 1] if node.level else []
    base = ".".join([*start, *([node.module] if node.module else [])])
    names = [f"{base}.{alias.name}" for alias in node.names]
    return [name if _exists(name) else base for name in names]


def _exists(module: str) -> bool:
    path = ROOT / module.replace(".", "/")
    return path.with_suffix(".py").exists() or (path / "__init__.py").exists()


def modules(package: str) -> dict[str, list[Import]]:
    """Module name -> its imports, for every file of a package."""
    found = {}
    for path in sorted((ROOT / package).rglob("*.py")):
        parts = path.relative_to(ROOT).with_suffix("").parts
        name = ".".join(parts[:-1] if parts[-1] == "__init__" else parts)
        found[name] = imports(path.read_text(encoding="utf-8"), name, parts[-1] == "__init__")
    return found


FILES = {**modules("loraprobe"), **modules("fedloop")}


def floor_of(part: str) -> int:
    for number, floor in enumerate(FLOORS):
        if part in floor:
            return number
    raise AssertionError(f"a new part of loraprobe: say in FLOORS where {part!r} belongs")


def upward(module: str, found: list[Import]) -> list[str]:
    """The imports of a loraprobe module that the floors do not allow."""
    part = module.split(".")[1]
    wrong = []
    for target, when in found:
        package, _, rest = target.partition(".")
        other = rest.partition(".")[0]
        if package == "fedloop" or target == "loraprobe":
            wrong.append(target)
        elif package == "loraprobe" and floor_of(other) > floor_of(part):
            wrong += [] if when != "import" and (part, other) in UPWARDS else [target]
    return wrong


def cycle(files: dict[str, list[Import]]) -> list[str]:
    """A circle of imports that happen when a module is imported; empty where there is none."""
    graph = {
        module: {target for target, when in found if when == "import" and target in files}
        - {module}
        for module, found in files.items()
    }
    try:
        list(TopologicalSorter(graph).static_order())
    except CycleError as error:
        return list(error.args[1])
    return []


def test_arrows_of_loraprobe_point_down() -> None:
    wrong = {
        module: targets
        for module, found in FILES.items()
        if module.startswith("loraprobe.") and (targets := upward(module, found))
    }
    assert wrong == {}


@pytest.mark.parametrize(
    ("module", "source"),
    [
        ("loraprobe.adapters.pair", "from ..features import slices"),
        ("loraprobe.features", "def f():\n    from .probe import Probe"),
        ("loraprobe.adapters.load", "from ..hub.snapshot import fetch"),
        ("loraprobe.probe", "from fedloop import Defense"),
        ("loraprobe.heads", "from loraprobe import Probe"),
    ],
)
def test_a_wrong_arrow_is_seen(module: str, source: str) -> None:
    assert upward(module, imports(source, module)) != []


def test_no_circle_of_imports() -> None:
    assert cycle(FILES) == []


def test_a_circle_is_seen() -> None:
    files = {"x.a": [Import("x.b", "import")], "x.b": [Import("x.a", "import")]}
    assert cycle(files) != []
    assert cycle({**files, "x.b": [Import("x.a", "call")]}) == []


@pytest.mark.parametrize("prefix", NUMBERS_ONLY)
def test_rules_and_levels_know_neither_adapters_nor_models(prefix: str) -> None:
    found = {
        module: [target for target, when in FILES[module] if when != "typing"]
        for module in FILES
        if module == prefix or module.startswith(prefix + ".")
    }
    assert found
    for targets in found.values():
        assert not [name for name in targets if name.split(".")[0] in {"loraprobe", "peft"}]


def test_only_the_engines_folders_know_their_engine() -> None:
    for module, found in FILES.items():
        for target, when in found:
            package = target.split(".")[0]
            if package == "flwr" and when == "import":
                assert module.startswith(("fedloop.flower.", "fedloop.plugins.flower")), module
            if package == "nvflare" and when == "import":
                assert module == "fedloop.plugins.nvflare", module


def test_only_deploy_touches_flowers_private_modules() -> None:
    for module, found in FILES.items():
        private = {
            target
            for target, _ in found
            if target.startswith("flwr.") and target.split(".")[1] not in FLOWER_PUBLIC
        }
        assert not private or module.startswith("fedloop.flower.deploy"), (module, private)


def test_nothing_of_ours_imports_the_plugins_or_what_is_not_installed() -> None:
    for module, found in FILES.items():
        targets = {target for target, _ in found}
        assert not {name for name in targets if name.split(".")[0] in OUTSIDE}, module
        if not module.startswith(("fedloop.plugins", "fedloop.flower")) and module != "fedloop":
            assert not {name for name in targets if name.startswith("fedloop.plugins")}, module


LIGHT = (
    *("loraprobe", "fedloop", "loraprobe.probe", "loraprobe.adapters.load", "loraprobe.scan"),
    *("loraprobe.manifest", "loraprobe.heads", "loraprobe.featurizer"),
)


@pytest.mark.parametrize("module", LIGHT)
def test_importing_it_loads_nothing_heavy(module: str) -> None:
    code = f"import sys, {module}; print(*sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert HEAVY & set(done.stdout.split()) == set()


@pytest.mark.parametrize("package", [loraprobe, fedloop])
def test_every_public_name_is_there(package: object) -> None:
    names = package.__all__  # type: ignore[attr-defined]
    assert sorted(set(names)) == sorted(names)
    for name in names:
        assert getattr(package, name).__doc__ or isinstance(getattr(package, name), dict | str)
