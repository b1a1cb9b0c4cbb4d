"""The learning curve: how good a model is after training on parts of the training rows, and whether more would help."""

import math
from collections.abc import Callable
from dataclasses import replace

import numpy as np

from evaluation.comparison import record_losses
from evaluation.held_out import is_worse
from preprocessing.parsing import canonical_codes
from preprocessing.targets import stratify_labels

SHARES = (1 / 8, 1 / 4, 1 / 2)  # of the training rows; each part holds the one before
LEAST = 16  # rows of a part


def learning_curve(splits, seed: int, whole: tuple, fit: Callable) -> tuple[list[dict], str]:
    """Return ([{"rows", "loss"}, …], a sentence that says whether more rows would help), measured on validation rows.

    whole: (task, logits, targets) of the validation split, by the model trained on all rows.  fit: a function from
    Splits to the same. The loss is the log-loss, or the root mean squared error in the data's units.
    """
    parts = []
    for share in SHARES:
        rows = _some_rows(splits, share, seed)
        if len(rows) >= LEAST:
            print(f"\nlearning curve: {len(rows)} of {len(splits.train)} training rows", flush=True)
            parts.append((len(rows), fit(replace(splits, train=splits.train.iloc[rows], notes=[]))))
    parts.append((len(splits.train), whole))
    losses = [
        record_losses(task, task.activate(logits).numpy(), task.decode(targets).numpy())
        for _, (task, logits, targets) in parts
    ]
    is_regression = whole[0].kind == "regression"

    def shown(mean: float) -> float:
        return math.sqrt(max(mean, 0.0)) if is_regression else mean

    curve = [{"rows": rows, "loss": shown(float(of.mean()))} for (rows, _), of in zip(parts, losses, strict=True)]
    if len(parts) < 3:
        return curve, "There are too few training rows for a learning curve."
    before, gain = (float((losses[i] - losses[i + 1]).mean()) for i in (-3, -2))
    what, now = "root mean squared error" if is_regression else "log-loss", curve[-1]["loss"]
    if not is_worse(losses[-2], losses[-1]):
        return curve, (
            f"More training rows would hardly help, as far as {len(losses[-1])} validation rows can tell: {what} "
            f"{curve[-2]['loss']:.4g} with {parts[-2][0]} rows, {now:.4g} with {parts[-1][0]}."
        )
    # If the loss is a + b·rows^−c, each doubling gains a constant share of the gain before.
    share = min(1.0, gain / before) if before > 0 else 1.0
    expected = shown(float(losses[-1].mean()) - share * gain)
    return curve, (
        f"More training rows would help: {what} {curve[-2]['loss']:.4g} with {parts[-2][0]} rows, {now:.4g} with "
        f"{parts[-1][0]}, and about {expected:.4g} with {2 * parts[-1][0]}."
    )


def _some_rows(splits, share: float, seed: int) -> np.ndarray:
    """Return the positions of a share of the training rows: of each class, or of whole groups. A smaller share is a
    part of a larger one."""
    train, count, group = splits.train, len(splits.train), splits.config.group
    random, form = np.random.default_rng(seed), splits.config.column_formats().get(splits.target, "")
    labels = stratify_labels(train[splits.target], splits.kind, 1, form)
    units = canonical_codes(train[group])[0] if group else np.arange(count)
    order = random.permutation(units.max() + 1)[units] + random.random(count) / 2  # groups one after the other
    kept = np.zeros(count, bool)
    for label in [None] if labels is None or group else np.unique(labels):
        rows = np.arange(count) if label is None else np.flatnonzero(labels == label)
        kept[rows[np.argsort(order[rows])[: max(2, round(share * len(rows)))]]] = True
    return np.flatnonzero(kept)
