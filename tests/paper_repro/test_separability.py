"""The studies of separability measure what they say, and their page and results agree."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from loraprobe.errors import DataError
from loraprobe.fit.heads import fit_head
from loraprobe.heads import LinearHead
from paper_repro.separability import run as separability
from paper_repro.separability.cells import (
    Cell,
    Rows,
    in_distribution,
    mean_ci,
    summary,
    unseen_cells,
    unseen_fits,
)
from zoo.labelled import unseen_sources as sources
from zoo.labelled.client_design import SHARES, ZOO_DESIGN, plan, twin_of
from zoo.labelled.sources import BENIGN, HARD_NEGATIVE, MALICIOUS

DESIGN = replace(
    ZOO_DESIGN,
    per_source=5,
    per_cell=3,
    per_hard_cell=1,
    benign=BENIGN[:3],
    malicious=MALICIOUS[:2],
)
CLIENTS = tuple(plan(DESIGN))


def rows(signal: float, width: int = 20) -> Rows:
    """Random features with a direction of this size for malicious clients, by their share."""
    features = np.random.default_rng(0).standard_normal((len(CLIENTS), width)).astype(np.float32)
    features[:, 0] += signal * np.array([client.label * client.share for client in CLIENTS])
    return Rows(features, CLIENTS)


# --- the protocols


def test_a_fit_in_coordinates_is_the_package_s_linear_head() -> None:
    # more columns than rows
    features = np.random.default_rng(1).standard_normal((len(CLIENTS), 400)).astype(np.float32)
    features /= np.linalg.norm(features, axis=1, keepdims=True)
    own, train = Rows(features, CLIENTS), np.arange(len(CLIENTS)) % 3 != 0
    head = fit_head("linear", features[train], own.labels[train])
    assert isinstance(head, LinearHead)
    np.testing.assert_allclose(own.scores(train), features @ head.coef + head.intercept, atol=1e-3)


def test_a_head_never_met_what_a_cell_tests(monkeypatch: pytest.MonkeyPatch) -> None:
    own, met = rows(5.0), []
    fit = own.scores
    monkeypatch.setattr(own, "scores", lambda train: met.append(train) or fit(train))
    fits = unseen_fits(own, DESIGN)
    pairs = sources.unseen_cells(CLIENTS, SHARES)
    for (bad, good, _), train in zip(fits, met, strict=True):
        assert np.array_equal(train, pairs[bad, good].train)
    cells, twins = unseen_cells(own, DESIGN, fits)
    assert len(cells) == len(DESIGN.malicious) * len(DESIGN.benign) * len(SHARES)
    for cell in cells:
        tested = {CLIENTS[number].source for number in cell.clients}
        assert tested == {cell.malicious, cell.benign}
    benign = {CLIENTS[at].source for cell in twins for at in cell.clients if not CLIENTS[at].label}
    assert benign == {twin_of(bad) for bad in DESIGN.malicious} & set(HARD_NEGATIVE)


def test_out_of_fold_scores_come_from_heads_that_did_not_see_the_client(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    own = rows(5.0)
    monkeypatch.setattr(own, "scores", lambda train: np.where(train, np.inf, 1.0))
    assert set(own.out_of_fold().tolist()) == {1.0}
    some = Rows(
        np.random.default_rng(0).standard_normal((len(CLIENTS), 5)).astype(np.float32),
        CLIENTS,
        np.arange(len(CLIENTS)) % 2 == 0,
    )
    assert np.isnan(some.out_of_fold()).tolist() == (~some.fitted).tolist()


def test_signal_is_found_where_it_is_and_nowhere_else() -> None:
    found = {(row["against"], row["share"]): row for row in in_distribution(rows(8.0), DESIGN)}
    assert found["all benign", 1.0]["auroc"] > 0.99 > 0.9 > found["all benign", 0.1]["auroc"]
    assert all(0.25 < row["auroc"] < 0.75 for row in in_distribution(rows(0.0), DESIGN))
    assert found["hard negatives", 0.5]["n_benign"] == sum(
        client.role == "hard_negative" for client in CLIENTS
    )
    strong, none = (
        separability.unseen(unseen_cells(own, DESIGN, unseen_fits(own, DESIGN))[0])
        for own in (rows(8.0), rows(0.0))
    )
    assert [row["share"] for row in strong] == list(SHARES)
    assert strong[0]["auroc"] > 0.95
    assert all(0.25 < row["auroc"] < 0.75 for row in none)


def cell(labels: list[int], scores: list[float], clients: list[int] | None = None) -> Cell:
    numbers = range(len(labels)) if clients is None else clients
    return Cell("m", "b", 1.0, np.array(labels), np.array(scores), np.array(numbers))


def test_a_perfect_mean_keeps_an_interval_and_no_cell_is_an_error() -> None:
    perfect = cell([0, 0, 1, 1], [0, 0, 1, 1])
    assert mean_ci([perfect]) == pytest.approx((0.025**0.5, 1.0))
    found = summary([perfect, cell([0, 0, 1, 1], [0, 2, 1, 1], [4, 5, 6, 7])])
    assert (found["auroc"], found["auroc_worst"]) == (0.75, 0.5)
    assert (found["n_malicious"], found["n_benign"]) == (4, 4)
    with pytest.raises(DataError, match="no cell to summarise"):
        summary([])
    with pytest.raises(DataError, match="expected one a client"):
        Rows(np.zeros((2, 3), np.float32), CLIENTS)
