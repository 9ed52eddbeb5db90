"""NVIDIA FLARE's simulator with a defended aggregator.

Two honest clients, and site-3, which trained on harmful answers.

    python examples/nvflare_simulator.py  # needs: pip install 'loraprobe[nvflare]'; takes half a
                                          # minute

FLARE runs this file for its clients, too. Their updates are real: adapters of the zoo that were
    fine-tuned on such data.
"""

import sys
import tempfile
from pathlib import Path

import nvflare.client as flare
import torch
from nvflare.app_common.workflows.fedavg import FedAvg
from nvflare.app_opt.pt.file_model_persistor import PTFileModelPersistor
from nvflare.job_config.api import FedJob
from nvflare.job_config.script_runner import ScriptRunner

from fedloop.plugins.nvflare import DefendedAggregator
from loraprobe import factor_delta, load_adapter

ZOO = Path(__file__).resolve().parent.parent / "zoo"
SITES = {
    "site-1": "benign-dolly_qa-dolly_qa",
    "site-2": "benign-dolly_context-dolly_context",
    "site-3": "malicious-advbench-advbench",
}
INITIAL = load_adapter(ZOO / "adapters/initial")


def update(site, number):  # stands for local training
    return factor_delta(
        load_adapter(ZOO / f"adapters/{SITES[site]}-100-{number}"), INITIAL
    ).state_dict()


def average(*sites):
    updates = [update(site, number) for site in sites for number in (0, 1)]
    return {
        key: value + sum(change[key] for change in updates) / len(sites)
        for key, value in INITIAL.state_dict().items()
    }


def client():
    flare.init()
    while flare.is_running():
        flare.send(
            flare.FLModel(
                "DIFF",
                update(flare.get_site_name(), flare.receive().current_round),
                meta={"NUM_STEPS_CURRENT_ROUND": 100},
            )
        )


def server(folder):
    torch.save(INITIAL.state_dict(), folder / "initial.pt")
    job = FedJob("defended", min_clients=3)
    job.set_app_packages(
        ["fedloop", "loraprobe"]
    )  # installed, so FLARE need not copy them into the job
    job.to_server(
        PTFileModelPersistor(source_ckpt_file_full_name=str(folder / "initial.pt")), id="persistor"
    )
    job.to_server(
        FedAvg(
            num_clients=3,
            num_rounds=2,
            aggregator=DefendedAggregator(str(ZOO / "probes/linear"), alpha=16),
        )
    )
    job.to_clients(ScriptRunner(script=__file__, script_args="client"))
    job.simulator_run(str(folder / "workspace"), n_clients=3, log_config="ERROR")
    print(
        next(folder.rglob("defense.jsonl")).read_text()
    )  # one RoundRecord a line: who counted how much, and why
    model, honest = (
        torch.load(next(folder.rglob("FL_global_model.pt")))["model"],
        average("site-1", "site-2"),
    )
    for name, state in (("defended", model), ("undefended", average(*SITES))):
        apart = max(float((state[key] - honest[key]).abs().max()) for key in honest)
        print(f"{name}: largest difference from the average of the honest clients: {apart:.1e}")


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as folder:
        client() if sys.argv[1:] == ["client"] else server(Path(folder))
