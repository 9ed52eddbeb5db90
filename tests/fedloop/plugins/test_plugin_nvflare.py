"""The aggregator for NVIDIA FLARE: between FLARE's own calls and events, and in its simulator."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from nvflare.apis.fl_constant import ReservedKey
from nvflare.apis.fl_context import FLContext
from nvflare.apis.shareable import Shareable
from nvflare.app_common.abstract.fl_model import FLModel, ParamsType
from nvflare.app_common.abstract.model import make_model_learnable
from nvflare.app_common.app_constant import AppConstants
from nvflare.app_common.app_event_type import AppEventType
from nvflare.app_common.utils.fl_model_utils import FLModelUtils
from nvflare.app_common.workflows.fedavg import FedAvg
from nvflare.app_opt.pt.file_model_persistor import PTFileModelPersistor
from nvflare.job_config.api import FedJob
from nvflare.job_config.script_runner import ScriptRunner

from fedloop import Defense, RoundRecord
from fedloop.defense.levels import CumulativeLevel
from fedloop.errors import ConfigError
from fedloop.plugins import Reply, defend_round, rejected
from fedloop.plugins.nvflare import RECORDS, STEPS, DefendedAggregator
from loraprobe import Probe, load_adapter
from loraprobe.errors import ProbeFormatError
from tests.helpers import plugged

ROOT = Path(__file__).resolve().parents[3]
ZOO = ROOT / "zoo"


@pytest.fixture(scope="module")
def probe_folder(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(plugged.probe().save_pretrained(tmp_path_factory.mktemp("probe")))


def result(
    client: Any, params: Any, steps: Any = 40, kind: ParamsType = ParamsType.FULL, **options: Any
) -> FLModel:
    """A client's result as FLARE's FedAvg hands it on."""
    meta = {"client_name": client, "NUM_STEPS_CURRENT_ROUND": steps, **options.pop("meta", {})}
    return FLModel(
        kind,
        params,
        meta={key: value for key, value in meta.items() if value is not None},
        **options,
    )


STATE = plugged.arrays_of(plugged.global_state())
KEY = next(iter(STATE))


def trained(seed: int, malicious: bool = False) -> dict[str, np.ndarray]:
    changes = plugged.arrays_of(plugged.delta(seed, malicious))
    return {key: STATE[key] + change for key, change in changes.items()}


def asked(
    probe: str, clients: Any = ("1", "2", "3"), level: str = "cumulative"
) -> DefendedAggregator:
    """An aggregator once the round's tasks have been sent."""
    return sent_to(DefendedAggregator(probe, plugged.ALPHA, level), clients)


def sent_to(aggregator: DefendedAggregator, clients: Any) -> DefendedAggregator:
    aggregator.reset_stats()
    for client in clients:
        aggregator.handle_event(AppEventType.BEFORE_TRAIN_TASK, plugged.task_for(client, STATE))
    return aggregator


class Engine:
    """As much of FLARE's as says where a run lies."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def get_workspace(self) -> Any:
        return self

    def get_run_dir(self, job: str) -> str:
        return str(self.folder)


def test_a_round_takes_its_global_model_and_its_clients_from_the_tasks_that_were_sent(
    probe_folder: str,
) -> None:
    aggregator = asked(probe_folder, ("1", "2", "3", "4"))
    for number in (1, 2):
        aggregator.accept_model(result(str(number), trained(10 * number)))
    aggregator.accept_model(result("3", trained(30, malicious=True)))
    model = aggregator.aggregate_model()
    assert model.params_type == ParamsType.FULL
    assert set(rejected(aggregator.records[0])) == {"3", "4"}
    assert aggregator.records[0].reasons == {"4": "missing: asked and sent nothing"}
    for key, value in model.params.items():
        np.testing.assert_allclose(value, (trained(10)[key] + trained(20)[key]) / 2, atol=1e-5)


def test_the_task_is_remembered_as_it_was_sent_although_flare_writes_into_its_dict(
    probe_folder: str,
) -> None:
    aggregator = DefendedAggregator(probe_folder, plugged.ALPHA)
    context = plugged.task_for("1", dict(STATE))
    aggregator.handle_event(AppEventType.BEFORE_TRAIN_TASK, context)
    sent = FLModelUtils.from_shareable(context.get_prop(AppConstants.TRAIN_SHAREABLE)).params
    aggregator.accept_model(result("1", trained(10)))
    for key in sent:
        sent[key] = sent[key] + 100  # as update_model does for a DIFF
    moved = aggregator.aggregate_model().params[KEY]
    np.testing.assert_allclose(moved, trained(10)[KEY], atol=1e-6)


@pytest.mark.parametrize(
    ("odd", "why"),
    [
        ({"steps": None}, "num_examples of type NoneType"),
        ({"steps": "many"}, "num_examples of type str"),
        ({"steps": float("nan")}, "num_examples of type float"),
        ({"params": {"a": np.ones((2, 2))}}, "not a LoRA factor"),
        ({"params": [1, 2]}, "state dict of type list"),
        ({"params": None, "kind": None}, "state dict of type NoneType"),
        ({"meta": {STEPS: 3}}, "steps of type int"),
    ],
    ids=["no steps", "text", "nan", "other keys", "list", "nothing", "evidence"],
)
def test_a_result_that_cannot_be_used_is_refused_with_a_reason(
    probe_folder: str, odd: dict[str, Any], why: str
) -> None:
    aggregator = asked(probe_folder)
    for number in (1, 2):
        aggregator.accept_model(result(str(number), trained(10 * number)))
    aggregator.accept_model(result("3", **{"params": trained(30), **odd}))
    aggregator.aggregate_model()
    assert why in aggregator.records[0].reasons["3"]
    assert aggregator.records[0].weights == {"1": 0.5, "2": 0.5, "3": 0.0}


@pytest.mark.parametrize(
    "wrong",
    [
        {"rule": "average"},
        {"rule": "trimmed_mean", "rule_options": {"F": 1}},
        {"rule": "trimmed_mean", "rule_options": {"f": "x"}},
        {"defense_options": {"max_norm": 1.5}},
        {"defense_options": {"min_mean_factor": 20}},
        {"defense_options": {"max_count_ratio": 0}},
        {"defense_options": {"registered": {"site-1": "40"}}},
        {"defense_options": {"score_aggregate": "yes"}},
        *({name: "x"} for name in ("defense_options", "rule_options", "level_options", "lora")),
        {"rule_options": {3: 1}},
        {"probe_revision": 3},
        {"lora": {"rslora": True}},
        {"level": "fltrust"},
        {"level_options": {"threshold": 2}},
        {"alpha": "16"},
        {"probe": None},
    ],
)
def test_what_is_wrong_is_said_where_the_job_is_written(wrong: dict[str, Any]) -> None:
    with pytest.raises(ConfigError):
        DefendedAggregator(**{"probe": "org/probe", "alpha": plugged.ALPHA, **wrong})


def test_every_plain_option_of_a_defence_can_be_given(probe_folder: str) -> None:
    options = {"score_aggregate": True, "max_norm_ratio": 1.5, "probation": 3}
    limits = DefendedAggregator(probe_folder, 16, defense_options=options).defense.limits
    assert {name: getattr(limits, name) for name in options} == options


def shareable(model: FLModel, sender: str) -> Shareable:
    """What ScatterAndGather hands to an aggregator: who sent it stands in the peer's properties."""
    one = FLModelUtils.to_shareable(model)
    one.set_peer_props({ReservedKey.IDENTITY_NAME: sender})
    return one


def test_in_other_workflows_the_sender_is_who_flare_says_not_who_the_result_says(
    probe_folder: str,
) -> None:
    context, aggregator = FLContext(), asked(probe_folder)
    for number in (1, 2):
        sent = shareable(result("1", trained(10 * number)), str(number))
        assert aggregator.accept(sent, context)
    nothing = Shareable()
    nothing.set_peer_props({ReservedKey.IDENTITY_NAME: "3"})
    assert not aggregator.accept(nothing, context)
    model = FLModelUtils.from_shareable(aggregator.aggregate(context))
    aggregator.reset(context)
    record = aggregator.records[0]
    assert record.weights == {"1": 0.5, "2": 0.5, "3": 0.0}
    assert "ValueError" in record.reasons["3"]
    np.testing.assert_allclose(model.params[KEY], trained(15)[KEY], atol=20)


def test_without_events_the_global_model_comes_from_the_context(probe_folder: str) -> None:
    aggregator, context = DefendedAggregator(probe_folder, plugged.ALPHA), FLContext()
    aggregator.accept_model(result("1", trained(10)))
    with pytest.raises(ConfigError, match="no GLOBAL_MODEL"):
        aggregator.aggregate_model()
    learnable = make_model_learnable(STATE, {})
    context.set_prop(AppConstants.GLOBAL_MODEL, learnable, private=True, sticky=False)
    aggregator.fl_ctx = context
    assert aggregator.aggregate_model().params.keys() == STATE.keys()


def test_metrics_are_those_of_the_accepted_clients_and_nothing_of_the_defence_goes_back_to_clients(
    probe_folder: str,
) -> None:
    aggregator = asked(probe_folder)
    first = {"loss": 1.0, "own": 2.0, "bad": float("nan"), "text": "x", "huge": 10**400}
    second = {"loss": np.float32(3.0), "bad": 1.0, "text": "x", "huge": 1}
    aggregator.accept_model(result("1", trained(10), 30, metrics=first))
    aggregator.accept_model(result("2", trained(20), 10, metrics=second))
    attack = trained(30, malicious=True)
    aggregator.accept_model(result("3", attack, 40, metrics={"loss": -1e9}))
    model = aggregator.aggregate_model()
    assert model.metrics == {"loss": pytest.approx(1.5)}
    assert model.meta == {}  # FLARE sends it on with the next task


def test_what_was_decided_is_a_line_in_the_runs_folder(probe_folder: str, tmp_path: Path) -> None:
    aggregator = DefendedAggregator(probe_folder, plugged.ALPHA)
    aggregator.fl_ctx = plugged.task_for("1", STATE)
    aggregator.fl_ctx.set_prop(ReservedKey.ENGINE, Engine(tmp_path), private=True, sticky=False)
    for seed in (1, 2):
        sent_to(aggregator, ("1",)).accept_model(result("1", trained(seed)))
        aggregator.aggregate_model()
    lines = (tmp_path / RECORDS).read_text().splitlines()
    assert [RoundRecord.from_json(line) for line in lines] == aggregator.records
    assert [record.round for record in aggregator.records] == [1, 2]


def test_a_workflow_that_resets_nothing_gets_every_result_counted_once(probe_folder: str) -> None:
    aggregator = DefendedAggregator(probe_folder, plugged.ALPHA)
    for seed in (1, 2):
        aggregator.handle_event(AppEventType.BEFORE_TRAIN_TASK, plugged.task_for("1", STATE))
        aggregator.accept_model(result("1", trained(seed)))
        aggregator.aggregate_model()
    assert [record.reasons for record in aggregator.records] == [{}, {}]


def test_evidence_travels_in_the_meta(probe_folder: str) -> None:
    aggregator = asked(probe_folder, level="step")
    for number in (1, 2):
        meta = {STEPS: [plugged.arrays_of(plugged.delta(10 * number))]}
        aggregator.accept_model(result(str(number), trained(10 * number), meta=meta))
    aggregator.accept_model(result("3", trained(30)))
    aggregator.aggregate_model()
    assert list(aggregator.records[0].reasons) == ["3"]
    assert "missing evidence" in aggregator.records[0].reasons["3"]


def test_a_missing_probe_is_found_where_the_job_runs() -> None:
    elsewhere = DefendedAggregator("/a/folder/of/the/server", 16)
    with pytest.raises(ProbeFormatError, match="/a/folder/of/the/server"):
        elsewhere.defense  # noqa: B018


def test_flare_writes_every_argument_into_the_jobs_configuration_and_copies_no_code(
    probe_folder: str, tmp_path: Path
) -> None:
    arguments = {
        "probe": probe_folder,
        "alpha": 8,
        "level": "cumulative",
        "level_options": {"shrink": 0.25},
        "defense_options": {"min_mean_factor": 0.3},
        "rule": "trimmed_mean",
        "rule_options": {"f": 1},
        "lora": {"use_rslora": True},
        "probe_revision": "main",
    }
    job = FedJob("job", min_clients=1)
    job.set_app_packages(["fedloop", "loraprobe"])
    job.to_server(FedAvg(num_clients=1, num_rounds=1, aggregator=DefendedAggregator(**arguments)))
    job.export_job(str(tmp_path))
    [config] = tmp_path.rglob("config_fed_server.json")
    written = json.loads(config.read_text())["workflows"][0]["args"]["aggregator"]
    defaults = ("cumulative", "mean")  # FLARE leaves out what is the default
    assert written["path"] == "fedloop.plugins.nvflare.DefendedAggregator"
    assert written["args"] == {
        name: value for name, value in arguments.items() if value not in defaults
    }
    assert not list(tmp_path.rglob("*.py"))


# --- the simulator

SITES = {
    "site-1": "benign-dolly_qa-dolly_qa-100-{}",
    "site-2": "benign-dolly_context-dolly_context-100-{}",
    "site-3": "malicious-advbench-advbench-100-{}",
    "site-4": "benign-gsm8k-gsm8k-100-{}",
}
CLIENT = f"""
import nvflare.client as flare
from pathlib import Path
from loraprobe import factor_delta, load_adapter

flare.init()
adapters, site = Path({str(ZOO / "adapters")!r}), flare.get_site_name()
while flare.is_running():
    number = flare.receive().current_round
    trained = load_adapter(adapters / {SITES!r}[site].format(number))
    params = factor_delta(trained, load_adapter(adapters / "initial")).state_dict()
    if site == "site-4":
        next(iter(params.values()))[0, 0] = float("nan")
    flare.send(flare.FLModel("DIFF", params, meta={{"NUM_STEPS_CURRENT_ROUND": 100}}))
"""


@pytest.mark.slow
def test_the_simulator_ends_with_the_model_of_a_plain_loop_and_without_the_bad_clients(
    tmp_path: Path,
) -> None:
    """FLARE's server and four client processes, changes instead of weights.

    Site-3 is malicious, site-4 sends NaN.
    """
    script, start = tmp_path / "client.py", load_adapter(ZOO / "adapters/initial").state_dict()
    script.write_text(CLIENT)
    torch.save(start, tmp_path / "initial.pt")
    job = FedJob("defended", min_clients=len(SITES))
    job.set_app_packages(["fedloop", "loraprobe"])
    job.to_server(
        PTFileModelPersistor(source_ckpt_file_full_name=str(tmp_path / "initial.pt")),
        id="persistor",
    )
    job.to_server(
        FedAvg(
            num_clients=len(SITES),
            num_rounds=2,
            aggregator=DefendedAggregator(str(ZOO / "probes/linear"), 16),
        )
    )
    for site in SITES:
        job.to(ScriptRunner(script=str(script)), site)
    assert job.simulator_run(str(tmp_path / "workspace"), log_config="ERROR") == 0
    run = tmp_path / "workspace/server/simulate_job"
    records = [RoundRecord.from_json(line) for line in (run / RECORDS).read_text().splitlines()]

    probe = Probe.from_pretrained(ZOO / "probes/linear")
    defense, state = Defense(probe, CumulativeLevel()), dict(start)
    for number, record in enumerate(records):
        replies = []
        for site, name in SITES.items():
            after = load_adapter(ZOO / "adapters" / name.format(number)).state_dict()
            change = {key: after[key] - start[key] for key in start}
            if site == "site-4":
                next(iter(change.values()))[0, 0] = float("nan")
            replies.append(Reply(site, 100, change, kind="factor_delta"))
        done = defend_round(defense, number + 1, replies, state, alpha=16, expected=list(SITES))
        state = done.state
        assert plugged.comparable(record) == plugged.comparable(done.record)
    assert [set(rejected(record)) for record in records] == [{"site-3", "site-4"}] * 2
    model = torch.load(next(run.rglob("FL_global_model.pt")), weights_only=True)["model"]
    assert model.keys() == state.keys()
    assert all(torch.allclose(model[key], state[key], rtol=0, atol=1e-6) for key in state)
    assert not any(torch.allclose(model[key], start[key], rtol=0, atol=1e-4) for key in state)
