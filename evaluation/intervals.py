"""How certain a metric of the test split is: bootstrap intervals, and no more digits than they support."""

import math
from collections.abc import Callable, Iterator

import numpy as np
from torch import Tensor

DRAWS, WORK = 1000, 20_000_000  # draws at most, and records of all draws
MIN_DRAWS = 200


def bootstrap(
    task, logits: Tensor, targets: Tensor, groups: np.ndarray | None = None, *, seed: int = 0
) -> dict[str, list[float]]:
    """Return the 95 % percentile interval [low, high] of each metric but the loss (Efron and Tibshirani, 1993).

    Records are drawn with replacement: within each class, so that the shares of the classes stay, or whole groups.
    logits: (N, …).  targets: (N,), encoded.  groups: a group of each record. Metrics that are not defined have none.
    """
    labels = task.decode(targets).numpy()
    compute = weighted_metrics(task, task.activate(logits).numpy(), labels)
    strata = None if task.kind == "regression" else labels
    found = [compute(weights) for weights in draw_weights(len(labels), strata, groups, seed=seed)]
    columns = {name: np.array([each[name] for each in found]) for name in found[0]}
    defined = {name: column[np.isfinite(column)] for name, column in columns.items()}
    return {name: np.percentile(column, [2.5, 97.5]).tolist() for name, column in defined.items() if len(column)}


def draw_weights(
    count: int, strata: np.ndarray | None = None, groups: np.ndarray | None = None, *, seed: int = 0
) -> Iterator[np.ndarray]:
    """Yield bootstrap samples of `count` records as weights (N,): how often each record is drawn.

    strata: draw records within each of these labels (N,).  groups: draw whole groups instead, (N,).
    """
    random = np.random.default_rng(seed)
    parts = [np.arange(count)]
    if strata is not None:
        parts = [np.flatnonzero(strata == label) for label in np.unique(strata)]
    codes = None if groups is None else np.unique(groups, return_inverse=True)[1]
    for _ in range(min(DRAWS, max(MIN_DRAWS, WORK // count))):
        if codes is not None:
            size = int(codes.max()) + 1
            yield np.bincount(random.integers(0, size, size), minlength=size)[codes].astype(float)
            continue
        weights = np.empty(count)
        for rows in parts:
            weights[rows] = np.bincount(random.integers(0, len(rows), len(rows)), minlength=len(rows))
        yield weights


def weighted_metrics(task, values: np.ndarray, targets: np.ndarray) -> Callable[[np.ndarray], dict[str, float]]:
    """Return a function from weights (N,) to the metrics of `task.metrics()`."""
    if task.kind == "regression":
        errors = values[:, 0] - targets

        def of_values(weights: np.ndarray) -> dict[str, float]:
            total = weights.sum()
            mse, mean = float(weights @ errors**2 / total), weights @ targets / total
            variance = float(weights @ (targets - mean) ** 2 / total)
            r2 = 1 - mse / variance if variance else math.nan
            return {"rmse": math.sqrt(mse), "mse": mse, "mae": float(weights @ abs(errors) / total), "r2": r2}

        return of_values
    import torch

    count, predicted = len(task.classes), task.decide(torch.from_numpy(values)).numpy()
    scored = [1] if task.kind == "binary" else range(count)
    ranks = {label: np.unique(values[:, label], return_inverse=True)[1] for label in scored}

    def of_classes(weights: np.ndarray) -> dict[str, float]:
        right = np.bincount(targets, weights * (targets == predicted), count)
        rows, said = np.bincount(targets, weights, count), np.bincount(predicted, weights, count)
        with np.errstate(invalid="ignore", divide="ignore"):
            f1 = 2 * right / (rows + said)
            roc_auc = [_roc_auc(ranks[label], targets == label, weights) for label in scored]
        occurring = (rows + said > 0) & np.isin(np.arange(count), scored)
        known = np.array(roc_auc)[np.isfinite(roc_auc)]
        return {
            "accuracy": float(right.sum() / rows.sum()),
            "roc_auc": float(known.mean()) if len(known) else math.nan,
            "f1": float(f1[occurring].mean()) if occurring.any() else 0.0,
        }

    return of_classes


def _roc_auc(ranks: np.ndarray, is_class: np.ndarray, weights: np.ndarray) -> float:
    """Return the weighted share of pairs in the right order; ties count half."""
    positive = np.bincount(ranks, weights * is_class)
    negative = np.bincount(ranks, weights * ~is_class)
    below = np.cumsum(negative) - negative / 2
    return float(positive @ below / (positive.sum() * negative.sum()))


def with_interval(value: float, interval: list[float] | None) -> str:
    """Return "0.95 (0.91 to 0.98)", with the digits that the interval supports."""
    if interval is None or interval[0] == interval[1]:
        return f"{value:.4g}"
    value, low, high = (with_digits(x, interval) for x in (value, *interval))
    return f"{value} ({low} to {high})"


def with_digits(value: float, interval: list[float] | None) -> str:
    """Return a number rounded to one or two digits of half the width of an interval."""
    if interval is None or interval[0] == interval[1]:
        return f"{value:.4g}"
    digits = -math.floor(math.log10((interval[1] - interval[0]) / 5))
    return f"{round(value, digits) + 0.0:.{max(0, digits)}f}"
