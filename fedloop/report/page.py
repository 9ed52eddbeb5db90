"""One HTML page about a run.

What it was, what came out, whom it trusted and why, and what the defence cost.

The page is one file without scripts or references to others, and it is the same whenever it is
written from the same records.
Client ids and reasons come from clients: every text is escaped on its way into the page, in tables
    and in figures.
"""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..config import Config
from ..defense.levels import CumulativeLevel
from ..defense.types import RoundRecord
from ..errors import FedloopError, StateError
from ..run.folder import read_run
from .figures import (
    ROLE_COLOURS,
    ROLE_WORDS,
    ROLES,
    Panel,
    clients_over_rounds,
    lines_over_rounds,
    metrics_over_rounds,
    seconds_by_round,
)
from .html import cut, figure, folded, number, page, paragraph, percent, table, tiles
from .metrics import METRIC_WORDS, sample_size, share_with_interval

PHASES = ("train", "evidence", "assess", "aggregate", "evaluate")
_PANELS = 3  # metrics with axes of their own; more would leave none of them wide enough to read
_NUMBERS = ("factors", "weights", "num_examples", "losses", "seconds", "bytes", "metrics")

Pair = tuple[str, str]


@dataclass(frozen=True)
class _Run:
    """What a page is written of. `roles`.

    Client -> one of ROLES, in that order, also for clients that only the records know.
    """

    config: Config
    about: Mapping[str, Mapping[str, Any]]
    roles: Mapping[str, str]
    records: Sequence[RoundRecord]

    @property
    def skipped(self) -> list[int]:
        return [record.round for record in self.records if record.skipped]

    def series(
        self, values: Callable[[RoundRecord], Mapping[str, float]]
    ) -> dict[str, list[float]]:
        """Client -> one value a round, NaN where it has none."""
        rounds = [values(record) for record in self.records]
        return {client: [one.get(client, math.nan) for one in rounds] for client in self.roles}


def ledger(records: Iterable[RoundRecord]) -> dict[str, Any]:
    """What a run cost in all.

    {"rounds", "seconds", "bytes", "evidence_to_train", "assess_aggregate_to_train"}.

    `seconds` has phase -> total wall-clock seconds, PHASES first and 0.0 where nothing was
    recorded; `bytes` has kind -> total bytes sent, "update" and "evidence" first. The ratios
    compare seconds with those of training; None without training time.
    """
    records = list(records)
    phases = [
        *PHASES,
        *sorted({phase for record in records for phase in record.seconds} - set(PHASES)),
    ]
    kinds = [
        "update",
        "evidence",
        *sorted({kind for record in records for kind in record.bytes} - {"update", "evidence"}),
    ]
    seconds = {
        phase: math.fsum(record.seconds.get(phase, 0.0) for record in records) for phase in phases
    }
    train = seconds["train"]
    return {
        "rounds": len(records),
        "seconds": seconds,
        "bytes": {kind: sum(record.bytes.get(kind, 0) for record in records) for kind in kinds},
        "evidence_to_train": seconds["evidence"] / train if train else None,
        "assess_aggregate_to_train": (
            (seconds["assess"] + seconds["aggregate"]) / train if train else None
        ),
    }


def write_report(run: Path, out: Path | None = None) -> Path:
    """Write the page about a run, finished or not, and return its path.

    `out`, or report.html in the run's folder.

    Raises:
        StateError: it is not the folder of a run, or a file of it is damaged.
        MissingExtra: matplotlib is not installed.
        FedloopError: the page cannot be written there.
    """
    try:
        config, about, records = read_run(run)
    except (OSError, UnicodeDecodeError) as error:
        raise StateError(
            f"cannot read the records of {run}: {error}. Expected the folder of a run that `fedloop"
            " run` wrote."
        ) from error
    page = _page(_checked(run, config, about, records))
    path = run / "report.html" if out is None else out
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(page, encoding="utf-8", newline="\n")
    except OSError as error:
        raise FedloopError(
            f"cannot write the report to {path}: {error}. Give a path that can be written with"
            " --out."
        ) from error
    return path


def _checked(run: Path, config: Config, about: Any, records: Sequence[RoundRecord]) -> _Run:
    """The run, once everything that the page reads of it has the type it should have."""
    if not isinstance(about, dict) or not all(
        isinstance(one, dict) and isinstance(one.get("role"), str) for one in about.values()
    ):
        raise StateError(
            f"{run / 'clients.json'}: expected an object of clients, each with its role; got"
            " something else. Restore the file."
        )
    rounds = [record.round for record in records]
    if rounds != list(range(1, len(rounds) + 1)):
        raise StateError(
            f"{run / 'records.jsonl'}: got records of rounds {rounds}; expected 1 to {len(rounds)},"
            " one each. Restore the file."
        )
    for record in records:
        groups = {
            name: getattr(record, name) for name in (*_NUMBERS, "scores", "reasons", "status")
        } | {"note": {"": record.note}}
        for name, values in groups.items():
            if not isinstance(values, dict) or not all(
                _fits(name, value) for value in values.values()
            ):
                kind = "finite numbers" if name in (*_NUMBERS, "scores") else "texts"
                raise StateError(
                    f"{run / 'records.jsonl'}, round {record.round}: {name} is not an object of"
                    f" {kind}. Restore the file."
                )
    known = sorted(
        {*about, *(client for record in records for client in (*record.factors, *record.reasons))}
    )
    roles = {client: about.get(client, {}).get("role") for client in known}
    ordered = [
        (client, role)
        for role in ROLES
        for client, own in roles.items()
        if (own if own in ROLES else "unknown") == role
    ]
    return _Run(config, about, dict(ordered), records)


def _fits(name: str, value: Any) -> bool:
    if name in ("reasons", "status", "note"):
        return isinstance(value, str)
    if name == "scores":
        return (
            isinstance(value, tuple)
            and len(value) > 0
            and all(_fits("score", one) for one in value)
        )
    return (
        isinstance(value, int | float) and -1e300 < value < 1e300
    )  # NaN and infinity fail, and so does an integer beyond any float


def _page(run: _Run) -> str:
    done, wanted = len(run.records), run.config.rounds
    top = paragraph(_in_a_sentence(run), "lead")
    if done < wanted:
        top += paragraph(
            f"This run is unfinished: {done} of {wanted} rounds are recorded, and all that follows"
            " is about these.",
            "banner",
        )
    measured = [
        ("Result", _metrics),
        ("Trust", lambda run: _factors(run) + _scores(run) + _weights(run)),
        ("Clients", _clients),
        ("Skipped rounds and refused updates", _refusals),
        ("Training", _losses),
        ("Overhead", _overhead),
    ]
    sections = [(title, content(run)) for title, content in measured if run.records]
    sections.insert(1, ("Setup", table("hl", (), _setup(run))))
    full = json.dumps(run.config.model_dump(mode="json"), indent=2)
    return page(
        run.config.name,
        top + (_tiles(run) if run.records else ""),
        [*sections, ("Configuration", folded("Every field, defaults included", full))],
    )


def _in_a_sentence(run: _Run) -> str:
    of, defense = run.config, run.config.defense
    counts = Counter(run.roles.values())
    who = ", ".join(f"{counts[role]} {ROLE_WORDS[role]}" for role in ROLES if counts[role])
    guard = (
        "without a defence" if defense.level == "none" else f"weighed by the {defense.level} level"
    )
    return (
        f"Federated LoRA fine-tuning of {of.model.name or of.model.base} by {len(run.roles)}"
        f" clients ({who}), {guard}."
    )


def _setup(run: _Run) -> list[Pair]:
    """The configuration in words."""
    of, clients, training, aggregation, defense = (
        run.config,
        run.config.clients,
        run.config.training,
        run.config.aggregation,
        run.config.defense,
    )
    base = (
        of.model.base
        if of.model.name in (None, of.model.base)
        else f"{of.model.name}, loaded from {of.model.base}"
    )
    steady = training.schedule == "constant"
    rate = f"learning rate {training.lr:g}" + ("" if steady else f" falling to {training.min_lr:g}")
    bad = (
        f"{clients.malicious}, {percent(clients.poison_share)} of their examples from"
        f" {clients.malicious_source}"
        if clients.malicious
        else "none"
    )
    hard = (
        f"{clients.hard_negatives}, from {clients.hard_negative_source}"
        if clients.hard_negatives
        else "none"
    )
    attack = (
        f"{clients.update_attack}{_options(clients.update_attack_options)}"
        if clients.update_attack
        else "none beside the data"
    )
    given = (
        {}
        if defense.threshold is None
        else {"threshold": "the probe's own" if defense.threshold == "probe" else defense.threshold}
    )
    level = (
        "none: every well-formed update counts by its examples"
        if defense.level == "none"
        else defense.level + _options({**defense.options, **given})
    )
    capped = (
        ""
        if defense.max_count_ratio is None
        else f"; example counts capped at {defense.max_count_ratio:g} times the median"
    )
    rows = [
        (
            "Base model",
            f"{base}; {of.model.dtype}"
            + ("" if of.model.quantization == "none" else f", {of.model.quantization}"),
        ),
        (
            "Adapter",
            (
                f"rank {of.lora.r}, alpha {of.lora.alpha:g}, on"
                f" {', '.join(of.lora.target_modules or ['the default modules'])}"
            ),
        ),
        (
            "Rounds",
            (
                f"{of.rounds}, with {clients.sampled or clients.count} of {clients.count} clients"
                f" each; seed {of.seed}"
            ),
        ),
        ("Local training", f"{training.steps} steps of {training.batch_size} examples, {rate}"),
        ("Benign data", f"{', '.join(clients.benign)}; partition {clients.partition}"),
        ("Malicious clients", bad),
        ("Hard negatives", hard),
        ("Attack on updates", attack if clients.malicious else "none"),
        (
            "Aggregation",
            (
                f"rule {aggregation.rule}{_options(aggregation.options)}, server"
                f" {aggregation.server}, LoRA {aggregation.lora}"
            ),
        ),
        ("Level", level),
        ("Probe", defense.probe or "none"),
        (
            "Safety gate",
            f"rounds with a mean factor below {defense.min_mean_factor:g} are skipped{capped}",
        ),
    ]
    return [row for row in rows if defense.level != "none" or row[0] != "Probe"]


def _tiles(run: _Run) -> str:
    taken = [factor for record in run.records for factor in record.factors.values()]
    refused = sum(_refused(record, client) for record in run.records for client in record.reasons)
    pairs = [
        (f"{len(run.records)} of {run.config.rounds}", "rounds recorded"),
        (str(len(run.skipped)), "rounds skipped"),
        (
            f"{taken.count(0.0)} of {len(taken)}",
            f"updates rejected (factor 0); {refused} of them refused with a reason",
        ),
    ]
    if "malicious" in run.roles.values():
        held = _mean(_malicious(run, lambda record: record.weights))
        pairs.append((percent(held), "of the aggregate from malicious clients, mean over rounds"))
    measured = _measured(run)
    share = share_with_interval(measured[-1][1], "refusal_strict") if measured else None
    if share:
        pairs.append(
            (
                percent(share[0]),
                (
                    f"{METRIC_WORDS['refusal_strict']}; 95 % interval {percent(share[1])} to"
                    f" {percent(share[2])}"
                ),
            )
        )
    return tiles(pairs)


def _measured(run: _Run) -> list[tuple[int, Mapping[str, float]]]:
    """Round -> metrics, where they were measured."""
    return [(record.round, record.metrics) for record in run.records if record.metrics]


def _metrics(run: _Run) -> str:
    measured = _measured(run)
    if not measured:
        return paragraph("Nothing was measured of the global model in these rounds.", "plain")
    last, metrics = measured[-1]
    rows = []
    for name in metrics:
        if not name.startswith("n_"):
            share, n = share_with_interval(metrics, name), sample_size(metrics, name)
            interval = f"{percent(share[1])} to {percent(share[2])}" if share else ""
            rows.append(
                (
                    METRIC_WORDS.get(name, name),
                    percent(share[0]) if share else f"{metrics[name]:.4g}",
                    interval,
                    str(n or ""),
                )
            )
    note = (
        f"The global model after round {last}. Intervals are Wilson's for the prompts sampled; they"
        " do not cover what another seed of the run would change. Rule counts an answer that holds"
        " any of 35 published strings, strict one that declines in its first two sentences."
    )
    return (
        table("lrrr", ("metric", "value", "95 % interval", "n"), rows)
        + paragraph(note)
        + (_over_rounds(measured) if len(measured) > 1 else "")
    )


def _over_rounds(measured: list[tuple[int, Mapping[str, float]]]) -> str:
    """The metrics' figure."""
    names = [
        name
        for name in dict.fromkeys(name for _, metrics in measured for name in metrics)
        if not name.startswith("n_")
    ]
    found = {
        name: [share_with_interval(metrics, name) for _, metrics in measured] for name in names
    }
    whole = [
        name
        for name in names
        if all(
            share or name not in metrics
            for share, (_, metrics) in zip(found[name], measured, strict=True)
        )
    ]
    shares = {
        METRIC_WORDS.get(name, name): [share or (math.nan,) * 3 for share in found[name]]
        for name in whole
    }
    others = {
        METRIC_WORDS.get(name, name): [metrics.get(name, math.nan) for _, metrics in measured]
        for name in names
        if name not in whole
    }
    if not names:
        return ""
    first, last = measured[0], measured[-1]
    title = f"The global model was measured {len(measured)} times"
    if "refusal_strict" in first[1] and "refusal_strict" in last[1]:
        ends = [
            f"{percent(metrics['refusal_strict'])} after round {at}"
            for at, metrics in (first, last)
        ]
        title = f"The share of harmful prompts refused (strict) is {ends[0]} and {ends[1]}"
    note = "Bars are 95 % Wilson intervals; points of one round stand beside each other."
    if len(others) > _PANELS:
        note += f" Not drawn: {', '.join([*others][_PANELS:])}."
    drawn = {name: others[name] for name in [*others][:_PANELS]}
    return figure(
        title, note, metrics_over_rounds(shares, drawn, [at for at, _ in measured], title)
    )


def _factors(run: _Run) -> str:
    series = run.series(lambda record: record.factors)
    title = f"The security factor ends at {_by_role(run, series)}"
    note = (
        "1 counts in full, 0 is left out. A client that was not sampled in a round leaves a gap."
        + _shaded(run)
    )
    return figure(
        title,
        note,
        clients_over_rounds(
            [Panel("", "security factor", series, (-0.03, 1.03))], run.roles, run.skipped, title
        ),
    )


def _scores(run: _Run) -> str:
    if not any(record.scores for record in run.records):
        return paragraph("No client was scored in these rounds, so there are no scores to draw.")
    most = run.series(
        lambda record: {client: max(scores) for client, scores in record.scores.items()}
    )
    last = run.series(
        lambda record: {client: scores[-1] for client, scores in record.scores.items()}
    )
    line, limits = _cut(run), (-0.03, 1.03)
    panels = [Panel("", "P(malicious)", last, limits, line)]
    if any(len(scores) > 1 for record in run.records for scores in record.scores.values()):
        panels = [
            Panel("highest of a round", "P(malicious)", most, limits, line),
            Panel("last of a round", "P(malicious)", last, limits, line),
        ]
    title = f"The probe's last P(malicious) is {_by_role(run, last)}"
    note = "What the level read of each client in each round." + (
        " The dotted line is the level's cut." if line else ""
    )
    return figure(title, note, clients_over_rounds(panels, run.roles, run.skipped, title))


def _cut(run: _Run) -> tuple[list[float], str] | None:
    """What the scores are compared with, a value a round, where the configuration alone says it."""
    of = run.config
    if of.defense.level == "none" or of.defense.threshold == "probe":
        return None
    level = of.defense.make_level(math.nan)
    if not isinstance(level, CumulativeLevel):
        return [level.threshold] * len(run.records), f"cut at {level.threshold:g}"
    if of.clients.sampled not in (None, of.clients.count):
        return None  # it depends on how often each client took part
    return [level.cut(record.round) for record in run.records], "cut"


def _weights(run: _Run) -> str:
    if "malicious" not in run.roles.values():
        return paragraph("No client of this run is malicious, so none of the aggregate is theirs.")
    held, due = (
        _malicious(run, lambda record: record.weights),
        _malicious(run, lambda record: record.num_examples),
    )
    if not any(map(math.isfinite, held)):
        return paragraph(
            "Nothing was aggregated in these rounds, so malicious clients have no share of it."
        )
    title = f"Malicious clients hold {percent(_mean(held))} of the aggregate on average"
    if any(map(math.isfinite, due)):
        title += f"; by example counts alone it would be {percent(_mean(due))}"
    note = (
        "Shares of the aggregation weights. The dashed line weighs the well-formed updates by their"
        " examples, as without a defence." + _shaded(run)
    )
    colours = {"with the defence": ROLE_COLOURS["malicious"][0], "by examples alone": "#8c8c8c"}
    series = dict(zip(colours, (held, due), strict=True))
    return figure(
        title,
        note,
        lines_over_rounds(series, colours, "malicious clients' share", run.skipped, title),
    )


def _malicious(run: _Run, values: Callable[[RoundRecord], Mapping[str, float]]) -> list[float]:
    """The malicious clients' share of the sum of these values, one a round, NaN for a round that
    was not aggregated.
    """
    shares = []
    for record in run.records:
        one = values(record)
        total = math.fsum(one.values()) if record.weights else 0.0
        theirs = math.fsum(
            value for client, value in one.items() if run.roles.get(client) == "malicious"
        )
        shares.append(theirs / total if total > 0 else math.nan)
    return shares


def _clients(run: _Run) -> str:
    factors, weights = (
        run.series(lambda record: record.factors),
        run.series(lambda record: record.weights),
    )
    scores = run.series(
        lambda record: {client: values[-1] for client, values in record.scores.items()}
    )
    rows = []
    for client, role in run.roles.items():
        about = run.about.get(client, {})
        share: Any = about.get("share")
        source = str(about.get("source", "")) + (
            f", {percent(share)}" if role == "malicious" and _fits("share", share) else ""
        )
        refused = sum(_refused(record, client) for record in run.records)
        taken = sum(map(math.isfinite, factors[client]))
        numbers = [
            number(_last(factors[client])),
            number(_mean(weights[client])),
            number(_last(scores[client])),
        ]
        verdict = run.records[-1].status.get(client, "")
        rows.append(
            (
                cut(client, 48),
                ROLE_WORDS[role],
                source,
                str(taken),
                *numbers,
                str(refused or ""),
                *([verdict] if _verdicts(run) else []),
            )
        )
    head = (
        "client",
        "role",
        "trained on",
        "rounds",
        "last factor",
        "mean weight",
        "last score",
        "refused",
        *(["verdict"] if _verdicts(run) else []),
    )
    return table(
        "lnlrrrrr" + "n" * _verdicts(run),
        head,
        rows,
        [ROLE_COLOURS[role][0] for role in run.roles.values()],
    )


def _verdicts(run: _Run) -> bool:
    return any(record.status for record in run.records)


def _refused(record: RoundRecord, client: str) -> bool:
    return client in record.reasons and not record.factors.get(client)


def _refusals(run: _Run) -> str:
    rows = [
        (
            str(record.round),
            cut(client, 48),
            ROLE_WORDS[run.roles[client]],
            number(record.factors.get(client, 0.0)),
            reason,
        )
        for record in run.records
        for client, reason in sorted(record.reasons.items())
    ]
    kept = [
        (
            str(record.round),
            record.note
            or f"skipped by the safety gate: mean factor {number(_mean(record.factors.values()))}",
        )
        for record in run.records
        if record.skipped or record.note
    ]
    above = table("nl", ("round", "what happened"), kept) if kept else ""
    if not rows:
        return above + paragraph(
            "Every update of these rounds was well-formed, and every client that had to be scored"
            " was.",
            "plain",
        )
    return above + table("llnrl", ("round", "client", "role", "factor", "reason"), rows)


def _losses(run: _Run) -> str:
    series = run.series(lambda record: record.losses)
    means = [_mean(record.losses.values()) for record in run.records if record.losses]
    if not means:
        return paragraph("No training loss is recorded.")
    title = f"The clients' mean training loss is {means[0]:.3g} in the first round" + (
        f" and {means[-1]:.3g} in the last" if len(means) > 1 else ""
    )
    note = (
        "Mean over a client's local steps of a round, in nats per answer token. Clients with other"
        " data have other losses." + _shaded(run)
    )
    return figure(
        title,
        note,
        clients_over_rounds(
            [Panel("", "training loss, nats per token", series)], run.roles, run.skipped, title
        ),
    )


def _overhead(run: _Run) -> str:
    spent, n = ledger(run.records), len(run.records)
    seconds, train = spent["seconds"], spent["seconds"]["train"]
    if not any(seconds.values()):
        return paragraph("No seconds are recorded.")
    rows = [
        (phase, f"{one:,.3f}", f"{one / n:,.3f}", percent(one / train) if train else "")
        for phase, one in seconds.items()
    ]
    sent = [(kind, f"{one:,}", f"{one / n:,.0f}") for kind, one in spent["bytes"].items()]
    title = "Seconds by phase"
    if train:
        evidence, rest = (
            percent(spent[name]) for name in ("evidence_to_train", "assess_aggregate_to_train")
        )
        title = (
            f"Evidence takes {evidence} of the time that training takes, assessment and aggregation"
            f" {rest}"
        )
    note = (
        "Wall-clock time of one process that plays all clients in turn. Aggregation is needed"
        " without a defence, too."
    )
    drawn = seconds_by_round(
        [record.seconds for record in run.records],
        list(seconds),
        ("evidence", "assess", "aggregate"),
        title,
    )
    times = table("lrrr", ("phase", "seconds", "seconds a round", "of training time"), rows)
    return (
        figure(title, note, drawn)
        + times
        + table("lrr", ("sent by clients", "bytes", "bytes a round"), sent)
    )


def _by_role(run: _Run, series: Mapping[str, Sequence[float]]) -> str:
    """Each role's mean over its clients of their last values, in words."""
    means = {
        role: _mean(_last(series[client]) for client, own in run.roles.items() if own == role)
        for role in ROLES
    }
    words = [
        f"{mean:.2f} for {ROLE_WORDS[role]}" for role, mean in means.items() if math.isfinite(mean)
    ]
    return f"{', '.join(words)} clients (means)"


def _shaded(run: _Run) -> str:
    return " Shaded rounds were skipped." if run.skipped else ""


def _last(values: Iterable[float]) -> float:
    return next((value for value in reversed([*values]) if math.isfinite(value)), math.nan)


def _mean(values: Iterable[float]) -> float:
    known = [value for value in values if math.isfinite(value)]
    return math.fsum(known) / len(known) if known else math.nan


def _options(options: Mapping[str, Any]) -> str:
    return (
        f" ({', '.join(f'{name} {value}' for name, value in options.items())})" if options else ""
    )
