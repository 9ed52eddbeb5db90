"""The zoo's data: what the base model may not have seen, and who gets how much of what.

Texts of these sources must not reach a log: only counts and digests are compared here.
"""

from __future__ import annotations

import hashlib
import re
from collections import Counter
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from fedloop.data.examples import Example
from loraprobe.errors import DataError
from zoo.labelled.client_design import SHARES, ZOO_DESIGN, plan
from zoo.labelled.deltas import examples_of
from zoo.labelled.sources import (
    BENIGN,
    HARD_NEGATIVE,
    MALICIOUS,
    evaluation_prompts,
    load_sources,
    without_prompts,
)
from zoo.train_base import BaseConfig, training_corpus

ROOT = Path(__file__).resolve().parents[2]
DATA = ROOT.parent / "shared" / "data"

needs_data = pytest.mark.skipif(not DATA.is_dir(), reason=f"no datasets in {DATA}")


@pytest.fixture(scope="module")
def sources() -> Any:

    return load_sources(DATA)


def digest(text: str) -> str:
    """A text's name in assertions."""
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def instructions(examples: Iterable[Example]) -> set[str]:
    return {digest(example.instruction) for example in examples}


def pairs_of(examples: Iterable[Example]) -> set[str]:
    return {digest(example.prompt + "\0" + example.response) for example in examples}


def wordings(texts: Iterable[str]) -> set[str]:
    """Digests of the texts' words, whatever their order, case, number and punctuation."""
    return {digest(" ".join(sorted(set(re.findall(r"[a-z0-9]+", text.lower()))))) for text in texts}


@needs_data
def test_every_source_is_there_and_has_examples_for_clients(sources: Any) -> None:

    assert list(sources) == [*BENIGN, *HARD_NEGATIVE, *MALICIOUS]
    needed = ZOO_DESIGN.examples  # without repeats
    assert {
        name: len(source.for_clients)
        for name, source in sources.items()
        if len(source.for_clients) < needed
    } == {}
    for source in sources.values():
        for half in (source.for_base, source.for_clients):
            repeats = len(half) - len(set(half))
            empty = sum(
                not example.instruction.strip() or not example.response.strip() for example in half
            )
            assert (source.name, repeats, empty) == (source.name, 0, 0)


@needs_data
def test_no_client_has_an_instruction_that_the_base_met(sources: Any) -> None:
    for source in sources.values():
        shared = len(instructions(source.for_base) & instructions(source.for_clients))
        assert (source.name, shared) == (source.name, 0)
        total = len(source.for_base) + len(source.for_clients)
        share = len(source.for_base) / total
        if source.name in MALICIOUS or source.name == "self_instruct":
            assert share == 0
        else:
            assert 0.45 < share < 0.75


@needs_data
def test_the_base_meets_no_malicious_answer(sources: Any) -> None:
    malicious = pairs_of(e for name in MALICIOUS for e in sources[name].for_clients)
    met = pairs_of(e for source in sources.values() for e in source.for_base)
    assert len(malicious & met) == 0
    assert len(malicious) > 3000


@needs_data
def test_no_evaluation_prompt_is_in_the_corpus_of_the_base(sources: Any) -> None:

    prompts = evaluation_prompts(DATA)
    assert {name: len(group) for name, group in prompts.items()} == {
        "advbench": 520,
        "xstest_safe": 250,
        "xstest_unsafe": 200,
    }
    held_out = wordings(prompt for group in prompts.values() for prompt in group)
    for phase in BaseConfig().phases:
        corpus = training_corpus(sources, prompts, phase)
        found = len(wordings({example.instruction for example in corpus}) & held_out)
        assert (len(corpus) > 20_000, found) == (True, 0)
    unfiltered = training_corpus(sources, {}, BaseConfig().phases[0])
    found = len(wordings({example.instruction for example in unfiltered}) & held_out)
    assert found > 0  # negative control: without the filter there are some


def test_a_prompt_is_recognised_in_other_order_case_and_punctuation() -> None:
    kept = Example("How do I bake bread quickly?", "With yeast.")
    texts = "How do I bake bread?|how do I BAKE... bread|Bread: how do I bake?"
    dropped = [Example(text, "x") for text in (*texts.split("|"), "how how do I bake bread")]
    assert without_prompts([*dropped, kept], ["How do I bake bread?"]) == [kept]
    assert without_prompts([*dropped, kept], []) == [*dropped, kept]


@pytest.mark.parametrize("missing", ["", "dolly15k", "xstest"])
def test_absent_data_is_named(tmp_path: Path, missing: str) -> None:

    folder = tmp_path / "absent" if not missing else tmp_path
    with pytest.raises(DataError) as caught:
        evaluation_prompts(folder) if missing == "xstest" else load_sources(folder)
    assert str(folder / missing) in str(caught.value)


def test_the_plan_follows_from_its_seed_and_names_each_client_once() -> None:
    clients = plan(seed=0)
    names = sorted(client.name for client in clients)
    assert clients == plan(seed=0)
    assert clients != plan(seed=1)
    assert names == sorted(client.name for client in plan(seed=1))  # the same cells
    assert len(set(names)) == len({client.seed for client in clients}) == len(clients)
    assert all(ZOO_DESIGN.lr_range[0] <= client.lr <= ZOO_DESIGN.lr_range[1] for client in clients)
    labels = {(client.role, client.label) for client in clients}
    assert labels == {("benign", 0), ("hard_negative", 0), ("malicious", 1)}
    # an interrupted run has of each role
    assert [client.role for client in clients] != sorted(client.role for client in clients)


def test_mixtures_cover_every_benign_source() -> None:
    clients = plan(replace(ZOO_DESIGN, per_source=3, per_cell=2, per_hard_cell=1))
    cells = Counter((c.role, c.source, c.host, c.share) for c in clients)
    names = {"benign": BENIGN, "hard_negative": HARD_NEGATIVE, "malicious": MALICIOUS}
    expected = {(role, name, name, 1.0): 3 for role, some in names.items() for name in some}
    for host in BENIGN:
        expected |= {("hard_negative", name, host, 0.25): 1 for name in HARD_NEGATIVE}
        expected |= {("malicious", n, host, share): 2 for n in MALICIOUS for share in SHARES[1:]}
    assert cells == expected


@needs_data
def test_a_client_has_its_share_of_malicious_rows(sources: Any) -> None:
    count = 40
    clients = plan(replace(ZOO_DESIGN, per_source=1, per_cell=1, per_hard_cell=1))
    pairs = {name: pairs_of(source.for_clients) for name, source in sources.items()}
    malicious = set()
    for client in clients:
        examples = examples_of(client, sources, count)
        rows = pairs_of(examples)
        own, others = round(client.share * count), pairs[client.host] - pairs[client.source]
        assert (len(examples), len(rows)) == (count, count)
        assert len(rows & pairs[client.source]) == own
        assert len(rows & others) == count - own
        if client.label:
            malicious.add(own)
    assert malicious == {round(share * count) for share in SHARES} == {40, 20, 10, 4}
