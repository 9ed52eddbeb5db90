"""Heads that torch trains by AdamW with early stopping: the paper's linear one, a perceptron."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from ..errors import FitError, require
from ..heads import FloatArray, LinearHead, MLPHead
from .data import (
    Float64,
    TrainingData,
    combine_rows,
    held_out_mask,
    inner_products,
    pos_weight_of,
    row_space,
)
from .options import LinearPaperOptions, MLPOptions

if TYPE_CHECKING:
    import torch


def fit_linear_paper(data: TrainingData, options: LinearPaperOptions, seed: int) -> LinearHead:
    """The paper's recipe: logistic regression by AdamW with heavy weight decay and early stopping.

    Two things are ours: the validation rows are whole groups, and the weights start at zero, so the
    seed decides batches and split only.

    Raises:
        FitError: too few groups to hold some out.

    Source: arXiv:2601.07177, LoRA-Probe; constants of its official code.
    """
    require("torch", "fed", "Fitting this head")
    import torch

    held = held_out_mask(data.y, data.groups, options.val_fraction, seed)
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
        options,
        torch.Generator().manual_seed(seed),
    )
    return LinearHead(coef.detach().numpy()[:, 0], float(intercept.detach()[0]))


def fit_mlp(data: TrainingData, options: MLPOptions, seed: int) -> MLPHead:
    """A small ReLU perceptron by AdamW with dropout and early stopping on held-out groups.

    Columns are standardised, and the standardisation is folded into the first layer. With p > n the
    network is trained on coordinates in the row space of the training rows: gradients never leave
    that space, so anything the first layer holds outside it would be the noise it was initialised
    with, and a new adapter would be scored by that noise.

    Raises:
        FitError: too few groups to hold some out.
    """
    require("torch", "fed", "Fitting this head")
    import torch

    dropout = options.dropout
    generator = torch.Generator().manual_seed(seed)
    held = held_out_mask(data.y, data.groups, options.val_fraction, seed)
    mean, inverse = _standardisation(data.x[~held])  # (p,), (p,)
    inputs, unmap = _network_inputs(((data.x - mean) * inverse).astype(np.float32), held)  # (n, k)
    widths = [inputs.shape[1], *options.hidden, 1]
    # PyTorch's default for a linear layer, drawn from our own generator
    bounds = [1.0 / math.sqrt(width) for width in widths[:-1]]
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
                mask = torch.rand(batch.shape, generator=generator) >= dropout
                batch = batch * mask / (1.0 - dropout)
        return batch @ weights[-1].T + biases[-1]  # (b, 1)

    _train([*weights, *biases], forward, torch.from_numpy(inputs), data.y, held, options, generator)
    layers = [weight.detach().numpy().astype(np.float64) for weight in weights]
    offsets = [bias.detach().numpy().astype(np.float64) for bias in biases]
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
    # Constant to within float32 rounding.
    constant = deviation <= np.maximum(1e-6 * typical, 1e-7 * np.abs(mean))
    if constant.all():
        raise FitError(
            "mlp: got training rows that are all the same, expected columns that vary. Check the"
            " recipe and the start point"
        )
    return mean, np.where(constant, 0.0, 1.0 / np.maximum(deviation, 0.01 * typical))


def _network_inputs(
    z: FloatArray, held: NDArray[np.bool_]
) -> tuple[FloatArray, Callable[[Float64], Float64]]:
    """What the network sees of standardised rows z (n, p), and its first layer in columns of z.

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


def _train(
    parameters: list[torch.Tensor],
    forward: Callable[[torch.Tensor, bool], torch.Tensor],
    x: torch.Tensor,
    y: NDArray[np.int64],
    held: NDArray[np.bool_],
    options: LinearPaperOptions | MLPOptions,
    generator: torch.Generator,
) -> None:
    """Fit parameters in place, and leave them at the epoch with the lowest held-out loss."""
    import torch

    targets = torch.from_numpy(y.astype(np.float32))
    loss = torch.nn.BCEWithLogitsLoss(pos_weight=torch.tensor(pos_weight_of(y[~held])))
    fitted = torch.from_numpy(np.flatnonzero(~held))
    outside = torch.from_numpy(np.flatnonzero(held))
    for parameter in parameters:
        parameter.requires_grad_(True)
    optimizer = torch.optim.AdamW(parameters, lr=options.lr, weight_decay=options.weight_decay)
    best_loss = math.inf
    waited = 0
    best = [parameter.detach().clone() for parameter in parameters]
    for _ in range(options.max_epochs):
        shuffled = fitted[torch.randperm(len(fitted), generator=generator)]
        for rows in torch.split(shuffled, options.batch_size):
            optimizer.zero_grad()
            loss(forward(x[rows], True)[:, 0], targets[rows]).backward()
            torch.nn.utils.clip_grad_norm_(parameters, options.clip)
            optimizer.step()
        with torch.no_grad():
            held_loss = float(loss(forward(x[outside], False)[:, 0], targets[outside]))
        if held_loss < best_loss - options.min_delta:
            best_loss = held_loss
            waited = 0
            best = [parameter.detach().clone() for parameter in parameters]
        else:
            waited += 1
            if waited >= options.patience:
                break
    if not math.isfinite(best_loss):
        raise FitError(
            "training: got no epoch with a finite held-out loss. Lower lr or normalise the features"
        )
    with torch.no_grad():
        for parameter, value in zip(parameters, best, strict=True):
            parameter.copy_(value)
