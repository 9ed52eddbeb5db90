"""What is shipped: the wheel's files and extras, and what a core-only installation can do and says
it cannot.
"""

from __future__ import annotations

import ast
import os
import re
import subprocess
import sys
import zipfile
from collections.abc import Iterator
from email import message_from_bytes
from email.message import Message
from pathlib import Path

import pytest

from tests.helpers import make, probes

ROOT = Path(__file__).resolve().parents[1]
SHIPPED = ("loraprobe", "fedloop")
EXAMPLE = ROOT / "fedloop/example"  # with a base model and a probe, which are links to the zoo's
SUFFIXES = (".py", ".typed", ".toml", ".html", ".j2")
CORE = {"numpy", "scipy", "safetensors", "huggingface-hub", "regex", "scikit-learn"}
EXTRAS = {
    "cli": {"typer", "rich"},
    "xgboost": {"xgboost-cpu"},
    "figures": {"matplotlib", "umap-learn", "jinja2"},
    "fed": {
        *("torch", "transformers", "peft", "accelerate", "pydantic", "rouge-score", "datasets"),
        *("gguf", "filelock", "numpy"),
    },
    "gpu": {"bitsandbytes"},
    "tensorboard": {"tensorboard"},
    "mlflow": {"mlflow-skinny", "sqlalchemy", "alembic"},
    "wandb": {"wandb"},
    "flower": {"torch", "flwr"},
    "flower-deploy": {"flwr", "cryptography"},
    "nvflare": {"torch", "nvflare"},
    "sign": {"model-signing", "pyopenssl"},
    "serve": {
        *"fastapi starlette pydantic uvicorn httptools uvloop limits prometheus-client".split()
    },
}
COLLECTIONS = {"all", "dev", "docs"}  # made of others


@pytest.fixture(scope="module")
def wheel(wheel_file: Path) -> zipfile.ZipFile:
    return zipfile.ZipFile(wheel_file)


@pytest.fixture(scope="module")
def metadata(wheel: zipfile.ZipFile) -> Message:
    [name] = [name for name in wheel.namelist() if name.endswith(".dist-info/METADATA")]
    return message_from_bytes(wheel.read(name))


def test_the_wheel_holds_both_packages_whole_and_nothing_else(wheel: zipfile.ZipFile) -> None:
    names = {name for name in wheel.namelist() if ".dist-info/" not in name}
    assert names == {
        str(path.relative_to(ROOT))
        for package in SHIPPED
        for path in (ROOT / package).rglob("*")
        if path.suffix in SUFFIXES
    } | {"fedloop/data/builtin/words.json"} | {
        f"fedloop/example/{path.relative_to(EXAMPLE)}"
        for pattern in ("[bp]*/*", "adapters/*-100-[012]/*", "adapters/manifest.csv")
        for path in EXAMPLE.glob(pattern)
    }
    assert {
        "loraprobe/py.typed",
        "fedloop/py.typed",
        "loraprobe/probe.py",
        "fedloop/client/training.py",
        "fedloop/example/example.toml",
        "fedloop/example/base/model.safetensors",
        "fedloop/example/probe/config.json",
    } <= names
    assert any(name.endswith(".dist-info/licenses/LICENSE") for name in wheel.namelist())


def test_the_commands_are_installed(wheel: zipfile.ZipFile) -> None:
    [name] = [name for name in wheel.namelist() if name.endswith(".dist-info/entry_points.txt")]
    lines = wheel.read(name).decode().split("\n")
    assert [line for line in lines if line] == [
        "[console_scripts]",
        "fedloop = fedloop.cli.main:main",
        "loraprobe = loraprobe.cli.main:main",
    ]


def requirements(metadata: Message, extra: str | None) -> set[str]:
    """The distributions that an extra requires; of the core, for None."""
    found = set()
    for line in metadata.get_all("Requires-Dist", []):
        name, marked = (
            re.match(r"[\w.-]+(?:\[[^]]*\])?", line),
            re.search(r"extra == ['\"]([\w-]+)['\"]", line),
        )
        assert name
        if (marked[1] if marked else None) == extra:
            found.add(name[0])
    return found


def test_the_extras_are_the_documented_ones(metadata: Message) -> None:
    assert set(metadata.get_all("Provides-Extra", [])) == set(EXTRAS) | COLLECTIONS
    assert requirements(metadata, None) == CORE
    for extra, packages in EXTRAS.items():
        assert requirements(metadata, extra) == packages
    [everything] = requirements(metadata, "all")
    assert set(everything.removeprefix("loraprobe[").removesuffix("]").split(",")) == {
        *"cli xgboost figures fed tensorboard serve".split()
    }
    assert {
        *"loraprobe[all,flower,flower-deploy,nvflare,sign] pytest ruff mypy".split()
    } <= requirements(metadata, "dev")


def missing_extras() -> Iterator[tuple[str, str]]:
    """(package, extra) of every call that raises MissingExtra; the package may be computed."""
    for path in [path for package in SHIPPED for path in (ROOT / package).rglob("*.py")]:
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if (
                isinstance(node, ast.Call)
                and isinstance(node.func, ast.Name)
                and node.func.id in ("MissingExtra", "require")
            ):
                package, extra = node.args[:2]
                if ast.unparse(extra) == "extra" or isinstance(package, ast.Starred):
                    continue  # its callers, or the lines above, write it out
                assert isinstance(extra, ast.Constant), ast.unparse(node)
                yield (
                    (str(package.value) if isinstance(package, ast.Constant) else ""),
                    str(extra.value),
                )


def test_every_pip_line_names_an_extra_that_brings_the_package() -> None:
    found = set(missing_extras())
    assert {
        ("umap-learn", "figures"),
        ("peft", "fed"),
        ("torch", "fed"),
        ("transformers", "fed"),
        ("", "cli"),
    } <= found
    plain = re.compile("-(cpu|skinny)$")
    brought = {
        extra: packages | {plain.sub("", name).replace("-", "_") for name in packages}
        for extra, packages in EXTRAS.items()
    }
    assert {
        (package, extra) for package, extra in found if package and package not in brought[extra]
    } == set()
    assert {extra for _, extra in found} <= set(EXTRAS)


CORE_ONLY = """
import sys
from pathlib import Path

ABSENT = {
    *("typer", "rich", "click", "xgboost", "umap", "matplotlib", "transformers", "peft"),
    *("accelerate", "flwr", "fastapi", "uvicorn"),
}

class Absent:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in ABSENT:
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)

sys.meta_path.insert(0, Absent())

import numpy as np
import loraprobe
from loraprobe.errors import MissingExtra
from loraprobe import Probe, load_adapter

folder = Path(sys.argv[1])
for head in ("linear", "xgboost"):
    print(repr(float(Probe.from_pretrained(folder / head)(folder / "adapter")[0])))

import fedloop
from fedloop.measure.refusal import refuses_by_rule
from fedloop.client.training import LoRASettings, attach_lora, load_base
from loraprobe.study.embed import embed

adapters = [load_adapter(folder / "adapter")]
attempts = (
    lambda: loraprobe.fit_probe(adapters * 4, [0, 1, 0, 1], head="xgboost"),
    lambda: embed(np.eye(8), "umap"),
    lambda: load_base(folder),
    lambda: attach_lora(None, LoRASettings(), 0),
)
for attempt in attempts:
    try:
        attempt()
    except MissingExtra as error:
        print(error)
    else:
        print("nothing was missing")
assert not {name.partition(".")[0] for name in sys.modules} & ABSENT
"""


def test_a_core_only_installation_scores_and_says_what_it_lacks(tmp_path: Path) -> None:
    data = probes.labelled(16, 1, kind="weights")
    make.folder(
        tmp_path / "adapter",
        make.tensors(data.adapters[1]),
        r=2,
        lora_alpha=4,
        base_model_name_or_path=probes.BASE,
    )
    fitted = {}
    for head, options in (("linear", {}), ("xgboost", {"n_estimators": 3})):
        fitted[head] = probes.fit_probe(
            data.adapters, data.labels, head=head, groups=data.groups, head_options=options
        )
        fitted[head].save_pretrained(tmp_path / head)
    done = subprocess.run(
        [sys.executable, "-c", CORE_ONLY, str(tmp_path)],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
        env={**os.environ},
    )
    assert done.returncode == 0, done.stderr
    linear, trees, *complaints = done.stdout.splitlines()
    for head, score in (("linear", linear), ("xgboost", trees)):
        expected = float(fitted[head](data.adapters[1])[0])
        assert float(score) == pytest.approx(expected, rel=1e-12)
    lines = [
        re.fullmatch(
            r".+ needs ([\w-]+), which is not installed: pip install 'loraprobe\[(\w+)\]'", line
        )
        for line in complaints
    ]
    assert [found and found.groups() for found in lines] == [
        ("xgboost", "xgboost"),
        ("umap-learn", "figures"),
        ("transformers", "fed"),
        ("peft", "fed"),
    ], complaints


@pytest.mark.parametrize(
    ("package", "attempt"),
    [
        ("torch", "import fedloop.plugins.openfedllm"),
        ("pydantic", "import fedloop.callbacks"),
        ("pydantic", "from fedloop import simulate"),
        ("torch", "from fedloop.flower import server_app"),
    ],
)
def test_fedloop_without_its_extra_says_the_pip_line(package: str, attempt: str) -> None:
    script = f"import sys; sys.modules[{package!r}] = None\nfrom fedloop.errors import MissingExtra"
    done = subprocess.run(
        [sys.executable, "-c", f"{script}\ntry: {attempt}\nexcept MissingExtra as e: print(e)"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    assert f"needs {package}, which is not installed: pip install 'loraprobe[fed]'" in done.stdout
