"""Drift in federations with client sampling.

The submitted updates of every participation, seen from two start points.

Read are the recorded, undefended federations of paper_repro.mixed.federations (48 clients, 16 of
them a round, eight participations each, four malicious sources at four poison shares). client: the
update since the round's global LoRA;
absolute: the submitted LoRA since the initial one, which is known from the rounds before. The head
of a federation is fitted on the same kinds of client that start from the initial LoRA
(paper_repro.mixed.labelled), without the malicious source, its twin and two benign kinds.
"""

from __future__ import annotations

import numpy as np

from loraprobe.featurizer import FeatureRecipe
from zoo.labelled.client_design import SHARES
from zoo.labelled.deltas import DeltaSet
from zoo.labelled.sources import MALICIOUS

from ..mixed.federations import PARTICIPATIONS, path
from ..mixed.setting import ALL, MODELS
from .cells import Row
from .rounds import Federation, fitted_heads, of_round, unit

MODEL = MODELS["chat-1m"]
WAYS = ("client", "absolute")


def recorded_sources() -> list[str]:
    """The malicious sources whose federation is recorded."""
    return [source for source in MALICIOUS if path(MODEL, source, ALL).exists()]


def measured(labelled: DeltaSet) -> dict[str, list[Row]]:
    """One row a recipe, way, poison share and participation."""
    rows: list[Row] = []
    sources = recorded_sources()
    for name, recipe in {
        "paper (B, first layer)": FeatureRecipe.paper(),
        "all B": FeatureRecipe.all_b(),
    }.items():
        heads, columns = fitted_heads(recipe, labelled, sources)
        everyone = [sampled(number, malicious, columns) for number, malicious in enumerate(sources)]
        for share in SHARES:
            federations = [one_share(whole, shares, share) for whole, shares in everyone]
            for way in WAYS:
                for number in range(1, PARTICIPATIONS + 1):
                    facts = {"recipe": name, "way": way, "share": share, "participation": number}
                    rows.append({**facts, **of_round(federations, heads, way, number - 1)})
    return {"sampled": rows}


def sampled(number: int, malicious: str, columns: np.ndarray) -> tuple[Federation, np.ndarray]:
    """One federation in the columns that a recipe reads, and its clients' poison shares (0 for
    honest ones).
    """
    with np.load(path(MODEL, malicious, ALL)) as file:
        updates = file["x"][:, file["isB"]][:, columns].astype(np.float64)
        meta, roles, shares = file["meta"], file["role"], file["share"].astype(float)
    labels = (roles == "malicious").astype(int)
    since_start, moved = absolute(updates, meta[:, 2])
    order = np.lexsort((meta[:, 0], meta[:, 1]))  # by participation, then by client
    shape = (PARTICIPATIONS, len(labels), 1, -1)
    features = {
        "client": updates[order].reshape(shape),
        "absolute": since_start[order].reshape(shape),
    }
    first = float(np.linalg.norm(features["client"][0, :, -1], axis=-1).mean())
    drifted = moved[order].reshape(PARTICIPATIONS, len(labels)).mean(axis=1) / first
    return Federation(
        number, malicious, {way: unit(rows) for way, rows in features.items()}, labels, drifted
    ), np.where(labels == 1, shares, 0.0)


def absolute(updates: np.ndarray, rounds: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Updates (n, p) since the initial LoRA, given the round (n,) of each, and how far the global
    LoRA had moved before it: (n, p), (n,).
    """
    total, since_start, moved = (
        np.zeros(updates.shape[1]),
        np.empty_like(updates),
        np.empty(len(updates)),
    )
    for number in np.unique(rounds):
        own = rounds == number
        since_start[own], moved[own] = total + updates[own], np.linalg.norm(total)
        total = total + updates[own].mean(axis=0)
    return since_start, moved


def one_share(whole: Federation, shares: np.ndarray, share: float) -> Federation:
    """The honest clients and the malicious ones of one poison share."""
    kept = (whole.labels == 0) | np.isclose(shares, share)
    features = {way: rows[:, kept] for way, rows in whole.features.items()}
    return Federation(whole.number, whole.malicious, features, whole.labels[kept], whole.moved)
