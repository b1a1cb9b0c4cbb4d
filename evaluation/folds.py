"""Cross-validation: splits in which each row is tested once, and the ensemble of the models with its metrics."""

import json
import math
from dataclasses import replace

import numpy as np
import pandas as pd

from config import FORMATTED, ModelConfig
from errors import UserError
from evaluation.conformal import describe_coverage, pool_coverage
from evaluation.intervals import with_interval
from evaluation.report import write_report
from evaluation.run_folder import SAMPLE_ROWS, write_metrics, write_sample
from pipeline import Pipeline, atomic_write, weights_sha256
from preprocessing.column import evenly_spaced
from preprocessing.copies import find_copies
from preprocessing.parsing import canonical_codes
from preprocessing.targets import stratify_labels

UPPER = {"accuracy": 1.0, "roc_auc": 1.0, "f1": 1.0, "r2": 1.0}  # the best value of a metric


def make_folds(splits, seed: int) -> list:
    """Return the Splits of each fold. Of k folds, number i is the test split of the i-th model, the next one its
    validation split, and all others its training split: no row decides anything about a model that is tested on it.

    Classes keep their shares. The rows of a --group, or copies of a row, stay in one fold.
    Raises UserError for too few rows or groups.
    """
    table, config = pd.concat([splits.train, splits.val, splits.test]), splits.config
    folds, form = config.folds, config.column_formats().get(splits.target, "")
    labels = stratify_labels(table[splits.target], splits.kind, 3, form)
    labels = np.zeros(len(table), int) if labels is None else labels
    if config.group:
        assign, units, what = _assign_groups, canonical_codes(table[config.group])[0], "groups"
    else:
        copies = None if config.keep_duplicates else find_copies(table.drop(columns=splits.target), config)
        assign, units, what = _assign, np.arange(len(table)) if copies is None else copies, "rows"
    if (count := len(np.unique(units))) < folds:
        raise UserError(f"--folds {folds}: {count} {what} are too few: give fewer folds.")
    fold_of = assign(units, labels, folds, seed)
    found = []
    for i in range(folds):
        test, val = fold_of == i, fold_of == (i + 1) % folds
        found.append(replace(splits, train=table[~(test | val)], val=table[val], test=table[test], notes=[]))
    found[0].notes.extend(splits.notes)
    return found


def _assign(units: np.ndarray, labels: np.ndarray, folds: int, seed: int) -> np.ndarray:
    """Return the fold of each row: rows, or copies of a row, are dealt out in random order, class by class."""
    class_of = np.zeros(units.max() + 1, int)
    class_of[units] = labels
    order = np.lexsort((np.random.default_rng(seed).permutation(len(class_of)), class_of))
    of_unit = np.empty(len(class_of), int)
    of_unit[order] = np.arange(len(class_of)) % folds
    return of_unit[units]


def _assign_groups(groups: np.ndarray, labels: np.ndarray, folds: int, seed: int) -> np.ndarray:
    """Return the fold of each row, so that groups stay whole and classes keep their shares."""
    from sklearn.model_selection import StratifiedGroupKFold

    fold_of = np.empty(len(groups), int)
    splitter = StratifiedGroupKFold(folds, shuffle=True, random_state=seed)
    for i, (_, test) in enumerate(splitter.split(groups, labels, groups)):
        fold_of[test] = i
    return fold_of


def same_columns(splits, pipeline: Pipeline):
    """Return a DataConfig with the kinds of columns and the size of images of a fitted pipeline, for all folds."""
    preprocessor, formats = pipeline.preprocessor, splits.config.column_formats()
    kinds = dict.fromkeys(preprocessor.left_out, "drop") | preprocessor.kinds
    kinds.pop(splits.config.group, None)
    written = {name: f":{form}" for name, form in formats.items() if kinds.get(name, "") in FORMATTED}
    columns = [f"{name}={kind}{written.pop(name, '')}" for name, kind in kinds.items()]
    columns += [f"{name}={form}" for name, form in written.items()]  # of the target
    size = preprocessor.model_args.get("image_size", 0)
    return replace(splits.config, columns=tuple(columns), image_size=size)


def same_networks(model: ModelConfig, pipeline: Pipeline) -> ModelConfig:
    """Return the flags of the network that was kept for the first fold, for all folds."""
    kept = pipeline.config["model"]
    return replace(model, model=tuple(kept["model"]), freeze=kept["freeze"], fine_tune=kept["fine_tune"])


def interval_of_mean(values: list[float], test_share: float) -> list[float]:
    """Return the 95 % interval [low, high] of the mean of a metric over folds.

    test_share: test rows by training rows. Folds share their training rows, so that their metrics vary less than those
    of independent runs; the variance is corrected for it (Nadeau and Bengio, "Inference for the Generalization Error",
    2003).
    """
    from scipy.stats import t

    mean, count = float(np.mean(values)), len(values)
    half = t.ppf(0.975, count - 1) * math.sqrt((1 / count + test_share) * np.var(values, ddof=1))
    return [mean - half, mean + half]


def summarize(runs: list) -> dict:
    """Return the metrics of an ensemble from the metrics.json of its members: means, and intervals of the means.

    runs: the train.Run of each fold.
    """
    folds = [json.loads((run.out / "metrics.json").read_text(encoding="utf-8")) for run in runs]
    mean = {
        split: {name: float(np.mean([getattr(run, split)[name] for run in runs])) for name in getattr(runs[0], split)}
        for split in ("val", "test")
    }
    share = float(np.mean([fold["rows"]["test"] / fold["rows"]["train"] for fold in folds]))
    values = {name: [run.test[name] for run in runs] for name in runs[0].test}
    found = {name: interval_of_mean(each, share) for name, each in values.items() if np.isfinite(each).all()}
    intervals = {name: [low, min(high, UPPER.get(name, math.inf))] for name, (low, high) in found.items()}
    each = ("rows", "best_epoch", "epochs", "val", "test", "seconds")
    seconds = sum(fold["seconds"] for fold in folds)
    findings = {finding["finding"]: finding for fold in folds for finding in fold["audit"]}
    baselines = {
        name: {metric: float(np.mean([fold["baselines"][name][metric] for fold in folds])) for metric in scores}
        for name, scores in folds[0]["baselines"].items()
        if all(value is not None for fold in folds for value in fold["baselines"][name].values())
    }
    return folds[0] | mean | {
        "rows": folds[0]["rows"] | {"test": sum(fold["rows"]["test"] for fold in folds)},
        "best_epoch": round(np.mean([fold["best_epoch"] for fold in folds])),
        "epochs": max(fold["epochs"] for fold in folds),
        "intervals": intervals,
        "coverage": pool_coverage([fold["coverage"] for fold in folds], [fold["rows"]["test"] for fold in folds]),
        "baselines": baselines,
        "audit": list(findings.values()),
        "diagnosis": list(dict.fromkeys(sentence for run in runs for sentence in run.diagnosis)),
        "seconds": seconds,
        "samples_per_second": sum(fold["samples_per_second"] * fold["seconds"] for fold in folds) / seconds,
        "folds": [{name: fold[name] for name in each} for fold in folds],
    }  # fmt: skip


def out_of_fold(runs: list) -> pd.DataFrame:
    """Return the predictions of all rows, in their order, each by the model that had not seen it; and its fold."""
    parts = [run.predictions.assign(fold=number) for number, run in enumerate(runs, start=1)]
    predictions = pd.concat(parts, ignore_index=True)
    is_number = pd.api.types.is_integer_dtype(predictions["row"])
    return predictions.sort_values("row", kind="stable", ignore_index=True) if is_number else predictions


def combine(runs: list, folds: list, config, out):
    """Write the files of a cross-validation: the ensemble, the predictions of all rows, the report, and metrics.json
    last.

    runs: the train.Run of each fold.  folds: its Splits.
    Returns the train.Run of the ensemble, and what `pool_coverage` returns.
    """
    pipeline, predictions = Pipeline.ensemble([run.pipeline for run in runs]), out_of_fold(runs)
    metrics = summarize(runs) | {
        "temperature": pipeline.task.temperature,
        "threshold": pipeline.task.threshold,
        "weights_sha256": weights_sha256(pipeline.model.state_dict()),
    }
    pipeline.save(out / "best.pt")
    with atomic_write(out / "test_predictions.csv") as file:
        predictions.to_csv(file, index=False)
    write_sample(evenly_spaced(folds[0].test, SAMPLE_ROWS), pipeline, out)
    histories = [run.history.assign(fold=number) for number, run in enumerate(runs, start=1)]
    found = {name: metrics[name] for name in ("val", "test", "intervals", "diagnosis")}
    history = pd.concat(histories, ignore_index=True)
    result = replace(runs[0], pipeline=pipeline, history=history, predictions=predictions, out=out, **found)
    if config.run.report:
        table = pd.concat([fold.test for fold in folds]).loc[predictions["row"]]
        write_report(result, replace(folds[0], test=table), config, metrics, (runs[0].pipeline, folds[0].test))
    write_metrics(metrics, out)
    return result, metrics["coverage"]


def print_folds(runs: list, result, coverage: dict) -> None:
    """Print the test metrics of each fold, and their means. result, coverage: what `combine` returns."""
    print()
    for number, run in enumerate(runs, start=1):
        print(f"fold {number}  " + "  ".join(f"{name} {value:.4g}" for name, value in run.test.items()))
    means = (f"{name} {with_interval(value, result.intervals.get(name))}" for name, value in result.test.items())
    print("mean    " + "  ".join(means) + "  (95 % intervals)")
    if coverage:
        print(describe_coverage(result.pipeline.task, coverage))
    print("", *result.diagnosis[:2], sep="\n")
    print(f"Each row was tested by a model that had not seen it: {result.out / 'test_predictions.csv'}")
    if (result.out / "report.html").exists():
        print(f"Report: {result.out / 'report.html'}")
    print(
        f"The ensemble of all models: {result.out / 'best.pt'}; its metrics are usually a little better than the mean."
    )
