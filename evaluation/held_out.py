"""Compare two models on records that neither was trained on, with what their checkpoints keep of the test split.

A checkpoint keeps a hash of its test records, the loss of each, and metrics: numbers only, no record.
"""

import hashlib
import math
from pathlib import Path

import numpy as np
import pandas as pd
import torch

from evaluation.comparison import record_losses
from preprocessing.column import evenly_spaced
from preprocessing.pixels import is_path
from task import Task

MAX_LOSSES = 5_000  # test records, evenly spaced, whose losses a checkpoint keeps
MIN_RECORDS = 30  # from which on two models are compared: the normal interval needs some


def summarize_test(pipeline, predictions: pd.DataFrame, metrics: dict[str, float], records: pd.DataFrame) -> dict:
    """Return {"records", "count", "losses", "metrics"} of a test split, in plain values for a checkpoint.

    predictions: of `Pipeline.predict`.  records: of the test split, with their targets.
    """
    task = pipeline.task
    targets = task.decode(task.encode(records[task.target])).numpy()
    losses = record_losses(task, task.from_columns(predictions), targets).clip(max=1e300)
    return {
        "records": _hash(records, [column.name for column in pipeline.preprocessor.columns if column.path_cells]),
        "count": len(records),
        "losses": [float(f"{loss:.6g}") for loss in evenly_spaced(torch.from_numpy(losses), MAX_LOSSES).tolist()],
        "metrics": {name: value for name, value in metrics.items() if name != "loss" and math.isfinite(value)},
    }


def _hash(records: pd.DataFrame, files: list[str]) -> str:
    """Return a hash of all cells in order.  files: columns of files, which may be in another folder: their names."""
    digest = hashlib.sha256()
    for name in sorted(records.columns):
        cells = records[name].tolist()
        if name in files:
            cells = [Path(cell).name if is_path(cell) else cell for cell in cells]
        digest.update(f"{name!r}: {cells!r}\n".encode("utf-8", "surrogatepass"))
    return digest.hexdigest()


def is_worse(new: list[float], old: list[float]) -> bool:
    """Return whether the new losses of the same records are higher beyond noise: whether the 95 % interval (normal,
    paired) of the mean difference is above 0."""
    difference = np.asarray(new, float) - np.asarray(old, float)
    return bool(difference.mean() - 1.96 * difference.std(ddof=1) / math.sqrt(len(difference)) > 0)


def have_same_records(new: dict, old: dict) -> bool:
    """Return whether two test summaries are of the same records, and of enough to compare them."""
    same = bool(new) and bool(old) and new["records"] == old["records"]
    return same and len(new["losses"]) == len(old["losses"]) >= MIN_RECORDS


def compare_tests(task: Task, new: dict, old: dict) -> tuple[bool, str]:
    """Return whether the new model is worse on the same test records, and both scores in words."""
    what = "mean squared error" if task.kind == "regression" else "log-loss"
    means = (float(np.mean(summary["losses"])) for summary in (new, old))
    scores = [f"{what} {' against '.join(f'{mean:.4g}' for mean in means)}"]
    before = dict(_shown(old))
    scores += [f"{name} {value:.4g} against {before[name]:.4g}" for name, value in _shown(new) if name in before]
    return is_worse(new["losses"], old["losses"]), f"{', '.join(scores)}, on the same {new['count']:,} test records"


def describe_test(summary: dict) -> str:
    """Return the metrics of a test split in words."""
    if not summary:
        return "not tested"
    return f"{', '.join(f'{name} {value:.4g}' for name, value in _shown(summary))} on {summary['count']:,} test records"


def _shown(summary: dict) -> list[tuple[str, float]]:
    return [(name, value) for name, value in summary["metrics"].items() if name in ("accuracy", "f1", "rmse", "r2")]
