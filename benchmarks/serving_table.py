"""What the serving benchmark measured, as the page shows it."""

from __future__ import annotations

from typing import Any


def table(result: dict[str, Any]) -> str:
    """The results as the page shows them."""
    rows = [
        (
            "| connections | server | processor, ms | p50, ms | p99, ms | requests/s |"
            " score: times its processor time | score: times its p50 |"
        ),
        "|---|---|---|---|---|---|---|---|",
    ]
    for connections in (1, 4):
        summary = result[f"{connections} connections"]
        rows += [_row(connections, name, summary) for name in ("score", "echo")]
    memory = result["memory"]
    machine = result["machine"]
    alone = ", ".join(f"{name} {value:.2f}" for name, value in result["parts_ms"].items())
    counts, resident = (
        " and ".join(f"{float(value):,g}" for value in column)
        for column in zip(*memory["resident_mib_after"].items(), strict=True)
    )
    about = [
        (
            f"{result['rounds']} rounds of {result['requests_per_round']} requests of"
            f" {result['body_bytes']:,} bytes to each server in turn; medians"
        ),
        "over rounds, and of the ratios within a round the lowest and the highest too.",
        (
            f"{machine['cores']} cores under a load of {machine['load']}, {machine['processor']},"
            f" Python {machine['python']}. In ms, alone and warm: {alone}."
        ),
        f"Memory after {counts} requests: {resident} MiB.",
    ]
    return "\n".join([*rows, "", _outcome(result), "", *about])


def _outcome(result: dict[str, Any]) -> str:
    goal = result["goal"]
    shown = []
    for connections in (1, 4):
        ratio = result[f"{connections} connections"]["score / echo"]["processor_ms"]
        verdict = "missed"
        if ratio["median"] <= goal:
            every = "in every round" if ratio["highest"] <= goal else "not in every round"
            verdict = f"met, {every}"
        shown.append(f"{verdict} at {connections} connection{'s' * (connections > 1)}")
    return (
        f"**Goal: a request takes at most {goal:g} times the echo's processor time:"
        f" {'; '.join(shown)}.**"
    )


def _row(connections: int, name: str, summary: dict[str, Any]) -> str:
    taken = summary[name]
    over = summary.get(f"score / {name}")
    ratios = ["", ""] if over is None else [_ratio(over[key]) for key in ("processor_ms", "p50_ms")]
    numbers = [f"{taken[name]:.2f}" for name in ("processor_ms", "p50_ms", "p99_ms")]
    numbers.append(f"{taken['requests_per_s']:,.0f}")
    return f"| {' | '.join([str(connections), name, *numbers, *ratios])} |"


def _ratio(values: dict[str, float]) -> str:
    return f"{values['median']:.2f} ({values['lowest']:.2f} to {values['highest']:.2f})"
