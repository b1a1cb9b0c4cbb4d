"""What to do next: sentences about a useless model, about its training, and about too little data, each with a flag."""

import math

import numpy as np
import pandas as pd

FALLING = 0.03  # of the validation loss in the last fifth of the epochs: training ended too early
RISEN = 0.15  # of the validation loss above its minimum: the network overfits
JUMP, JUMPS = 1.5, 0.2  # times the lowest loss so far, and share of the epochs in which it is passed: unstable
WIDE = 0.05  # half an interval of accuracy or R²: the test split is too small to see what a change brings
ENOUGH_EPOCHS = 5  # to say something about a curve


def diagnose(history: pd.DataFrame, val: dict, test: dict, evaluation: dict, task, splits, config) -> list[str]:
    """Return sentences, the most important first.

    history: a row per epoch.  evaluation: what `run_folder.evaluate_test` returns.
    """
    if useless := diagnose_useless(val, test, task, splits, config):
        return useless
    found = [evaluation["comparison"], _judge_curves(history, config.training)]
    found += [] if config.data.folds else [_judge_size(test, evaluation["intervals"], splits)]
    return [sentence for sentence in found if sentence]


def is_useless(metrics: dict, task, records) -> bool:
    """Return whether metrics are no better than always predicting the mean, or the most frequent class.

    Where classes are rare, the accuracy of a good model may equal the share of the frequent class: it is useless only
    if it cannot rank the records either, and its ROC AUC is what chance gives.
    """
    if task.kind == "regression":
        return metrics["r2"] <= 0  # false for NaN, of a single row
    majority = np.bincount(task.encode(records[task.target]).long()).max() / len(records)
    return metrics["accuracy"] <= majority and metrics["roc_auc"] <= 0.5 + min(0.05, 1 / math.sqrt(len(records)))


def diagnose_useless(val: dict, test: dict, task, splits, config) -> list[str]:
    """Return sentences that explain a useless model and what to try; empty if it beats the constant baseline."""
    if not is_useless(test, task, splits.test):
        return []
    names = ("r2",) if task.kind == "regression" else ("accuracy", "roc_auc")
    shown = ", ".join(f"{name} {test[name]:.4g}" for name in names)
    guess = f"the mean of {task.target}" if task.kind == "regression" else "the most frequent class"
    useless = f"on the test split it is no better than always predicting {guess} ({shown})."
    found = "learned nothing" if is_useless(val, task, splits.val) else "does not generalise"
    hints = [f"a lower --lr (now {config.training.lr:g})"]
    hints += [] if config.training.clip_norm else ["--clip-norm 1"]
    hints += [] if config.data.scaling == "quantile" else ["--scaling quantile"]
    return [
        f"The model {found}: {useless}",
        f"Try {', '.join(hints)}, or more --epochs (now {config.training.epochs}).",
    ]


def _judge_curves(history: pd.DataFrame, training) -> str:
    """Return a sentence about the loss curves: unstable, ended too early, overfitting; "" if nothing is wrong."""
    train, val = history["train/loss"].to_numpy(), history["val/loss"].to_numpy()
    count = len(val)
    if count < ENOUGH_EPOCHS or val.min() <= 0:
        return ""
    lowest = np.minimum.accumulate(val)
    if (val[1:] > JUMP * lowest[:-1]).mean() > JUMPS and train[-1] > 0.9 * train[0]:
        return f"Training is unstable: the validation loss jumps. Try a lower --lr (now {training.lr:g})."
    best, last = int(val.argmin()) + 1, count - max(1, count // 5)
    if best == count == training.epochs and 1 - val[-1] / lowest[last - 1] > FALLING:
        return (
            f"The validation loss was still falling in the last epoch: try more --epochs (now {training.epochs}), or a "
            f"higher --lr (now {training.lr:g})."
        )
    if val[-1] > (1 + RISEN) * val.min() and train[-1] < train[best - 1]:
        return (
            f"The network overfits after epoch {best}: the training loss falls on, and the validation loss rises. That "
            "epoch was kept. Try a higher --dropout or --weight-decay, or more data."
        )
    return ""


def _judge_size(test: dict, intervals: dict, splits) -> str:
    """Return a sentence if the test split is too small to tell models apart that differ by a few percent."""
    name = "r2" if "r2" in test else "accuracy"
    low, high = intervals.get(name, (0.0, 0.0))
    if (half := (high - low) / 2) <= WIDE:
        return ""
    return (
        f"The test split has {len(splits.test)} rows, and {name} is known to ±{half:.2g} only. Cross-validation tests "
        "all rows: --folds 5."
    )
