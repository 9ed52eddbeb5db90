"""What the tests of the Hub find there: two commits with probes, and an adapter.

What travels between them: tiny probes and adapters in folders.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from loraprobe import Probe
from loraprobe.errors import LoraprobeError
from tests.helpers import make
from tests.helpers.hub import Hub
from tests.helpers.probes import BASE, labelled_adapter, new_data, tiny_probe

SHA = "0123456789abcdef0123456789abcdef01234567"
NEWER = "f" * 40
HEAD = "head.safetensors"
LEARNT = "featurizer.safetensors"
WEIGHTS = "adapter_model.safetensors"


def filled(hub: Hub) -> Hub:
    """Two commits, each with a probe at the root and one in the folder a/b.

    Linear and mlp, then xgboost and cosine.
    """
    for commit, heads in ((SHA, ("linear", "mlp")), (NEWER, ("xgboost", "cosine"))):
        folder = hub.commit(commit)
        tiny_probe(heads[0]).save_pretrained(folder)
        tiny_probe(heads[1]).save_pretrained(folder / "a" / "b")
        (folder / "scores.png").write_bytes(b"a picture")
    hub.refs["v1"] = SHA
    return hub


def with_adapter(hub: Hub) -> Hub:
    """The same Hub, with an adapter at the root of the older commit."""
    folder = hub.at(SHA)
    make.folder(folder, labelled_adapter(1, kind="weights").state_dict(), r=2, lora_alpha=4)
    return hub


def scores(probe: Probe) -> bytes:
    return probe(new_data().adapters).tobytes()


def head_of(probe: Probe) -> str:
    """Which of the fixture's four probes it is."""
    [head] = [
        head
        for head in ("linear", "mlp", "xgboost", "cosine")
        if scores(tiny_probe(head)) == scores(probe)
    ]
    return head


def peft_folder(path: Path, seed: int = 1) -> Path:
    """A tiny adapter in PEFT's format."""
    tensors = labelled_adapter(seed, kind="weights").state_dict()
    return make.folder(path, tensors, r=2, lora_alpha=4, base_model_name_or_path=BASE)


def refused(reason: str, operation: Callable[..., Any], *arguments: Any, **options: Any) -> str:
    """The message of an operation that our library has to refuse, and that says this."""
    with pytest.raises(LoraprobeError, match=reason) as caught:
        operation(*arguments, **options)
    return str(caught.value)


def norms(adapter: Any) -> list[float]:
    return [pair.norm() for pair in adapter.values()]
