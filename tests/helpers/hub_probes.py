"""What the tests of the Hub find there: two commits with probes, and an adapter.

No network (`fake_hub`).
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from loraprobe import Probe
from tests.helpers import make
from tests.helpers.fake_hub import FakeHub
from tests.helpers.probes import labelled_adapter, new_data, tiny_probe

SHA = "0123456789abcdef0123456789abcdef01234567"
NEWER = "f" * 40
HEAD = "head.safetensors"
LEARNT = "featurizer.safetensors"
WEIGHTS = "adapter_model.safetensors"


def filled_hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> FakeHub:
    """Two commits, each with a probe at the root and one in the folder a/b.

    Linear and mlp, then xgboost and cosine.
    """
    hub = FakeHub(tmp_path, monkeypatch)
    for commit, heads in ((SHA, ("linear", "mlp")), (NEWER, ("xgboost", "cosine"))):
        folder = hub.commit(commit)
        tiny_probe(heads[0]).save_pretrained(folder)
        tiny_probe(heads[1]).save_pretrained(folder / "a" / "b")
        (folder / "scores.png").write_bytes(b"a picture")
    hub.refs["v1"] = SHA
    return hub


def with_adapter(hub: FakeHub) -> FakeHub:
    """The same Hub, with an adapter at the root of the older commit."""
    folder = hub.root / SHA
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


def norms(adapter: Any) -> list[float]:
    return [pair.norm() for pair in adapter.values()]
