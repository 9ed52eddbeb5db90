"""What every command says where an extra is not installed: its pip line, never a traceback."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import numpy as np

from fedloop import Config, RoundRecord
from fedloop.example import FOLDER, example_config, write_adapters
from fedloop.run.folder import RunFolder

ROOT = Path(__file__).resolve().parents[2]
# Modules that an installation without the extra does not have.
BROUGHT = {
    "cli": ("typer", "rich", "click"),
    "xgboost": ("xgboost",),
    "figures": ("matplotlib", "umap", "jinja2"),
    "fed": (
        *("torch", "transformers", "peft", "accelerate", "pydantic", "rouge_score", "datasets"),
        *("gguf", "tokenizers"),
    ),
    "serve": ("fastapi", "starlette", "uvicorn", "httptools", "uvloop", "limits"),
    "flower": ("flwr", "grpc", "tomli_w"),
    "sign": ("model_signing",),
}
COMMANDS = {
    "loraprobe": (
        "--help",
        "score adapters/malicious-advbench-advbench-100-2 --probe probe --base initial",
        "inspect adapters/malicious-advbench-advbench-100-2",
        "scan adapters/malicious-advbench-advbench-100-2",
        "train adapters/train.csv --out linear",
        "train adapters/train.csv --out trees --head xgboost",
        "train adapters/train.csv --out mlp --head mlp",
        "evaluate adapters/held-out.csv --probe linear",
        "verify linear --on adapters/held-out.csv",
        "verify linear --key key.pub",
        "card linear",
        "zoo list probes",
        "report adapters --out page.html",
        "serve --probe linear",
    ),
    "fedloop": (
        "--help",
        "run example.toml --out run",
        "run example.toml --out flower --engine flower",
        "resume run",
        "report run",
        "explain done a",
        "allow done a --why known",
        "deny done a --why left",
        "audit done",
        "client base data.jsonl --out client",
        "mt-bench run questions.jsonl --out answers.jsonl",
        "flower init federation",
        "flower superlink --certificates . --database state.db",
        "flower register federation a key.pub --ca ca.crt",
        "flower start federation --out run --ca ca.crt",
        "flower node --superlink a:1 --ca ca.crt --key key --data data.jsonl",
    ),
}
RUN = """
import contextlib, importlib, io, json, sys

ABSENT = set(sys.argv[1].split(","))

class Without:
    def __init__(self, finder):
        self.finder = finder

    def find_spec(self, name, path=None, target=None):
        absent = name.partition(".")[0] in ABSENT
        return None if absent else self.finder.find_spec(name, path, target)

sys.meta_path[:] = [Without(finder) for finder in sys.meta_path]
for package, commands in json.loads(sys.argv[2]).items():
    main = importlib.import_module(f"{package}.cli.main").main
    for command in commands:
        sys.argv = [package, *command.split()]
        out = io.TextIOWrapper(io.BytesIO(), "utf-8", write_through=True)
        try:
            with contextlib.redirect_stdout(out), contextlib.redirect_stderr(out):
                code = main() or 0
        except SystemExit as end:
            code = end.code
        except BaseException as error:
            code = f"{type(error).__name__}: {error}"
        said = out.buffer.getvalue().decode()
        print(json.dumps([f"{package} {command}", code, said]), flush=True)
"""


def finished_run(folder: Path) -> None:
    """A folder of a run of one round."""
    config = Config.of(tomllib.loads(example_config()))
    record = RoundRecord(1, {"a": (0.1,)}, {"a": 1.0}, {"a": 1.0})
    with RunFolder.create(folder, config, {"a": {"role": "benign"}}) as run:
        run.save(record, {"lora": np.zeros(2, np.float32)})
        run.log([record])


def said(tmp_path: Path, *installed: str) -> dict[str, tuple[object, str]]:
    """Command -> its exit code and what it printed, with the core and these extras."""
    absent = {name for extra, names in BROUGHT.items() if extra not in installed for name in names}
    (tmp_path / "data.jsonl").write_text('{"instruction": "a", "response": "b"}\n')
    (tmp_path / "questions.jsonl").write_text("")
    finished_run(tmp_path / "done")
    write_adapters(tmp_path / "adapters", force=True)
    (tmp_path / "example.toml").write_text(example_config())
    (tmp_path / "probes").mkdir()
    (tmp_path / "probes/one").symlink_to(FOLDER / "probe")
    for name, target in (("probe", FOLDER / "probe"), ("base", FOLDER / "base")):
        (tmp_path / name).symlink_to(target)
    (tmp_path / "initial").symlink_to(ROOT / "zoo/adapters/initial")
    done = subprocess.run(
        [sys.executable, "-c", RUN, ",".join(absent), json.dumps(COMMANDS)],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=500,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    rows = [json.loads(line) for line in done.stdout.splitlines()]
    return {command: (code, text) for command, code, text in rows}


def test_the_core_alone_says_that_commands_need_the_extra_cli(tmp_path: Path) -> None:
    for command, (code, text) in said(tmp_path).items():
        assert code == 2, command
        assert "pip install 'loraprobe[cli]'" in text, (command, text)


# What works with the extra cli alone; of all the others, the extra that is named.
NEEDS = {
    "--head xgboost": "xgboost",
    "--head mlp": "fed",
    "verify linear --key": "sign",
    "loraprobe report": "figures",
    "serve": "serve",
    "fedloop run": "fed",
    "fedloop resume": "fed",
    "fedloop report": "fed",
    "fedloop client": "fed",
    "mt-bench": "fed",
    "flower superlink": "flower-deploy",
    "register": "fed",
    "flower start": "fed",
    "flower node": "fed",
}


def test_with_the_commands_alone_each_works_or_names_the_extra_it_lacks(tmp_path: Path) -> None:
    for command, (code, text) in said(tmp_path, "cli").items():
        assert isinstance(code, int), (command, code)
        assert "Traceback" not in text, command
        extra = next((NEEDS[part] for part in NEEDS if part in command), None)
        if extra is None:
            assert code in (0, 3), (command, code, text)
        else:
            lacks = re.findall(r"pip install 'loraprobe\[([\w,-]+)\]'", text)
            assert (code, lacks) == (2, [extra]), (command, text)
