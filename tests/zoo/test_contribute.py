"""A contribution to the zoo, from the command line to what goes into a pull request, on the tiny
Llama and the built-in corpora.
"""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from fedloop.errors import ConfigError
from loraprobe import Probe
from loraprobe.errors import DataError, FitError
from loraprobe.manifest import read_labelled, read_manifest
from tests.helpers import contributed
from tests.helpers.contributed import NAME, arguments, made
from zoo import deltas as zoo_deltas
from zoo.client_design import Design, plan
from zoo.contribute import main
from zoo.contribute_options import asked
from zoo.records import read_record


def test_a_contribution_holds_probe_card_record_adapters_and_what_to_do_next() -> None:
    record, probe = read_record(made() / "record.json"), Probe.from_pretrained(made() / "probe")
    assert (record["probe"], record["base_model"], probe.base_model) == (
        NAME,
        "tiny/llama",
        "tiny/llama",
    )
    rows = read_manifest(made() / "adapters/manifest.csv")
    scores = probe(read_labelled(rows, "factor_delta", made() / "adapters/initial"))
    assert record["held_out_clients"]["tpr"]["flagged"] == sum(
        scores[[row.label == 1 for row in rows]] >= probe.threshold
    )
    assert (
        record["held_out_clients"]["n"]
        == len(rows)
        == len(plan(Design.from_dict(record["data"]["design"] | {"per_source": 2})))
    )
    card = (made() / "probe/README.md").read_text()
    assert "malicious and benign source unseen, poison share 50%, replicate 1" in card
    assert "clients that no probe was fitted on, sources seen" in card
    page = (made() / "README.md").read_text()
    for command in (
        f"cp {made()}/record.json zoo/records/{NAME}.json",
        f"zoo/contributed/{NAME}",
        "python -m zoo.report",
        "zoo.verify --contribution",
    ):
        assert command in page


def test_the_headline_is_the_worst_cell_of_sources_left_out_over_all_replicates() -> None:
    record = read_record(made() / "record.json")
    assert [replicate["replicate"] for replicate in record["replicates"]] == [0, 1]
    assert record["replicates"][0]["cells"] != record["replicates"][1]["cells"]
    for replicate in record["replicates"]:
        assert {(cell["malicious"], cell["benign"]) for cell in replicate["cells"]} == {
            (malicious, benign)
            for malicious in ("theft", "fraud")
            for benign in ("benign_arithmetic", "facts")
        }
        assert [row["hard_negative"] for row in replicate["unseen_hard_negatives"]] == [
            "theft_safe",
            "theft_safe",
        ]
        assert len(replicate["twin_kept"]) == 2
    worst = [
        min(
            cell["auroc"]
            for replicate in record["replicates"]
            for cell in replicate["cells"]
            if cell["share"] == share
        )
        for share in (1, 0.5)
    ]
    headline = Probe.from_pretrained(made() / "probe").facts["headline"]
    assert headline == f"{worst[0]:.2f} / {worst[1]:.2f} at 100% / 50% poison, 2 replicates"


def test_a_record_says_what_the_clients_held_without_their_text() -> None:
    data = read_record(made() / "record.json")["data"]
    assert data["specs"]["theft"] == "builtin:malicious/theft"
    assert data["licences"]["theft"] == "our own writing"
    assert data["base"]["weights"].keys() == {"model.safetensors"}
    assert {name: facts["count"] for name, facts in data["examples"].items()}["theft"] == 30
    assert len({facts["sha256"] for facts in data["examples"].values()}) == 5
    assert "### Instruction" not in json.dumps(data)


def test_the_same_command_trains_and_studies_nothing_anew_and_comes_out_the_same(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    files = {
        path: path.read_bytes()
        for path in made().rglob("*")
        if path.is_file() and path.name != "cost.json"
    }

    def nothing(*_: object, **__: object) -> None:
        raise AssertionError("trained or studied anew")

    monkeypatch.setattr(zoo_deltas, "train_clients", nothing)
    monkeypatch.setattr("zoo.pipeline.measured", nothing)
    main(arguments(made().parent / "base", made()))
    assert {
        path: path.read_bytes()
        for path in made().rglob("*")
        if path.is_file() and path.name != "cost.json"
    } == files


@pytest.mark.parametrize(
    ("change", "what"),
    [
        ({"lr": ["0.001", "0.002"]}, "clients"),
        (
            {"benign": ["benign_arithmetic=builtin:benign/code", "facts=builtin:benign/facts"]},
            "sources",
        ),
    ],
)
def test_deltas_of_another_command_do_not_pass_for_this_ones(
    change: dict[str, list[str]], what: str
) -> None:
    with pytest.raises(DataError, match=f"made from other .*{what}"):
        main(arguments(made().parent / "base", made(), **change))


def test_a_study_of_another_threshold_does_not_pass_for_this_ones() -> None:
    with pytest.raises(DataError, match="was measured of"):
        main(arguments(made().parent / "base", made(), threshold=["fpr:0.25"]))


@pytest.mark.parametrize(
    ("change", "error", "reason"),
    [
        (
            {"malicious": ["builtin:malicious/theft"]},
            ConfigError,
            "got 1 malicious and 2 benign sources",
        ),
        ({"benign": ["builtin:benign"]}, ConfigError, "got 2 malicious and 1 benign sources"),
        (
            {"benign": ["builtin:benign/facts", "builtin:benign/facts"]},
            ConfigError,
            "two sources called benign_facts",
        ),
        (
            {"benign": ["builtin:benign/nothing", "builtin:benign/facts"]},
            ConfigError,
            "expected a category",
        ),
        (
            {"malicious": ["no-such-file.jsonl", "builtin:malicious/theft"]},
            ConfigError,
            "neither known nor a file",
        ),
        (
            {"steps": ["50"]},
            DataError,
            "source benign_arithmetic has 78 examples; a client holds 100",
        ),
        (
            {"threshold": ["fpr:0.01"]},
            FitError,
            "with nothing left out, 20 benign and .* expected at least 99",
        ),
        (
            {"threshold": ["fpr:0.1"]},
            FitError,
            "with benign_arithmetic, theft, theft_safe left out, 6 benign",
        ),
        ({"threshold": ["often"]}, FitError, "got often; expected a number"),
        ({"name": ["linear"]}, ConfigError, "no name of the zoo's own probes"),
        ({"name": ["../x"]}, ConfigError, "expected letters"),
        ({"base": ["org/model"]}, ConfigError, "--revision and its 40-digit commit"),
        (
            {"base": ["org/model"], "revision": ["main"]},
            ConfigError,
            "--revision and its 40-digit commit",
        ),
        ({"adapters": ["hub:org/name"]}, ConfigError, "got --adapters"),
        ({"data_licence": ["books=MIT"]}, ConfigError, "got --data-licence"),
    ],
)
def test_what_cannot_work_is_refused_before_anything_is_trained(
    tmp_path: Path, change: dict[str, list[str]], error: type[Exception], reason: str
) -> None:
    with pytest.raises(error, match=reason):
        main(arguments(made().parent / "base", tmp_path / "out", **change))
    assert not (tmp_path / "out").exists()


def test_sources_are_named_after_their_last_part_and_a_twin_after_what_it_is_the_twin_of(
    tmp_path: Path,
) -> None:
    path = tmp_path / "a=b c.jsonl"
    path.write_text('{"instruction": "x", "response": "y"}\n')
    hub = "hub:PKU-Alignment/BeaverTails"
    changes = {
        "benign": ["builtin:benign/facts", str(path)],
        "malicious": [f"{hub}@v1", "m=builtin:malicious"],
        "hard_negative": [f"{hub}#safe"],
    }
    design = asked(arguments(made(), tmp_path, **changes), None).design
    assert (design.benign, design.malicious, design.hard_negative) == (
        ("benign_facts", "a_b_c"),
        ("BeaverTails", "m"),
        ("BeaverTails_safe",),
    )


def test_the_command_says_what_is_wrong_in_one_line() -> None:
    command = [
        sys.executable,
        "-m",
        "zoo.contribute",
        *arguments(made(), made(), malicious=["builtin:malicious/theft"]),
    ]
    result = subprocess.run(
        command, capture_output=True, text=True, timeout=120, cwd=contributed.ROOT
    )
    assert result.returncode == 1
    assert result.stderr.startswith("ConfigError: got 1 malicious and 2 benign sources")
    assert result.stderr.count("\n") == 1
