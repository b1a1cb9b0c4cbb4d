"""Write report.html: one self-contained page that says how good a run is, and what its model gets wrong."""

import shlex

import numpy as np
import pandas as pd
import torch

from config import Config
from evaluation import html
from evaluation.comparison import record_losses
from evaluation.conformal import describe_coverage
from evaluation.explanations import deciding_parts, importance
from evaluation.figures import curves, judge
from evaluation.slices import worst_slices
from pipeline import atomic_write

WORST = 10  # test records that are shown
CELL = 120  # characters of a cell that are shown


def write_report(result, splits, config: Config, metrics: dict, tested: tuple | None = None) -> None:
    """Write report.html into the run folder.

    result: a train.Run.  metrics: the content of metrics.json.  tested: (pipeline, test rows) of one fold, if the model
    is the ensemble of folds, which has no test rows of its own.
    """
    task, (pipeline, test) = result.pipeline.task, tested or (result.pipeline, splits.test)
    targets = task.encode(splits.test[splits.target])
    sections = [
        ("Result", _scores(metrics) + html.bullets([describe_coverage(task, metrics["coverage"])])),
        (
            "What to know",
            html.bullets([*(each["finding"] for each in metrics["audit"]), *result.diagnosis, *splits.notes]),
        ),
        ("Folds", _folds(metrics)),
        ("Training", "" if tested else curves(result.history, metrics["best_epoch"], metrics["learning_curve"])),
        ("Predictions of the test split", judge(task, result.predictions, targets)),
        ("Where it is worst", _slices(result.pipeline, result.predictions, splits.test, targets)),
        ("Importance of columns", importance(pipeline, test)),
        ("What decided", deciding_parts(pipeline, test)),
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


def _folds(metrics: dict) -> str:
    """Return the test metrics of each fold, with links to the reports of the folds."""
    rows = [
        [html.Link(f"fold {number}", f"fold-{number}/report.html"), fold["rows"]["test"], *fold["test"].values()]
        for number, fold in enumerate(metrics.get("folds", []), start=1)
    ]
    return html.table(rows, ["", "test rows", *metrics["test"]]) if rows else ""


def _slices(pipeline, predictions: pd.DataFrame, records: pd.DataFrame, targets: torch.Tensor) -> str:
    """Return the slices of the test records, by the values of a column, in which the model is worst."""
    task = pipeline.task
    values, labels = task.from_columns(predictions), task.decode(targets).numpy()
    if task.kind == "regression":
        name, errors = "mean absolute error", abs(values[:, 0] - labels)
    else:
        name, errors = "share of errors", (task.decide(torch.from_numpy(values)).numpy() != labels).astype(float)
    rows = worst_slices(pipeline, records, record_losses(task, values, labels), errors)
    caption = "Values of a column for which the loss is higher than for the others, beyond noise"
    return html.table(rows, ["column", "values", "records", name, "of the others"], caption) if rows else ""


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
    pictures = {
        column.name: [html.Picture(url) for url in column.examples(cells[column.name])]
        for column in pipeline.preprocessor.columns
        if column.path_cells
    }
    cells = cells.iloc[:, :12].map(lambda cell: str(cell)[:CELL] + ("…" if len(str(cell)) > CELL else ""))
    cells = cells.assign(**pictures)
    table = pd.concat([predictions[shown].iloc[worst].reset_index(drop=True), cells], axis=1)
    return html.table(table.astype(object).to_numpy().tolist(), list(table.columns))


def command_line(config: Config) -> str:
    """Return the flags that differ from the defaults, as a person writes them; not where a run is written to."""
    defaults, flags = Config().to_dict(), []
    for group, values in config.to_dict().items():
        changed = {k: v for k, v in values.items() if v != defaults[group][k] and k not in ("out", "resume")}
        flags += [as_flag(name, value) for name, value in changed.items()]
    return " ".join(flags)


def _reproduce(splits, config: Config, metrics: dict) -> str:
    rows = [[k, metrics[k]] for k in ("epochs", "best_epoch", "device", "threads", "weights_sha256") if k in metrics]
    return f"<p><code>python train.py {html.text(command_line(config))}</code></p>" + html.table(rows, ["", ""])


def as_flag(name: str, value) -> str:
    """Return a field of config.py as a person writes it on the command line."""
    name = name.replace("_", "-")
    if isinstance(value, bool):
        return f"--{name}" if value else f"--no-{name}"
    return shlex.join([f"--{name}", *map(str, value if isinstance(value, list) else [value])])
