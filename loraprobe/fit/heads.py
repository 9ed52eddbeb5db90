"""Learning a head: labelled features in, a frozen head of `loraprobe.heads` out.

Each fitter is a pure function of checked data, options and a seed. Rows of a group (steps of one
client, clients of one run) are never split between fitting and held-out, because near-copies on
both sides would make early stopping blind. All randomness comes from the seed; no fitter reads or
moves the global generator of Python, NumPy or torch.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..errors import FitError, MissingExtra
from ..heads import FloatArray, Head, LinearHead, XGBoostHead
from ..heads.trees import trees_from_xgboost
from .data import (
    Float64,
    Groups,
    Kinds,
    TrainingData,
    check_training_data,
    combine_rows,
    held_out_mask,
    logistic,
    pos_weight_of,
    row_space,
)
from .mass_mean import fit_mass_mean
from .options import CosineOptions, LinearOptions, XGBoostOptions, head_options
from .torch_heads import fit_linear_paper, fit_mlp


def fit_linear(data: TrainingData, options: LinearOptions, seed: int) -> LinearHead:
    """Class-balanced L2 logistic regression, solved to convergence: the default head.

    Deterministic; the seed and the groups are not used. With p > n the solution lies in the row
    space of x, so the problem is solved in an orthonormal basis of that space, which for an L2
    penalty is the same problem with n unknowns.

    Raises:
        FitError: no convergence within `max_iter`.
    """
    if not options.standardize:
        return _linear(data.x, data.y, options)
    mean = data.x.mean(axis=0, dtype=np.float64)
    scale = data.x.std(axis=0, dtype=np.float64)
    scale[scale < 1e-8] = np.inf  # a constant column says nothing: weight 0
    head = _linear(((data.x - mean) / scale).astype(np.float32), data.y, options)
    coef = head.coef / scale
    return LinearHead(coef.astype(np.float32), head.intercept - float(coef @ mean))


def _linear(x: FloatArray, y: NDArray[np.int64], options: LinearOptions) -> LinearHead:
    if x.shape[1] <= len(x):
        coef, intercept = logistic(x.astype(np.float64), y, options.C, options.max_iter)
        return LinearHead(coef.astype(np.float32), intercept)
    coordinates, to_rows = row_space(x)  # (n, k), (n, k)
    reduced, intercept = logistic(coordinates, y, options.C, options.max_iter)  # (k,)
    return LinearHead(combine_rows(x, to_rows @ reduced).astype(np.float32), intercept)


def fit_cosine(data: TrainingData, options: CosineOptions, seed: int) -> LinearHead:
    """The baseline every probe must beat: the cosine to the mean benign direction.

    mu is the normalised mean of the benign rows and P = sigmoid(a cos(x, mu) + b). The rows must be
    L2-normalised, so cos(x, mu) = x . mu and the result is a LinearHead with coef = a mu. The rank
    order is that of the cosine; the sign of a is learnt with it.

    (a, b) are fitted to cosines against a mean that leaves out the row's own group: with p >> n a
    row is close to a mean it is part of, and a cut between such cosines would put every new benign
    row on the malicious side. Deterministic; the seed is not used.

    Raises:
        FitError: rows that are neither zero nor of norm 1 (within 1e-3), fewer than 2 benign
            groups, or a benign mean of zero.
    """
    rows = data.x.astype(np.float64)
    norms = np.linalg.norm(rows, axis=1)
    if not ((np.abs(norms - 1.0) <= 1e-3) | (norms < 1e-12)).all():
        raise FitError(
            f"cosine head: got rows with L2 norms from {norms.min():.4g} to {norms.max():.4g};"
            " expected 1 (or 0 for an empty row). Use a recipe that L2-normalises"
        )
    benign = rows * (data.y == 0)[:, None]
    total = benign.sum(axis=0)
    cosines = np.empty(len(rows))
    for group in np.unique(data.groups):
        inside = data.groups == group
        cosines[inside] = rows[inside] @ _direction(total - benign[inside].sum(axis=0))
    spread = float(cosines.std())
    if spread < 1e-12:
        raise FitError(
            "cosine head: got the same cosine for every row, expected some spread. The recipe keeps"
            " no direction; change it"
        )
    # standardised, so that the penalty (C = 1) means the same whether cosines span 0.01 or 1
    slope, intercept = logistic(((cosines - cosines.mean()) / spread)[:, None], data.y, 1.0, 2000)
    a = float(slope[0]) / spread
    return LinearHead(
        (a * _direction(total)).astype(np.float32), intercept - a * float(cosines.mean())
    )


def _direction(total: Float64) -> Float64:
    norm = float(np.linalg.norm(total))
    if norm < 1e-9:
        # rows have norm 1: below this the sum is rounding, also when one group held every benign
        # row
        raise FitError(
            "cosine head: got a mean of benign rows that is zero, expected 2 or more benign groups"
            " with a direction. Add some"
        )
    return total / norm


def fit_xgboost(data: TrainingData, options: XGBoostOptions, seed: int) -> XGBoostHead:
    """Shallow boosted trees with early stopping on held-out groups, kept up to the best round.

    Raises:
        FitError: too few groups to hold some out, or an option that XGBoost refuses.
        MissingExtra: xgboost is not installed.
    """
    try:
        import xgboost
    except ImportError as error:
        raise MissingExtra("xgboost", "xgboost", "fitting an XGBoost head") from error
    threads = options.nthread
    held = held_out_mask(data.y, data.groups, options.val_fraction, seed)
    pos_weight = pos_weight_of(data.y[~held])
    training = xgboost.DMatrix(data.x[~held], label=data.y[~held], nthread=threads)
    # XGBoost does not apply scale_pos_weight to its metrics: without these weights early stopping
    # would watch another loss
    weights = np.where(data.y[held] == 1, pos_weight, 1.0)
    held_out = xgboost.DMatrix(data.x[held], label=data.y[held], weight=weights, nthread=threads)
    parameters = {
        "objective": "binary:logistic",
        "eval_metric": "logloss",
        "tree_method": "hist",
        "max_depth": options.max_depth,
        "eta": options.eta,
        "subsample": options.subsample,
        "colsample_bytree": options.colsample,
        "max_bin": 64,
        "scale_pos_weight": pos_weight,
        "nthread": threads,
        "seed": seed,
        "verbosity": 0,
    }
    try:
        booster = xgboost.train(
            parameters,
            training,
            options.n_estimators,
            evals=[(held_out, "held_out")],
            early_stopping_rounds=options.early_stopping,
            verbose_eval=False,
        )
    except xgboost.core.XGBoostError as error:
        raise FitError(
            f"xgboost: {str(error).splitlines()[0]}. Change the option it names"
        ) from error
    best = booster[: booster.best_iteration + 1]
    return trees_from_xgboost(bytes(best.save_raw("json")), data.x.shape[1])


HEAD_FITTERS: dict[str, Callable[[TrainingData, Any, int], Head]] = {
    "linear": fit_linear,
    "linear_paper": fit_linear_paper,
    "mlp": fit_mlp,
    "xgboost": fit_xgboost,
    "cosine": fit_cosine,
    "mass_mean": fit_mass_mean,
}
"""Fitters by the name that `fit_head` and the command line take."""


def fit_head(
    name: str,
    x: Any,
    y: Any,
    groups: Groups = None,
    *,
    seed: int = 0,
    kinds: Kinds | None = None,
    options: Mapping[str, Any] | None = None,
) -> Head:
    """Fit the head called `name`: features (n, p), labels (n,) and groups (n,) -> a frozen head.

    Args:
        kinds: (n,) kinds of data, for the heads that weigh them ("mass_mean"); the others do not
            look at them.
        options: of that head, such as {"C": 10.0} for "linear": see `loraprobe.fit.options`.

    Raises:
        FitError: an unknown name or option, or data that cannot support the fit.
    """
    checked = head_options(name, options)
    return HEAD_FITTERS[name](check_training_data(x, y, groups, kinds), checked, seed)
