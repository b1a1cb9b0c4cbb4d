"""Write report.html: one self-contained page that says how good a run is, and what its model gets wrong."""

import shlex

import numpy as np
import pandas as pd
import torch

from config import Config
from evaluation import html
from evaluation.conformal import describe_coverage
from pipeline import atomic_write
from preprocessing.preprocessor import take

WORST = 10  # test records that are shown
CELL = 120  # characters of a cell that are shown
MAX_CLASSES = 30  # of a confusion matrix
IMPORTANCE_ROWS, IMPORTANCE_DRAWS = 500, 5  # test records whose cells are permuted, and how often


def write_report(result, splits, config: Config, metrics: dict) -> None:
    """Write report.html into the run folder.

    result: a train.Run.  metrics: the content of metrics.json.
    """
    task = result.pipeline.task
    targets = task.encode(splits.test[splits.target])
    sections = [
        ("Result", _scores(metrics) + html.bullets([describe_coverage(task, metrics["coverage"])])),
        (
            "What to know",
            html.bullets([*(each["finding"] for each in metrics["audit"]), *result.diagnosis, *splits.notes]),
        ),
        ("Training", html.plots(_curves(result.history, metrics["best_epoch"]))),
        ("Predictions of the test split", _judge(task, result.predictions, targets)),
        ("Importance of columns", _importance(result.pipeline, splits)),
        ("Worst predictions of the test split", _worst(result.pipeline, result.predictions, splits, targets)),
        ("Columns", html.table(result.pipeline.preprocessor.summary(), ["column", "kind", "what is done with it"])),
        ("How to run this again", _reproduce(splits, config, metrics)),
    ]
    introduction = (
        f"{metrics['model']} on {splits.sources[0]}: {metrics['rows']['train']} training, "
        f"{metrics['rows']['val']} validation and {metrics['rows']['test']} test rows."
    )
    with atomic_write(result.out / "report.html") as file:
        file.write(html.page(f"{task.target}: {task.kind}", introduction, sections))


# ---------------------------------------------------------------- sections


def _scores(metrics: dict) -> str:
    """Return the test metrics with their intervals, beside the metrics of the baselines."""
    names, baselines, intervals = list(metrics["test"]), metrics["baselines"], metrics["intervals"]
    rows = []
    for name in names:
        low, high = intervals.get(name, (None, None))
        interval = "" if low is None else f"{html.number(low)} to {html.number(high)}"
        others = [baseline.get(name) for baseline in baselines.values()]
        rows.append(
            [name, float(metrics["test"][name]), interval, *(float(np.nan if x is None else x) for x in others)]
        )
    return html.table(rows, ["test split", "network", "95 % interval", *baselines])


def _curves(history: pd.DataFrame, best_epoch: int) -> list[tuple[str, str]]:
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
    return [*figures, ("Learning rate", html.draw(rates, "epoch", "lr"))]


def _judge(task, predictions: pd.DataFrame, targets: torch.Tensor) -> str:
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


def _importance(pipeline, splits) -> str:
    """Return how much the loss rises if the cells of a column are permuted among test records (Breiman, 2001)."""
    test = splits.test.iloc[:: max(1, len(splits.test) // IMPORTANCE_ROWS)].head(IMPORTANCE_ROWS)
    task, names = pipeline.task, pipeline.preprocessor.names
    if len(names) < 2 or len(test) < 10:
        return ""
    targets, records = task.encode(test[splits.target]), test.drop(columns=splits.target)
    parts, logits = pipeline.predict_logits(records)
    sources = {features.name: features.source for features in pipeline.preprocessor.derived}
    base, random, rows = float(task.loss(logits, targets)), np.random.default_rng(0), []
    for name in names:
        rises = []
        for _ in range(IMPORTANCE_DRAWS):
            order = torch.from_numpy(random.permutation(len(test)))
            moved = {key: take(x, order) if sources.get(key, key) == name else x for key, x in parts.items()}
            rises.append(float(task.loss(pipeline.logits(pipeline.preprocessor.join(moved)), targets)) - base)
        rows.append([name, float(np.mean(rises)), f"± {2 * np.std(rises, ddof=1) / IMPORTANCE_DRAWS**0.5:.2g}"])
    rows.sort(key=lambda row: -row[1])
    caption = f"Rise of the loss ({base:.4g}) when the cells of a column are exchanged between records"
    return html.table(rows[:30], ["column", "rise of the loss", "95 % interval"], caption)


def _worst(pipeline, predictions: pd.DataFrame, splits, targets: torch.Tensor) -> str:
    task, names = pipeline.task, pipeline.preprocessor.names
    if task.kind == "regression":
        error = abs(predictions["target"].astype(float) - predictions["prediction"].astype(float)).to_numpy()
        shown = ["row", "target", "prediction"]
    else:
        probabilities = task.from_columns(predictions)
        error = 1 - probabilities[np.arange(len(targets)), targets.long().numpy()]
        shown = ["row", "target", "prediction", "probability"]
    worst = np.argsort(-error, kind="stable")[:WORST]
    cells = splits.test[names].iloc[worst].reset_index(drop=True)
    cells = cells.iloc[:, :12].map(lambda cell: str(cell)[:CELL] + ("…" if len(str(cell)) > CELL else ""))
    table = pd.concat([predictions[shown].iloc[worst].reset_index(drop=True), cells], axis=1)
    return html.table(table.astype(object).to_numpy().tolist(), list(table.columns))


def _reproduce(splits, config: Config, metrics: dict) -> str:
    defaults, flags = Config().to_dict(), []
    for group, values in config.to_dict().items():
        changed = {k: v for k, v in values.items() if v != defaults[group][k] and k not in ("out", "resume")}
        flags += [as_flag(name, value) for name, value in changed.items()]
    rows = [[k, metrics[k]] for k in ("epochs", "best_epoch", "device", "threads", "weights_sha256") if k in metrics]
    return f"<p><code>python train.py {html.text(' '.join(flags))}</code></p>" + html.table(rows, ["", ""])


def as_flag(name: str, value) -> str:
    """Return a field of config.py as a person writes it on the command line."""
    name = name.replace("_", "-")
    if isinstance(value, bool):
        return f"--{name}" if value else f"--no-{name}"
    return shlex.join([f"--{name}", *map(str, value if isinstance(value, list) else [value])])
