"""Figures of a report: curves of training, and what the predictions of the test split show."""

import numpy as np
import pandas as pd
import torch

from evaluation import html

MAX_CLASSES = 30  # of a confusion matrix


def curves(history: pd.DataFrame, best_epoch: int, learning_curve: list[dict]) -> str:
    """Return the figures of training.  learning_curve: [{"rows", "loss"}, …], or empty."""

    def losses(axes):
        axes.plot(history["epoch"], history["train/loss"], color=html.BLUE, label="training")
        axes.plot(history["epoch"], history["val/loss"], color=html.ORANGE, label="validation")
        axes.axvline(best_epoch, color=html.GREY, linestyle=":")

    def rates(axes):
        axes.plot(history["epoch"], history["lr"], color=html.BLUE)

    figures = [(f"Loss; the dotted line is the best epoch, {best_epoch}", html.draw(losses, "epoch", "loss"))]
    name = next(name for name in history if name.startswith("val/") and name != "val/loss")

    def metric(axes):
        axes.plot(history["epoch"], history[name], color=html.ORANGE)

    figures.append((f"{name.removeprefix('val/')} on the validation split", html.draw(metric, "epoch", name)))

    def parts(axes):
        axes.plot([point["rows"] for point in learning_curve], [point["loss"] for point in learning_curve], "o-")
        axes.set_xscale("log", base=2)
        axes.set_xticks([point["rows"] for point in learning_curve], [str(point["rows"]) for point in learning_curve])
        axes.minorticks_off()

    figures.append(("Learning rate", html.draw(rates, "epoch", "lr")))
    if learning_curve:
        caption = "Learning curve: validation loss after training on parts of the rows"
        figures.append((caption, html.draw(parts, "training rows", "loss")))
    return html.plots(figures)


def judge(task, predictions: pd.DataFrame, targets: torch.Tensor) -> str:
    """Return tables and figures of predictions, as `Task.to_columns` makes them, and targets (N,), encoded."""
    if task.kind == "regression":
        return html.plots(_regression_plots(predictions))
    labels, names = targets.long().numpy(), list(map(str, task.classes))
    probabilities = task.from_columns(predictions)
    predicted = task.decide(torch.from_numpy(probabilities)).numpy()
    matrix = _confusion(labels, predicted, names) if len(names) <= MAX_CLASSES else ""
    per_class = []
    for i, name in enumerate(names):
        found, is_class = predicted == i, labels == i
        right = int((found & is_class).sum())
        precision = right / found.sum() if found.any() else np.nan
        recall = right / is_class.sum() if is_class.any() else np.nan
        per_class.append([name, int(is_class.sum()), int(found.sum()), float(precision), float(recall)])
    header = ["class", "records", "predicted", "precision", "recall"]
    figures = _binary_plots(task, labels, probabilities[:, 1]) if task.kind == "binary" else []
    figures.append(_reliability(labels, predicted, probabilities))
    return matrix + html.table(per_class, header) + html.plots(figures)


def _confusion(labels: np.ndarray, predicted: np.ndarray, names: list[str]) -> str:
    counts = np.zeros((len(names), len(names)), int)
    np.add.at(counts, (labels, predicted), 1)
    head = "".join(f'<th class="number">{html.text(name)}</th>' for name in names)
    rows = ""
    for name, row in zip(names, counts, strict=True):
        shades = row / max(1, row.sum())
        cells = "".join(
            f'<td class="number" style="background: rgb(59 125 216 / {0.6 * shade:.2f})">{count}</td>'
            for count, shade in zip(row, shades, strict=True)
        )
        rows += f"<tr><th>{html.text(name)}</th>{cells}</tr>"
    caption = "<caption>Confusion matrix: a row for each class, a column for each prediction</caption>"
    return f'<div class="wide"><table>{caption}<tr><th></th>{head}</tr>{rows}</table></div>'


def _binary_plots(task, labels: np.ndarray, p: np.ndarray) -> list[tuple[str, str]]:
    from sklearn.metrics import precision_recall_curve, roc_curve

    if labels.min() == labels.max():
        return []
    above = p > task.threshold
    false_rate, true_rate, _ = roc_curve(labels, p)
    precision, recall, _ = precision_recall_curve(labels, p)

    def roc(axes):
        axes.plot([0, 1], [0, 1], color=html.GREY, linestyle=":")
        axes.plot(false_rate, true_rate, color=html.BLUE)
        axes.plot(above[labels == 0].mean(), above[labels == 1].mean(), "o", color=html.ORANGE)

    def precision_recall(axes):
        axes.axhline(labels.mean(), color=html.GREY, linestyle=":")
        axes.plot(recall, precision, color=html.BLUE)
        if above.any():
            axes.plot(above[labels == 1].mean(), labels[above].mean(), "o", color=html.ORANGE)

    threshold = f"the point is the decision threshold, {task.threshold:.3g}"
    return [
        (f"ROC curve of {task.classes[1]}; {threshold}", html.draw(roc, "false positive rate", "true positive rate")),
        (
            f"Precision and recall of {task.classes[1]}",
            html.draw(precision_recall, "recall", "precision", ylim=(0, 1.03)),
        ),
    ]


def _reliability(labels: np.ndarray, predicted: np.ndarray, probabilities: np.ndarray) -> tuple[str, str]:
    """Return the share of right predictions against their probability, in ten bins of equally many records, and the
    expected calibration error (Guo et al., 2017)."""
    if probabilities.shape[1] == 2:
        p, right = probabilities[:, 1], labels == 1
    else:
        p, right = probabilities[np.arange(len(labels)), predicted], labels == predicted
    bins = np.array_split(np.argsort(p), min(10, len(p)))
    points = np.array([(p[rows].mean(), right[rows].mean(), len(rows)) for rows in bins])
    error = float((abs(points[:, 0] - points[:, 1]) * points[:, 2]).sum() / len(p))

    def plot(axes):
        axes.plot([0, 1], [0, 1], color=html.GREY, linestyle=":")
        axes.plot(points[:, 0], points[:, 1], "o-", color=html.BLUE)

    caption = f"Reliability: expected calibration error {error:.3f}"
    return caption, html.draw(plot, "predicted probability", "observed share", xlim=(0, 1), ylim=(0, 1.03))


def _regression_plots(predictions: pd.DataFrame) -> list[tuple[str, str]]:
    shown = predictions.iloc[:: max(1, len(predictions) // 2000)]
    target, predicted = shown["target"].astype(float), shown["prediction"].astype(float)

    def against(axes):
        ends = [min(target.min(), predicted.min()), max(target.max(), predicted.max())]
        axes.plot(ends, ends, color=html.GREY, linestyle=":")
        axes.plot(target, predicted, ".", color=html.BLUE, alpha=0.5)

    def residuals(axes):
        axes.axhline(0, color=html.GREY, linestyle=":")
        axes.plot(predicted, target - predicted, ".", color=html.BLUE, alpha=0.5)

    return [
        ("Predictions against targets; on the line they are equal", html.draw(against, "target", "prediction")),
        ("Residuals: target − prediction", html.draw(residuals, "prediction", "residual")),
    ]
