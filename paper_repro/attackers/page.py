"""The page about attackers who know the defence, and the numbers of its figures."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from statistics import mean, stdev
from typing import Any

from ..common.format import distinct, markdown, page_with, where
from .moves import MOVES
from .run import (
    AGAINST_LIES,
    AGAINST_SCHEDULES,
    LEFT_OUT,
    LIVE,
    NO_ATTACK,
    RESULTS,
    SHORT,
    key,
    read_results,
)

PAGE = Path(__file__).with_name("README.md")
SUMMARY = RESULTS.with_name("attackers.json")
Line = dict[str, Any]
UPDATE_GUARDS = ("client", "cumulative", "cumulative, round and length too")
PRIVATE = ("cumulative, private probe", "cumulative, private probe of A and B")
POISON = "poison share"
WAITING = (
    "from round k",
    "from round k, made up for",
    "every k-th round",
    "every k-th round, made up for",
    "between verdict and audit",
)


def summary_text() -> str:
    """results/attackers.json, which the figure is drawn from."""
    return json.dumps(summary(read_results()), indent=1) + "\n"


def rendered() -> str:
    """The page with every table between its markers made anew."""
    rows = summary(read_results())
    tables = {
        "updates": update_table(rows),
        "schedules": schedule_table(rows),
        "evidence": evidence_table(rows),
        "honest": honest_table(rows),
        "worst": worst_table(rows),
        "live": live_table(live_rows(rows_of_live())),
    }
    return page_with(PAGE, tables)


def summary(lines: Iterable[Line]) -> list[Line]:
    """One row an attack, strength and defence, over all recordings.

    What it cost and what was seen of it.

    damage: points of refusal lost, against the same recording with the attackers left out of every
        round.
    rejected: 1 - the factor of attackers in rounds in which they sent poison; flagged: share of
    their poisoned updates that the published probe flags by itself at its own cut. Intervals:
    Clopper-Pearson on clients, the worst case in which a client's rounds agree.
    """
    lines = list(lines)
    calm = {
        _recording(line): line["guards"][LEFT_OUT] for line in lines if line["attack"] == NO_ATTACK
    }
    cells: dict[tuple[str, float], list[Line]] = {}
    for line in lines:
        if _recording(line) in calm:
            cells.setdefault((line["attack"], line["strength"]), []).append(line)
    return [
        _row(attack, strength, guard, own, calm)
        for (attack, strength), own in cells.items()
        for guard in own[0]["guards"]
    ]


def _recording(line: Line) -> tuple[str, int, int]:
    return line["source"], line["seed"], line["rounds"]


def _row(
    attack: str,
    strength: float,
    guard: str,
    lines: Sequence[Line],
    calm: dict[tuple[str, int, int], Line],
) -> Line:
    own = [(line["guards"][guard], calm[_recording(line)]) for line in lines]
    damage = [100 * (base["refusal"] - facts["refusal"]) for facts, base in own]
    row: Line = {
        "attack": attack,
        "strength": strength,
        "defence": guard,
        "recordings": len(own),
        "goals": sum(facts["n"] for facts, _ in own),
        "damage": round(mean(damage), 2),
        "damage_sd": round(stdev(damage), 2) if len(damage) > 1 else 0.0,
        "refusal": round(100 * mean(facts["refusal"] for facts, _ in own), 2),
        "skipped": sum(facts["skipped"] for facts, _ in own),
    }
    if all("loss" in facts for facts, _ in own):  # measured where nothing defends
        row["loss"] = round(mean(facts["loss"] - base["loss"] for facts, base in own), 4)
    for role in ("malicious", "honest"):
        factors = [value for facts, _ in own for value in facts["factor"][role]]
        flags = [value for facts, _ in own for value in facts["flagged_alone"][role]]
        row[role] = {
            "clients": len(factors),
            "rejected": round(1 - mean(factors), 4),
            "rejected_ci": interval([1 - value for value in factors]),
            "worst": round(1 - min(factors), 4),
            "flagged": round(mean(flags), 4),
            "flagged_ci": interval(flags),
        }
    return row


def interval(rates: Sequence[float], level: float = 0.95) -> tuple[float, float]:
    """Clopper-Pearson on the sum of rates in [0, 1], one a client.

    At most as wide a spread as of clients that are all or nothing.
    """
    from scipy.special import betaincinv

    size, hits, tail = len(rates), sum(rates), (1 - level) / 2
    low = 0.0 if hits <= 1e-9 else float(betaincinv(hits, size - hits + 1, tail))
    high = 1.0 if size - hits <= 1e-9 else float(betaincinv(hits + 1, size - hits, 1 - tail))
    return round(low, 3), round(high, 3)


def update_table(rows: Sequence[Line]) -> str:
    """Attacks on the update: what they would do, what is seen, what comes through."""
    table = [
        "attack | strength | damage undefended | answer loss | flagged alone"
        " | rejected by cumulative | through client | through cumulative | with both checks"
    ]
    for attack in (POISON, *MOVES):
        for strength, own in _strengths(rows, attack):
            bare, cumulative = own["no defence"], own["cumulative"]["malicious"]
            through = " | ".join(_through(own[name]) for name in UPDATE_GUARDS)
            table.append(
                f"{attack} | {strength:g} | {_points(bare)} | {bare['loss']:+.2f}"
                f" | {_rate(cumulative, 'flagged')} | {_rate(cumulative, 'rejected')} | {through}"
            )
    return markdown(table) + "\n" + _sizes(rows)


def schedule_table(rows: Sequence[Line]) -> str:
    """Attacks that wait, against every level."""
    guards = [name for name in AGAINST_SCHEDULES if name != "no defence"]
    played = [
        (attack, f"{strength:g}", own)
        for attack in WAITING
        for strength, own in _strengths(rows, attack)
    ]
    for (_, own), (_, lies) in zip(
        _strengths(rows, POISON)[:1], _strengths(rows, "true evidence"), strict=True
    ):
        played.append(("in every round", "-", own | lies))
    table = [["poison", "k", "damage undefended", *guards]]
    for attack, strength, own in played:
        through = [_through(own[name]) if name in own else "-" for name in guards]
        table.append([attack, strength, _points(own["no defence"]), *through])
    return markdown(table)


def evidence_table(rows: Sequence[Line]) -> str:
    """What levels that read the client's own evidence see if it lies."""
    guards = [name for name in AGAINST_LIES if name != "no defence"]
    table = [["evidence", *guards]]
    for attack in ("true evidence", "forged evidence"):
        table += [
            [attack, *(_through(own[name]) for name in guards)]
            for _, own in _strengths(rows, attack)
        ]
    return markdown(table)


def honest_table(rows: Sequence[Line]) -> str:
    """What the defences take from honest clients where nobody attacks, and where somebody does."""
    table = [
        "defence | nobody attacks: rejected | worst client | refusal"
        " | over all attacks: rejected | worst client | clients"
    ]
    for guard in distinct(rows, "defence"):
        own = where(rows, defence=guard)
        calm = [row for row in where(own, attack=NO_ATTACK) if row["strength"] != SHORT]
        attacked = [row["honest"] for row in own if row["attack"] != NO_ATTACK]
        if guard in ("no defence", LEFT_OUT, *PRIVATE) or not calm or not attacked:
            continue
        # Where nobody attacks the attackers-to-be are honest as well, and count.
        everyone = [calm[0][role] for role in ("honest", "malicious")]
        n = sum(facts["clients"] for facts in everyone)
        rejected = sum(facts["rejected"] * facts["clients"] for facts in everyone) / n
        table.append(
            f"{guard} | {rejected:.1%} | {max(facts['worst'] for facts in everyone):.0%}"
            f" | {calm[0]['refusal']:.1f} %"
            f" | {mean(facts['rejected'] for facts in attacked):.1%}"
            f" | {max(facts['worst'] for facts in attacked):.0%} | {n}"
        )
    return markdown(table)


def worst_table(rows: Sequence[Line]) -> str:
    """The attack that gets most through every defence."""
    table = [
        "defence | attacks tried | worst attack | strength | damage that comes through"
        " | its damage undefended | rejected"
    ]
    bare = {(row["attack"], row["strength"]): row for row in where(rows, defence="no defence")}
    for guard in distinct(rows, "defence"):
        if guard in (LEFT_OUT, *PRIVATE):
            continue
        own = [row for row in where(rows, defence=guard) if row["attack"] != NO_ATTACK]
        worst = max(own, key=lambda row: row["damage"])
        undefended = bare[worst["attack"], worst["strength"]]
        table.append(
            f"{guard} | {len(own)} | {worst['attack']} | {worst['strength']:g}"
            f" | {_points(worst)} | {_points(undefended)} | {_rate(worst['malicious'], 'rejected')}"
        )
    return markdown(table)


def rows_of_live() -> list[tuple[Line, Line]]:
    """Every live line with the replayed line of the same cell."""
    replayed = {key(line): line for line in read_results()}
    return [(line, replayed[key(line)]) for line in read_results(LIVE)]


def live_rows(pairs: Iterable[tuple[Line, Line]]) -> list[Line]:
    """One row a live federation."""
    same = ("attack", "strength", "source", "seed")
    return [
        {
            **{name: live[name] for name in same},
            "defence": guard,
            "live": facts,
            "replayed": replayed["guards"][guard],
        }
        for live, replayed in pairs
        for guard, facts in live["guards"].items()
    ]


def live_table(rows: Sequence[Line]) -> str:
    """Refusal at the end of whole federations beside that of replays."""
    if not rows:
        return "Not played yet."
    table = [
        "attack | strength | defence | malicious source | seed"
        " | refusal: replayed | federation | trust: replayed | federation"
    ]
    for row in rows:
        played = [row[how] for how in ("replayed", "live")]
        refusals = " | ".join(f"{facts['refusal']:.0%}" for facts in played)
        trusts = " | ".join(f"{mean(facts['factor']['malicious']):.2f}" for facts in played)
        table.append(
            f"{row['attack']} | {row['strength']:g} | {row['defence']} | {row['source']}"
            f" | {row['seed']} | {refusals} | {trusts}"
        )
    apart = mean(abs(row["replayed"]["refusal"] - row["live"]["refusal"]) for row in rows)
    return (
        markdown(table)
        + f"\n{len(rows)} federations, {rows[0]['live']['n']} goals each; mean distance"
        f" {100 * apart:.1f} points."
    )


def _strengths(rows: Sequence[Line], attack: str) -> list[tuple[float, dict[str, Line]]]:
    """An attack's strengths in the order in which they were tried, each with its row a defence."""
    found: dict[float, dict[str, Line]] = {}
    for row in where(rows, attack=attack):
        found.setdefault(row["strength"], {})[row["defence"]] = row
    return list(found.items())


def _points(row: Line) -> str:
    return f"{row['damage']:.1f} ± {row['damage_sd']:.1f}"


def _through(row: Line) -> str:
    return f"{row['damage']:.1f} / {1 - row['malicious']['rejected']:.2f}"


def _rate(facts: Line, what: str) -> str:
    low, high = facts[f"{what}_ci"]
    return f"{facts[what]:.0%} [{low:.0%}, {high:.0%}]"


def _sizes(rows: Sequence[Line]) -> str:
    row = rows[0]
    return (
        "Damage: points of refusal lost (strict measure), mean ± standard deviation over"
        f" {row['recordings']} recordings, {row['goals']} goals of AdvBench in all; answer loss:"
        " nats a token more than without an attack; rates with 95 % intervals over"
        f" {row['malicious']['clients']} attackers; through a defence: damage / mean factor of the"
        " poison."
    )
