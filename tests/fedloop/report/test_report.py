"""The page about a run.

What it says, that nothing a client wrote becomes markup, and that it is the same every time.
"""

from __future__ import annotations

import json
import math
import os
import re
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from fedloop.defense.types import RoundRecord
from fedloop.errors import FedloopError, StateError
from fedloop.report.costs import ledger
from fedloop.report.page import write_report
from loraprobe.errors import MissingExtra
from tests.helpers.reported import (
    HOSTILE,
    HTML_TAGS,
    MALICIOUS,
    SVG_TAGS,
    Page,
    names,
    read,
    records,
    roles,
    save,
    spoken,
)

pytest.importorskip("matplotlib")

ROOT = Path(__file__).resolve().parents[3]
Write = Callable[..., Path]


@pytest.fixture
def write(tmp_path: Path) -> Write:
    """Makes a run's folder: (records, roles, changed tables of the configuration) -> its path."""
    return partial(save, tmp_path / "run")


@pytest.fixture(scope="module")
def report(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The page of the six rounds."""
    return write_report(save(tmp_path_factory.mktemp("report") / "run", records()))


@pytest.fixture(scope="module")
def page(report: Path) -> Page:
    return read(report)


# --- the page


def test_the_page_says_what_was_run_and_what_came_out(page: Page, report: Path) -> None:
    text = page.text
    assert report.name == "report.html"
    for said in (
        (
            "tiny/chat by 10 clients (5 benign, 2 hard negative, 3 malicious), weighed by the"
            " cumulative level"
        ),
        "3, 50.0 % of their examples from builtin:malicious",
        "zoo/probes/linear",
        "rule mean, server fedavg, LoRA factors",
        "1 rounds skipped",
        "harmful prompts refused (strict) 79.0 % 70.0 % to 85.8 % 100",
        "safe prompts refused (strict) 6.0 % 2.1 % to 16.2 % 50",
        "held-out loss, nats per token 1.9 40",  # of 40 pairs, but no share of them
        "is 58.0 % after round 3 and 79.0 % after round 6",
        '"poison_share": 0.5',
    ):
        assert said in text, said
    assert "unfinished" not in text


def test_the_page_adds_up_what_the_records_hold(page: Page) -> None:
    made, spent = records(), ledger(records())
    bad = {names()[i] for i in MALICIOUS}
    kept = [one.weights for one in made if not one.skipped]
    shares = sum(sum(weights.get(name, 0.0) for name in bad) for weights in kept)
    rejected = sum(factor == 0 for one in made for factor in one.factors.values())
    mean = sum(made[3].factors.values()) / len(made[3].factors)
    refused = [(one.round, *entry) for one in made for entry in one.reasons.items()]
    assert len(refused) == 2
    for said in (
        f"{rejected} of 48 updates rejected (factor 0); 2 of them refused with a reason",
        *(f"{at} {who} {spoken(who)} 0.000 {why}" for at, who, why in refused),
        f"4 skipped: mean factor {mean:.3f}",
        f"Malicious clients hold {100 * shares / 5:.1f} % of the aggregate",
        f"train {spent['seconds']['train']:.3f}",
        f"Evidence takes {100 * spent['evidence_to_train']:.1f} % of the time that training takes",
        f"update {spent['bytes']['update']:,} {8 * 65536:,}",
    ):
        assert said in page.text, said


def test_why_a_round_was_skipped_is_its_note(write: Write) -> None:
    skipped = replace(ROUND, skipped=True, weights={}, note="skipped: <b>too few</b>")
    text = read(write_report(write([skipped]))).text
    assert "1 skipped: <b>too few</b>" in text
    assert "safety gate:" not in text


def test_an_unfinished_run_says_so_even_with_half_a_line_at_its_end(write: Write) -> None:
    run = write(records()[:2])
    with (run / "records.jsonl").open("a", encoding="utf-8") as file:
        file.write('{"round": 3, "sco')
    text = read(write_report(run)).text
    assert "This run is unfinished: 2 of 6 rounds are recorded" in text
    assert "2 of 6 rounds recorded" in text


def unscored(record: RoundRecord) -> RoundRecord:
    ones = dict.fromkeys(record.factors, 1.0)
    return replace(record, scores={}, factors=ones, reasons={}, metrics={})


ROUND = records()[0]
BENIGN = {name: {"role": "benign", "source": "s", "share": 1.0} for name in names()}
NO_SCORES = ("no scores to draw", "Nothing was measured", "none: every well-formed update counts")


@pytest.mark.parametrize(
    ("of", "options", "said", "unsaid"),
    [
        ([], {}, ("0 of 6 rounds", "zoo/probes/linear"), "Malicious clients hold"),
        ([unscored(ROUND)], {"defense": {}}, NO_SCORES, "Probe"),
        (
            [ROUND],
            {"about": BENIGN},
            ("No client of this run is malicious",),
            "Malicious clients hold",
        ),
        (
            [replace(ROUND, skipped=True, weights={})],
            {},
            ("Nothing was aggregated",),
            "Malicious clients hold",
        ),
    ],
    ids=["before its first round", "no defence", "benign clients", "only skips"],
)
def test_what_a_run_has_not_is_said_and_not_drawn(
    write: Write, page: Page, of: Any, options: Any, said: tuple[str, ...], unsaid: str
) -> None:
    shown = read(write_report(write(of, **options)))
    assert not [one for one in said if one not in shown.text]
    assert unsaid not in shown.text
    assert unsaid in page.text  # negative control
    assert ("svg" in dict(shown.tags)) == bool(of)


# --- nothing a client wrote becomes markup, nothing is fetched


def hostile(values: Any) -> Any:
    """The first clients' ids replaced."""
    new = dict(zip(names(), HOSTILE, strict=False))
    return {new.get(name, name): value for name, value in values.items()}


def hostile_run(write: Write) -> Path:
    fields = ("scores", "factors", "weights", "num_examples", "losses")
    of = []
    for one in records()[:2]:
        renamed = {field: hostile(getattr(one, field)) for field in fields}
        of.append(
            replace(
                one,
                **renamed,
                reasons={who: f"<img src=x onerror=x()> {who}" for who in hostile(one.reasons)},
                metrics={
                    "<svg onload=x()>_rule": 0.5,
                    "n_<svg onload=x()>": 10,
                    "</style><b>": 3.0,
                },
                status=dict.fromkeys(renamed["factors"], "<i>"),
                seconds={**one.seconds, "<u>": 1.0},
            )
        )
    about = {name: {**one, "source": "<a href=x>"} for name, one in hostile(roles()).items()}
    return write(of, about, name="</title><script>x()</script>", model={"base": "<base href=x>"})


def test_hostile_ids_reasons_and_names_stay_text(write: Write) -> None:
    page = read(write_report(hostile_run(write)))
    assert {tag for tag, _ in page.tags} <= HTML_TAGS | SVG_TAGS
    assert not [
        name
        for _, attributes in page.tags
        for name in attributes
        if name.startswith("on") or name in ("src", "href")
    ]
    naive = Page(f'<p>{HOSTILE[0]}</p><svg aria-label="{HOSTILE[1]}"></svg>')
    assert "script" in {tag for tag, _ in naive.tags}  # negative control: it would be seen
    assert "onload" in dict(naive.tags)["svg"]
    text, figures = page.text, "\n".join(page.in_svg)
    for said in (HOSTILE[0], HOSTILE[1]):
        assert said in text
        assert said in figures
    # neither left out for its underscore nor read as mathematics nor unescaped twice
    assert "_a $\\frac{1}{$ &lt;" in figures
    assert "<img src=x onerror=x()>" in text
    assert "b\ufffdc\ufffd" in text
    assert "\u202e" not in text + figures
    assert "d" * 49 not in text
    assert "<svg onload=x()>_rule" in text
    assert "<svg onload=x()>_rule" in figures


def test_the_page_is_one_file_that_fetches_and_runs_nothing(page: Page, report: Path) -> None:
    raw = report.read_text(encoding="utf-8")
    assert {tag for tag, _ in page.tags} == HTML_TAGS | SVG_TAGS
    assert not page.open
    links = [
        value
        for _, attributes in page.tags
        for name, value in attributes.items()
        if name in ("src", "href", "xlink:href")
    ]
    assert links
    assert all(str(link).startswith("#") for link in links)
    assert all(inside.startswith("#") for inside in re.findall(r"url\(([^)]*)", raw))
    assert "@import" not in raw
    assert "default-src 'none'" in raw
    ids = [attributes["id"] for _, attributes in page.tags if "id" in attributes]
    assert len(ids) == len(set(ids))
    assert {str(link)[1:] for link in links} <= set(ids)


# --- the same page every time


def test_equal_records_give_equal_pages_in_another_process(report: Path, tmp_path: Path) -> None:
    out = tmp_path / "again.html"
    command = [sys.executable, "-m", "fedloop.cli.main", "report", report.parent, "--out", out]
    environment = {**os.environ, "PYTHONHASHSEED": "4711", "OMP_NUM_THREADS": "1"}
    subprocess.run(command, env=environment, cwd=ROOT, check=True, timeout=300)
    assert out.read_bytes() == report.read_bytes()


# --- what is refused


NUMBERS = "is not an object of finite numbers"
DAMAGED: list[tuple[dict[str, Any], str]] = [
    ({"factors": {"client-00": math.nan}}, f"factors {NUMBERS}"),
    ({"factors": {"client-00": "1"}}, f"factors {NUMBERS}"),
    ({"losses": {"client-00": 10**400}}, f"losses {NUMBERS}"),
    ({"weights": [1.0]}, f"weights {NUMBERS}"),
    ({"scores": {"client-00": []}}, f"scores {NUMBERS}"),
    ({"scores": {"client-00": "ab"}}, f"scores {NUMBERS}"),
    ({"reasons": {"client-00": 3}}, "reasons is not an object of texts"),
    ({"note": 3}, "note is not an object of texts"),
    ({"round": 3}, "got records of rounds .*3.*; expected 1 to 1"),
    ({"colour": 3}, "not a round record"),
]


@pytest.mark.parametrize(
    ("file", "content", "message"),
    [
        *(("records.jsonl", *damaged) for damaged in DAMAGED),
        ("clients.json", b"[]", "/run"),
        ("clients.json", b'{"a": {}}', "/run"),
        ("clients.json", b"{", "/run"),
        ("config.json", b"{}", "not the folder of a run"),
        ("records.jsonl", b"\xff\n", "/run"),
    ],
)
def test_damaged_files_are_refused(write: Write, file: str, content: Any, message: str) -> None:
    run = write([ROUND])
    if not isinstance(content, bytes):
        content = (json.dumps({**json.loads(ROUND.to_json()), **content}) + "\n").encode()
    (run / file).write_bytes(content)
    with pytest.raises(StateError, match=message):
        write_report(run)
    assert not (run / "report.html").exists()


def test_what_a_page_needs_and_where_it_cannot_be_are_said(
    write: Write, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(StateError, match="not the folder of a run"):
        write_report(tmp_path / "nowhere")
    run = write([])
    with pytest.raises(FedloopError, match="cannot write the report"):
        write_report(run, tmp_path)
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(MissingExtra, match=r"loraprobe\[figures\]"):
        write_report(write([ROUND]))
