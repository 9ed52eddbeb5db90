"""The sub-commands that publish and fetch.

What they pass on, what they print and write, and where they end with 2.
"""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from loraprobe import Probe, factor_delta
from loraprobe.cli import commands
from loraprobe.hub.card import card, card_files
from tests.helpers import make
from tests.helpers.boxed import invoke
from tests.helpers.hub import REPO, Hub, flipped
from tests.helpers.probes import labelled_adapter, new_data, tiny_probe

SHA = "0123456789abcdef0123456789abcdef01234567"
NEWER = "f" * 40


@pytest.fixture
def hub(hub: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Hub:
    """A zoo in two commits, the second with one probe more and another head for the first.

    And a probe at the root. We stand in an empty folder.
    """
    for commit, heads in ((SHA, {"one": "linear"}), (NEWER, {"one": "cosine", "two": "xgboost"})):
        tiny_probe("mlp").save_pretrained(hub.commit(commit))
        for name, head in heads.items():
            tiny_probe(head).with_facts(headline=f"{head} finds it").save_pretrained(
                hub.at(commit) / name
            )
    hub.refs["v1"] = SHA
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    return hub


def scores(source: str | Path, *options: Any) -> bytes:
    return Probe.from_pretrained(source, *options)(new_data().adapters).tobytes()


# --- push


def test_a_token_is_no_option_and_the_help_says_where_it_comes_from() -> None:
    for command in (("push",), ("pull",), ("zoo", "list"), ("zoo", "pull")):
        shown = " ".join(invoke(*command, "--help").stdout.split())
        assert "--token" not in shown
        assert "HF_TOKEN" in shown
        assert "hf auth login" in shown


def test_what_is_no_probe_is_not_pushed(hub: Hub, tmp_path: Path) -> None:
    for folder in ("nowhere", REPO):  # the second would be one on the Hub
        refusal = invoke("push", folder, REPO, code=2).stderr
        assert f"ProbeFormatError: {folder} does not exist" in refusal
    assert (
        "HubError: got the repository 'name'"
        in invoke("push", tiny_probe().save_pretrained(tmp_path / "probe"), "name", code=2).stderr
    )
    assert hub.asked == []


# --- pull


@pytest.mark.parametrize(
    ("arguments", "commit", "source"),
    [
        (("pull", REPO), NEWER, "."),
        (("pull", REPO, "--revision", "v1", "--subfolder", "one"), SHA, "one"),
        (("zoo", "pull", "one", "--repo", REPO), NEWER, "one"),
        (("zoo", "pull", "one", "--repo", REPO, "--revision", SHA), SHA, "one"),
    ],
)
def test_pull_writes_a_copy_and_prints_its_commit(
    hub: Hub, tmp_path: Path, arguments: tuple[str, ...], commit: str, source: str
) -> None:
    out = tmp_path / "[red]out[/red]"
    assert invoke(*arguments, "--out", out).stdout == f"{commit}\nsaved to {out}\n"
    published = {
        path.name: path.read_bytes()
        for path in (hub.at(commit) / source).iterdir()
        if path.is_file()
    }
    assert {path.name: path.read_bytes() for path in out.iterdir()} == published
    assert "README.md" in published


def test_the_zoo_is_a_repository_of_its_own(hub: Hub, tmp_path: Path) -> None:
    for command in (("zoo", "pull", "one", "--out", tmp_path / "out"), ("zoo", "list")):
        # the fake knows no such repository
        assert invoke(*command, code=2).stderr.startswith("HubError: loraprobe/zoo@main: ")


@pytest.mark.parametrize(
    "arguments",
    [
        ("pull", REPO, "--subfolder", "[/]"),
        ("pull", "[/]"),
        ("zoo", "pull", "three", "--repo", REPO),
    ],
)
def test_a_pull_that_fails_writes_nothing(
    hub: Hub, tmp_path: Path, arguments: tuple[str, ...]
) -> None:
    result = invoke(*arguments, "--out", tmp_path / "out", code=2)
    assert re.match(r"HubError: .*(\[/\]|three)", result.stderr), result.stderr
    assert not (tmp_path / "out").exists()


# --- card


def test_the_card_is_printed_or_written_with_its_figure(tmp_path: Path) -> None:
    probe = tiny_probe("linear", threshold="fpr:0.2").with_facts(
        detects="[red]x[/red] :skull:", title="t\x1b[2J"
    )
    folder = probe.save_pretrained(tmp_path / "probe")
    shown = invoke("card", folder, "--repo", REPO, "--subfolder", "one").stdout
    assert shown == card(probe, REPO, "one").replace("\x1b", r"\x1b")
    out = tmp_path / "[a].md"
    assert (
        invoke("card", folder, "-o", out).stdout
        == f"wrote {out}\nwrote {tmp_path / 'scores.png'}\n"
    )
    assert out.read_bytes() == card_files(probe)["README.md"]
    assert (tmp_path / "scores.png").read_bytes() == card_files(probe)["scores.png"]
    assert "ProbeFormatError" in invoke("card", tmp_path, code=2).stderr


# --- zoo list


def test_a_zoo_on_the_hub_is_listed_at_one_commit(hub: Hub) -> None:
    for options, commit, heads in (
        ((), NEWER, {"one": "linear", "two": "xgboost"}),
        (("--revision", "v1"), SHA, {"one": "linear"}),
    ):
        listed = json.loads(invoke("zoo", "list", REPO, *options, "--json").stdout)
        assert {entry["name"]: entry["head"] for entry in listed} == heads
        assert {entry["commit"] for entry in listed} == {commit}
        shown = invoke("zoo", "list", REPO, *options).stdout
        assert f"{REPO} at {commit}" in shown
        assert all(name in shown for name in heads)
    assert "cosine finds it" in invoke("zoo", "list", REPO).stdout
    assert "linear finds it" in shown


def test_the_local_zoo_comes_first_and_the_published_one_where_there_is_none(
    hub: Hub, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("loraprobe.hub.zoo.ZOO_REPO", REPO)
    names = {name: Probe.from_pretrained(hub.at(NEWER) / name).digest for name in ("one", "two")}
    monkeypatch.setattr("loraprobe.hub.zoo.ZOO_DIGESTS", names)
    assert f"{REPO} at {NEWER}" in invoke("zoo", "list").stdout
    hub.clear()
    tiny_probe().save_pretrained(Path("zoo/probes/mine"))
    [entry] = json.loads(invoke("zoo", "list", "--json").stdout)
    assert (entry["name"], entry["commit"]) == ("mine", None)
    assert hub.asked == []
    assert "revisions belong to Hub ids" in invoke("zoo", "list", "--revision", "v1", code=2).stderr


def test_a_probe_that_cannot_be_read_is_an_error_after_the_others(hub: Hub) -> None:
    config = hub.at(NEWER) / "one" / "config.json"
    config.write_bytes(flipped(config.read_bytes(), 0))
    (hub.at(NEWER) / "base").mkdir()
    (hub.at(NEWER) / "base" / "config.json").write_text('{"model_type": "llama"}')
    result = invoke("zoo", "list", REPO, "--json", code=2)
    assert [entry["name"] for entry in json.loads(result.stdout)] == ["two"]
    told, *complaints = result.stderr.splitlines()
    assert told == f"{REPO} is of commit {NEWER}"
    complaints.pop(0)  # that main can change
    assert [line.split(": ")[:2] for line in complaints] == [
        ["ProbeFormatError", "base"],
        ["ProbeFormatError", "one"],
    ]
    assert "two" in invoke("zoo", "list", REPO, code=2).stdout


def test_a_repository_without_probes_and_one_that_is_not_there_are_errors(hub: Hub) -> None:
    for name in ("one", "two"):
        (hub.at(NEWER) / name / "config.json").unlink()
    assert "ProbeFormatError: no probe in org/name" in invoke("zoo", "list", REPO, code=2).stderr
    hub.error = ConnectionError("no network")
    assert re.match(
        r"HubError: org/name@main: .*no local file or folder 'org/name' either",
        invoke("zoo", "list", REPO, code=2).stderr,
    )


# --- score


@pytest.fixture
def adapters(hub: Hub) -> Hub:
    """Another adapter in each commit's root; they are of kind weights, as everything on the Hub."""
    for number, commit in enumerate((SHA, NEWER)):
        make.folder(
            hub.at(commit),
            labelled_adapter(number, kind="weights").state_dict(),
            r=2,
            lora_alpha=4,
            base_model_name_or_path="org/base",
        )
    return hub


def scored(*arguments: object) -> dict[str, Any]:
    """What `score --json` prints, whatever its verdict."""
    result = CliRunner().invoke(commands.app, ["score", *map(str, arguments), "--json"])
    printed: dict[str, Any] = json.loads(result.stdout)
    assert result.exit_code == printed["exit_code"]
    return printed


def test_score_takes_adapters_base_and_probe_from_the_hub_and_says_the_commits(
    adapters: Hub,
) -> None:
    before, after = labelled_adapter(0, kind="weights"), labelled_adapter(1, kind="weights")
    printed = scored(
        f"{REPO}@{NEWER}",
        f"{REPO}@v1",
        REPO,
        "--base",
        f"{REPO}@v1",
        "--probe",
        REPO,
        *"--revision v1 --subfolder one".split(),
    )
    assert (printed["probe"], printed["commit"], printed["base"], printed["base_commit"]) == (
        REPO,
        SHA,
        f"{REPO}@v1",
        SHA,
    )
    assert [(row["adapter"], row["commit"]) for row in printed["results"]] == [
        (f"{REPO}@{NEWER}", NEWER),
        (f"{REPO}@v1", SHA),
        (REPO, NEWER),
    ]
    expected = tiny_probe("linear")([factor_delta(after, before)])[0]
    assert [row["score"] for row in printed["results"]] == [
        expected,
        pytest.approx(printed["results"][1]["score"]),
        expected,
    ]
    assert printed["results"][1]["reason"] == "nothing that the probe reads has changed"
    other = scored(REPO, "--base", f"{REPO}@v1", "--probe", REPO, "--subfolder", "one")
    assert (other["commit"], other["results"][0]["score"]) == (
        NEWER,
        tiny_probe("cosine")([factor_delta(after, before)])[0],
    )


def test_local_paths_have_no_commit_and_may_hold_an_at(adapters: Hub) -> None:
    local = make.folder(
        Path("org/name@v1"), labelled_adapter(2, kind="weights").state_dict(), r=2, lora_alpha=4
    )
    probe = tiny_probe().save_pretrained(Path("probe"))
    printed = scored(local, "--base", "fresh", "--probe", probe)
    assert (printed["commit"], printed["base_commit"], printed["results"][0]["commit"]) == (
        None,
        None,
        None,
    )
    assert (
        printed["results"][0]["score"]
        == tiny_probe()([factor_delta(labelled_adapter(2, kind="weights"), None)])[0]
    )
    assert adapters.asked == []


def test_an_adapter_that_the_hub_does_not_give_is_a_row_with_its_error(adapters: Hub) -> None:
    probe = tiny_probe().save_pretrained(Path("probe"))
    (adapters.at(NEWER) / "adapter_model.safetensors").unlink()
    good, bad, odd = scored(f"{REPO}@v1", REPO, "a/b/c@v1", "--base", "fresh", "--probe", probe)[
        "results"
    ]
    assert good["score"] is not None
    assert (bad["score"], bad["commit"], bad["verdict"]) == (None, None, "error")
    assert bad["reason"].startswith(
        f"HubError: {REPO}@{NEWER}: the repository has none of adapter_model.safetensors"
    )
    assert odd["reason"].startswith("AdapterFormatError: no file or folder 'a/b/c@v1'")


@pytest.mark.parametrize("command", ["scan", "report", "serve"])
def test_every_command_says_which_commit_of_a_probe_it_uses(command: str, adapters: Hub) -> None:
    arguments = {
        "scan": [str(adapters.at(NEWER))],
        "report": [str(adapters.at(NEWER)), "--out", "page.html"],
        "serve": ["--base", "nowhere"],  # ends after the probes are loaded
    }[command]
    for name, commit, warns in ((REPO, NEWER, True), (f"{REPO}@{SHA}", SHA, False)):
        said = CliRunner().invoke(commands.app, [command, *arguments, "--probe", name]).stderr
        assert f"{REPO} is of commit {commit}" in said, said
        assert (f"main can change; {REPO}@{commit} does not" in said) == warns
        Path("page.html").unlink(missing_ok=True)
