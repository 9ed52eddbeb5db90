"""Heads that torch trains.

The paper's linear recipe and a small perceptron, by AdamW with early stopping on held-out groups.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from ..errors import FitError
from ..heads import FloatArray, LinearHead, MLPHead
from .data import (
    Float64,
    Groups,
    check_training_data,
    combine_rows,
    held_out_mask,
    inner_products,
    pos_weight_of,
    require_positive,
    row_space,
)

if TYPE_CHECKING:
    import torch


def fit_linear_paper(
    x: Any,
    y: Any,
    groups: Groups,
    *,
    seed: int,
    lr: float = 0.01,
    weight_decay: float = 2.0,
    batch_size: int = 256,
    max_epochs: int = 100,
    patience: int = 15,
    min_delta: float = 1e-4,
    clip: float = 0.5,
    val_fraction: float = 0.1,
) -> LinearHead:
    """The paper's recipe: logistic regression by AdamW with heavy weight decay and early stopping.

    Every constant is the paper's.

    Two things are ours: the validation rows are whole groups, and the weights start at zero, so the
        seed decides batches and split only.

    Raises:
        FitError: bad data or options, or too few groups to hold some out.

    Source: arXiv:2601.07177, LoRA-Probe; constants of its official code.
    """
    import torch

    schedule = _Schedule(lr, weight_decay, batch_size, max_epochs, patience, min_delta, clip)
    data = check_training_data(x, y, groups)
    held = held_out_mask(data.y, data.groups, val_fraction, seed)
    coef = torch.zeros(data.x.shape[1], 1, requires_grad=True)
    intercept = torch.zeros(1, requires_grad=True)

    def forward(batch: torch.Tensor, training: bool) -> torch.Tensor:
        return batch @ coef + intercept  # (b, 1)

    _train(
        [coef, intercept],
        forward,
        torch.from_numpy(data.x),
        data.y,
        held,
        schedule,
        torch.Generator().manual_seed(seed),
    )
    return LinearHead(coef.detach().numpy()[:, 0], float(intercept.detach()[0]))


def fit_mlp(
    x: Any,
    y: Any,
    groups: Groups,
    *,
    seed: int,
    hidden: tuple[int, ...] = (64,),
    dropout: float = 0.1,
    lr: float = 1e-3,
    weight_decay: float = 0.01,
    batch_size: int = 64,
    max_epochs: int = 200,
    patience: int = 20,
    min_delta: float = 1e-4,
    clip: float = 1.0,
    val_fraction: float = 0.2,
) -> MLPHead:
    """A small ReLU perceptron by AdamW with dropout and early stopping on held-out groups.

    Columns are standardised, and the standardisation is folded into the first layer. With p > n the
    network is trained on coordinates in
    the row space of the training rows: gradients never leave that space, so anything the first
    layer holds outside it would be the noise it was initialised with, and a new adapter would be
    scored by that noise.

    Raises:
        FitError: bad data or options, or too few groups to hold some out.
    """
    import torch

    schedule = _Schedule(lr, weight_decay, batch_size, max_epochs, patience, min_delta, clip)
    if not all(width >= 1 for width in hidden) or not 0.0 <= dropout < 1.0:
        raise FitError(
            f"mlp: got hidden={hidden} and dropout={dropout}, expected widths of at least 1 and a"
            " dropout in [0, 1)"
        )
    generator = torch.Generator().manual_seed(seed)
    data = check_training_data(x, y, groups)
    held = held_out_mask(data.y, data.groups, val_fraction, seed)
    mean, inverse = _standardisation(data.x[~held])  # (p,), (p,)
    inputs, unmap = _network_inputs(((data.x - mean) * inverse).astype(np.float32), held)  # (n, k)
    widths = [inputs.shape[1], *hidden, 1]
    bounds = [
        1.0 / math.sqrt(width) for width in widths[:-1]
    ]  # PyTorch's default for a linear layer, drawn from our own generator
    weights = [
        torch.empty(o, i).uniform_(-b, b, generator=generator)
        for i, o, b in zip(widths, widths[1:], bounds, strict=False)
    ]
    biases = [
        torch.empty(o).uniform_(-b, b, generator=generator)
        for o, b in zip(widths[1:], bounds, strict=True)
    ]

    def forward(batch: torch.Tensor, training: bool) -> torch.Tensor:
        for weight, bias in zip(weights[:-1], biases[:-1], strict=True):
            batch = torch.relu(batch @ weight.T + bias)
            if training:  # by hand: torch's dropout draws from the global generator
                batch = (
                    batch
                    * (torch.rand(batch.shape, generator=generator) >= dropout)
                    / (1.0 - dropout)
                )
        return batch @ weights[-1].T + biases[-1]  # (b, 1)

    _train(
        [*weights, *biases], forward, torch.from_numpy(inputs), data.y, held, schedule, generator
    )
    layers, offsets = (
        [part.detach().numpy().astype(np.float64) for part in parts] for parts in (weights, biases)
    )
    layers[0] = unmap(layers[0]) * inverse  # (h, k) -> (h, p)
    offsets[0] = offsets[0] - layers[0] @ mean
    return MLPHead(
        tuple(w.astype(np.float32) for w in layers), tuple(b.astype(np.float32) for b in offsets)
    )


def _standardisation(x: FloatArray) -> tuple[Float64, Float64]:
    """Mean and inverse scale of each column: (n, p) -> (p,), (p,) float64.

    Per column, because spectra, norms and ranks come in different units. A quiet column is
    amplified at most 100 times more than the typical one, or a trace of drift in it would drown the
    others; a constant column gets 0, since its weight would stay random.
    """
    mean = x.mean(axis=0, dtype=np.float64)
    deviation = x.std(axis=0, dtype=np.float64)
    typical = float(np.sqrt(np.mean(deviation**2)))
    constant = deviation <= np.maximum(
        1e-6 * typical, 1e-7 * np.abs(mean)
    )  # to within float32 rounding
    if constant.all():
        raise FitError(
            "mlp: got training rows that are all the same, expected columns that vary. Check the"
            " recipe and the start point"
        )
    return mean, np.where(constant, 0.0, 1.0 / np.maximum(deviation, 0.01 * typical))


def _network_inputs(
    z: FloatArray, held: NDArray[np.bool_]
) -> tuple[FloatArray, Callable[[Float64], Float64]]:
    """What the network sees of standardised rows z (n, p), and how to express its first layer in
    columns of z.

    Returns:
        (inputs (n, k) float32 of unit mean square over the fitted rows, with k = p, or their rank
        if p exceeds their number; a function from first-layer weights on inputs (h, k) to weights
        on z (h, p)).
    """
    fitted = z[~held]
    if z.shape[1] <= len(fitted):
        return z, lambda weight: weight
    coordinates, to_rows = row_space(fitted)  # (m, k), (m, k)
    scale = float(np.sqrt(np.mean(coordinates**2)))
    inputs = np.empty((len(z), coordinates.shape[1]), dtype=np.float32)
    inputs[~held] = coordinates / scale
    inputs[held] = inner_products(z[held], fitted) @ to_rows / scale
    return inputs, lambda weight: combine_rows(fitted, to_rows @ weight.T / scale).T


@dataclass(frozen=True)
class _Schedule:
    """How fast and how long a torch head trains."""

    lr: float
    weight_decay: float
    batch_size: int
    max_epochs: int
    patience: int
    min_delta: float
    clip: float

    def __post_init__(self) -> None:
        require_positive(
            **{
                name: value
                for name, value in vars(self).items()
                if name not in ("weight_decay", "min_delta")
            }
        )


def _train(
    parameters: list[torch.Tensor],
    forward: Callable[[torch.Tensor, bool], torch.Tensor],
    x: torch.Tensor,
    y: NDArray[np.int64],
    held: NDArray[np.bool_],
    schedule: _Schedule,
    generator: torch.Generator,
) -> None:
    """Fit ``parameters`` in place on the rows that are not held, and leave them at the epoch with
    the lowest held-out loss.
    """
    import torch

    targets = torch.from_numpy(y.astype(np.float32))
    loss = torch.nn.BCEWithLogitsLoss(pos_weight=torch.tensor(pos_weight_of(y[~held])))
    fitted, outside = (
        torch.from_numpy(np.flatnonzero(~held)),
        torch.from_numpy(np.flatnonzero(held)),
    )
    for parameter in parameters:
        parameter.requires_grad_(True)
    optimizer = torch.optim.AdamW(parameters, lr=schedule.lr, weight_decay=schedule.weight_decay)
    best_loss, waited = math.inf, 0
    best = [parameter.detach().clone() for parameter in parameters]
    for _ in range(schedule.max_epochs):
        for rows in torch.split(
            fitted[torch.randperm(len(fitted), generator=generator)], schedule.batch_size
        ):
            optimizer.zero_grad()
            loss(forward(x[rows], True)[:, 0], targets[rows]).backward()
            torch.nn.utils.clip_grad_norm_(parameters, schedule.clip)
            optimizer.step()
        with torch.no_grad():
            held_loss = float(loss(forward(x[outside], False)[:, 0], targets[outside]))
        if held_loss < best_loss - schedule.min_delta:
            best_loss, waited = held_loss, 0
            best = [parameter.detach().clone() for parameter in parameters]
        else:
            waited += 1
            if waited >= schedule.patience:
                break
    if not math.isfinite(best_loss):
        raise FitError(
            "training: got no epoch with a finite held-out loss. Lower lr or normalise the features"
        )
    with torch.no_grad():
        for parameter, value in zip(parameters, best, strict=True):
            parameter.copy_(value)
