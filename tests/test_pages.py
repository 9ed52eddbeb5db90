"""Every command and every piece of Python on README.md and in docs/ runs as it is printed.

Blocks below the mark `<!-- from a wheel -->` run in an empty folder with nothing but the wheel, the
others in one that has the clone's folders. Blocks of a page run in order, and leave their files to
the next. What is not run stands in NOT_RUN, with the reason.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
import time
import tomllib
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pytest

import fedloop
import loraprobe
from fedloop import Defense, defend_round
from loraprobe import load_adapter
from tests.helpers.federated import settings, toml

ROOT = Path(__file__).resolve().parents[1]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
WHEEL = "<!-- from a wheel -->"
BLOCK = re.compile(r"^(<!-- [^\n]* -->\n)?```(\w*)\n(.*?)^```", re.MULTILINE | re.DOTALL)
NOT_RUN = {
    r"^make ": "minutes: sets up an environment, and is what calls this test",
    r"pip install|venv": "network",
    r"leave-out": "a minute and more of fits: tests/cli/test_cli_leave_out.py",
    r"\borg/": "network, and a repository of one's own: tests/cli/test_cli_hub.py",
    r"openssl": "keys for what is not run here: test_flower_guide.py, tests/loraprobe/hub",
    r"fedloop (run|resume|report run|audit|explain|allow|deny|probe-kit)|\bkit/|--engine flower": (
        "a minute of training or more: tests/cli/test_fedloop_cli.py, tests/fedloop/flower"
    ),
    r"fedloop flower (superlink|node|start|register|unregister)|ssh-keygen": (
        "several hosts: tests/fedloop/flower/test_flower_guide.py follows the page"
    ),
}
"""What in a line keeps it from being run -> why."""
ENGINE = ("FedAvg(", "FedAdam(", "EngineStrategy", "fed_args", "global_aggregate", "average(")
"""Python of an engine's own script: tests/test_examples.py checks calls and arguments."""
OWN_LOOP = ('"org/', "global_state", "hospital-3", "replies", "experiment.toml")
"""Python with names of the reader's own loop: run with a loop of two rounds."""
TOOLS = ("loraprobe", "fedloop", "make", "pip", "python", "find", "curl", "openssl", "ssh-keygen")


class Block(NamedTuple):
    language: str
    text: str
    wheel: bool


def blocks(page: Path) -> Iterator[Block]:
    for mark, language, text in BLOCK.findall(page.read_text(encoding="utf-8")):
        yield Block(language, text, WHEEL in mark)


def lines(text: str) -> list[str]:
    """The commands of a block, continued lines joined."""
    joined = text.replace("\\\n", " ")
    return [line.strip() for line in joined.splitlines() if line.startswith(TOOLS)]


def why_not(line: str) -> str | None:
    return next((why for pattern, why in NOT_RUN.items() if re.search(pattern, line)), None)


@pytest.fixture(scope="session")
def wheel(wheel_file: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What the wheel of this tree unpacks to."""
    unpacked = tmp_path_factory.mktemp("unpacked")
    shutil.unpack_archive(wheel_file, unpacked, "zip")
    return unpacked


def is_served() -> bool:
    """Whether a service answers where the pages' commands ask for one."""
    asked = "import urllib.request as r; r.urlopen('http://127.0.0.1:8080/healthz', timeout=5)"
    done = subprocess.run([sys.executable, "-c", asked], capture_output=True, check=False)
    return done.returncode == 0


class Place:
    """A folder that blocks run in, and the environment that they run with."""

    def __init__(self, folder: Path, packages: Path) -> None:
        self.folder = folder
        tools = folder.with_name(f"{folder.name}-tools")
        for path in (folder, tools):
            path.mkdir()
        for name in ("loraprobe", "fedloop"):
            tool = tools / name
            tool.write_text(f'#!/bin/sh\nexec "{sys.executable}" -m {name}.cli.main "$@"\n')
            tool.chmod(0o755)
        path = f"{tools}:{Path(sys.executable).parent}:{os.environ['PATH']}"
        alone = {"PYTHONPATH": str(packages), "PATH": path, "HOME": str(tools)}
        self.environment = {**alone, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
        self.running: list[subprocess.Popen[bytes]] = []

    def run(self, command: list[str]) -> None:
        done = subprocess.run(
            command,
            cwd=self.folder,
            env=self.environment,
            capture_output=True,
            text=True,
            timeout=600,
            check=False,
        )
        said = f"{command[-1]}\n{done.stdout[-2000:]}{done.stderr[-2000:]}"
        assert done.returncode in (0, 3, 4), said  # also what is found malicious or inconclusive
        assert "Traceback" not in done.stderr, said

    def start(self, line: str) -> None:
        """A service: it answers before the next command runs."""
        if is_served():
            pytest.skip("another service answers on the port that the page names")
        self.running.append(
            subprocess.Popen(["bash", "-c", f"exec {line}"], cwd=self.folder, env=self.environment)
        )
        for _ in range(600):
            if is_served():
                return
            assert self.running[-1].poll() is None, line
            time.sleep(0.1)  # nothing tells when another process listens
        raise AssertionError(f"{line}: no answer in a minute")


@pytest.mark.slow
@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_the_commands_and_the_python_of_a_page_run_as_printed(
    page: Path, wheel: Path, tmp_path: Path
) -> None:
    clone = Place(tmp_path / "clone", ROOT)
    for name in ("zoo", "examples", "paper_repro", "benchmarks"):
        (clone.folder / name).symlink_to(ROOT / name)
    alone = Place(tmp_path / "alone", wheel)
    found = list(blocks(page))
    run = [line for block in found for line in lines(block.text) if why_not(line) is None]
    for tool in {line.split()[0] for line in run}:
        if shutil.which(tool, path=clone.environment["PATH"]) is None:
            pytest.skip(f"needs {tool}, as the page's reader does")
    try:
        for block in found:
            place = alone if block.wheel else clone
            if block.language == "python":
                if not any(name in block.text for name in ENGINE + OWN_LOOP):
                    place.run([sys.executable, "-c", block.text])
            elif block.language in ("", "bash", "sh"):
                for line in lines(block.text):
                    if why_not(line) is None:
                        if "loraprobe serve" in line:
                            place.start(line)
                        else:
                            place.run(["bash", "-c", line])
    finally:
        for place in (clone, alone):
            for process in place.running:
                process.terminate()
                process.wait(60)


def own_loop(probe: str) -> dict[str, Any]:
    """What pages leave to the reader's own loop: a round of adapters of the zoo."""
    state = load_adapter(ROOT / "zoo/adapters/initial").state_dict()
    kinds = ("dolly_qa", "gsm8k", "self_instruct")
    replies = {
        client: (40, load_adapter(ROOT / f"zoo/adapters/benign-{kind}-{kind}-100-0").state_dict())
        for client, kind in zip(("hospital-3", "vendor-7", "site-1"), kinds, strict=True)
    }
    clients = [*replies, "site-4"]
    return {
        "replies": replies,
        "collect": lambda number: replies,
        "rounds": 1,
        "state": state,
        "global_state": state,
        "state_that_it_started_from": state,
        "asked": clients,
        "sampled": clients,
        "sampled_clients": clients,
        "its_state": replies["site-1"][1],
        "defense": Defense(probe, "cumulative"),
        "defend_round": defend_round,
    }


@pytest.mark.parametrize(
    ("page", "blocks_run"), [("README.md", 1), ("docs/plug-in.md", 4), ("docs/recipes.md", 3)]
)
def test_the_python_for_a_loop_of_the_readers_own_runs(
    page: str,
    blocks_run: int,
    tiny_files: Any,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "experiment.toml").write_text(toml(settings(tiny_files, rounds=1)))
    probe = str(ROOT / "zoo/probes/linear")
    names, run = own_loop(probe), 0
    for language, text, _ in blocks(ROOT / page):
        theirs = any(name in text for name in ENGINE)
        if language == "python" and not theirs and any(name in text for name in OWN_LOOP):
            names["number"] = run + 1
            exec(text.replace('"org/probe"', repr(probe)), names)
            run += 1
    assert run == blocks_run
    if "train" in names:
        kept = names["train"](3, names["state"], names["collect"], lambda state: 0.0, patience=1)
        assert kept.keys() == names["state"].keys()
    assert names["done"].weights


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_toml_json_and_yaml_on_a_page_can_be_read(page: Path) -> None:
    import yaml

    readers = {"toml": tomllib.loads, "json": json.loads, "yaml": yaml.safe_load}
    for block in blocks(page):
        if block.language in readers:
            readers[block.language](block.text)


def headings(page: Path) -> set[str]:
    """The anchors that GitHub and the site give a page's headings."""
    text = re.sub(r"^```.*?^```", "", page.read_text(encoding="utf-8"), flags=re.M | re.S)
    plain = (re.sub(r"[^\w\- ]", "", line.lower()) for line in re.findall(r"^#+ (.*)", text, re.M))
    return {line.strip().replace(" ", "-") for line in plain}


def test_every_link_inside_the_repository_leads_to_a_file_and_a_heading() -> None:
    ours = "https://github.com/loraprobe/loraprobe/blob/main/"
    checked = 0
    for page in (*PAGES, ROOT / "CHANGELOG.md", *(ROOT / "paper_repro").rglob("*.md")):
        text = re.sub(r"^```.*?^```", "", page.read_text(encoding="utf-8"), flags=re.M | re.S)
        for link in re.findall(r"\]\(([^)\s]+)\)", text):
            folder = ROOT if link.startswith(ours) else page.parent
            path, _, heading = link.removeprefix(ours).partition("#")
            if "://" not in path:
                target = (folder / path).resolve() if path else page
                assert target.exists(), (page, link)
                assert not heading or heading in headings(target), (page, link)
                checked += 1
    assert checked > 100


def test_every_public_name_is_on_the_reference_pages() -> None:
    for package in (fedloop, loraprobe):
        page = (ROOT / f"docs/reference/{package.__name__}.md").read_text(encoding="utf-8")
        listed = set(re.findall(r"^::: (\S+)", page, re.M))
        for name in set(package.__all__) - {"__version__"}:
            module = f"{package.__name__}.{package._MODULE_OF[name]}"
            assert listed & {module, f"{module}.{name}"}, name


def test_every_reason_not_to_run_a_line_is_given_and_needed() -> None:
    printed = [line for page in PAGES for block in blocks(page) for line in lines(block.text)]
    for pattern, why in NOT_RUN.items():
        assert why, pattern
        assert any(re.search(pattern, line) for line in printed), pattern
    assert sum(why_not(line) is None for line in printed) > 12  # the control: the others do run
