"""zoo.verify finds what was changed.

In a record, a probe, its card, its adapters, its studies, or the pages.
"""

from __future__ import annotations

import math
import shutil
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from loraprobe import Probe
from tests.helpers.small_zoo import NAME, ROOT, a_zoo, edit
from zoo import verify
from zoo.build import save_again
from zoo.labelled.diff_records import Comparison
from zoo.verify import TOLERANCE, verify_pages, verify_probe, zoo_probes

RECORD, PROBE, ADAPTERS = f"records/{NAME}.json", f"probes/{NAME}", "adapters"


def found(zoo: Path) -> list[str]:
    comparison = Comparison(TOLERANCE)
    for one in zoo_probes(zoo):
        verify_probe(one, comparison)
    return comparison.lines


@pytest.fixture
def zoo(tmp_path: Path) -> Path:
    return a_zoo(tmp_path / "zoo")


def test_a_zoo_as_it_was_made_agrees_in_many_values(zoo: Path) -> None:
    comparison = Comparison(TOLERANCE)
    verify_probe(zoo_probes(zoo)[0], comparison)
    assert comparison.lines == []
    assert comparison.compared > 1000


CHANGED: list[tuple[str, Any, str]] = [
    ("probe", "another", "name"),
    ("base_model", "org/base", "base_model: the record says 'org/base'; measured was 'tiny/llama'"),
    ("head", "mlp", "head: the record says 'mlp'; measured was 'linear'"),
    ("fitted threshold", 0.5, "fitted.threshold"),
    ("fitted sha256 head.safetensors", "0" * 64, "fitted.sha256"),
    ("about detects", "everything", "facts.detects"),
    ("data clients benign", 1000, "data.clients.benign: the record says 1000; measured was 12"),
    ("replicates 1 cells 0 auroc", 0.123, "unseen_sources of replicate 1"),
    (
        "score_distribution counts benign 0",
        999,
        "facts.score_distribution.counts.benign",
    ),
    ("held_out_clients auroc", 0.5, "held_out_clients.auroc: the record says 0.5"),
    ("held_out_clients extra", 1, "held_out_clients: the fields"),
    ("data design shares", [1.0], "expected a source and a share of the record's design"),
    ("adapters", "../../elsewhere", "expected a folder of the zoo"),
    ("adapters", "elsewhere", "cannot read the manifest"),
    ("replicates", None, "is not a record of this version"),
]


@pytest.mark.parametrize(("keys", "value", "line"), CHANGED)
def test_a_changed_value_of_a_record_is_found(zoo: Path, keys: str, value: Any, line: str) -> None:
    path = [int(key) if key.isdecimal() else key for key in keys.split()]
    edit(zoo / RECORD, *path, value=value)
    check_found(zoo, line)


def check_found(zoo: Path, line: str) -> None:
    lines = found(zoo)
    assert any(one.startswith(NAME) and line in one for one in lines), lines


def _save(zoo: Path, change: Callable[[Probe], Probe]) -> None:
    """A changed probe, saved as it should be: its own files contradict nothing."""
    change(Probe.from_pretrained(zoo / PROBE)).save_pretrained(zoo / PROBE)


def _swap(first: Path, second: Path) -> None:
    a, b = first.read_bytes(), second.read_bytes()
    first.write_bytes(b)
    second.write_bytes(a)


def _weights(zoo: Path, start: str) -> Path:
    return next((zoo / ADAPTERS).glob(f"{start}*")) / "adapter_model.safetensors"


def _replace(path: Path, old: str, new: str) -> None:
    text = path.read_text()
    assert old in text
    path.write_text(text.replace(old, new, 1))


TAMPERED: dict[str, tuple[Callable[[Path], object], str]] = {
    "another threshold": (
        lambda zoo: _save(zoo, lambda probe: replace(probe, threshold=0.01)),
        "fitted.threshold",
    ),
    "a better figure in the facts": (
        lambda zoo: _save(zoo, lambda probe: probe.with_facts(headline="1.00 everywhere")),
        "facts.headline",
    ),
    "a digit of the card": (
        lambda zoo: _replace(zoo / PROBE / "README.md", "## Measured", "## Proven"),
        "of the card is '## Proven by the publisher'",
    ),
    "no card": (lambda zoo: (zoo / PROBE / "README.md").unlink(), "line 1 of the card is None"),
    "one more file": (
        lambda zoo: (zoo / PROBE / "model.pkl").write_bytes(b"x"),
        "other files in its folder",
    ),
    "another figure": (
        lambda zoo: (zoo / PROBE / "scores.png").write_bytes(b"x"),
        "whether scores.png is what the facts give",
    ),
    "a config edited by hand": (
        lambda zoo: _replace(zoo / PROBE / "config.json", '"bins": 40', '"bins": 41'),
        "ProbeFormatError",
    ),
    "no record": (lambda zoo: (zoo / RECORD).unlink(), "cannot read the record"),
    "another label": (
        lambda zoo: _replace(zoo / ADAPTERS / "manifest.csv", ",malicious,", ",benign,"),
        "is labelled 0 with source",
    ),
    "a client twice": (
        lambda zoo: _replace(
            zoo / ADAPTERS / "manifest.csv", "-facts-100-1,facts", "-facts-100-0,facts"
        ),
        "every client once",
    ),
    "two adapters swapped": (
        lambda zoo: _swap(_weights(zoo, "benign"), _weights(zoo, "malicious-theft-theft")),
        "held_out_clients.by_",
    ),
    "no adapter": (lambda zoo: _weights(zoo, "benign").unlink(), "benign"),
    "another start": (
        lambda zoo: _swap(_weights(zoo, "initial"), _weights(zoo, "benign")),
        "held_out_clients",
    ),
}


@pytest.mark.parametrize("name", TAMPERED)
def test_a_change_to_a_file_is_found(zoo: Path, name: str) -> None:
    tamper, line = TAMPERED[name]
    tamper(zoo)
    check_found(zoo, line)


def test_cards_that_are_out_of_date_are_written_again_without_a_fit(zoo: Path) -> None:
    head = (zoo / PROBE / "head.safetensors").read_bytes()
    _replace(zoo / PROBE / "README.md", "## Measured", "## Measured before")
    (zoo / PROBE / "scores.png").unlink()
    edit(zoo / RECORD, "about", "detects", value="Something else.")
    save_again(zoo)
    assert found(zoo) == []
    assert "Something else." in (zoo / PROBE / "README.md").read_text()
    assert (zoo / PROBE / "head.safetensors").read_bytes() == head


def test_a_figure_of_another_matplotlib_is_not_compared_and_that_is_said(
    zoo: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (zoo / PROBE / "scores.png").write_bytes(b"x")
    edit(zoo / RECORD, "figure_drawn_with", value="matplotlib 0.1")
    assert found(zoo) == []
    assert "drawn with matplotlib 0.1" in capsys.readouterr().out


# --- the pages


@pytest.mark.parametrize("page", ["docs/results.md", "zoo/README.md"])
def test_a_changed_digit_of_a_table_is_found(tmp_path: Path, page: str) -> None:
    (tmp_path / "zoo").mkdir()
    (tmp_path / "docs").mkdir()
    for name in ("docs/results.md", "zoo/README.md"):
        shutil.copy(ROOT / name, tmp_path / name)
    for name in ("records", "base"):
        (tmp_path / "zoo" / name).symlink_to(ROOT / "zoo" / name)
    comparison = Comparison()
    verify_pages(tmp_path / "zoo", comparison)
    assert comparison.lines == []
    _replace(tmp_path / page, "| **linear** | 0.9", "| **linear** | 0.8")
    verify_pages(tmp_path / "zoo", comparison)
    assert comparison.lines == [
        f"{tmp_path / page}: its tables are not those of the records; run python -m zoo.report"
    ]


# --- comparing


@pytest.mark.parametrize(
    ("said", "measured", "lines"),
    [
        ({"a": [1, 2.0]}, {"a": [1.0, 2]}, 0),
        (1.0, 1.0 + 5e-7, 0),
        (1.0, 1.0 + 2e-6, 1),
        (1e6, 1e6 + 0.5, 0),
        (1e-9, 2e-6, 1),
        (1.0, math.nan, 1),
        (math.nan, 1.0, 1),
        (1, True, 1),
        (None, 0, 1),
        ("1", 1, 1),
        ([1], [1, 2], 1),
        ([], {}, 1),
        ({"a": 1}, {"b": 1}, 1),
        ({"a": 1, "b": 2}, {"a": 3, "b": 4}, 2),
    ],
)
def test_two_values_agree_only_if_they_are_alike(said: Any, measured: Any, lines: int) -> None:
    comparison = Comparison(1e-6)
    comparison.add("x", said, measured)
    assert len(comparison.lines) == lines
    assert comparison.compared > 0


# --- the command


def exit_code(monkeypatch: pytest.MonkeyPatch, *arguments: str) -> int | str | None:
    monkeypatch.setattr(sys, "argv", ["zoo.verify", *arguments])
    with pytest.raises(SystemExit) as caught:
        verify.main()
    return caught.value.code


@pytest.mark.slow
def test_the_zoo_of_this_repository_agrees(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert exit_code(monkeypatch) == 0, capsys.readouterr().out


def test_the_exit_code_says_whether_all_agrees(
    zoo: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(verify, "ZOO", zoo)
    monkeypatch.setattr(verify, "verify_pages", lambda *_: None)
    assert exit_code(monkeypatch) == 0
    edit(zoo / RECORD, "held_out_clients", "auroc", value=0.123)
    capsys.readouterr()
    assert exit_code(monkeypatch) == 1
    line = f"{NAME}: held_out_clients.auroc: the record says 0.123; measured was"
    assert capsys.readouterr().out.count(line) == 1
    assert NAME in str(exit_code(monkeypatch, "--only", "no-such-probe"))
