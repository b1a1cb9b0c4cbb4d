"""Fit the temperature of probabilities and the decision threshold of a rare class to the validation split."""

import math
from dataclasses import replace

import torch
from torch import Tensor

from preprocessing.column import evenly_spaced
from task import Task

ROWS = 10_000  # validation records, evenly spaced, that are read
RARE = 0.2  # share of the records: a rarer class is seldom the more probable one, and gets its own threshold


def calibrate(task: Task, logits: Tensor, targets: Tensor, monitor: str = "loss") -> Task:
    """Return a task whose temperature and threshold suit validation records: (N, …) logits, (N,) encoded targets.

    monitor: the metric that matters; for accuracy the more probable class is predicted, however rare the other.
    The temperature minimises the negative log-likelihood (Guo et al., "On Calibration of Modern Neural Networks",
    2017). It stays 1 unless a likelihood-ratio test finds a difference (5 %). The threshold of a rare class maximises
    its expected F1 score under the calibrated probabilities (Lipton et al., "Optimal Thresholding of Classifiers to
    Maximize F1 Measure", 2014), which is less noisy than the score on its few records.
    """
    if task.kind == "regression":
        return task
    rows = evenly_spaced(torch.arange(len(targets)), ROWS)
    logits, labels = logits[rows], targets[rows].long()
    calibrated = replace(task, temperature=_fit_temperature(task, logits, labels))
    if task.kind == "multiclass" or monitor == "accuracy" or task.class_weights:  # weights find rare classes, too
        return calibrated
    shares = torch.bincount(labels, minlength=2) / len(labels)
    rare = int(shares.argmin())
    if not 0 < shares[rare] < RARE:
        return calibrated
    ordered = calibrated.activate(logits)[:, rare].sort(descending=True).values
    counts = torch.arange(1, len(ordered) + 1)
    last = int((ordered.cumsum(0) / (counts + ordered.sum())).argmax())
    threshold = min(0.5, float(ordered[last : last + 2].mean()))
    return replace(calibrated, threshold=round(threshold if rare == 1 else 1 - threshold, 6))


def _fit_temperature(task: Task, logits: Tensor, labels: Tensor) -> float:
    """Return the temperature with the highest likelihood of `labels`, or 1 if it is not significantly higher."""
    from scipy.optimize import minimize_scalar

    def negative_log_likelihood(log_temperature: float) -> float:
        probabilities = replace(task, temperature=math.exp(log_temperature)).activate(logits)
        return -float(probabilities.gather(1, labels[:, None]).clamp_min(1e-15).log().sum())

    found = minimize_scalar(negative_log_likelihood, bounds=(-1.5, 1.5), method="bounded", options={"xatol": 1e-3})
    gain = negative_log_likelihood(0.0) - found.fun
    return round(math.exp(found.x), 6) if 2 * gain > 3.84 else 1.0  # the 0.95 quantile of chi² with one degree
