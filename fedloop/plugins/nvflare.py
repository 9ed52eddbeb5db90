"""The defence as an aggregator of NVIDIA FLARE, for FedAvg and every other workflow that takes a
ModelAggregator:

    FedAvg(num_clients=5, num_rounds=3, aggregator=DefendedAggregator("org/probe", alpha=16))

FLARE's filters see one client at a time; an aggregator sees the round. Clients send a PEFT state
dict as FLModel.params, FULL or DIFF, and the number of examples as meta["NUM_STEPS_CURRENT_ROUND"].

Source: the ModelAggregator API of NVFlare 2.9, https://nvflare.readthedocs.io/.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from loraprobe.adapters.adapter import Kind
from loraprobe.errors import AdapterFormatError
from loraprobe.probe import Probe

from ..checks import checked_options, is_number
from ..defense.defense import Defense
from ..defense.explain import rejected
from ..defense.levels import make_level
from ..defense.parts import level_for
from ..defense.types import Rejected, RoundRecord
from ..defense.weighing import Limits
from ..errors import ConfigError, MissingExtra
from ..rules.rule import make_rule
from .loop import check_rejected, defend_round
from .replies import BROKEN, LoRAOptions, Reply

try:
    from nvflare.apis.fl_constant import FLMetaKey, ReservedKey
    from nvflare.apis.fl_context import FLContext
    from nvflare.apis.shareable import Shareable
    from nvflare.app_common.abstract.fl_model import FLModel, ParamsType
    from nvflare.app_common.abstract.model import ModelLearnableKey
    from nvflare.app_common.aggregators.model_aggregator import ModelAggregator
    from nvflare.app_common.app_constant import AppConstants
    from nvflare.app_common.app_event_type import AppEventType
    from nvflare.app_common.utils.fl_model_utils import FLModelUtils
except ImportError as missing:
    raise MissingExtra("nvflare", "nvflare", "fedloop.plugins.nvflare") from missing

STEPS = "lora_steps"  # FLModel.meta[STEPS]: evidence, a list of factor deltas under PEFT key names
RECORDS = "defense.jsonl"  # in the server's folder of the run, one RoundRecord a line


class DefendedAggregator(ModelAggregator):  # type: ignore[misc]  # NVFlare has no types
    """Judges every round's models and hands back the average of the accepted ones, or the former
    model if the round is skipped.

    It needs to know the round's global model, which it takes from the training tasks as they are
    sent (or else from GLOBAL_MODEL in the context); the clients that got a task and sent no result
    are missing. A client is who FLARE says sent the result. Probe and level are loaded where the
    job runs, at the first round. What it decides is logged and appended to `defense.jsonl` in the
    run's folder; it is not put into the model's meta, which clients get to see.

    Args:
        probe: a folder on the server or a Hub id; `probe_revision` is a commit of the latter.
        alpha: PEFT's lora_alpha.
        level: a name in `fedloop.defense.levels.LEVELS`, `level_options` its fields.
        defense_options: min_mean_factor, max_count_ratio, max_norm_ratio, registered, max_steps,
            forget_after, probation, newcomer_share, score_aggregate of `Defense`.
        rule: a name in `fedloop.AGGREGATORS`, `rule_options` its options; `rejected` as of
            `defend_round`.
        lora: further arguments of `Adapter.from_state_dict`: use_rslora, alpha_pattern,
            rank_pattern, base_model.

    Attributes:
        records: what it decided so far.

    Raises:
        ConfigError: no such level or rule, or an option that is unknown or not valid.
    """

    def __init__(
        self,
        probe: str,
        alpha: float,
        level: str = "cumulative",
        level_options: dict[str, Any] | None = None,
        defense_options: dict[str, Any] | None = None,
        rule: str = "mean",
        rule_options: dict[str, Any] | None = None,
        lora: dict[str, Any] | None = None,
        probe_revision: str | None = None,
        rejected: Rejected = "left_out",
    ) -> None:
        super().__init__()
        if not isinstance(probe, str) or not probe:
            raise ConfigError(f"probe: got {probe!r}; expected a folder on the server or a Hub id")
        if not isinstance(probe_revision, str | None):
            raise ConfigError(f"probe_revision: got {probe_revision!r}; expected a commit or None")
        make_level(level, **checked_options("level_options", level_options))
        make_rule(rule, **checked_options("rule_options", rule_options))
        check_rejected(rejected)
        Limits.of(defense_options)
        LoRAOptions.of(alpha, checked_options("lora", lora))
        # Under the names of the arguments: FLARE reads them off again to write the job's
        # configuration.
        self.probe = probe
        self.alpha = alpha
        self.level = level
        self.level_options = level_options
        self.defense_options = defense_options
        self.rule = rule
        self.rule_options = rule_options
        self.lora = lora
        self.probe_revision = probe_revision
        self.rejected = rejected
        self.records: list[RoundRecord] = []
        self._defense: Defense | None = None
        self._global: dict[str, Any] | None = None
        self._replies: list[Reply] = []
        self._metrics: dict[str, Mapping[str, Any]] = {}
        self._expected: set[str] = set()

    @property
    def defense(self) -> Defense:
        """The defence, loaded when it is first asked for.

        Raises:
            ProbeFormatError, HubError, ConfigError: probe or options cannot be used.
        """
        if self._defense is None:
            probe = Probe.from_pretrained(self.probe, revision=self.probe_revision)
            level = level_for(probe, self.level, self.level_options)
            self._defense = Defense(probe, level, **(self.defense_options or {}))
        return self._defense

    def handle_event(self, event_type: str, fl_ctx: FLContext) -> None:
        """Note who gets a training task, and the global model in it."""
        super().handle_event(event_type, fl_ctx)
        peer = fl_ctx.get_peer_context()
        if event_type == AppEventType.BEFORE_TRAIN_TASK and peer is not None:
            sent = FLModelUtils.from_shareable(fl_ctx.get_prop(AppConstants.TRAIN_SHAREABLE))
            self._global = dict(sent.params or {})  # a copy: FLARE adds changes to its own dict
            self._expected.add(peer.get_identity_name())

    def accept(self, shareable: Shareable, fl_ctx: FLContext) -> bool:
        """Take one result from a workflow that does not say who sent it.

        Who it is stands in the peer's context.
        """
        self.fl_ctx = fl_ctx
        client = shareable.get_peer_prop(ReservedKey.IDENTITY_NAME, None)
        try:
            model = FLModelUtils.from_shareable(shareable)
        except BROKEN as error:
            self._replies.append(Reply(_name(client), None, error))
            return False
        model.meta["client_name"] = client
        self.accept_model(model)
        return True

    def accept_model(self, model: FLModel) -> None:
        """Take one result; it is judged when the round is complete."""
        meta = model.meta if isinstance(model.meta, dict) else {}
        client = meta.get("client_name")
        count = meta.get(FLMetaKey.NUM_STEPS_CURRENT_ROUND)
        state = (
            model.params
            if isinstance(client, str)
            else AdapterFormatError(
                "the result's meta has no client_name; whose it is cannot be known"
            )
        )
        kind: Kind = "factor_delta" if model.params_type == ParamsType.DIFF else "weights"
        self._replies.append(Reply(_name(client), count, state, meta.get(STEPS, ()), kind))
        self._metrics[_name(client)] = model.metrics or {}

    def aggregate_model(self) -> FLModel:
        """The round's model: FULL, under the keys of the global model.

        Raises:
            ConfigError: there was neither a training task nor a GLOBAL_MODEL to compare results
                with.
        """
        done = defend_round(
            self.defense,
            self.defense.round + 1,
            self._replies,
            self._start(),
            alpha=self.alpha,
            expected=sorted(self._expected) or None,  # without events nobody knows
            rule=self.rule,
            options=self.rule_options,
            rejected=self.rejected,
            **(self.lora or {}),
        )
        self.records.append(done.record)
        self._tell(done.record)
        metrics = _mean_metrics(self._metrics, done.weights)
        self.reset_stats()
        return FLModel(params_type=ParamsType.FULL, params=done.state, metrics=metrics or None)

    def reset_stats(self) -> None:
        """Forget the round's results, not the defence's memory of its clients."""
        self._global = None
        self._replies = []
        self._metrics = {}
        self._expected = set()

    def _start(self) -> dict[str, Any]:
        if self._global is not None:
            return self._global
        learnable = self.fl_ctx.get_prop(AppConstants.GLOBAL_MODEL) if self.fl_ctx else None
        if not learnable:
            raise ConfigError(
                "got no training task and no GLOBAL_MODEL; expected the global model, let FLARE"
                " build the aggregator as a component"
            )
        return dict(learnable[ModelLearnableKey.WEIGHTS])

    def _tell(self, record: RoundRecord) -> None:
        if self.fl_ctx is None:
            return
        self.info(
            f"round {record.round}:"
            f" {'skipped' if record.skipped else f'weights {dict(record.weights)}'}; rejected:"
            f" {rejected(record)}"
        )
        engine = self.fl_ctx.get_engine()
        if engine is not None:
            folder = Path(engine.get_workspace().get_run_dir(self.fl_ctx.get_job_id()))
            with (folder / RECORDS).open("a", encoding="utf-8") as file:
                file.write(record.to_json() + "\n")


def _name(client: Any) -> str:
    return client if isinstance(client, str) else "unknown"


def _mean_metrics(
    metrics: Mapping[str, Mapping[str, Any]], weights: Mapping[str, float]
) -> dict[str, float]:
    """The weighted mean of the numbers that every accepted client reported.

    Workflows select and stop by them.
    """
    counted = {client: weight for client, weight in weights.items() if weight > 0}
    names = [set(metrics[client]) for client in counted]
    means = {}
    for name in sorted(set.intersection(*names), key=str) if names else ():
        values = {client: metrics[client][name] for client in counted}
        if all(map(is_number, values.values())):
            means[name] = math.fsum(weight * values[client] for client, weight in counted.items())
    return means
