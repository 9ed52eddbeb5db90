"""The figures and the numbers of the page about a run."""

from __future__ import annotations

import math
import re

import pytest

from fedloop.defense.types import RoundRecord
from fedloop.report.costs import ledger
from fedloop.report.drawing import ROLES, Panel, label
from fedloop.report.figures import clients_over_rounds
from fedloop.report.metrics import sample_size, share_with_interval

pytest.importorskip("matplotlib")

# --- the figures


def lines(series: dict[str, list[float]], about: dict[str, str]) -> list[tuple[str, str, str]]:
    """(path, colour, dashes) of every line of the clients, "" for a solid one."""
    svg = clients_over_rounds([Panel("", "x", series)], about, [], "x")
    drawn = re.findall(r'<path d="([^"]*)" clip-path="[^"]*" style="fill: none; ?([^"]*)"', svg)
    found = [(path, dict(part.split(": ") for part in style.split("; "))) for path, style in drawn]
    # the grid
    return [
        (path, style["stroke"], style.get("stroke-dasharray", ""))
        for path, style in found
        if style["stroke"] != "#e8e8e8"
    ]


def test_lines_that_end_at_the_same_place_are_counted_there() -> None:
    series = {"a": [1.0, 1.0], "b": [0.5, 1.0], "c": [1.0, 1.0], "d": [0.2, 0.4]}
    about = {"a": "benign", "b": "benign", "c": "malicious", "d": "malicious"}
    svg = clients_over_rounds([Panel("", "x", series)], about, [], "x")
    assert ">2 benign, 1 malicious<" in svg
    assert svg.count(" malicious<") == 1


def test_a_round_without_a_value_is_a_gap() -> None:
    whole, broken = lines(
        {"a": [0.1, 0.2, 0.3, 0.4, 0.5], "b": [0.5, 0.4, math.nan, 0.2, 0.1]},
        {"a": "benign", "b": "benign"},
    )
    assert (whole[0].count("M"), broken[0].count("M")) == (1, 2)


def test_roles_differ_in_colour_and_in_line_style() -> None:
    about = {role: role for role in ROLES}
    drawn = lines({role: [0.1 * i, 0.2] for i, role in enumerate(ROLES)}, about)
    assert (
        len(drawn)
        == len({colour for _, colour, _ in drawn})
        == len({dashes for _, _, dashes in drawn})
        == len(ROLES)
    )


def test_long_labels_are_cut_and_strange_ones_made_drawable() -> None:
    assert label("d" * 25) == "d" * 21 + "..."
    assert label("d" * 24) == "d" * 24
    assert label("Zürich\u202e\n名") == "Zürich???"


# --- numbers


def test_the_ledger_adds_up_by_phase() -> None:
    one = RoundRecord(
        1,
        {},
        {},
        {},
        seconds={"train": 4.0, "evidence": 1.0, "assess": 0.25, "aggregate": 0.5, "audit": 2.0},
        bytes={"update": 10},
    )
    two = RoundRecord(
        2,
        {},
        {},
        {},
        seconds={"train": 6.0, "assess": 0.25, "evaluate": 9.0},
        bytes={"update": 30, "evidence": 4},
    )
    assert ledger(iter([one, two])) == {
        "rounds": 2,
        "seconds": {
            "train": 10.0,
            "evidence": 1.0,
            "assess": 0.5,
            "aggregate": 0.5,
            "evaluate": 9.0,
            "audit": 2.0,
        },
        "bytes": {"update": 40, "evidence": 4},
        "evidence_to_train": 0.1,
        "assess_aggregate_to_train": 0.1,
    }


def test_a_metric_finds_its_own_sample() -> None:
    metrics = {
        "refusal_rule": 0.5,
        "n_refusal": 10,
        "over_refusal_rule": 0.25,
        "n_over_refusal": 8,
        "loss": 0.5,
        "n_utility": 4,
        "other": 0.5,
    }
    assert {
        name: sample_size(metrics, name)
        for name in ("refusal_rule", "over_refusal_rule", "loss", "other", "initial_refusal_rule")
    } == {
        "refusal_rule": 10,
        "over_refusal_rule": 8,
        "loss": 4,
        "other": None,
        "initial_refusal_rule": 10,
    }


def test_only_a_whole_number_of_the_sample_is_a_share() -> None:
    metrics = {
        "refusal_rule": 0.5,
        "refusal_reward": 0.537,
        "refusal_score": -1.0,
        "n_refusal": 10,
        "loss": 0.5,
        "n_utility": 10,
    }
    found = share_with_interval(metrics, "refusal_rule")
    assert found == pytest.approx((0.5, 0.236593, 0.763407), abs=1e-6)  # Wilson 1927
    for name in ("refusal_reward", "refusal_score", "loss", "absent"):
        assert share_with_interval(metrics, name) is None
