"""The defence around a Flower strategy of your own, in one line:

    strategy = DefendedStrategy(FedAdam(...), Defense("org/probe"), alpha=16)

for clients that reply as in Flower's examples: one ArrayRecord with a PEFT state dict, one
MetricRecord with the number of examples. The strategy sees the accepted replies only, as copies
whose number of examples is multiplied by the security factor. Rules that take no weights
(FedMedian, Krum, ...) count all accepted replies alike: choose a level that rejects outright, as
`CumulativeLevel` does.

Source: the Strategy API of Flower 1.41, https://flower.ai/docs/framework/.
"""

from __future__ import annotations

import copy
import logging
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import numpy as np

from loraprobe.errors import AdapterFormatError, LoraprobeError

from ..defense.defense import Defense
from ..defense.explain import rejected
from ..defense.types import Assessment, RoundRecord
from ..errors import ConfigError, EvidenceError, MissingExtra
from .replies import BROKEN, GlobalState, LoRAOptions, Reply, assess

try:
    from flwr.app import Array, ArrayRecord, ConfigRecord, Message, MetricRecord, RecordDict
    from flwr.serverapp import Grid
    from flwr.serverapp.strategy import Strategy
except ImportError as missing:
    raise MissingExtra("flwr", "flower", "fedloop.plugins.flower") from missing

# ArrayRecords of a reply that are evidence: "step-1", "step-2", ...; factor deltas under PEFT key
# names
STEP = "step-"
_LOG = logging.getLogger(__name__)


class DefendedStrategy(Strategy):
    """A strategy behind the defence; the same methods, and `start` as Flower has it.

    A client is the node that Flower says sent the reply, as a string; Flower's SuperLink checks
    that it is the node whose message is answered, not which node pushed it. A node that was asked
    and sent no reply, or an error, is missing. When a round is skipped its arrays are returned as
    they were, and the strategy is not asked.

    Args:
        strategy: its `weighted_by_key`, if it has one, names the number of examples; otherwise that
            is "num-examples".
        defense: counts rounds by itself: Flower counts from 1 after every start.
        alpha: PEFT's lora_alpha.
        on_record: called with every round's record; rejections are logged anyhow.
        lora: further arguments of `Adapter.from_state_dict`: use_rslora, alpha_pattern,
            rank_pattern, base_model.

    Raises:
        ConfigError: the strategy has a `start` of its own, which a wrapper would leave out; or an
            option of the LoRA is unknown or not valid.
    """

    def __init__(
        self,
        strategy: Strategy,
        defense: Defense,
        *,
        alpha: float,
        on_record: Callable[[RoundRecord], None] | None = None,
        **lora: Any,
    ) -> None:
        if not isinstance(strategy, Strategy) or not isinstance(defense, Defense):
            raise ConfigError(
                f"got a strategy of type {type(strategy).__name__} and a defence of type"
                f" {type(defense).__name__}; expected a Flower Strategy and a Defense"
            )
        if type(strategy).start is not Strategy.start:
            raise ConfigError(
                f"{type(strategy).__name__} has its own start(); expected Flower's. Defend its"
                " aggregate_train, or use defend_round in it."
            )
        self.strategy = strategy
        self.defense = defense
        self._lora = LoRAOptions.of(alpha, lora)
        self._on_record = on_record or (lambda record: None)
        self._counted_by = getattr(strategy, "weighted_by_key", "num-examples")
        self._expected: list[str] = []
        self._arrays: ArrayRecord | None = None

    def summary(self) -> None:
        """Log the settings."""
        _LOG.info("defended by %r", self.defense.level)
        self.strategy.summary()

    def configure_train(
        self, server_round: int, arrays: ArrayRecord, config: ConfigRecord, grid: Grid
    ) -> Iterable[Message]:
        """As the strategy, remembering what was sent to whom."""
        messages = list(self.strategy.configure_train(server_round, arrays, config, grid))
        self._arrays = arrays
        self._expected = [str(message.metadata.dst_node_id) for message in messages]
        return messages

    def aggregate_train(
        self, server_round: int, replies: Iterable[Message]
    ) -> tuple[ArrayRecord | None, MetricRecord | None]:
        """Judge the replies and let the strategy aggregate the accepted ones."""
        if self._arrays is None:
            raise EvidenceError(
                "got replies without a configure_train before them; expected the round's global"
                " arrays first, once for every round"
            )
        arrays: ArrayRecord | None = self._arrays
        former = _numpy(self._arrays)
        metrics = None
        self._arrays = None
        start = GlobalState(former, self._lora)
        answers = sorted((message for message in replies if message.has_content()), key=_sender)
        odd = self._odd_metrics([reply for reply in answers if _sender(reply) in self._expected])
        sent = [self._reply(message, odd) for message in answers]
        with self.defense.undone_on_error():
            assessment = assess(self.defense, self.defense.round + 1, sent, start, self._expected)
            unusable = ""
            if not assessment.skipped:
                accepted = [
                    self._weighted_copy(message, assessment, start, former)
                    for message in answers
                    if _sender(message) in assessment.accepted
                ]
                result, metrics = self.strategy.aggregate_train(server_round, accepted)
                try:
                    arrays = None if result is None else _like(result, start, former)
                except LoraprobeError as error:
                    unusable = f"the strategy's result is unusable: {error}"
        record = assessment.record(unusable=unusable, rule=type(self.strategy).__name__)
        for client, why in rejected(record).items():
            _LOG.warning("round %d: client %s: %s", record.round, client, why)
        self._on_record(record)
        return arrays, metrics

    def configure_evaluate(
        self, server_round: int, arrays: ArrayRecord, config: ConfigRecord, grid: Grid
    ) -> Iterable[Message]:
        """As the strategy."""
        return self.strategy.configure_evaluate(server_round, arrays, config, grid)

    def aggregate_evaluate(
        self, server_round: int, replies: Iterable[Message]
    ) -> MetricRecord | None:
        """As the strategy, without replies whose metrics are not like most others'.

        One of them would end the run.
        """
        messages = list(replies)
        odd = self._odd_metrics([message for message in messages if message.has_content()])
        return self.strategy.aggregate_evaluate(
            server_round, [message for message in messages if id(message) not in odd]
        )

    def _odd_metrics(self, answers: Sequence[Message]) -> dict[int, Exception]:
        """id of a message -> why its metrics cannot be averaged with the others'.

        A node has one voice, however much it sends.
        """
        shapes = {id(message): _metrics_shape(message) for message in answers}
        voices = dict.fromkeys((_sender(message), shapes[id(message)]) for message in answers)
        usual = Counter(shape for _, shape in voices).most_common(1)[0][0] if voices else ()
        odd = {message: shape for message, shape in shapes.items() if shape != usual}
        return {
            message: AdapterFormatError(f"got the metrics {shape}; expected {usual}, as most sent")
            for message, shape in odd.items()
        }

    def _reply(self, message: Message, odd: dict[int, Exception]) -> Reply:
        client = _sender(message)
        count = _metrics(message).get(self._counted_by)
        arrays = {
            name: record
            for name, record in message.content.array_records.items()
            if not name.startswith(STEP)
        }
        try:
            if id(message) in odd:
                raise odd[id(message)]
            if len(arrays) != 1:
                raise AdapterFormatError(
                    f"got the ArrayRecords {sorted(arrays)}; expected one, and evidence in records"
                    f" named {STEP}1, {STEP}2, ..."
                )
            state = _numpy(next(iter(arrays.values())))
            return Reply(
                client, count, state, [_numpy(record) for record in _steps(message.content)]
            )
        except BROKEN as error:
            return Reply(client, count, error)

    def _weighted_copy(
        self,
        message: Message,
        assessment: Assessment,
        start: GlobalState,
        former: dict[str, np.ndarray],
    ) -> Message:
        """A copy of a reply for the strategy, which may change it.

        Checked arrays, and its weight as the number of examples.
        """
        client = _sender(message)
        content = RecordDict()
        for name, value in message.content.items():
            if isinstance(value, ArrayRecord) and not name.startswith(STEP):
                state: dict[str, np.ndarray] = start.renamed(_numpy(value))
                wide = {
                    key: array.astype(np.result_type(array, former[key]))
                    for key, array in state.items()
                }
                content[name] = ArrayRecord({key: Array(array) for key, array in wide.items()})
            elif isinstance(value, MetricRecord):
                factor = assessment.factors[client]
                count = assessment.num_examples[client]
                content[name] = MetricRecord(
                    {**value, self._counted_by: count if factor == 1 else count * factor}
                )
            elif isinstance(value, ConfigRecord):
                content[name] = value
        reply = copy.copy(message)
        reply.content = content
        return reply


def _sender(message: Message) -> str:
    return str(message.metadata.src_node_id)


def _numpy(record: ArrayRecord) -> dict[str, np.ndarray]:
    return {key: array.numpy() for key, array in record.items()}


def _steps(content: RecordDict) -> list[ArrayRecord]:
    names = sorted(
        (name for name in content.array_records if name.startswith(STEP)),
        key=lambda name: int(name.removeprefix(STEP)),
    )
    return [content.array_records[name] for name in names]


def _metrics(message: Message) -> MetricRecord:
    """The reply's only MetricRecord, or an empty one."""
    records = list(message.content.metric_records.values())
    return records[0] if len(records) == 1 else MetricRecord()


def _metrics_shape(message: Message) -> tuple[tuple[str, int], ...]:
    """What has to be alike to be averaged: names, and lengths of lists (0 for a number)."""
    return tuple(
        (key, len(value) if isinstance(value, list) else 0)
        for key, value in sorted(_metrics(message).items())
    )


def _like(result: ArrayRecord, start: GlobalState, former: dict[str, np.ndarray]) -> ArrayRecord:
    """A strategy's result in the types of the global arrays.

    Raises:
        AdapterFormatError, NonFiniteError: it has other keys, or is not finite.
    """
    if result.keys() != former.keys():
        raise AdapterFormatError(
            f"got {len(result)} arrays; expected the {len(former)} that the round started from"
        )
    with np.errstate(over="ignore"):  # beyond the type becomes infinite, which is refused
        arrays = {key: result[key].numpy().astype(old.dtype) for key, old in former.items()}
    start.check(arrays)
    return ArrayRecord({key: Array(array) for key, array in arrays.items()})


defended = DefendedStrategy  # its former name
