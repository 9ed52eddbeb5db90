"""What server and clients send each other over Flower.

One flat array each for adapter and evidence, with layouts as JSON.

server -> client   arrays: lora, and where the round needs them initial, correction, residual
                   config: protocol, round, nonce, agreement, task
client -> server   arrays: update, and evidence if it was asked for
                   config: protocol, round, nonce, layout, scale, step-layout, steps, evidence-scale
                   metrics: num-examples, loss, train-seconds, evidence-seconds

The nonce is a new secret for every message. Flower lets a node fetch its own messages only (by its
key, where keys are used), but does not compare the sender that a reply names with the node that
pushed it: only who could read the message knows the nonce.

Nothing of a reply is computed with before its names, types, lengths and layouts are known to be the
expected ones.
"""

from __future__ import annotations

import hmac
import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from loraprobe.adapters.adapter import Adapter
from loraprobe.adapters.layout import Layout, flattened, pack, unpack
from loraprobe.adapters.pair import LazyTensor, LoRAPair

from ..client.client import Trained
from ..client.training import LocalTraining
from ..defense.types import ClientUpdate
from ..errors import MessageError
from ..run.server_state import GradientChange
from ..run.spool import not_kept
from .agreement import Agreement
from .arrays import decode, encode, itemsize

if TYPE_CHECKING:
    from flwr.app import Array, ArrayRecord, ConfigRecord, RecordDict

PROTOCOL = 1
ARRAYS, CONFIG, METRICS = "arrays", "config", "metrics"


@dataclass(frozen=True)
class Task:
    """What one client is to do in one round.

    Attributes:
        lora: the round's global LoRA, kind "weights".
        initial: the federation's initial LoRA, where shadows start; None if no shadow is wanted.
        wanted: whether evidence is.
        residual: module -> (d_out, d_in), what exact aggregation has added to the base so far.
    """

    round: int
    nonce: str
    training: LocalTraining
    seed: int
    wanted: bool
    lora: Adapter
    initial: Adapter | None = None
    change: GradientChange = field(default_factory=GradientChange)
    residual: Mapping[str, Tensor] = field(default_factory=dict)


class Encoder:
    """Arrays of a round as Flower sends them: those that all clients get are made once."""

    def __init__(self, wire: str) -> None:
        self._wire = wire
        self._encoded: dict[str, tuple[Array, float]] = {}

    def arrays(self, task: Task) -> dict[str, tuple[Array, float]]:
        """name -> array and scale, of everything that a task sends."""
        arrays = {"lora": self._once("lora", lambda: pack(task.lora)[0], self._wire)}
        initial = task.initial
        if initial is not None:
            arrays["initial"] = self._once("initial", lambda: pack(initial)[0], self._wire)
        if task.change.correction is not None:  # a client's own
            arrays["correction"] = encode(task.change.correction.numpy(), self._wire)
        if task.residual:  # always whole: it is added to the base, and rounding would add up
            parts = [task.residual[name].reshape(-1) for name in sorted(task.residual)]
            arrays["residual"] = self._once("residual", lambda: torch.cat(parts), "float32")
        return arrays

    def _once(self, name: str, vector: Callable[[], Tensor], wire: str) -> tuple[Array, float]:
        if name not in self._encoded:
            self._encoded[name] = encode(vector().numpy(), wire)
        return self._encoded[name]


def pack_task(task: Task, agreement: Agreement, encoder: Encoder | None = None) -> RecordDict:
    """The server's message to one client.

    Args:
        encoder: of the round, if it has several messages.
    """
    from flwr.app import ArrayRecord, ConfigRecord, RecordDict

    encoded = (encoder or Encoder(agreement.wire)).arrays(task)
    arrays = {name: array for name, (array, _) in encoded.items()}
    scales = {name: scale for name, (_, scale) in encoded.items()}
    plain = {
        "training": asdict(task.training),
        "seed": task.seed,
        "wanted": task.wanted,
        "proximal": task.change.proximal,
        "scales": scales,
        "residual": {name: list(tensor.shape) for name, tensor in task.residual.items()},
    }
    config = ConfigRecord({"protocol": PROTOCOL, "round": task.round, "nonce": task.nonce})
    config["agreement"], config["task"] = agreement.to_json(), json.dumps(plain)
    return RecordDict({ARRAYS: ArrayRecord(arrays), CONFIG: config})


def unpack_task(content: RecordDict) -> tuple[Task, Agreement]:
    """The inverse of `pack_task`, at the client.

    Raises:
        MessageError: the message is not one of this version of fedloop.
    """
    config = _record(content.config_records, CONFIG)
    _check_protocol(config)
    agreement = Agreement.from_json(str(config.get("agreement")))
    arrays = _record(content.array_records, ARRAYS)
    try:
        plain = json.loads(str(config.get("task")))
        training = LocalTraining(**plain["training"])
        scales = plain["scales"]
        shapes = plain["residual"]

        def vector(name: str, size: int, wire: str) -> Tensor:
            return torch.from_numpy(decode(arrays[name], name, size, wire, scales[name]))

        vectors = {
            name: vector(name, agreement.layout.size, agreement.wire)
            for name in ("lora", "initial", "correction")
            if name in arrays
        }
        residual = (
            _split(
                vector("residual", sum(math.prod(shape) for shape in shapes.values()), "float32"),
                shapes,
            )
            if shapes
            else {}
        )
        weights = {
            name: unpack(vectors[name], agreement.weights, base_model=agreement.base_model)
            for name in ("lora", "initial")
            if name in vectors
        }
        change = GradientChange(plain["proximal"], vectors.get("correction"))
        return (
            Task(
                int(config["round"]),
                str(config["nonce"]),
                training,
                int(plain["seed"]),
                bool(plain["wanted"]),
                weights["lora"],
                weights.get("initial"),
                change,
                residual,
            ),
            agreement,
        )
    except (KeyError, TypeError, ValueError) as error:
        raise MessageError(
            f"got no task that this version of fedloop can read: {error!r}. Install the server's"
            " version."
        ) from error


def pack_reply(trained: Trained, task: Task, agreement: Agreement) -> RecordDict:
    """A client's answer to a task.

    Raises:
        NonFiniteError: training diverged.
    """
    from flwr.app import ArrayRecord, ConfigRecord, MetricRecord, RecordDict

    steps = trained.update.steps
    arrays: dict[str, Array] = {}
    config = ConfigRecord(
        {
            "protocol": PROTOCOL,
            "round": task.round,
            "nonce": task.nonce,
            "layout": _text(agreement.layout),
            "steps": len(steps),
        }
    )
    arrays["update"], config["scale"] = encode(
        pack(trained.delta, agreement.layout)[0].numpy(), agreement.wire
    )
    if steps:
        flat = np.concatenate([flattened(step, agreement.step.slots) for step in steps])
        arrays["evidence"], config["evidence-scale"] = encode(flat, agreement.wire)
        config["step-layout"] = _text(agreement.step)
    metrics = MetricRecord({"num-examples": trained.update.num_examples, "loss": trained.loss})
    metrics["train-seconds"], metrics["evidence-seconds"] = (
        trained.seconds["train"],
        trained.seconds["evidence"],
    )
    return RecordDict({ARRAYS: ArrayRecord(arrays), CONFIG: config, METRICS: metrics})


def answers(content: RecordDict, nonce: str) -> bool:
    """Whether a reply comes from somebody who could read the message with this nonce."""
    record = content.config_records.get(CONFIG)
    returned = None if record is None else record.get("nonce")
    return isinstance(returned, str) and hmac.compare_digest(returned.encode(), nonce.encode())


def unpack_reply(content: RecordDict, client_id: str, task: Task, agreement: Agreement) -> Trained:
    """What a client sent, as the in-process engine would have it.

    Args:
        client_id: as the server knows the sender; nothing of it is taken from the message.
        task: what it was asked to do.

    Raises:
        MessageError: it is not of the form that was agreed on.
    """
    arrays = _record(content.array_records, ARRAYS)
    config = _record(content.config_records, CONFIG)
    metrics = _record(content.metric_records, METRICS)
    if len(content) != 3:
        raise MessageError(
            f"got the records {sorted(map(str, content))[:8]}; expected {ARRAYS}, {CONFIG} and"
            f" {METRICS}"
        )
    _check_protocol(config)
    if config.get("round") != task.round:
        raise MessageError(
            f"got a reply to round {str(config.get('round'))[:40]}; expected round {task.round}"
        )
    expected = {"update", "evidence"} if task.wanted and agreement.evidence else {"update"}
    if not {"update"} <= arrays.keys() <= expected:
        raise MessageError(
            f"got the arrays {sorted(arrays)[:8]}; expected"
            f" {' and '.join(sorted(expected, reverse=True))}"
        )
    _check_layout(config.get("layout"), agreement.layout, "layout")
    vector = decode(
        arrays["update"], "update", agreement.layout.size, agreement.wire, config.get("scale")
    )
    delta = unpack(torch.from_numpy(vector), agreement.layout, base_model=agreement.base_model)
    steps = _steps(arrays, config, task, agreement)
    # Defense checks the count.
    update = ClientUpdate(client_id, metrics.get("num-examples"), delta, steps)
    seconds = {name: _seconds(metrics.get(f"{name}-seconds")) for name in ("train", "evidence")}
    loss = metrics.get("loss")
    size = len(steps) * agreement.step.size * itemsize(agreement.wire)
    return Trained(update, loss if isinstance(loss, float) else math.nan, seconds, size)


def _steps(
    arrays: ArrayRecord, config: ConfigRecord, task: Task, agreement: Agreement
) -> tuple[Adapter, ...]:
    """The evidence as adapters that hold nothing but what the probe reads.

    None if none was sent, which the defence refuses.
    """
    if "evidence" not in arrays:
        return ()
    count = agreement.steps(task.training)
    layout = agreement.step
    if config.get("steps") != count:
        raise MessageError(
            f"got {str(config.get('steps'))[:40]} steps of evidence; expected {count}"
        )
    _check_layout(config.get("step-layout"), layout, "step-layout")
    rows = decode(
        arrays["evidence"],
        "evidence",
        count * layout.size,
        agreement.wire,
        config.get("evidence-scale"),
    ).reshape(count, layout.size)
    return tuple(_probed(torch.from_numpy(row), agreement) for row in rows)


def _probed(row: Tensor, agreement: Agreement) -> Adapter:
    """One step, of which only the sent factors can be read."""
    slots = agreement.step.slots
    sent = {
        (slot.module, slot.factor): part.view(slot.shape)
        for slot, part in zip(slots, torch.split(row, [s.size for s in slots]), strict=True)
    }
    shapes = {(slot.module, slot.factor): slot.shape for slot in agreement.layout.slots}
    pairs = {}
    for module in dict.fromkeys(slot.module for slot in slots):
        A, B = (
            sent.get((module, factor), LazyTensor(shapes[module, factor], not_kept))
            for factor in ("A", "B")
        )
        pairs[module] = LoRAPair(A, B, agreement.layout.scalings[module])
    return Adapter(pairs, kind="factor_delta", base_model=agreement.base_model)


def _record(records: Mapping[str, Any], name: str) -> Any:
    if name not in records:
        raise MessageError(f"got no record {name!r}; expected one in every message")
    return records[name]


def _check_protocol(config: ConfigRecord) -> None:
    if config.get("protocol") != PROTOCOL:
        raise MessageError(
            f"got protocol {str(config.get('protocol'))[:40]}; expected {PROTOCOL}: install the"
            " same version of fedloop everywhere"
        )


def _check_layout(text: Any, layout: Layout, what: str) -> None:
    if text == _text(layout):
        return
    raise MessageError(
        f"{what}: {_difference(text, layout)}. Use the same base model, rank and target modules"
        " everywhere."
    )


def _difference(text: Any, layout: Layout) -> str:
    """What is different, as far as that can be said of a stranger's text."""
    if not isinstance(text, str) or len(text) > 4 * len(_text(layout)) + 1000:
        return f"got {type(text).__name__}; expected the layout as JSON"
    try:
        plain = json.loads(text)
        got = {(str(module), str(factor)): tuple(shape) for module, factor, shape in plain["slots"]}
        kind = str(plain["kind"])[:40]
    except (ValueError, TypeError, KeyError, RecursionError):
        return "got JSON that is not a layout"
    expected = {(slot.module, slot.factor): slot.shape for slot in layout.slots}
    if kind != layout.kind:
        return f"got kind {kind!r}; expected {layout.kind!r}"
    for (module, factor), shape in expected.items():
        if got.get((module, factor)) != shape:
            return (
                f"{module}, lora_{factor}: got shape {str(got.get((module, factor)))[:60]};"
                f" expected {shape}"
            )
    extra = sorted(str(key) for key in got.keys() - expected.keys())
    return (
        f"got {len(extra)} matrices too many, first {extra[0][:100]}"
        if extra
        else "the matrices are in another order or scaled otherwise"
    )


def _text(layout: Layout) -> str:
    return json.dumps(layout.to_dict(), sort_keys=True)


def _split(vector: Tensor, shapes: Mapping[str, Sequence[int]]) -> dict[str, Tensor]:
    names = sorted(shapes)
    parts = torch.split(vector, [math.prod(shapes[name]) for name in names])
    return {name: part.view(*shapes[name]) for name, part in zip(names, parts, strict=True)}


def _seconds(claim: Any) -> float:
    """A client's word on its own time; 0 if it is no duration."""
    return float(claim) if isinstance(claim, float) and 0 <= claim < 1e9 else 0.0
