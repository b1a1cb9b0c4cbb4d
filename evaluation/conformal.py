"""Fit prediction sets and intervals that hold the target of as many records as asked: split-conformal prediction."""

import math
from dataclasses import replace

import numpy as np
import torch
from torch import Tensor

from errors import UserError
from task import Task, wilson_interval

SCALED = 200  # validation records from which on the width of an interval follows the difficulty of the record


def check_rows(count: int, coverage: float) -> None:
    """Raise UserError if `count` validation records are too few for a coverage."""
    if coverage and count < (needed := _rows_needed(coverage)):
        raise UserError(
            f"--coverage {coverage:g} needs {needed} validation rows, and there are {count}: give a lower coverage, or "
            "a larger --val-split."
        )


def _rows_needed(coverage: float) -> int:
    """Return how many records let the rank of the quantile be at most their number."""
    return math.ceil(coverage / (1 - coverage) - 1e-9)


def fit_coverage(task: Task, logits: Tensor, targets: Tensor, coverage: float, *, scaled: bool = True) -> Task:
    """Return a task whose sets or intervals hold the target of a share of at least `coverage` of new records.

    logits: (N, …) of validation records.  targets: (N,), encoded.  scaled: fit the difficulty of regression records.
    The score of a record is 1 - the probability of its class (Sadinle et al., "Least Ambiguous Set-Valued Classifiers
    with Bounded Error Levels", 2019), or its absolute error by its difficulty (Lei et al., "Distribution-Free
    Predictive Inference for Regression", 2018). A quarter of the records fits the difficulty, and the others the
    quantile of the scores.
    """
    if not coverage:
        return replace(task, coverage=0.0, quantile=0.0, difficulty=[])
    task = replace(task, coverage=coverage, difficulty=[])
    if task.kind != "regression":
        labels = targets.long()[:, None]
        scores = 1 - task.activate(logits).gather(1, labels)[:, 0]
    else:
        errors = (logits.double().flatten(1).mean(dim=1) - targets.double()).abs()
        is_fit = torch.arange(len(errors)) % 4 == 0
        if scaled and len(errors) >= SCALED and int((~is_fit).sum()) >= _rows_needed(coverage):
            task = replace(task, difficulty=_fit_difficulty(task, logits[is_fit], errors[is_fit]))
            logits, errors = logits[~is_fit], errors[~is_fit]
        scores = errors / task.difficulty_of(logits)
    rank = math.ceil((len(scores) + 1) * coverage - 1e-9)
    return replace(task, quantile=float(scores.sort().values[rank - 1]))


def _fit_difficulty(task: Task, logits: Tensor, errors: Tensor) -> list[float]:
    """Return the weights of `Task.difficulty_of` under which the errors (N,) are most likely, as exponentially
    distributed around the difficulty; with a small penalty on all weights but the first."""
    from scipy.optimize import minimize

    features, errors = task.difficulty_features(logits).numpy(), errors.numpy()

    def loss(weights: np.ndarray) -> tuple[float, np.ndarray]:
        log = features @ weights
        ratio = errors * np.exp(-log)
        penalty = weights * (np.arange(len(weights)) > 0) / len(errors)
        return float((log + ratio).mean() + weights @ penalty / 2), features.T @ (1 - ratio) / len(errors) + penalty

    start = np.zeros(features.shape[1])
    start[0] = math.log(errors.mean() + 1e-9)
    return [float(f"{weight:.6g}") for weight in minimize(loss, start, jac=True, method="BFGS").x]


def measure_coverage(task: Task, logits: Tensor, targets: Tensor) -> dict:
    """Return {"asked", "reached", "interval", "size"}: the share of test records whose target is in its set or
    interval, the 95 % interval of this share (Wilson, 1927), and the mean number of classes or width."""
    if not task.coverage:
        return {}
    values = task.activate(logits)
    if task.kind == "regression":
        (lower, upper), expected = task.interval(logits, values), task.decode(targets)
        inside, sizes = (lower <= expected) & (expected <= upper), upper - lower
    else:
        sets = task.sets(values)
        inside, sizes = sets.gather(1, targets.long()[:, None])[:, 0], sets.sum(dim=1)
    size = sizes.double().mean().item()
    return {"asked": task.coverage, **_share(int(inside.sum()), len(inside)), "size": size}


def pool_coverage(folds: list[dict], rows: list[int]) -> dict:
    """Return one result of `measure_coverage` for those of folds with these numbers of test records."""
    if not folds[0]:
        return {}
    inside = sum(round(fold["reached"] * count) for fold, count in zip(folds, rows, strict=True))
    size = float(np.average([fold["size"] for fold in folds], weights=rows))
    return {"asked": folds[0]["asked"], **_share(inside, sum(rows)), "size": size}


def _share(inside: int, count: int) -> dict:
    return {"reached": inside / count, "interval": wilson_interval(inside / count, count)}


def describe_coverage(task: Task, coverage: dict) -> str:
    """Return what `measure_coverage` found as a sentence."""
    if not coverage:
        return ""
    low, high = coverage["interval"]
    what, size = "sets", f"a set holds {coverage['size']:.3g} of {len(task.classes)} classes"
    if task.kind == "regression":
        what, size = "intervals", f"an interval is {coverage['size']:.4g} wide"
    return (
        f"Coverage {coverage['asked']:g}: the {what} hold the target of {coverage['reached']:.1%} of the test records "
        f"({low:.1%} to {high:.1%}); on average {size}."
    )
