"""`fedloop run | resume | report | example`.

What they print and write, and that what is wrong is one message and exit code 2.
"""

from __future__ import annotations

import json
import re
import tomllib
from pathlib import Path

import pytest
import torch

from fedloop.cli import operator  # noqa: F401  # it joins the app
from fedloop.example import example_config
from fedloop.run.folder import read_run
from fedloop.run.simulate import simulate
from loraprobe.adapters.layout import pack
from loraprobe.adapters.load import load_adapter
from tests.helpers.boxed import fed as invoke
from tests.helpers.federated import Files, defended, experiment, settings


def test_run_writes_the_run_that_simulate_computes(tiny_files: Files, tmp_path: Path) -> None:
    values = settings(
        tiny_files,
        name="the [/] one",
        defense=defended(tiny_files),
        evaluation={"utility": "builtin:heldout_benign", "limit": 2},
    )
    config, out = experiment(tmp_path / "one.toml", values), tmp_path / "[red]out[/red]"
    shown = invoke("run", config, "--out", out).stdout
    expected = simulate(values)
    assert torch.equal(pack(load_adapter(out / "adapter"))[0], pack(expected.adapter)[0])
    assert [record.factors for record in read_run(out)[2]] == [
        record.factors for record in expected.records
    ]
    assert "the [/] one: 2 rounds" in shown
    assert f"written to {out}; `fedloop report {out}` draws it\n" in shown
    for client, role in expected.roles.items():
        assert re.search(rf"{client}\W+{role['role']}\W+1\.00\W+0\.250\W+0", shown), shown
    for name, value in expected.metrics.items():
        assert f"{name}: {value:.4g}\n" in shown
    again = invoke("run", config, "--out", out).stdout  # a finished run is shown again
    assert "the [/] one: 2 rounds" in again
    assert "the [/] one: 2 rounds" in invoke("resume", out).stdout


def test_a_run_need_not_be_written_and_may_name_its_folder_itself(
    tiny_files: Files, tmp_path: Path
) -> None:
    values = settings(tiny_files, rounds=1)
    assert "written to" not in invoke("run", experiment(tmp_path / "one.toml", values)).stdout
    assert [path.name for path in tmp_path.iterdir()] == ["one.toml"]
    experiment(tmp_path / "one.toml", {**values, "output": {"folder": "beside"}})
    invoke("run", tmp_path / "one.toml")
    assert len(read_run(tmp_path / "beside")[2]) == 1
    invoke("run", tmp_path / "one.toml", "-o", tmp_path / "elsewhere")
    assert len(read_run(tmp_path / "elsewhere")[2]) == 1


def test_report_writes_a_page(tiny_files: Files, tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    config = experiment(tmp_path / "one.toml", settings(tiny_files, rounds=1))
    invoke("run", config, "--out", tmp_path / "run")
    assert f"wrote {tmp_path / 'run' / 'report.html'}" in invoke("report", tmp_path / "run").stdout
    assert "client-00" in (tmp_path / "run" / "report.html").read_text()
    invoke("report", tmp_path / "run", "--out", tmp_path / "page.html")
    assert (tmp_path / "page.html").read_text() == (tmp_path / "run" / "report.html").read_text()


def test_example_prints_the_packaged_file() -> None:
    shown = invoke("example").stdout
    assert shown == example_config()
    values = tomllib.loads(shown)
    assert values["name"] == "example"
    assert Path(values["model"]["base"]).is_absolute()


def test_a_wrong_configuration_is_told_in_full_and_exits_with_2(
    tiny_files: Files, tmp_path: Path
) -> None:
    values = settings(tiny_files, rounds=0)
    values["training"] |= {"lr": -1.0, "speed": 3}
    result = invoke(
        "run", experiment(tmp_path / "bad.toml", values), "--out", tmp_path / "out", code=2
    )
    assert result.stderr.splitlines()[0] == "ConfigError: the configuration is not valid:"
    assert [line.split(":")[0].strip() for line in result.stderr.splitlines()[1:]] == [
        "rounds",
        "training.lr",
        "training.speed",
    ]
    assert result.stdout == ""
    assert not (tmp_path / "out").exists()


def test_what_is_not_there_exits_with_2(tiny_files: Files, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "file").write_text("x")
    good = settings(tiny_files, rounds=1)
    for arguments, message in (
        (("run", tmp_path / "absent.toml"), "ConfigError: cannot read .*absent.toml"),
        (
            (
                "run",
                experiment(
                    tmp_path / "a.toml", {**good, "model": {"base": str(tmp_path / "empty")}}
                ),
            ),
            "DataError: cannot load the base model",
        ),
        (
            (
                "run",
                experiment(
                    tmp_path / "b.toml",
                    {**good, "defense": {"level": "step", "probe": str(tmp_path / "empty")}},
                ),
            ),
            "no config.json in",
        ),
        (
            ("run", experiment(tmp_path / "c.toml", good), "--out", tmp_path / "file"),
            "StateError: cannot make the folder",
        ),
        (
            ("run", tmp_path / "c.toml", "--out", tmp_path),
            "StateError: .*is not empty and holds no run",
        ),
        (("run", tmp_path / "c.toml", "--wire", "float16"), "expected --engine flower"),
        (("resume", tmp_path / "empty"), "StateError: .*is not the folder of a run"),
        (("resume", tmp_path / "absent"), "StateError: .*is not the folder of a run"),
        (("report", tmp_path / "empty"), "StateError: .*is not the folder of a run"),
    ):
        result = invoke(*arguments, code=2)
        assert re.search(message, result.stderr), (arguments, result.stderr)
        assert "Traceback" not in result.stderr


def test_an_operator_explains_overrules_and_audits(tiny_files: Files, tmp_path: Path) -> None:
    values = settings(tiny_files, rounds=1, training={"schedule": "constant"})
    config, out = experiment(tmp_path / "one.toml", values), tmp_path / "run"
    invoke("run", config, "--out", out)
    assert "round 1, client-01; factor 1, weight" in invoke("explain", out, "client-01").stdout
    invoke("deny", out, "client-01", "--why", "left the project")
    assert "nobody" in invoke("allow", out, "nobody", "--why", "x", code=2).stderr
    invoke("resume", out, "--rounds", "2")
    why = "denied: left the project"
    assert why in invoke("explain", out, "client-01", "--round", "2").stdout
    assert "no decision on it" in invoke("audit", out, "--client", "client-1", code=2).stderr
    shown = invoke("audit", out, "--client", "client-01")
    assert [json.loads(line)["what"] for line in shown.stdout.splitlines()] == [
        *("client", "deny", "client")
    ]
    head = shown.stderr.split()[-1]
    assert invoke("audit", out / "audit.jsonl", "--head", head, "-q").stdout == f"{head}\n"
    lines = (out / "audit.jsonl").read_text().splitlines(keepends=True)
    (out / "audit.jsonl").write_text("".join(lines[:-1]))
    assert "missing at the end" in invoke("audit", out, code=1).stderr
    log = out / "audit.jsonl"
    assert "missing at the end" in invoke("audit", log, "--head", head, code=1).stderr


def test_a_run_that_trained_nothing_ends_with_1(tiny_files: Files, tmp_path: Path) -> None:
    values = settings(tiny_files, rounds=1, training={"lr": 1e30})
    done = invoke("run", experiment(tmp_path / "one.toml", values), code=1)
    assert "nothing was trained" in done.stderr
