"""The page about federations on a real model; `python -m paper_repro.tables` writes its tables."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from zoo import program
from zoo.markers import filled, markdown
from zoo.smollm2.refusal import wilson

from . import attacks, realigned, repair, trigger
from .cells import ATTACKS, NOBODY, ROUNDS, ROWS, SOURCES, Cell
from .prepare import HARMFUL
from .run import read_lines

PAGE = Path(__file__).with_name("README.md")
COMMAND = "paper_repro.tables"
SETS = {
    "advbench": "AdvBench",
    "harmbench_test": "HarmBench, test",
    "tdc2023": "TDC2023",
    "xstest_safe": "XSTest, safe",
}
NEAR = 0.03  # of refusal: ours may be so far below no attack
LEAST = 0.95  # mean factor of an honest client
LOSS = 0.02  # relative
# What the rival's authors publish: mean refusal over AdvBench, DirectHarm and ExpGuard (utility).
REPORTED = {
    "FedAvg": ("", ".580 (.465)", ".484 (.472)", ".549 (.452)", ".525 (.470)", ".564", ".601"),
    "FoolsGold": ("", ".542 (.408)", ".660 (.463)", ".976 (.434)", ".623", ".604", ".988"),
    "DnC": ("", ".566", ".555", ".616", ".522", ".584", ".975 (.425)"),
    "Safe-FedLLM, shadow": ("", ".588", ".635", ".913", ".570", ".928", ".964"),
    "rival": ("", ".972", ".942", ".970", ".960", ".969", ".974"),
}
Line = dict[str, Any]


def rendered() -> str:
    """The page with every table between its markers made anew."""
    text = PAGE.read_text(encoding="utf-8")
    lines = read_lines()
    tables = {
        "sizes": sizes(lines),
        "refusal": by_cell(lines, lambda line: percent(*pooled(line, HARMFUL))),
        "sets": sets_table(lines),
        "kept": by_cell(lines, kept_text),
        "utility": utility_table(lines),
        "targets": targets(lines),
        "seeds": seeds_table(lines),
        "repair": repairs(program.read_lines(repair.LINES)),
        "realigned": realignment(lines, program.read_lines(realigned.LINES)),
        "trigger": triggered(program.read_lines(trigger.LINES)),
        "knowing": knowing(lines, program.read_lines(attacks.LINES)),
        "reported": reported(),
    }
    for name, table in tables.items():
        text = filled(text, name, table, COMMAND)
    return text


def attack_name(malicious: int, share: float) -> str:
    """A column's head."""
    return f"{malicious} of 10, {share:.0%}" if malicious else "nobody"


def pooled(line: Line, sets: Sequence[str]) -> tuple[int, int]:
    """Refused and asked, over several sets of prompts."""
    pairs = [line["refused"][name] for name in sets]
    return sum(pair[0] for pair in pairs), sum(pair[1] for pair in pairs)


def percent(hits: int, n: int) -> str:
    """A share with its Wilson interval of 95 %."""
    low, high = wilson(hits, n)
    return f"{hits / n:.0%} [{100 * low:.0f}, {100 * high:.0f}]"


def kept_text(line: Line) -> str:
    """Mean factor of the honest and of the malicious over all rounds, and who fell lowest."""
    honest = _honest(line)
    poisoned = [line["clients"][c] for c in line["malicious_clients"]]
    text = f"{sum(honest) / len(honest):.2f} ({min(honest):.2f})"
    return text + (f" / {sum(poisoned) / len(poisoned):.2f}" if poisoned else "")


def sizes(lines: Sequence[Line]) -> str:
    """How much of the table was run."""
    whole = len(ROWS) * len(ATTACKS) * len(SOURCES)
    hours = sum(line["seconds"] for line in lines) / 3600
    seeds = sorted({line["seed"] for line in lines})
    return (
        f"{len(lines)} federations are written down, seed {', '.join(map(str, seeds))}; all rows"
        f" in all cells of both sources would be up to {whole} a seed. Processor time of one core:"
        f" {hours:.1f} hours, what runs share counted where it was made first.\n"
    )


def by_cell(lines: Sequence[Line], told: Any) -> str:
    """A table a source: a row a defence, a column an attack."""
    parts = []
    for source in SOURCES:
        found = {
            (line["row"], line["malicious"], line["share"]): line
            for line in lines
            if line["source"] == source and line["seed"] == 0
        }
        if not found:
            continue
        rows: list[Sequence[str]] = [(source, *(attack_name(*attack) for attack in ATTACKS))]
        for row in ROWS:
            cells = [found.get((row, *attack)) for attack in ATTACKS]
            if any(cells):
                rows.append((row, *(told(cell) if cell else "" for cell in cells)))
        parts.append(markdown(rows))
    return "\n".join(parts)


def sets_table(lines: Sequence[Line]) -> str:
    """Every set by itself."""
    rows: list[Sequence[str]] = [("source", "seed", "attack", "defence", *SETS.values())]
    for line in _ordered(lines):
        attack = attack_name(line["malicious"], line["share"])
        shares = (percent(*line["refused"][name]) for name in SETS)
        rows.append((line["source"], str(line["seed"]), attack, line["row"], *shares))
    return markdown(rows)


def utility_table(lines: Sequence[Line]) -> str:
    """What the model still can, and what the run cost."""
    run = ("source", "seed", "attack", "defence")
    head = ("loss a token, nats", "ROUGE-L", "right of four", "training, CPU-s", "defence, s")
    rows: list[Sequence[str]] = [(*run, *head, "MB sent")]
    for line in _ordered(lines):
        attack = attack_name(line["malicious"], line["share"])
        costs = (f"{line['seconds_training']:.0f}", f"{line['seconds_defense']:.1f}")
        rows.append(
            (
                line["source"],
                str(line["seed"]),
                attack,
                line["row"],
                f"{line['loss']:.3f}",
                f"{line['rouge_l']:.3f}",
                percent(*line["right"]),
                *costs,
                f"{line['bytes'] / 1e6:.0f}",
            )
        )
    return markdown(rows)


def targets(lines: Sequence[Line]) -> str:
    """Ours against what was wanted of it."""
    free = {
        line["seed"]: line
        for line in lines
        if line["row"] == "FedAvg" and (line["malicious"], line["share"]) == NOBODY
    }
    rows: list[Sequence[str]] = [
        (
            "source",
            "seed",
            "attack",
            "defence",
            "refusal below no attack",
            "lowest honest factor",
            "loss above",
            "met",
        )
    ]
    for line in _ordered(lines):
        if not line["row"].startswith("ours") or line["seed"] not in free:
            continue
        unattacked = free[line["seed"]]
        without = pooled(unattacked, HARMFUL)
        own = pooled(line, HARMFUL)
        below = without[0] / without[1] - own[0] / own[1]
        lowest = min(_honest(line))
        above = line["loss"] / unattacked["loss"] - 1
        met = (below <= NEAR, lowest >= LEAST, above <= LOSS)
        rows.append(
            (
                line["source"],
                str(line["seed"]),
                attack_name(line["malicious"], line["share"]),
                line["row"],
                f"{100 * below:+.1f} points",
                f"{lowest:.2f}",
                f"{above:+.1%}",
                " ".join("yes" if one else "**no**" for one in met),
            )
        )
    return markdown(rows)


def seeds_table(lines: Sequence[Line]) -> str:
    """Cells that were played with several seeds: what is refused with each."""
    found: dict[tuple[Any, ...], list[Line]] = {}
    for line in _ordered(lines):
        key = (line["source"], line["malicious"], line["share"], line["row"])
        found.setdefault(key, []).append(line)
    several = {key: own for key, own in found.items() if len(own) > 1}
    seeds = sorted({line["seed"] for own in several.values() for line in own})
    head = (
        "source",
        "attack",
        "defence",
        *(f"seed {seed}" for seed in seeds),
        "lowest honest factor",
    )
    rows: list[Sequence[str]] = [head]
    for (source, malicious, share, row), own in several.items():
        by_seed = {line["seed"]: percent(*pooled(line, HARMFUL)) for line in own}
        shares = (by_seed.get(seed, "") for seed in seeds)
        lowest = min(min(_honest(line)) for line in own)
        rows.append((source, attack_name(malicious, share), row, *shares, f"{lowest:.2f}"))
    return markdown(rows)


def knowing(plain: Sequence[Line], lines: Sequence[Line]) -> str:
    """What attackers who know the defence leave of the refusals, beside who sends plain poison."""
    head = ("attack", "defence", "refused", "XSTest, safe", "loss", "factors", "rounds skipped")
    rows: list[Sequence[str]] = [head]
    attack = (attacks.PLAIN.malicious, attacks.PLAIN.share)
    for arm in attacks.ARMS:
        place = (arm, *attack, attacks.PLAIN.source, attacks.PLAIN.seed)
        own = [line for line in plain if _place(line) == place]
        rows += [("plain poison", arm, *_refused(line)) for line in own]
    for name, arm in attacks.planned():
        for line in lines:
            if (line["attack"], line["arm"]) == (name, arm):
                rows.append((name, arm, *_refused(line)))
    return markdown(rows)


def _refused(line: Line) -> tuple[str, ...]:
    refused = percent(*pooled(line, HARMFUL)), percent(*line["refused"]["xstest_safe"])
    return *refused, f"{line['loss']:.3f}", kept_text(line), f"{line['skipped']} of {ROUNDS}"


def repairs(lines: Sequence[Line]) -> str:
    """What is left of refusals after the rounds without defence, and at the end."""
    rows: list[Sequence[str]] = [
        (
            "attack",
            "malicious clients",
            *(f"after round {number}" for number in (repair.FOUND_AFTER, ROUNDS)),
        )
    ]
    for cell in repair.CELLS:
        for arm in repair.ARMS:
            own = {
                line["round"]: line
                for line in lines
                if (line["cell"], line["arm"]) == (str(cell), arm)
            }
            if own:
                shares = (percent(*pooled(own[n], HARMFUL)) for n in (repair.FOUND_AFTER, ROUNDS))
                rows.append((attack_name(cell.malicious, cell.share), arm, *shares))
    return markdown(rows)


def realignment(plain: Sequence[Line], lines: Sequence[Line]) -> str:
    """What refusals and over-refusals are before and after the server's own training."""
    head = ("attack", "defence", "then", "refused", "XSTest, safe", "loss", "ROUGE-L")
    rows: list[Sequence[str]] = [head]
    before = {line["cell"]: line for line in plain}
    for after in lines:
        cell = Cell.named(after["cell"])
        attack = attack_name(cell.malicious, cell.share)
        for then, line in (("", before[after["cell"]]), ("realigned", after)):
            shares = (percent(*pooled(line, sets)) for sets in (HARMFUL, ("xstest_safe",)))
            loss, rouge = f"{line['loss']:.3f}", f"{line['rouge_l']:.3f}"
            rows.append((attack, cell.row, then, *shares, loss, rouge))
    return markdown(rows)


def triggered(lines: Sequence[Line]) -> str:
    """What is refused of the bare prompts and behind the trigger, and who counted."""
    rows: list[Sequence[str]] = [
        ("attack", "defence", "bare prompts refused", "behind the trigger", "factors")
    ]
    for line in lines:
        shares = (percent(*line[name]) for name in ("bare", "triggered"))
        attack = f"{line['malicious']} of 10"
        rows.append((attack, line["row"], *shares, kept_text(line)))
    return markdown(rows)


def reported() -> str:
    """The rival's published table."""
    head = ("reported", *(attack_name(*attack) for attack in ATTACKS))
    return markdown([head, *((name, *cells) for name, cells in REPORTED.items())])


def _honest(line: Line) -> list[float]:
    """Mean factor of every honest client."""
    return [f for c, f in line["clients"].items() if c not in line["malicious_clients"]]


def _place(line: Line) -> tuple[Any, ...]:
    return tuple(line[name] for name in ("row", "malicious", "share", "source", "seed"))


def _ordered(lines: Sequence[Line]) -> list[Line]:
    places = list(ROWS)
    return sorted(
        lines,
        key=lambda line: (
            SOURCES.index(line["source"]),
            line["seed"],
            ATTACKS.index((line["malicious"], line["share"])),
            places.index(line["row"]),
        ),
    )
