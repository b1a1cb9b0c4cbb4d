"""Whether one model is really better than another: paired comparisons on the same records."""

import math
from collections.abc import Callable
from dataclasses import dataclass, replace

import numpy as np

from evaluation.calibration import calibrate
from evaluation.intervals import draw_weights, weighted_metrics

LEVEL = 0.05  # of a false alarm among all pairs of models
POWER_Z = 0.84  # the 0.8 quantile of the normal distribution: `more_rows` finds the difference in 4 of 5 cases
MANY_TIMES = 100  # times the rows: a difference that takes more is called none
LOWER_IS_BETTER = ("log_loss", "rmse", "mae")
SIMPLER = 0.8  # times the size, or the training time, of the other: less is simpler


@dataclass(frozen=True)
class Paired:
    """A metric of K models on the same records, and the differences of all pairs.

    values: (K,).  difference, half, p: (K, K), for the model of the row minus the model of the column: half the width
    of its 95 % interval, and the p-value, corrected for the number of pairs (Holm, 1979).
    """

    values: np.ndarray
    difference: np.ndarray
    half: np.ndarray
    p: np.ndarray

    def interval(self, i: int, j: int) -> list[float]:
        middle, half = self.difference[i, j], self.half[i, j]
        return [float(middle - half), float(middle + half)]


def compare_draws(values: np.ndarray, draws: np.ndarray, count: int) -> Paired:
    """Compare a metric of K models, values (K,), by its values in B bootstrap samples of the same records, (B, K).

    count: records, or groups of records, that were drawn. An interval is the difference ± t bootstrap standard errors
    (Efron and Tibshirani, 1993, chapter 13; for a mean it is the interval of the paired t-test).
    """
    from scipy import stats

    difference = values[:, None] - values[None]
    spread = np.array([np.nanstd(draws - draws[:, [i]], axis=0, ddof=1) for i in range(len(values))])
    error = spread * math.sqrt(count / max(1, count - 1))  # a bootstrap sample varies as if it had a record more
    error[error < 1e-12] = 0
    half = stats.t.ppf(1 - LEVEL / 2, max(1, count - 1)) * error
    with np.errstate(divide="ignore", invalid="ignore"):
        p = np.where(error > 0, 2 * stats.t.sf(abs(difference) / error, max(1, count - 1)), 1.0)
    return Paired(values, difference, half, holm(p))


def compare_means(losses: np.ndarray, groups: np.ndarray | None = None) -> Paired:
    """Compare the mean losses of K models on the same records: losses (N, K).  groups: of the records, drawn whole."""
    draws = np.array([weights @ losses / weights.sum() for weights in draw_weights(len(losses), None, groups)])
    return compare_draws(losses.mean(axis=0), draws, _count(losses, groups))


def compare_models(tasks: list, values: list[np.ndarray], targets: np.ndarray, groups=None) -> dict[str, Paired]:
    """Compare models by each metric: log-loss, accuracy, ROC AUC and F1, or RMSE and MAE. The first one decides.

    tasks: of each model.  values: what `task.activate` returns, (N, classes) or (N, 1).  targets: (N,), decoded.
    groups: of the records, drawn whole. Without them, the p-value of the accuracy is McNemar's.
    """
    metrics = [_metrics(task, each, targets) for task, each in zip(tasks, values, strict=True)]
    names = list(metrics[0](np.ones(len(targets))))

    def compute(weights: np.ndarray) -> list[list[float]]:
        found = [metric(weights) for metric in metrics]
        return [[each[name] for each in found] for name in names]

    whole = np.array(compute(np.ones(len(targets))))  # (metrics, K)
    draws = np.array([compute(weights) for weights in draw_weights(len(targets), None, groups)])
    found = {name: compare_draws(whole[i], draws[:, i], _count(targets, groups)) for i, name in enumerate(names)}
    if "accuracy" in found and groups is None:
        import torch

        right = np.array([t.decide(torch.from_numpy(v)).numpy() == targets for t, v in zip(tasks, values, strict=True)])
        p = np.array([[mcnemar(a, b) for b in right] for a in right])
        found["accuracy"] = replace(found["accuracy"], p=holm(p))
    return found


def _count(records: np.ndarray, groups: np.ndarray | None) -> int:
    return len(records) if groups is None else len(np.unique(groups))


def _metrics(task, values: np.ndarray, targets: np.ndarray) -> Callable[[np.ndarray], dict[str, float]]:
    """Return a function from weights (N,) to the metrics by which models are compared."""
    compute, losses = weighted_metrics(task, values, targets), record_losses(task, values, targets)

    def of_records(weights: np.ndarray) -> dict[str, float]:
        found = compute(weights)
        if task.kind == "regression":
            return {name: found[name] for name in ("rmse", "mae")}
        return {"log_loss": float(weights @ losses / weights.sum()), **found}

    return of_records


def record_losses(task, values: np.ndarray, targets: np.ndarray) -> np.ndarray:
    """Return the loss of each record, (N,): the squared error in the units of the data, or −log p of its class.

    values: what `task.activate` returns, (N, classes) or (N, 1).  targets: (N,), decoded.
    """
    if task.kind == "regression":
        return (values[:, 0] - targets) ** 2
    return -np.log(values[np.arange(len(targets)), targets].clip(1e-6))


def validation_losses(trainer, loader) -> np.ndarray:
    """Return the loss of each record of a validation loader, (N,), with probabilities calibrated on it."""
    logits, targets = trainer.logits(loader)
    task = calibrate(trainer.task, logits, targets, trainer.config.monitor)
    return record_losses(task, task.activate(logits).numpy(), task.decode(targets).numpy())


def compare_networks(first: tuple, second: tuple, names: tuple[str, str]) -> tuple[bool, str]:
    """Return whether the second (trainer, validation loader) has the lower mean loss, and a sentence with both."""
    losses = [float(validation_losses(*each).mean()) for each in (first, second)]
    kept = losses[1] < losses[0]
    classifies = bool(first[0].task.classes)
    low, high = (f"{x if classifies else math.sqrt(x):.4g}" for x in sorted(losses))
    return kept, (
        f"On the validation split, {names[kept]} is better than {names[not kept]}, and is kept: "
        f"{'log-loss' if classifies else 'RMSE'} {low} against {high}."
    )


def mcnemar(right: np.ndarray, other: np.ndarray) -> float:
    """Return the exact p-value that two models are equally often right (McNemar, 1947): (N,) booleans each.

    Only the records count on which one is right and the other is not: each is then a fair coin.
    """
    from scipy.stats import binomtest

    only, other_only = int((right & ~other).sum()), int((other & ~right).sum())
    return float(binomtest(only, only + other_only).pvalue) if only + other_only else 1.0


def holm(p: np.ndarray) -> np.ndarray:
    """Correct the p-values (K, K) of all pairs of models, so that one false alarm among them is as rare as asked.

    All pairs count, also if only those with the best model are shown: the data have chosen the best.
    """
    rows, columns = np.triu_indices(len(p), 1)
    order = np.argsort(p[rows, columns])
    factors = np.arange(len(order), 0, -1)
    corrected, pairs = np.ones_like(p), (rows[order], columns[order])
    corrected[pairs] = np.maximum.accumulate(np.minimum(1, factors * p[pairs]))
    return np.minimum(corrected, corrected.T)


def best_model(name: str, paired: Paired) -> int:
    """Return the model with the best value of the metric called `name`."""
    return int(np.nanargmin(paired.values if name in LOWER_IS_BETTER else -paired.values))


def verdict(name: str, paired: Paired, i: int, j: int) -> str:
    """Return whether model i is "better" or "worse" than model j by the metric called `name`, or "cannot tell"."""
    if not paired.p[i, j] < LEVEL:
        return "the same" if paired.difference[i, j] == paired.half[i, j] == 0 else "cannot tell"
    return "better" if (paired.difference[i, j] < 0) == (name in LOWER_IS_BETTER) else "worse"


def more_rows(paired: Paired, i: int, j: int, rows: int) -> float:
    """Return about how many more test rows would tell models i and j apart in 4 of 5 cases, if they differ by as much
    as they seem to; infinity if that is more than a hundred times as many.

    The standard error falls with the square root of the rows (Cohen, 1988).
    """
    from scipy import stats

    pairs = len(paired.values) * (len(paired.values) - 1) / 2
    error = paired.half[i, j] / 1.96
    distance = abs(paired.difference[i, j]) / error if error else 0.0
    wanted = stats.norm.isf(LEVEL / 2 / pairs) + POWER_Z
    if wanted > math.sqrt(MANY_TIMES) * distance:
        return math.inf
    return max(1.0, rows * ((wanted / distance) ** 2 - 1))


def simpler(others: list[int], best: int, sizes: list[int], seconds: list[float]) -> tuple[int, str]:
    """Return the model to prefer among `best` and the others that cannot be told from it, and why.

    A smaller model costs less wherever it runs, so the size counts first: bytes of weights and preprocessor. Models of
    about the same size are ordered by their seconds of training. 0 = unknown.
    """
    everyone = [best, *others]
    if all(sizes[i] for i in everyone):
        small = min(everyone, key=lambda i: sizes[i])
        if sizes[small] < SIMPLER * sizes[best]:
            return small, f"it is smaller ({_bytes(sizes[small])} against {_bytes(sizes[best])})"
        everyone = [i for i in everyone if sizes[i] <= sizes[best] / SIMPLER]
    if all(seconds[i] for i in everyone):
        quick = min(everyone, key=lambda i: seconds[i])
        if seconds[quick] < SIMPLER * seconds[best]:
            return quick, f"it trains faster ({seconds[quick]:.3g} s against {seconds[best]:.3g} s)"
    return best, ""


def _bytes(size: int) -> str:
    return f"{size / 1e6:.3g} MB" if size >= 1e6 else f"{size / 1e3:.3g} kB"
