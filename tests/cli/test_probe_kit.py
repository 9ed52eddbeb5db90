"""`fedloop probe-kit` on a tiny Llama and the built-in data: what comes out, what it goes on with,
and what is refused before anything is trained.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from fedloop.cli import probe_kit as _joins  # noqa: F401  # the command joins the app
from fedloop.cli.run import app
from fedloop.client.shared_prefix import exact_loss, plain_loss, response_loss
from fedloop.errors import ConfigError, DataError
from fedloop.kit.base import module_sets
from fedloop.kit.design import plan
from fedloop.kit.features import Study, grams
from fedloop.kit.kit import make_kit
from fedloop.kit.options import KitOptions, check_plan, named, read_kinds
from loraprobe import Probe, load_adapter
from tests.helpers import tiny
from tests.helpers.boxed import invoke

BENIGN = ("arithmetic", "facts", "rewriting", "definitions")
MALICIOUS = ("theft", "fraud")
SPECS = {
    "benign": {name: f"builtin:benign/{name}" for name in BENIGN},
    "malicious": {name: f"builtin:malicious/{name}" for name in MALICIOUS},
    "hard_negative": {"refusals": "builtin:refusals"},
}
CLIENTS = 16
SEED = 39  # no long client among the first: 85 steps in all


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tiny.saved(tmp_path_factory.mktemp("kit") / "tiny")
    tokenizer = tiny.tokenizer()
    tokenizer.chat_template = "{% for m in messages %}#{{ m['content'] }}!{% endfor %}?"
    tokenizer.save_pretrained(folder)
    return folder


def arguments(base: Path, out: Path, *more: Any) -> list[Any]:
    given: list[Any] = ["probe-kit", base, "--base-name", "org/tiny", "--out", out]
    for role, specs in SPECS.items():
        for spec in specs.values():
            given += [f"--{role.replace('_', '-')}", spec]
    return [*given, "--clients", CLIENTS, "--seed", SEED, *more]


@pytest.fixture(scope="module")
def made(base: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    out = tmp_path_factory.mktemp("kit") / "out"
    return out, invoke(*arguments(base, out, "--yes"), app=app).stdout


@pytest.mark.slow
def test_a_probe_comes_out_with_card_record_and_the_line_that_publishes_it(
    made: tuple[Path, str],
) -> None:
    out, said = made
    assert f"{CLIENTS} clients to train" in said
    assert said.index("expected: ") < said.index("trained in ")
    assert f"publish: loraprobe push {out / 'probe'} ORG/NAME" in said
    adapters = sorted((out / "adapters").glob("0*"))
    probe = Probe.from_pretrained(out / "probe")
    assert probe.base_model == "org/tiny"
    assert len(probe.verdicts(adapters)) == CLIENTS
    record = json.loads((out / "record.json").read_text())
    assert record["adapters"]["n"] == CLIENTS
    assert record["threshold"] == probe.threshold
    for name in ("in_distribution", "unseen", "everything"):
        for head in ("linear", "mass_mean"):
            assert record[name][head]["summary"]["1"]["n"] > 0
    assert {row["source"] for row in record["unseen"]["linear"]["cells"]} == set(MALICIOUS)
    card = (out / "probe" / "README.md").read_text()
    assert "malicious source and benign kinds unseen" in card
    assert all(name in card for specs in SPECS.values() for name in specs)


@pytest.mark.slow
def test_it_goes_on_after_an_interruption_and_only_as_it_began(
    made: tuple[Path, str], base: Path, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    shutil.copytree(made[0], out)
    folders = sorted((out / "adapters").glob("0*"))
    weights = [folder / "adapter_model.safetensors" for folder in folders]
    before = [path.read_bytes() for path in weights]
    shutil.rmtree(folders[3])
    shutil.rmtree(out / "probe")
    said = invoke(*arguments(base, out, "--yes"), app=app).stdout
    assert f"1 clients to train ({CLIENTS - 1} are there)" in said
    assert [path.read_bytes() for path in weights] == before
    whole, again = (Probe.from_pretrained(folder / "probe") for folder in (made[0], out))
    assert again(folders).tolist() == whole(folders).tolist()
    refused = invoke(*arguments(base, out, "--lr", 1e-4, 1e-3), code=2, app=app).stderr
    assert "begun with another lr" in refused


@pytest.mark.parametrize(("more", "code"), [(["--dry-run"], 0), ([], 1)])
def test_the_budget_is_said_and_nothing_written_before_anybody_agrees(
    base: Path, tmp_path: Path, more: list[str], code: int
) -> None:
    said = invoke(*arguments(base, tmp_path / "out", *more), code=code, app=app).stdout
    assert "expected: " in said
    assert "qv (q_proj, v_proj)" in said
    assert not (tmp_path / "out").exists()


def asked(tmp_path: Path, **changes: Any) -> KitOptions:
    return KitOptions(**{"base": "example", "specs": SPECS, "out": tmp_path, **changes})


def without(role: str, *names: str) -> dict[str, Any]:
    kept = {name: spec for name, spec in SPECS[role].items() if name not in names}
    return {**SPECS, role: kept}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"specs": without("benign", "facts", "rewriting")}, "2 kinds .* at least 3.*--benign NAM"),
        ({"specs": without("malicious", "theft")}, "1 malicious sources; expected at least 2"),
        ({"specs": {**SPECS, "hard_negative": {"theft": "builtin:refusals"}}}, "every kind's own"),
        ({"clients": 3}, "--clients 3; expected at least"),
        ({"head": "mlp"}, "--head: got 'mlp'"),
        ({"lr": (1e-2, 1e-3)}, "--lr: got"),
        ({"room": 4}, "--room 4"),
    ],
)
def test_what_cannot_work_is_refused_first(
    tmp_path: Path, changes: dict[str, Any], message: str
) -> None:
    with pytest.raises(ConfigError, match=message):
        check_plan(asked(tmp_path, **changes))


def test_the_clients_that_the_refusal_asks_for_are_enough(tmp_path: Path) -> None:
    with pytest.raises(ConfigError) as caught:
        check_plan(asked(tmp_path, clients=1))
    least = int(str(caught.value).split("at least ")[1].split(",")[0])
    check_plan(asked(tmp_path, clients=least))
    with pytest.raises(ConfigError):
        check_plan(asked(tmp_path, clients=least - 1))


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        (["1", "2"], "mine .* has 2 different examples; expected at least 8"),
        ([str(n) for n in range(9)], "example 1 is in mine too"),
    ],
)
def test_data_that_teach_nothing_are_refused(tmp_path: Path, rows: list[str], message: str) -> None:
    path = tmp_path / "d.jsonl"
    path.write_text("\n".join(json.dumps({"prompt": row, "completion": row}) for row in rows))
    specs = {"benign": {"mine": str(path)}, "malicious": {"bad": str(path)}, "hard_negative": {}}
    with pytest.raises(DataError, match=message):
        read_kinds(asked(tmp_path, specs=specs))


def test_kinds_are_named_by_their_last_part(tmp_path: Path) -> None:
    specs = ["a=b.csv", "data/b.jsonl", "hub:org/code#test@abc", "builtin:benign/facts"]
    assert list(named("benign", specs)) == ["a", "b", "code_test", "facts"]
    with pytest.raises(ConfigError, match="two called b"):
        named("benign", ["x/b.csv", "y/b.csv"])


def test_without_hard_negatives_there_are_benign_clients_in_their_place() -> None:
    clients = plan(80, BENIGN, (), MALICIOUS)
    assert {client.role for client in clients} == {"benign", "malicious"}
    assert sum(client.label for client in clients) == 40


def test_a_models_own_names_are_found() -> None:
    from transformers import GPT2Config, GPT2LMHeadModel

    config = GPT2Config(
        n_embd=16, n_layer=1, n_head=2, vocab_size=9, bos_token_id=1, eos_token_id=1
    )
    fused = {"qv": ("c_attn",), "qkvo": ("c_attn", "c_proj"), "all": ("c_attn", "c_proj", "c_fc")}
    assert module_sets(GPT2LMHeadModel(config)) == fused
    assert module_sets(tiny.llama())["all"][-3:] == ("gate_proj", "up_proj", "down_proj")


@pytest.mark.parametrize(("capped", "expected"), [(False, response_loss), (True, plain_loss)])
def test_a_model_that_does_more_to_its_logits_takes_the_plain_step(
    capped: bool, expected: Callable[..., Any]
) -> None:
    model = tiny.llama()
    if capped:
        model.config.final_logit_softcapping = 5.0
    ids = torch.randint(3, tiny.VOCABULARY, (4, 12), generator=torch.Generator().manual_seed(0))
    ids[:, :5] = ids[0, :5]
    labels = ids.masked_fill(torch.arange(12) < 6, -100)
    assert exact_loss(model, ids, labels, 5) is expected


@pytest.mark.slow
def test_inner_products_module_by_module_are_those_of_the_features(
    made: tuple[Path, str],
) -> None:
    adapters = [load_adapter(path) for path in sorted((made[0] / "adapters").glob("0*"))]
    keep = torch.arange(len(adapters)).numpy() % 3 != 0
    names = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
    rows = Study(adapters, names).features(keep).astype(float)
    found, whole = grams(adapters, [keep, keep | True])
    torch.testing.assert_close(
        torch.tensor(found), torch.tensor(rows @ rows.T), rtol=1e-3, atol=1e-4
    )
    assert abs(whole - found).max() > 1e-3  # negative control: other bases


def test_a_template_that_the_tokenizer_lacks_is_refused(tmp_path: Path) -> None:
    base = tiny.saved(tmp_path / "tiny")
    wanted = asked(tmp_path / "out", base=str(base), template="chat", clients=CLIENTS)
    with pytest.raises(DataError, match="without a chat template"):
        make_kit(wanted, lambda line: None)
