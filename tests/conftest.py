"""Fixtures that several test files share."""

from __future__ import annotations

import shutil
import signal
import subprocess
import sys
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

ROOT = Path(__file__).resolve().parent.parent


def pytest_configure(config: pytest.Config) -> None:
    torch.set_num_threads(1)
    if (
        signal.getsignal(signal.SIGINT) is signal.SIG_IGN
    ):  # so a shell starts what runs in the background; commands under test would inherit it
        signal.signal(signal.SIGINT, signal.default_int_handler)
    # PEFT asks transformers 5 for a property that transformers renamed; neither is ours.
    config.addinivalue_line(
        "filterwarnings", "ignore:.is_gradient_checkpointing. is deprecated:FutureWarning"
    )
    # huggingface_hub uploads in a way that httpx will drop.
    config.addinivalue_line("filterwarnings", "ignore:Use 'content=:DeprecationWarning")
    # Typer imports what Click 9 will drop.
    config.addinivalue_line(
        "filterwarnings", "ignore:.*will be removed in Click 9:DeprecationWarning"
    )


@pytest.fixture(scope="session")
def vectors() -> Path:
    """Numbers recorded from independent implementations; see the README there."""
    path = ROOT.parent / "shared" / "vectors"
    if not path.is_dir():
        pytest.skip(f"no recorded vectors in {path}")
    return path


@pytest.fixture(scope="session")
def tiny_files(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """`federated.Files`: a tiny base model and a probe for its LoRA."""
    pytest.importorskip("peft")
    from tests.helpers import federated

    return federated.written(tmp_path_factory.mktemp("tiny"))


@pytest.fixture
def hub(tmp_path: Path) -> Iterator[Any]:
    """`hub.Hub`, empty, in place of the network."""
    from tests.helpers.hub import installed

    with installed(tmp_path) as hub:
        yield hub


@pytest.fixture(scope="session")
def peft_llama() -> Callable[..., Any]:
    """Makes a PEFT model: LoraConfig fields -> LoRA with random A and B on a two-layer random
    Llama of width 32.
    """
    peft, transformers = pytest.importorskip("peft"), pytest.importorskip("transformers")

    def make(**config: Any) -> Any:
        fields = {
            "r": 4,
            "lora_alpha": 8,
            "target_modules": ["q_proj", "v_proj"],
            "task_type": "CAUSAL_LM",
            **config,
        }
        with torch.random.fork_rng():
            torch.manual_seed(0)
            llama = transformers.LlamaConfig(
                hidden_size=32,
                intermediate_size=48,
                num_hidden_layers=2,
                num_attention_heads=4,
                num_key_value_heads=2,
                vocab_size=64,
            )
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # of PEFT, about settings that are odd on purpose
                model = peft.get_peft_model(
                    transformers.LlamaForCausalLM(llama), peft.LoraConfig(**fields)
                )
            for name, parameter in model.named_parameters():
                if "lora_" in name:
                    torch.nn.init.normal_(parameter)
        return model

    return make


@pytest.fixture(scope="session")
def wheel_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The wheel of a copy of the working tree, built with what is installed here."""
    shipped = ("loraprobe", "fedloop")
    tree, out = tmp_path_factory.mktemp("tree"), tmp_path_factory.mktemp("dist")
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, tree)
    for name in (*shipped, "tests", "zoo", "figures"):
        left_out = ("__pycache__", "*.npy", *(() if name in shipped else ("*.safetensors",)))
        shutil.copytree(ROOT / name, tree / name, ignore=shutil.ignore_patterns(*left_out))
    command = [sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", str(out)]
    done = subprocess.run(command, cwd=tree, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    [path] = out.iterdir()
    return path
