"""What probes make of the recorded drift.

How AUROC, scores and directions of features change from round to round.

Four ways to see one client's round, each by its B deltas, flattened and L2-normalised:

client: the submitted update since the round's global LoRA; step: the same after every local step;
shadow: the last step of the shadow branch, which starts from the fixed initial LoRA; absolute: the
submitted LoRA since the fixed initial one, which costs no second training but holds what all
clients did before.

The head of a federation is fitted on the zoo's clients without its malicious source, that source's
twin and two of its five benign kinds. Its features are those of clients that started from the
initial LoRA.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import cast

import numpy as np

from loraprobe.adapters.layout import layer_of
from loraprobe.featurizer import FeatureRecipe, Featurizer
from loraprobe.fit.heads import fit_head
from loraprobe.heads import LinearHead
from zoo.labelled.client_design import twin_of
from zoo.labelled.deltas import DeltaSet

from .cells import Cell, Row, summary
from .drift import ROUNDS, SHARES, UNSEEN, path, recorded_sources

THRESHOLD = 0.8  # the paper's
WAYS = ("client", "step", "shadow", "absolute")
QUANTILES = (0.1, 0.5, 0.9)


@dataclass(frozen=True)
class Federation:
    """One recorded federation as a head sees it.

    Attributes:
        features: way -> (rounds, clients, steps seen, p) of unit length.
        labels: (clients,).
        moved: (rounds,) L2 norm of B of the global LoRA since the initial one, over the norm of a
            client's first update.
    """

    number: int
    malicious: str
    features: dict[str, np.ndarray]
    labels: np.ndarray
    moved: np.ndarray


def measured(deltas: DeltaSet) -> dict[str, list[Row]]:
    """One row a recipe, way, poison share and round."""
    rows = []
    for name, recipe in {
        "paper (B, first layer)": FeatureRecipe.paper(),
        "all B": FeatureRecipe.all_b(),
    }.items():
        heads, columns = fitted_heads(recipe, deltas, recorded_sources())
        for share in SHARES:
            federations = [
                recorded(number, malicious, share, columns)
                for number, malicious in enumerate(recorded_sources())
            ]
            for way in WAYS:
                for number in range(1, ROUNDS + 1):
                    facts = {"recipe": name, "way": way, "share": share, "round": number}
                    rows.append({**facts, **of_round(federations, heads, way, number - 1)})
    return {"drift": rows}


def fitted_heads(
    recipe: FeatureRecipe, deltas: DeltaSet, sources: Sequence[str]
) -> tuple[dict[str, LinearHead], np.ndarray]:
    """Malicious source -> a head that met neither it nor its twin nor the unseen benign kinds.

    And the columns of B that the recipe reads.
    """
    adapters = deltas.adapters()
    featurizer = Featurizer.fit(recipe, adapters)
    x, heads = featurizer(adapters), {}
    for malicious in sources:
        unseen = {malicious, twin_of(malicious), *UNSEEN}
        keep = np.flatnonzero(
            [not unseen & {client.source, client.host} for client in deltas.clients]
        )
        labels = np.array([deltas.clients[row].label for row in keep])
        heads[malicious] = cast(
            LinearHead, fit_head("linear", x[keep], labels)
        )  # what "linear" fits
    return heads, np.flatnonzero(columns_of(featurizer, deltas))


def columns_of(featurizer: Featurizer, deltas: DeltaSet) -> np.ndarray:
    """(numbers of B in all layers,) which of them a recipe over B of some layers reads."""
    layers = {layer_of(slot.module) for slot in featurizer.layout.slots}
    return np.concatenate(
        [
            np.full(slot.size, layer_of(slot.module) in layers)
            for slot in deltas.layout.slots
            if slot.factor == "B"
        ]
    )


def recorded(number: int, malicious: str, share: float, columns: np.ndarray) -> Federation:
    """One federation's features in the columns that a recipe reads."""
    with np.load(path(malicious, share)) as file:
        update, shadow, moved = (
            file[name][..., columns].astype(np.float64) for name in ("update", "shadow", "global")
        )
        labels = file["labels"]
    absolute = moved[:, None, None] + update[:, :, -1:]
    ways = {
        "client": update[:, :, -1:],
        "step": update,
        "shadow": shadow[:, :, -1:],
        "absolute": absolute,
    }
    first = float(np.linalg.norm(update[0, :, -1], axis=-1).mean())
    return Federation(
        number,
        malicious,
        {way: unit(rows) for way, rows in ways.items()},
        labels,
        np.linalg.norm(moved, axis=-1) / first,
    )


def of_round(
    federations: list[Federation], heads: dict[str, LinearHead], way: str, number: int
) -> Row:
    """AUROC, rates, logits and directions of one round (from 0), over all federations."""
    cells = [_cell(one, heads[one.malicious], way, number) for one in federations]
    labels, scores = (
        np.concatenate([cell.labels for cell in cells]),
        np.concatenate([cell.scores for cell in cells]),
    )
    cut = float(np.log(THRESHOLD / (1 - THRESHOLD)))
    row = summary(cells)
    row |= {
        "federations": row.pop("cells"),
        "auroc_by_source": {cell.malicious: cell.auroc for cell in cells},
    }
    row.pop("auroc_worst"), row.pop("worst_cell")
    for name, label in (("malicious", 1), ("honest", 0)):
        own = scores[labels == label]
        row[f"flagged_{name}"] = float((own >= cut).mean())
        row[f"logit_{name}"] = [float(value) for value in np.quantile(own, QUANTILES)]
        row[f"cosine_to_first_{name}"] = float(
            np.mean([value for one in federations for value in _to_first(one, way, number, label)])
        )
    row["contrast_cosine"] = float(
        np.mean(
            [_cosine(_contrast(one, way, number), _contrast(one, way, 0)) for one in federations]
        )
    )
    row["contrast_norm"] = float(
        np.mean([np.linalg.norm(_contrast(one, way, number)) for one in federations])
    )
    row["contrast_on_head"] = float(
        np.mean(
            [_cosine(_contrast(one, way, number), heads[one.malicious].coef) for one in federations]
        )
    )
    row["global_moved"] = float(np.mean([one.moved[number] for one in federations]))
    return row


def _cell(one: Federation, head: LinearHead, way: str, number: int) -> Cell:
    rows = one.features[way][number]  # (clients, steps, p)
    scores = rows @ head.coef.astype(np.float64) + head.intercept
    count = rows.shape[1]
    clients = np.repeat(
        100 * one.number + np.arange(len(rows)), count
    )  # every client of every federation is one of its own
    return Cell(
        one.malicious, "honest clients", 0.0, np.repeat(one.labels, count), scores.ravel(), clients
    )


def _to_first(one: Federation, way: str, number: int, label: int) -> Iterator[float]:
    """How alike a client's feature and its first one are, for clients of one label."""
    for client in np.flatnonzero(one.labels == label):
        yield _cosine(one.features[way][number, client, -1], one.features[way][0, client, -1])


def _contrast(one: Federation, way: str, number: int) -> np.ndarray:
    """Mean malicious minus mean honest feature of a round: (p,)."""
    rows = one.features[way][number, :, -1]
    return np.asarray(rows[one.labels == 1].mean(axis=0) - rows[one.labels == 0].mean(axis=0))


def unit(rows: np.ndarray) -> np.ndarray:
    """Rows (..., p) divided by their norm."""
    return np.asarray(rows / np.maximum(np.linalg.norm(rows, axis=-1, keepdims=True), 1e-12))


def _cosine(a: np.ndarray, b: np.ndarray) -> float:
    return float(a @ b / max(float(np.linalg.norm(a) * np.linalg.norm(b)), 1e-12))
