"""Write report.html: one self-contained page that says how good a run is, and what its model gets wrong."""

import html
import io
import re
import shlex

import numpy as np
import pandas as pd
import torch

from config import Config
from pipeline import atomic_write
from preprocessing.preprocessor import take

WORST = 10  # test records that are shown
CELL = 120  # characters of a cell that are shown
MAX_CLASSES = 30  # of a confusion matrix
IMPORTANCE_ROWS, IMPORTANCE_DRAWS = 500, 5  # test records whose cells are permuted, and how often
BLUE, ORANGE, GREY = "#3b7dd8", "#d9822b", "#8a8a8a"  # readable on white and on black

STYLE = """
:root { color-scheme: light dark; --line: #8884; --soft: #8882; }
body { font: 16px/1.5 system-ui, sans-serif; margin: 0 auto; padding: 1rem; max-width: 60rem; }
h1 { font-size: 1.6rem; margin: 0; overflow-wrap: anywhere; } h2 { font-size: 1.2rem; margin: 2rem 0 .5rem; }
.wide { overflow-x: auto; margin: .5rem 0 1rem; } .plots { display: flex; flex-wrap: wrap; gap: 1rem; }
figure { margin: 0; flex: 1 1 17rem; max-width: 28rem; } figcaption { font-size: .9rem; opacity: .8; }
svg { width: 100%; height: auto; } svg text { fill: currentColor; font-family: inherit; }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; }
caption { text-align: left; opacity: .8; white-space: nowrap; }
th, td { border-bottom: 1px solid var(--line); padding: .2rem .6rem; text-align: left; vertical-align: top; }
td { max-width: 24rem; min-width: 3rem; overflow-wrap: break-word; }
td.number, th.number { text-align: right; white-space: nowrap; }
.findings li { margin: .3rem 0; } code { background: var(--soft); padding: .1rem .3rem; overflow-wrap: anywhere; }
@media print { body { max-width: none; font-size: 11pt; } h2 { break-after: avoid; } figure, tr { break-inside: avoid; }
}
"""


def write_report(result, splits, config: Config, metrics: dict) -> None:
    """Write report.html into the run folder.

    result: a train.Run.  metrics: the content of metrics.json.
    """
    task = result.pipeline.task
    targets = task.encode(splits.test[splits.target])
    sections = [
        ("Result", _scores(metrics)),
        ("What to know", _list([*(each["finding"] for each in metrics["audit"]), *result.diagnosis, *splits.notes])),
        ("Training", _plots(_curves(result.history, metrics["best_epoch"]))),
        ("Predictions of the test split", _judge(task, result.predictions, targets)),
        ("Importance of columns", _importance(result.pipeline, splits)),
        ("Worst predictions of the test split", _worst(result.pipeline, result.predictions, splits, targets)),
        ("Columns", _table(result.pipeline.preprocessor.summary(), ["column", "kind", "what is done with it"])),
        ("How to run this again", _reproduce(splits, config, metrics)),
    ]
    title = f"{task.target}: {task.kind}"
    body = "".join(f"<section><h2>{name}</h2>{content}</section>" for name, content in sections if content)
    with atomic_write(result.out / "report.html") as file:
        file.write(
            f'<!doctype html><html><head><meta charset="utf-8"><title>{_text(title)}</title>'
            '<meta name="viewport" content="width=device-width, initial-scale=1">'
            f"<style>{STYLE}</style></head><body><h1>{_text(title)}</h1>"
            f"<p>{_text(metrics['model'])} on {_text(splits.sources[0])}: {metrics['rows']['train']} training, "
            f"{metrics['rows']['val']} validation and {metrics['rows']['test']} test rows.</p>{body}</body></html>\n"
        )


# ---------------------------------------------------------------- HTML


def _text(value) -> str:
    return html.escape(str(value))


def _number(value) -> str:
    return "–" if value is None or value != value else f"{value:.4g}"


def _list(sentences: list[str]) -> str:
    items = "".join(f"<li>{_text(sentence)}</li>" for sentence in sentences)
    return f'<ul class="findings">{items}</ul>' if items else ""


def _table(rows, header: list[str], caption: str = "") -> str:
    """Return an HTML table. Numbers are rounded and aligned to the right."""

    def cell(value) -> str:
        if isinstance(value, float):
            return f'<td class="number">{_number(value)}</td>'
        return f'<td class="number">{value}</td>' if isinstance(value, int) else f"<td>{_text(value)}</td>"

    head = "".join(f"<th>{_text(name)}</th>" for name in header)
    body = "".join(f"<tr>{''.join(map(cell, row))}</tr>" for row in rows)
    title = f"<caption>{_text(caption)}</caption>" if caption else ""
    return f'<div class="wide"><table>{title}<thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div>'


def _plots(figures: list[tuple[str, str]]) -> str:
    shown = "".join(f"<figure>{svg}<figcaption>{_text(caption)}</figcaption></figure>" for caption, svg in figures)
    return f'<div class="plots">{shown}</div>'


def _draw(plot, xlabel: str, ylabel: str, **limits) -> str:
    """Return what `plot(axes)` draws as SVG whose text and axes take the colour of the page."""
    import matplotlib
    from matplotlib.figure import Figure

    with matplotlib.rc_context({"svg.fonttype": "none", "svg.hashsalt": "report", "font.size": 11}):
        figure = Figure(figsize=(4.2, 3.2), layout="constrained")
        axes = figure.subplots()
        plot(axes)
        axes.set(xlabel=xlabel, ylabel=ylabel, **limits)
        axes.spines[["top", "right"]].set_visible(False)
        if axes.get_legend_handles_labels()[0]:
            axes.legend(frameon=False)
        file = io.StringIO()
        figure.savefig(file, format="svg", transparent=True, metadata={"Date": None, "Creator": None})
    svg = file.getvalue()
    svg = re.sub(r"<metadata>.*?</metadata>", "", svg[svg.index("<svg") :], flags=re.DOTALL)
    return svg.replace("#000000", "currentColor")


# ---------------------------------------------------------------- sections


def _scores(metrics: dict) -> str:
    """Return the test metrics with their intervals, beside those of the baselines."""
    names, baselines, intervals = list(metrics["test"]), metrics["baselines"], metrics["intervals"]
    rows = []
    for name in names:
        low, high = intervals.get(name, (None, None))
        interval = "" if low is None else f"{_number(low)} to {_number(high)}"
        others = [baseline.get(name) for baseline in baselines.values()]
        rows.append(
            [name, float(metrics["test"][name]), interval, *(float(np.nan if x is None else x) for x in others)]
        )
    return _table(rows, ["test split", "network", "95 % interval", *baselines])


def _curves(history: pd.DataFrame, best_epoch: int) -> list[tuple[str, str]]:
    def losses(axes):
        axes.plot(history["epoch"], history["train/loss"], color=BLUE, label="training")
        axes.plot(history["epoch"], history["val/loss"], color=ORANGE, label="validation")
        axes.axvline(best_epoch, color=GREY, linestyle=":")

    def rates(axes):
        axes.plot(history["epoch"], history["lr"], color=BLUE)

    figures = [(f"Loss; the dotted line is the best epoch, {best_epoch}", _draw(losses, "epoch", "loss"))]
    name = next(name for name in history if name.startswith("val/") and name != "val/loss")

    def metric(axes):
        axes.plot(history["epoch"], history[name], color=ORANGE)

    figures.append((f"{name.removeprefix('val/')} on the validation split", _draw(metric, "epoch", name)))
    return [*figures, ("Learning rate", _draw(rates, "epoch", "lr"))]


def _judge(task, predictions: pd.DataFrame, targets: torch.Tensor) -> str:
    if task.kind == "regression":
        return _plots(_regression_plots(predictions))
    labels, names = targets.long().numpy(), list(map(str, task.classes))
    probabilities = predictions[[f"probability_{name}" for name in names]].to_numpy(copy=True)
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
    return matrix + _table(per_class, header) + _plots(figures)


def _confusion(labels: np.ndarray, predicted: np.ndarray, names: list[str]) -> str:
    counts = np.zeros((len(names), len(names)), int)
    np.add.at(counts, (labels, predicted), 1)
    head = "".join(f'<th class="number">{_text(name)}</th>' for name in names)
    rows = ""
    for name, row in zip(names, counts, strict=True):
        shades = row / max(1, row.sum())
        cells = "".join(
            f'<td class="number" style="background: rgb(59 125 216 / {0.6 * shade:.2f})">{count}</td>'
            for count, shade in zip(row, shades, strict=True)
        )
        rows += f"<tr><th>{_text(name)}</th>{cells}</tr>"
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
        axes.plot([0, 1], [0, 1], color=GREY, linestyle=":")
        axes.plot(false_rate, true_rate, color=BLUE)
        axes.plot(above[labels == 0].mean(), above[labels == 1].mean(), "o", color=ORANGE)

    def precision_recall(axes):
        axes.axhline(labels.mean(), color=GREY, linestyle=":")
        axes.plot(recall, precision, color=BLUE)
        if above.any():
            axes.plot(above[labels == 1].mean(), labels[above].mean(), "o", color=ORANGE)

    threshold = f"the point is the decision threshold, {task.threshold:.3g}"
    return [
        (f"ROC curve of {task.classes[1]}; {threshold}", _draw(roc, "false positive rate", "true positive rate")),
        (f"Precision and recall of {task.classes[1]}", _draw(precision_recall, "recall", "precision", ylim=(0, 1.03))),
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
        axes.plot([0, 1], [0, 1], color=GREY, linestyle=":")
        axes.plot(points[:, 0], points[:, 1], "o-", color=BLUE)

    caption = f"Reliability: expected calibration error {error:.3f}"
    return caption, _draw(plot, "predicted probability", "observed share", xlim=(0, 1), ylim=(0, 1.03))


def _regression_plots(predictions: pd.DataFrame) -> list[tuple[str, str]]:
    shown = predictions.iloc[:: max(1, len(predictions) // 2000)]
    target, predicted = shown["target"].astype(float), shown["prediction"].astype(float)

    def against(axes):
        ends = [min(target.min(), predicted.min()), max(target.max(), predicted.max())]
        axes.plot(ends, ends, color=GREY, linestyle=":")
        axes.plot(target, predicted, ".", color=BLUE, alpha=0.5)

    def residuals(axes):
        axes.axhline(0, color=GREY, linestyle=":")
        axes.plot(predicted, target - predicted, ".", color=BLUE, alpha=0.5)

    return [
        ("Predictions against targets; on the line they are equal", _draw(against, "target", "prediction")),
        ("Residuals: target − prediction", _draw(residuals, "prediction", "residual")),
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
    return _table(rows[:30], ["column", "rise of the loss", "95 % interval"], caption)


def _worst(pipeline, predictions: pd.DataFrame, splits, targets: torch.Tensor) -> str:
    task, names = pipeline.task, pipeline.preprocessor.names
    if task.kind == "regression":
        error = abs(predictions["target"].astype(float) - predictions["prediction"].astype(float)).to_numpy()
        shown = ["row", "target", "prediction"]
    else:
        probabilities = predictions[[f"probability_{name}" for name in task.classes]].to_numpy()
        error = 1 - probabilities[np.arange(len(targets)), targets.long().numpy()]
        shown = ["row", "target", "prediction", "probability"]
    worst = np.argsort(-error, kind="stable")[:WORST]
    cells = splits.test[names].iloc[worst].reset_index(drop=True)
    cells = cells.iloc[:, :12].map(lambda cell: str(cell)[:CELL] + ("…" if len(str(cell)) > CELL else ""))
    table = pd.concat([predictions[shown].iloc[worst].reset_index(drop=True), cells], axis=1)
    return _table(table.astype(object).to_numpy().tolist(), list(table.columns))


def _reproduce(splits, config: Config, metrics: dict) -> str:
    defaults, flags = Config().to_dict(), []
    for group, values in config.to_dict().items():
        changed = {k: v for k, v in values.items() if v != defaults[group][k] and k not in ("out", "resume")}
        flags += [_flag(name, value) for name, value in changed.items()]
    rows = [[k, metrics[k]] for k in ("epochs", "best_epoch", "device", "threads", "weights_sha256") if k in metrics]
    return f"<p><code>python train.py {_text(' '.join(flags))}</code></p>" + _table(rows, ["", ""])


def _flag(name: str, value) -> str:
    name = name.replace("_", "-")
    if isinstance(value, bool):
        return f"--{name}" if value else f"--no-{name}"
    return shlex.join([f"--{name}", *map(str, value if isinstance(value, list) else [value])])
