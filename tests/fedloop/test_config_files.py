"""An experiment's file: where its paths start, and what cannot be read."""

from __future__ import annotations

from pathlib import Path

import pytest

from fedloop.config import Config
from fedloop.errors import ConfigError

FILE = """
rounds = 2
[model]
base = "base"
[clients]
benign = ["data/a.jsonl", "builtin:benign"]
malicious_source = "data/a.jsonl"
[defense]
level = "step"
probe = "probes/one"
[evaluation]
utility = "data/a.jsonl"
harmful = "builtin:harmful_prompts"
[output]
folder = "runs/new"
"""


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """An experiment with its data beside it."""
    place = tmp_path / "place"
    for name in ("base", "data", "probes/one"):
        (place / name).mkdir(parents=True)
    (place / "data" / "a.jsonl").write_text('{"instruction": "a", "response": "b"}\n')
    (place / "one.toml").write_text(FILE)
    return place


def test_relative_paths_start_at_the_files_folder(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = []
    for here, path in (
        (tmp_path, "place/one.toml"),
        (folder, "one.toml"),
        (tmp_path, folder / "one.toml"),
    ):
        monkeypatch.chdir(here)
        config = Config.read(path)
        found.append(config)
        assert config.model.base == str(folder / "base")
        assert config.clients.benign == (str(folder / "data" / "a.jsonl"), "builtin:benign")
        assert config.clients.malicious_source == str(folder / "data" / "a.jsonl")
        assert config.defense.probe == str(folder / "probes" / "one")
        assert (config.evaluation.utility, config.evaluation.harmful) == (
            str(folder / "data" / "a.jsonl"),
            "builtin:harmful_prompts",
        )
        assert config.output.folder == str(folder / "runs" / "new")
    assert found[0] == found[1] == found[2]  # one experiment, wherever it is started


def test_what_is_not_beside_the_file_is_a_hub_id(folder: Path) -> None:
    (folder / "one.toml").write_text(
        FILE.replace('"probes/one"', '"org/probe"').replace('base = "base"', 'base = "/abs/base"')
    )
    config = Config.read(folder / "one.toml")
    assert (config.defense.probe, config.model.base) == ("org/probe", "/abs/base")


@pytest.mark.parametrize("content", [None, b"rounds = ", b"\xff\xfe", b"rounds = 1\nrounds = 2"])
def test_a_file_that_cannot_be_read_is_refused(tmp_path: Path, content: bytes | None) -> None:
    path = tmp_path / "bad.toml"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(ConfigError, match=r"cannot read .*bad\.toml.*`fedloop example` prints one"):
        Config.read(path)
