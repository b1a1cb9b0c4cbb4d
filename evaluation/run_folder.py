"""What a run prints and writes: metrics and what is wrong with them, test predictions, a sample, a training batch."""

import json
import math
import os
import re
import shutil
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import numpy as np
import pandas as pd
import torch

from errors import UserError, error_prefix
from evaluation.baselines import compare_with_baselines, evaluate_baselines
from evaluation.conformal import describe_coverage, measure_coverage
from evaluation.diagnosis import is_useless
from evaluation.intervals import bootstrap, with_digits, with_interval
from evaluation.report import write_report
from pipeline import atomic_write, weights_sha256
from preprocessing.column import evenly_spaced
from scaling.processes import is_main

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None

SAMPLE_ROWS = 5
TEMPORARY = re.compile(
    r"\.(last\.pt|best\.pt|metrics\.json|report\.html|test_predictions\.csv|sample\.csv)\.[a-z0-9_]{8}"
)


def new_folder(source: str) -> str:
    """Return a name for the folder of a run on a file: runs/<name>-<time>."""
    base = name = f"runs/{Path(source).name.split('.')[0]}-{time.strftime('%Y%m%d-%H%M%S')}"
    count = 1
    while os.path.exists(name):
        count += 1
        name = f"{base}-{count}"
    return name


@contextmanager
def open_run_folder(config, source: str) -> Iterator[Path]:
    """Create or resume a run folder and lock it: no other run can write to it meanwhile.

    A folder that is new and still without last.pt is removed if an exception leaves the block.
    Of several processes that train together, only the first one writes: the others get no folder.
    Raises UserError if the folder holds another run, is in use by another process, or cannot be written to.
    """
    if not is_main():
        yield Path()
        return
    out = Path(config.out or new_folder(source))
    created = [folder for folder in (out, *out.parents) if not os.path.exists(folder)]
    try:
        out.mkdir(parents=True, exist_ok=True)
        os.listdir(out)
    except OSError as error:
        raise UserError(f"--out {out}: not a folder that can be written to ({error.strerror}).") from None
    with _locked(out):
        _check_run_folder(out, config.resume)
        try:
            yield out
        except BaseException:
            if created and not any(out.rglob("last.pt")):  # nothing was learned yet
                shutil.rmtree(out, ignore_errors=True)
                with suppress(OSError):
                    for folder in created[1:]:
                        folder.rmdir()
            raise


@contextmanager
def _locked(out: Path) -> Iterator[None]:
    """Lock a folder. The system releases the lock when the process ends, however it ends.

    Not on Windows, and not on file systems that cannot lock a folder.
    """
    if fcntl is None:
        yield
        return
    descriptor = os.open(out, os.O_RDONLY)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        is_there = out.exists() and os.path.samestat(os.stat(out), os.fstat(descriptor))  # else it was just removed
    except BlockingIOError:
        is_there = False
    except OSError:
        is_there = True
    try:
        if not is_there:
            raise UserError(f"--out {out}: another run is writing to this folder: wait for it, or give another folder.")
        yield
    finally:
        os.close(descriptor)


def _check_run_folder(out: Path, resume: str) -> None:
    """Raise UserError for a folder that holds another run, and remove the temporary files of a run that was killed."""
    if not os.access(out, os.W_OK):
        raise UserError(f"--out {out}: not a folder that can be written to.")
    if not resume and (last := sorted([*out.glob("last.pt"), *out.glob("fold-*/last.pt")])):
        raise UserError(f"--out {out} already holds a run: give another folder, or --resume {last[-1]}.")
    if not resume and (out / "best.pt").exists():
        raise UserError(f"--out {out} already holds a best.pt: give another folder.")
    for path in out.iterdir():
        if TEMPORARY.fullmatch(path.name):
            path.unlink(missing_ok=True)


def write_previews(out: Path, loader, preprocessor) -> None:
    """Write augmented.png: the next training batch as the network sees it, if a person can look at it."""
    if not (is_main() and any(column.path_cells for column in preprocessor.columns)):
        return
    inputs = {name: x[:32] for name, x in next(iter(loader))[0].items()}
    for column in preprocessor.columns:
        if column.path_cells:
            picture = column.preview(column.batch(inputs[column.input], training=True))
            try:
                out.mkdir(parents=True, exist_ok=True)
                picture.save(out / "augmented.png")
            except OSError as error:
                raise UserError(f"--out {out}: cannot be written to ({error.strerror}).") from None


def evaluate_test(trainer, splits, loaders, config):
    """Predict the test split, once; return (a DataFrame of predictions, metrics, {"intervals", "baselines",
    "comparison", "coverage"})."""
    pipeline, loader = trainer.pipeline, loaders[2]
    started = time.perf_counter()
    logits, targets = trainer.logits(loader)
    milliseconds = 1000 * (time.perf_counter() - started) / len(targets)
    weights = list(pipeline.model.state_dict().values())
    size = sum(weight.numel() * weight.element_size() for weight in weights) / 1e6
    how_many = sum(weight.numel() for weight in weights)
    print(f"\nnetwork: {how_many:,} weights, {size:.1f} MB; {milliseconds:.2g} ms per test record", flush=True)
    if not torch.isfinite(logits).all():
        with error_prefix(splits.sources[2]):
            pipeline.predict_logits(splits.test)  # raises UserError, which names row and column
    in_order = torch.cat(list(loader.batch_sampler)).argsort()  # batches of texts are sorted by length
    predictions = pipeline.to_frame(logits[in_order], splits.test)
    predictions.insert(0, "target", pipeline.task.as_numbers(splits.test[splits.target]))
    if "file" in predictions:
        predictions["file"] = predictions.pop("file")  # last, after the predictions
    logits, targets = logits[in_order], targets[in_order]
    groups = splits.test[config.data.group].astype("str").to_numpy() if config.data.group else None
    if groups is not None:  # for compare.py, which draws whole groups too
        predictions["group"] = groups
    evaluation = {"intervals": bootstrap(pipeline.task, logits, targets, groups), "baselines": {}, "comparison": ""}
    evaluation["coverage"] = measure_coverage(pipeline.task, logits, targets)
    if config.run.report:
        baselines, their_logits = evaluate_baselines(pipeline.task, pipeline.preprocessor, loaders[0], loader)
        comparison = compare_with_baselines(pipeline.task, logits, targets, their_logits)
        evaluation |= {"baselines": baselines, "comparison": comparison}
    return predictions.rename_axis("row").reset_index(), pipeline.task.evaluate(logits, targets), evaluation


def read_predictions(out: Path, task) -> pd.DataFrame:
    """Read test_predictions.csv of a run. Raises OSError or ValueError if it cannot be read."""
    is_text = task.kind != "regression" and isinstance(task.classes[0], str)
    text = {"dtype": dict.fromkeys(("target", "prediction"), str), "keep_default_na": False} if is_text else {}
    return pd.read_csv(out / "test_predictions.csv", **text)


def read_tested(out: Path, trainer, splits, config):
    """Return what `evaluate_test` does, if the files in `out` hold it for these weights and records.

    So a resumed run with nothing left to train is not tested again. Otherwise None.
    """
    task, target = trainer.task, splits.test[splits.target]
    try:
        metrics = json.loads((out / "metrics.json").read_text(encoding="utf-8"))
        predictions = read_predictions(out, task)
        same = (
            metrics["weights_sha256"] == weights_sha256(trainer.best["state_dict"])
            and metrics["epochs"] == trainer.epoch
            and metrics["config"]["data"] == config.to_dict()["data"]
            and metrics.get("coverage", {}).get("asked", 0) == config.run.coverage
            and predictions["row"].tolist() == target.index.tolist()
            and np.allclose(task.encode(predictions["target"]), task.encode(target))
        )
        test = {name: math.nan if value is None else value for name, value in metrics["test"].items()}
    except (OSError, ValueError, KeyError):  # the run was killed before or while they were written
        return None
    evaluation = {
        "intervals": metrics.get("intervals", {}),
        "baselines": metrics.get("baselines", {}),
        "comparison": metrics.get("comparison", ""),
        "coverage": metrics.get("coverage", {}),
    }
    return (predictions, test, evaluation) if same else None


def write_sample(records, pipeline, out: Path) -> None:
    """Write a few records without the target for predict.py to try.

    Files that cells name are copied into sample/. A table with other columns refers to them there.
    """
    columns = {column.name: column for column in pipeline.preprocessor.columns if column.path_cells}
    records = records.drop(columns=pipeline.task.target)
    for name, column in columns.items():
        (out / "sample").mkdir(exist_ok=True)
        files = column.sample_files(records[name])
        for file, content in files:
            (out / "sample" / file).write_bytes(content)
        records = records.assign(**{name: [f"sample/{file}" for file, _ in files]})
    if not (columns and pipeline.preprocessor.lone):
        with atomic_write(out / "sample.csv") as file:
            records.to_csv(file, index=False)


def write_run(result, trainer, splits, config, evaluation: dict, findings: list[dict]) -> None:
    """Write what is known after training: test predictions, a sample for predict.py, the report, and metrics.json last.

    result: a train.Run.  evaluation: what `evaluate_test` returns.  findings: of evaluation/audit.py.
    """
    out, task = result.out, result.pipeline.task
    with atomic_write(out / "test_predictions.csv") as file:
        result.predictions.to_csv(file, index=False)
    write_sample(evenly_spaced(splits.test, SAMPLE_ROWS), result.pipeline, out)
    rows = {"train": len(splits.train), "val": len(splits.val), "test": len(splits.test)}
    seconds = float(result.history["seconds"].sum())
    metrics = {
        "task": task.kind,
        "target": task.target,
        "classes": task.classes,
        "rows": rows,
        "best_epoch": trainer.best["epoch"],
        "epochs": len(result.history),
        "val": result.val,
        "test": result.test,
        "intervals": result.intervals,
        "baselines": evaluation["baselines"],
        "audit": findings,
        "comparison": evaluation["comparison"],
        "coverage": evaluation["coverage"],
        "learning_curve": evaluation.get("learning_curve", []),
        "diagnosis": result.diagnosis,
        "temperature": task.temperature,
        "threshold": task.threshold,
        "seconds": seconds,
        "samples_per_second": rows["train"] * len(result.history) / seconds,
        "weights_sha256": weights_sha256(trainer.best["state_dict"]),
        "model": " + ".join(result.pipeline.model_spec["names"]),
        "device": str(trainer.device),
        "threads": trainer.threads,
        "processes": trainer.processes,
        "config": config.to_dict(),
    }
    if config.run.report:
        write_report(result, splits, config, metrics)
    write_metrics(metrics, out)


def write_metrics(metrics: dict, out: Path) -> None:
    with atomic_write(out / "metrics.json") as file:
        plain = json.loads(json.dumps(metrics), parse_constant=lambda _: None)  # JSON has no NaN
        json.dump(plain, file, indent=2, ensure_ascii=False)
        file.write("\n")


def print_data(splits, pipeline, findings: list[dict]) -> None:
    """Print what was inferred about the data, for a person to check and overrule."""
    for note in splits.notes:
        print(note)
    rows = f"{len(splits.train)} train, {len(splits.val)} validation, {len(splits.test)} test rows"
    print(f"{pipeline.task.summary()}; {rows}")
    table = pipeline.preprocessor.summary()
    widths = [max(len(row[i]) for row in table) for i in range(2)]
    for name, kind, what in table:
        print(f"  {name:<{min(widths[0], 40)}}  {kind:<{widths[1]}}  {what}")
    print("Override with --task KIND and --columns NAME=KIND …")
    print(
        *(f"{each['check']}: {each['finding']}" for each in findings), sep="\n", end="\n" * bool(findings), flush=True
    )


def print_result(result, trainer, splits, evaluation: dict, findings: list[dict]) -> None:
    """Print one screen: metrics, findings, what to do next.

    evaluation: what `evaluate_test` returns.  findings: of evaluation/audit.py.
    """
    epochs, seconds, patience = len(result.history), float(result.history["seconds"].sum()), trainer.config.patience
    early = f" (stopped early: --patience {patience})" if trainer.out_of_patience() else ""
    if (threshold := trainer.task.threshold) != 0.5:
        print(f"\ndecision threshold {threshold:.3g}, because one class is rare: {trainer.task.classes[1]} above it")
    print(f"\nbest epoch {trainer.best['epoch']} of {epochs}{early}, in {seconds:.1f} s")
    intervals = result.intervals
    print("val   " + "  ".join(f"{name} {with_digits(x, intervals.get(name))}" for name, x in result.val.items()))
    tested = (f"{name} {with_interval(value, intervals.get(name))}" for name, value in result.test.items())
    print("test  " + "  ".join(tested) + "  (95 % intervals)")
    if baselines := evaluation["baselines"]:
        best = min(baselines, key=lambda name: baselines[name]["loss"])
        shown = (f"{name} {with_digits(value, intervals.get(name))}" for name, value in baselines[best].items())
        print(f"      best baseline, {best}: " + "  ".join(shown))
    if evaluation["coverage"]:
        print(describe_coverage(trainer.task, evaluation["coverage"]))
    sample = next((result.out / name for name in ("sample.csv", "sample") if (result.out / name).exists()), "new.csv")
    print("", *(each["finding"] for each in findings), *result.diagnosis, sep="\n")
    if not is_useless(result.test, trainer.task, splits.test):
        print(f"Try it: python predict.py --checkpoint {result.out / 'best.pt'} --input {sample} --output -")
    if (result.out / "report.html").exists():
        print(f"Report: {result.out / 'report.html'}")
