"""Learning a head: labelled features in, a frozen head of :mod:`loraprobe.heads` out.

Each fitter is a pure function ``fit(x, y, groups, *, seed, ...)``. ``groups`` says which rows
belong together (steps of one client, clients of one run); rows of a group are never split between
fitting and held-out, because near-copies on both sides would make early stopping blind. All
randomness comes from ``seed``; no fitter reads or moves the global generator of Python, NumPy or
torch.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..errors import FitError
from ..heads import FloatArray, Head, LinearHead, XGBoostHead, import_xgboost
from .data import (
    Float64,
    Groups,
    check_training_data,
    combine_rows,
    held_out_mask,
    logistic,
    pos_weight_of,
    require_positive,
    row_space,
)
from .mass_mean import Kinds, fit_mass_mean
from .torch_heads import fit_linear_paper, fit_mlp


def fit_linear(
    x: Any,
    y: Any,
    groups: Groups,
    *,
    seed: int,
    C: float = 100.0,
    max_iter: int = 2000,
    standardize: bool = False,
) -> LinearHead:
    """Class-balanced L2 logistic regression, solved to convergence: the default head.

    Deterministic; ``seed`` and ``groups`` are taken so that every fitter is called alike. With p >
    n the solution lies in the row space of x, so the problem is solved in an orthonormal basis of
    that space, which for an L2 penalty is the same problem with n unknowns.

    Args:
        C: inverse strength of the penalty. 100, not scikit-learn's 1: the rows are L2-normalised,
            so logits of useful size need coefficients far larger than 1.
        standardize: fit on columns of mean 0 and deviation 1, and fold both into the result. For
            features of several units, such as log norms beside ranks; flattened unit vectors lose
            what their common scale says.

    Raises:
        FitError: bad data or options, or no convergence within ``max_iter``.
    """
    require_positive(C=C, max_iter=max_iter)
    data = check_training_data(x, y, groups)
    if not standardize:
        return _linear(data.x, data.y, C, max_iter)
    mean, scale = data.x.mean(axis=0, dtype=np.float64), data.x.std(axis=0, dtype=np.float64)
    scale[scale < 1e-8] = np.inf  # a constant column says nothing: weight 0
    head = _linear(((data.x - mean) / scale).astype(np.float32), data.y, C, max_iter)
    coef = head.coef / scale
    return LinearHead(coef.astype(np.float32), head.intercept - float(coef @ mean))


def _linear(x: FloatArray, y: NDArray[np.int64], C: float, max_iter: int) -> LinearHead:
    if x.shape[1] <= len(x):
        coef, intercept = logistic(x.astype(np.float64), y, C, max_iter)
        return LinearHead(coef.astype(np.float32), intercept)
    coordinates, to_rows = row_space(x)  # (n, k), (n, k)
    reduced, intercept = logistic(coordinates, y, C, max_iter)  # (k,)
    return LinearHead(combine_rows(x, to_rows @ reduced).astype(np.float32), intercept)


def fit_cosine(x: Any, y: Any, groups: Groups, *, seed: int) -> LinearHead:
    """The baseline every probe must beat.

    The cosine to the mean benign direction, turned into a probability.

    mu is the normalised mean of the benign rows and P = sigmoid(a cos(x, mu) + b). The rows must be
    L2-normalised, so cos(x, mu) = x . mu and the result is a LinearHead with coef = a mu. The rank
    order is that of the cosine; the sign of a is learnt with it.

    (a, b) are fitted to cosines against a mean that leaves out the row's own group: with p >> n a
    row is close to a mean it is part of, and a cut between such cosines would put every new benign
    row on the malicious side. Deterministic; ``seed`` is not used.

    Raises:
        FitError: rows that are neither zero nor of norm 1 (within 1e-3), fewer than 2 benign
            groups, or a benign mean of zero.
    """
    data = check_training_data(x, y, groups)
    rows = data.x.astype(np.float64)
    norms = np.linalg.norm(rows, axis=1)
    if not ((np.abs(norms - 1.0) <= 1e-3) | (norms < 1e-12)).all():
        raise FitError(
            f"cosine head: got rows with L2 norms from {norms.min():.4g} to {norms.max():.4g},"
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


def fit_xgboost(
    x: Any,
    y: Any,
    groups: Groups,
    *,
    seed: int,
    max_depth: int = 3,
    eta: float = 0.1,
    subsample: float = 0.8,
    colsample: float = 0.2,
    n_estimators: int = 300,
    early_stopping: int = 20,
    val_fraction: float = 0.2,
    nthread: int = 1,
) -> XGBoostHead:
    """Shallow boosted trees with early stopping on held-out groups.

    Only the trees up to the best round are kept.

    Raises:
        FitError: bad data or options, or too few groups to hold some out.
        MissingExtra: xgboost is not installed.
    """
    require_positive(max_depth=max_depth, eta=eta, subsample=subsample, colsample=colsample)
    require_positive(n_estimators=n_estimators, early_stopping=early_stopping, nthread=nthread)
    xgboost = import_xgboost()
    data = check_training_data(x, y, groups)
    held = held_out_mask(data.y, data.groups, val_fraction, seed)
    pos_weight = pos_weight_of(data.y[~held])
    training = xgboost.DMatrix(data.x[~held], label=data.y[~held], nthread=nthread)
    # XGBoost does not apply scale_pos_weight to its metrics: without these weights early stopping
    # would watch another loss
    held_out = xgboost.DMatrix(
        data.x[held],
        label=data.y[held],
        weight=np.where(data.y[held] == 1, pos_weight, 1.0),
        nthread=nthread,
    )
    parameters = {
        "objective": "binary:logistic",
        "eval_metric": "logloss",
        "tree_method": "hist",
        "max_depth": max_depth,
        "eta": eta,
        "subsample": subsample,
        "colsample_bytree": colsample,
        "max_bin": 64,
        "scale_pos_weight": pos_weight,
        "nthread": nthread,
        "seed": seed,
        "verbosity": 0,
    }
    try:
        booster = xgboost.train(
            parameters,
            training,
            n_estimators,
            evals=[(held_out, "held_out")],
            early_stopping_rounds=early_stopping,
            verbose_eval=False,
        )
    except xgboost.core.XGBoostError as error:
        raise FitError(
            f"xgboost: {str(error).splitlines()[0]}. Change the option it names"
        ) from error
    best = booster[: booster.best_iteration + 1]
    return XGBoostHead.from_json(bytes(best.save_raw("json")), data.x.shape[1])


HEAD_FITTERS: dict[str, Callable[..., Head]] = {
    "linear": fit_linear,
    "linear_paper": fit_linear_paper,
    "mlp": fit_mlp,
    "xgboost": fit_xgboost,
    "cosine": fit_cosine,
    "mass_mean": fit_mass_mean,
}
"""Fitters by the name that ``fit_head`` and the command line take."""


def fit_head(
    name: str, x: Any, y: Any, groups: Groups, seed: int, kinds: Kinds | None = None, **options: Any
) -> Head:
    """Fit the head called ``name``.

    Features (n, p), labels (n,), groups (n,) or None -> a frozen head.

    Args:
        kinds: (n,) kinds of data, for the heads that weigh them (``mass_mean``); the others do not
            look at them.
        options: keyword options of that fitter, such as ``C`` for "linear".

    Raises:
        FitError: an unknown name or option (with the valid ones), or data that cannot support the
            fit.
    """
    if name not in HEAD_FITTERS:
        raise FitError(f"head: got {name!r}, expected one of {sorted(HEAD_FITTERS)}")
    fitter = HEAD_FITTERS[name]
    keywords = {
        p.name for p in inspect.signature(fitter).parameters.values() if p.kind is p.KEYWORD_ONLY
    }
    known = keywords - {"seed", "kinds"}
    if unknown := sorted(set(options) - known):
        raise FitError(
            f"head {name!r}: got the unknown options {unknown}, expected some of {sorted(known)}"
        )
    return fitter(
        x, y, groups, seed=seed, **options, **({"kinds": kinds} if "kinds" in keywords else {})
    )
