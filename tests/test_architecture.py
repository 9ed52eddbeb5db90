"""Who may import whom, what stays out of the top level, and that the public names are there."""

from __future__ import annotations

import ast
import inspect
import subprocess
import sys
from collections.abc import Iterator
from graphlib import TopologicalSorter
from pathlib import Path
from typing import NamedTuple

import pytest

import fedloop
import loraprobe

ROOT = Path(__file__).resolve().parents[1]
HEAVY = {
    "transformers",
    "peft",
    "umap",
    "xgboost",
    "flwr",
    "nvflare",
    "fastapi",
    "uvicorn",
    "prometheus_client",
    "matplotlib",
}
# What subclasses an engine's classes and is imported by who uses that engine: by nothing of ours
# that is not in this table itself.
ENGINES = {
    "fedloop.flower.strategy": "flwr",
    "fedloop.plugins.flower": "flwr",
    "fedloop.plugins.nvflare": "nvflare",
}
OUTSIDE = {"zoo", "figures", "paper_repro", "benchmarks", "fuzz", "examples", "tests"}

# The scoring service: one package, free to import the library and itself.
_SERVE = (
    "answers app client command exchange gate head known logs metrics openapi page protocol scoring"
    " server settings upload"
)
SERVE = {"serve", *(f"serve.{name}" for name in _SERVE.split())}
LEAVE_OUT = {"leave_out", "leave_out_folds", "leave_out_report", "commands_leave_out"}
# loraprobe, from the bottom to the top: a module imports from rows above its own only; the last row
# among itself.
ROWS = (
    {"errors", "strict_json"},
    {"pair", "safetensors_header", "safetensors_bytes", "torch_file"},
    {"adapter"},
    {"peft_io", "features"},
    {"featurizer"},
    {"probe"},
    {
        "format",
        "hub",
        "hub_errors",
        "hub_snapshot",
        "card",
        "baselines",
        "manifest",
        "slices",
        "terminal",
        "commands",
        "commands_hub",
        "cli",
    }
    | LEAVE_OUT
    | SERVE,
)
# These take arrays, not adapters: they import errors and each other, and are imported from probe
# upwards.
ARRAYS = {
    "heads",
    "training_data",
    "torch_fitting",
    "fitting",
    "xgb_json",
    "metrics",
    "embed",
    "calibration",
    "card_figure",
    "mass_mean",
}
# Calls upwards, made when a function runs: constructors that name the file formats and the Hub they
# read.
DEFERRED = {("adapter", "peft_io"), ("peft_io", "hub"), ("probe", "format"), ("probe", "hub")}
# fedloop's numbers in, numbers out: usable without loraprobe.
NUMBERS_ONLY = {
    "levels",
    "weights",
    "accumulate",
    "attacks",
    "aggregate",
    "aggregate_rows",
    "aggregate_published",
    "server",
    "lora_aggregation",
}


class Import(NamedTuple):
    target: str  # absolute, "loraprobe.adapters.adapter"
    when: str  # "import", "call" or "typing"


def imports(source: str, module: str, is_package: bool = False) -> list[Import]:
    """Every import of a module's source, relative ones resolved, and when it happens."""
    package = module.split(".") if is_package else module.split(".")[:-1]
    return [
        Import(target, when)
        for node, when in _import_nodes(ast.parse(source), "import")
        for target in _targets(node, package)
    ]


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
    if "." in base:  # from loraprobe.adapters.adapter import Adapter
        return [base]
    return [
        name if (ROOT / (name.replace(".", "/") + ".py")).exists() else base for name in names
    ]  # from loraprobe import metrics


def modules(package: str) -> dict[str, list[Import]]:
    """Module name -> its imports, for every file of a package."""
    found = {}
    for path in sorted((ROOT / package).rglob("*.py")):
        parts = path.relative_to(ROOT).with_suffix("").parts
        name = ".".join(parts[:-1] if parts[-1] == "__init__" else parts)
        found[name] = imports(path.read_text(encoding="utf-8"), name, parts[-1] == "__init__")
    return found


FILES = {**modules("loraprobe"), **modules("fedloop")}


def row_of(name: str) -> int:
    return next(number for number, row in enumerate(ROWS) if name in row)


def wrong_way(module: str, found: list[Import]) -> list[str]:
    """The imports of a loraprobe module that the rows above do not allow."""
    name, wrong = module.removeprefix("loraprobe."), []
    for target, when in found:
        top, _, other = target.partition(".")
        if top == "fedloop":
            wrong.append(target)
        if (
            top != "loraprobe"
            or ((name, other) in DEFERRED and when != "import")
            or other == "errors"
        ):
            continue
        if not other:
            wrong.append(
                target
            )  # from loraprobe import Probe: the module it comes from is the one to name
        elif name in ARRAYS:
            wrong += [target] * (other not in ARRAYS)
        elif other in ARRAYS:
            wrong += [target] * (row_of(name) < row_of("probe"))
        elif row_of(other) > row_of(name) or (row_of(other) == row_of(name) < len(ROWS) - 1):
            wrong.append(target)
    return wrong


LIBRARY = [module for module in FILES if module.startswith("loraprobe.")]


@pytest.mark.parametrize("module", LIBRARY)
def test_arrows_point_one_way(module: str) -> None:
    name = module.removeprefix("loraprobe.")
    assert name in set().union(ARRAYS, *ROWS), (
        f"a new module: say in {Path(__file__).name} where {name} belongs"
    )
    assert wrong_way(module, FILES[module]) == []


@pytest.mark.parametrize(
    ("module", "source"),
    [
        ("adapter", "from .features import slices"),
        ("adapter", "from .peft_io import Scalings"),
        ("features", "from .peft_io import load_adapter"),
        ("features", "def f():\n    from .probe import Probe"),
        (
            "featurizer",
            (
                "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    from loraprobe.probe"
                " import Probe"
            ),
        ),
        ("featurizer", "from .metrics import auroc"),
        ("metrics", "import loraprobe.adapters.adapter"),
        ("heads", "from loraprobe import Adapter"),
        ("probe", "from .hub import fetch_probe"),
        ("probe", "from loraprobe import format"),
        (
            "card",
            (
                "class C:\n    try:\n        from fedloop.defense.levels import StepLevel\n   "
                " except ImportError: ..."
            ),
        ),
    ],
)
def test_an_arrow_that_points_the_other_way_is_seen(module: str, source: str) -> None:
    assert len(wrong_way(f"loraprobe.{module}", imports(source, f"loraprobe.{module}"))) == 1


def test_loraprobe_can_be_imported_in_some_order() -> None:
    edges = {
        module: {target for target, when in FILES[module] if when == "import" and target in FILES}
        for module in LIBRARY
    }
    assert len(list(TopologicalSorter(edges).static_order())) >= len(LIBRARY)  # raises CycleError


def heavy_or_outside(found: list[Import]) -> list[str]:
    tops = [(target.partition(".")[0], when) for target, when in found]
    return [top for top, when in tops if (top in HEAVY and when == "import") or top in OUTSIDE]


@pytest.mark.parametrize("module", FILES)
def test_heavy_packages_are_imported_where_they_are_used_and_scripts_nowhere(module: str) -> None:
    assert (
        heavy_or_outside(
            [one for one in FILES[module] if one.target.partition(".")[0] != ENGINES.get(module)]
        )
        == []
    )


@pytest.mark.parametrize("module", [name for name in FILES if name not in ENGINES])
def test_engines_are_not_imported_by_those_who_do_not_use_them(module: str) -> None:
    assert [
        target for target, when in FILES[module] if target in ENGINES and when == "import"
    ] == []


@pytest.mark.parametrize(
    "module",
    [
        name
        for name in FILES
        if name.startswith("fedloop.") and not name.startswith("fedloop.plugins")
    ],
)
def test_plugins_are_built_on_fedloop_and_not_the_other_way_round(module: str) -> None:
    assert [target for target, _ in FILES[module] if target.startswith("fedloop.plugins")] == []


def test_a_heavy_import_is_seen_at_the_top_only() -> None:
    inside = (
        "def f():\n    import peft\nfrom typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    import"
        " umap"
    )
    assert heavy_or_outside(imports(inside, "loraprobe.x")) == []
    assert heavy_or_outside(imports("import peft.utils", "loraprobe.x")) == ["peft"]
    assert heavy_or_outside(
        imports("if True:\n    from matplotlib import pyplot", "loraprobe.x")
    ) == ["matplotlib"]
    assert heavy_or_outside(imports("def f():\n    from zoo.build import main", "fedloop.x")) == [
        "zoo"
    ]


@pytest.mark.parametrize(
    "module", [name for name in FILES if name.removeprefix("fedloop.") in NUMBERS_ONLY]
)
def test_the_numbers_of_fedloop_need_neither_loraprobe_nor_peft(module: str) -> None:
    assert {target.partition(".")[0] for target, _ in FILES[module]} & {
        "loraprobe",
        "peft",
    } == set()


# --- the public names
# -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "parameters"),
    [
        ("load_adapter", {"revision"}),
        ("Adapter", set()),
        ("Adapter.from_state_dict", {"state_dict", "alpha"}),
        ("factor_delta", {"after", "before"}),
        ("weight_delta", {"after", "before"}),
        ("FeatureRecipe.paper", set()),
        ("Featurizer.fit", set()),
        ("Featurizer.__call__", set()),
        ("fit_probe", {"head", "recipe", "groups", "threshold", "seed"}),
        ("evaluate", set()),
        ("Probe.__call__", set()),
        ("Probe.save_pretrained", set()),
        ("Probe.from_pretrained", {"subfolder", "revision"}),
        ("Probe.push_to_hub", {"repo_id", "private", "token", "commit_message", "create_pr"}),
    ],
)
def test_a_documented_name_is_there_with_its_parameters(name: str, parameters: set[str]) -> None:
    thing: object = loraprobe
    for part in name.split("."):
        thing = getattr(thing, part)
    assert callable(thing)
    assert parameters <= set(inspect.signature(thing).parameters)


@pytest.mark.parametrize(
    ("name", "parameters"),
    [
        *(
            (f"{level}.{method}", set())
            for level in ("StepLevel", "ClientLevel", "ShadowLevel", "EvidenceLevel")
            for method in ("init", "status")
        ),
        ("StepLevel.update", {"state", "scores", "num_examples"}),
        ("CumulativeLevel.update", {"state", "scores", "num_examples"}),
        ("Defense.assess", {"round", "updates"}),
        ("Defense.state_dict", set()),
        ("Defense.load_state_dict", {"state"}),
        ("ClientUpdate", {"client_id", "num_examples", "adapter", "steps"}),
        ("RoundRecord", {"scores", "factors", "weights", "reasons", "skipped", "seconds"}),
        ("aggregation_weights", {"factors", "num_examples", "min_mean_factor"}),
        ("simulate", {"config"}),
    ],
)
def test_a_documented_name_of_fedloop_is_there_with_its_parameters(
    name: str, parameters: set[str]
) -> None:
    thing: object = fedloop
    for part in name.split("."):
        thing = getattr(thing, part)
    assert callable(thing)
    assert parameters <= set(inspect.signature(thing).parameters)


def test_the_documented_rules_optimisers_and_attacks_are_there() -> None:
    rules = (
        "mean median trimmed_mean krum multi_krum geometric_median centered_clipping nnm foolsgold"
        " residual dnc flame lasa"
    )
    assert set(rules.split()) <= set(fedloop.AGGREGATORS)
    assert set(fedloop.SERVER_OPTIMIZERS) == {
        "fedavg",
        "fedprox",
        "scaffold",
        "fedavgm",
        "fedadagrad",
        "fedyogi",
        "fedadam",
    }
    assert {"sign_flip", "scaling", "gaussian", "ipm", "alie", "mimic", "probe_evasion"} == set(
        fedloop.ATTACKS
    )


def test_the_report_has_the_documented_fields() -> None:
    assert {"auroc", "auroc_ci", "tpr_at_fpr", "ece", "n"} <= set(
        loraprobe.EvalReport.__dataclass_fields__
    )


def test_everything_offered_is_there_and_nothing_else_is_made_up() -> None:
    assert all(getattr(loraprobe, name) is not None for name in loraprobe.__all__)
    assert set(dir(loraprobe)) == set(loraprobe.__all__)
    assert all(getattr(fedloop, name) is not None for name in fedloop.__all__)
    assert set(dir(fedloop)) == set(fedloop.__all__)
    with pytest.raises(AttributeError, match="no attribute 'load_adaptor'"):
        loraprobe.load_adaptor  # noqa: B018
    with pytest.raises(AttributeError, match="no attribute 'simulator'"):
        fedloop.simulator  # noqa: B018


def test_importing_is_light() -> None:
    script = f"""
import sys
def loaded(): return sorted(set(sys.modules) & {{"torch", "numpy", *{sorted(HEAVY)}}})
import loraprobe; print(loaded())
import fedloop; print([name for name in loaded() if name in {sorted(HEAVY)}])
from loraprobe import Featurizer, Probe, evaluate, fit_probe, load_adapter; print(loaded())
"""
    result = subprocess.run(
        [sys.executable, "-c", script],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=True,
        timeout=120,
    )
    assert result.stdout.splitlines() == ["[]", "[]", "['numpy', 'torch']"]
