"""Compare models on the same test records: which one is better, and is it beyond noise?

  python compare.py runs/a runs/b                                    finished runs, on their test predictions
  python compare.py --checkpoint a.pt b.pt --data new.csv            checkpoints, on data that none was trained on

The log-loss decides between classifiers, the RMSE between regressions. Differences are paired, record by record, with
95 % bootstrap intervals; accuracies are compared with McNemar's exact test. With more than two models, p-values are
corrected for the number of pairs (Holm). Runs with other test records are refused.
"""

import os

os.environ.setdefault("OMP_WAIT_POLICY", "passive")  # spinning threads slow down everything else on the machine

import json
import sys
from dataclasses import dataclass, replace
from pathlib import Path

from tyro.conf import Positional

from config import Config
from console import run
from errors import UserError, did_you_mean, error_prefix, parse_flags

MANY_MODELS = 3  # more than these have only the deciding metric on the screen, and the others on the page


@dataclass(frozen=True)
class Options:
    """what to compare"""

    runs: Positional[tuple[str, ...]] = ()
    """Folders of finished runs, two or more."""
    checkpoint: tuple[str, ...] = ()
    """Instead of runs: checkpoints, two or more, that predict --data."""
    data: str = ""
    """Records with targets, for --checkpoint: a file that predict.py reads, or a folder of classes. Rows without a
    target are left out."""
    output: str = ""
    """Also write a page with plots of the intervals and the records on which the models differ most, such as
    compare.html."""
    device: str = "auto"
    """For --checkpoint: auto (a GPU if there is one), cpu, cuda, mps …"""

    def __post_init__(self):
        if self.runs and self.checkpoint:
            raise UserError("give run folders, or --checkpoint and --data, not both.")
        if bool(self.checkpoint) != bool(self.data):
            raise UserError("--checkpoint and --data belong together: which models, and the records to predict.")
        names = self.checkpoint or self.runs
        if len(names) < 2:
            what = "--checkpoint needs two or more checkpoints" if names and not self.runs else "give two or more runs"
            raise UserError(f"{what}, such as: python compare.py runs/a runs/b")
        paths = [os.path.realpath(name) for name in names]
        if again := [name for name, path in zip(names, paths, strict=True) if paths.count(path) > 1]:
            raise UserError(f"{again[-1]} is given twice.")


@dataclass(frozen=True)
class Scored:
    """The predictions of a model for N records, and what they are compared with."""

    name: str
    task: object  # a task.Task
    config: dict  # the flags of the run
    size: int  # bytes of weights and preprocessor
    seconds: float  # of training; 0 = unknown
    targets: object  # (N,), decoded
    values: object  # what `task.activate` returns: (N, classes) or (N, 1)
    records: object  # a DataFrame: target, and file and group if they are known; the index holds row numbers


# ---------------------------------------------------------------- runs


def read_run(folder: str) -> Scored:
    """Read the test predictions of a finished run. Raises UserError if the folder does not hold them."""
    from config import from_plain
    from evaluation.run_folder import read_predictions
    from sources.checkpoint import read_checkpoint
    from task import Task

    out = Path(folder)
    if out.is_file():
        raise UserError(f"{folder} is a file: give the folders of runs, or --checkpoint and --data.")
    if not out.is_dir():
        raise UserError(f"{folder}: no such run folder.")
    for name in ("metrics.json", "test_predictions.csv", "best.pt"):
        if not (out / name).is_file():
            raise UserError(f"{folder}: {name} is missing: it is not the folder of a finished run.")
    state = read_checkpoint(out / "best.pt")
    try:
        metrics = json.loads((out / "metrics.json").read_text(encoding="utf-8"))
        task = from_plain(Task, state["task"])
        table = read_predictions(out, task).set_index("row")
        values = task.from_columns(table)
        targets = task.decode(task.encode(table["target"])).numpy()
        trained = metrics["weights_sha256"] == state["weights_sha256"]
        seconds = float(metrics["seconds"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        reason = " ".join(str(error).split())
        raise UserError(f"{folder}: metrics.json or test_predictions.csv cannot be read ({reason}).") from None
    if not trained:
        raise UserError(
            f"{folder}: best.pt is not the model that metrics.json describes: the run was resumed and has not finished "
            f"(python train.py --resume {out / 'last.pt'})."
        )
    records = table[[name for name in ("target", "file", "group") if name in table]]
    return Scored(folder, task, state["config"], _size(state), seconds, targets, values, records)


def _size(state: dict) -> int:
    """Return the bytes of weights and preprocessor, which holds the scores of n-grams, in a checkpoint."""
    weights = sum(value.numel() * value.element_size() for value in state["state_dict"].values())
    return weights + len(json.dumps(state["preprocessor"]))


def in_same_order(runs: list[Scored]) -> list[Scored]:
    """Return runs with their records in the order of the first.

    Raises UserError, naming the difference, if their test records are not the same.
    """
    first = runs[0]
    for other in runs[1:]:
        rows, theirs = set(first.records.index), set(other.records.index)
        if rows != theirs or len(first.records) != len(other.records):
            alone = min(rows ^ theirs, default=None)
            where = f": row {alone} is only in {(first if alone in rows else other).name}" if rows != theirs else ""
            raise UserError(
                f"{first.name} and {other.name} have different test records ({len(first.records)} and "
                f"{len(other.records)} rows{where}){_split_flags(first, other)}. Train both with the same data, "
                "--seed and splits, or compare their checkpoints on new records: --checkpoint and --data."
            )
    order = [run.records.index.get_indexer(first.records.index) for run in runs]
    runs = [
        replace(run, targets=run.targets[rows], values=run.values[rows], records=run.records.iloc[rows])
        for run, rows in zip(runs, order, strict=True)
    ]
    for other in runs[1:]:
        _check_records(first, other)
    return runs


def _check_records(first: Scored, other: Scored) -> None:
    """Raise UserError for a row whose target or file differs between two runs."""
    import numpy as np

    def refuse(name: str, differs) -> None:
        if differs.any():
            at = int(differs.argmax())
            a, b = (run.records[name].iloc[at] for run in (first, other))
            raise UserError(
                f"row {first.records.index[at]}: the {name} is {str(a)!r} in {first.name} and {str(b)!r} in "
                f"{other.name}: their test records are not the same."
            )

    spread = 1e-6 * max(1.0, first.task.std)  # encoded targets are float32
    refuse("target", ~np.isclose(first.targets, other.targets, rtol=1e-5, atol=spread))
    if "file" in first.records and "file" in other.records:  # the folder may have been moved
        ours, theirs = ([os.path.basename(str(file)) for file in run.records["file"]] for run in (first, other))
        refuse("file", np.array(ours) != np.array(theirs))


def _split_flags(first: Scored, other: Scored) -> str:
    ours, theirs = (
        Config.from_dict(run.config).to_dict()["data"] | {"seed": run.config["training"]["seed"]}
        for run in (first, other)
    )
    from evaluation.report import as_flag

    names = [name for name in ours if ours[name] != theirs[name]]
    shown = ", ".join(f"{as_flag(name, ours[name])} against {as_flag(name, theirs[name])}" for name in names)
    return f"; they differ in {shown}" if shown else ""


def check_tasks(tasks: dict[str, object]) -> None:
    """Raise UserError if models have different targets, kinds of task or classes.  tasks: name → task."""
    first_name, first = next(iter(tasks.items()))
    for name, task in tasks.items():
        if (task.target, task.kind) != (first.target, first.kind):
            raise UserError(
                f"{first_name} predicts {first.target!r} ({first.kind}) and {name} predicts {task.target!r} "
                f"({task.kind}): only models of the same task can be compared."
            )
        if task.classes != first.classes:
            ours, theirs = (", ".join(map(str, each.classes)) for each in (first, task))
            raise UserError(f"{first_name} has the classes {ours}, and {name} has {theirs}: they must be the same.")


# ---------------------------------------------------------------- checkpoints


def score_checkpoints(paths: tuple[str, ...], data: str, device: str) -> list[Scored]:
    """Predict the records of `data` that have a target with each checkpoint.

    Raises UserError if the checkpoints have different tasks, or the records cannot be read.
    """
    from pipeline import Pipeline
    from sources.checkpoint import read_checkpoint

    pipelines = {path: Pipeline.load(path).to(device) for path in paths}
    check_tasks({path: pipeline.task for path, pipeline in pipelines.items()})
    task, notes, found = next(iter(pipelines.values())).task, [], []
    for path, pipeline in pipelines.items():
        records, logits, left_out = _predict(pipeline, task, data, notes)
        if len(records) == 0:
            raise UserError(f"{data}: no row has a target in column {task.target!r}.")
        with error_prefix(data):
            targets = task.decode(task.encode(records["target"])).numpy()
        values = pipeline.task.activate(logits).numpy()
        size = _size(read_checkpoint(path))
        found.append(Scored(path, pipeline.task, pipeline.config, size, 0.0, targets, values, records))
    notes += [f"{data}: {left_out} rows without a target are left out"] if left_out else []
    print(*dict.fromkeys(notes), sep="\n", end="\n" * bool(notes), file=sys.stderr)
    return found


def _predict(pipeline, task, data: str, notes: list[str]):
    """Return (records with a target, as `Scored` has them; their logits; the number of rows without a target)."""
    import pandas as pd
    import torch

    from sources import FILE, read_folder, read_records

    preprocessor = pipeline.require_preprocessor()
    if Path(data).is_dir():
        frames = [read_folder(data, notes)[0]]
    else:
        frames = read_records(data, preprocessor.layout, preprocessor.read_rows, notes)
    names = {task.target: "target", FILE: "file", pipeline.config.get("data", {}).get("group", ""): "group"}
    records, logits, left_out = [], [torch.empty(0, task.out_features)], 0
    for frame in frames:
        if task.target not in frame:
            raise UserError(
                f"{data}: column {task.target!r}, the target, is missing.{did_you_mean(task.target, frame.columns)}"
            )
        given = task.has_target(frame[task.target])
        frame, left_out = frame[given], left_out + int((~given).sum())
        if len(frame):
            with error_prefix(data):
                logits.append(pipeline.predict_logits(frame)[1])
        records.append(frame[[name for name in names if name in frame]].rename(columns=names))
    if not records:
        raise UserError(f"{data}: there are no rows below the header.")
    return pd.concat(records), torch.cat([part for part in logits if len(part)] or logits), left_out


# ---------------------------------------------------------------- result


def conclude(models: list[Scored], found: dict) -> list[str]:
    """Return sentences: each model against the best one, and which one to choose.

    found: what `compare_models` returns.
    """
    import math

    from evaluation.comparison import best_model, more_rows, simpler, verdict

    name, paired = next(iter(found.items()))
    best, rows = best_model(name, paired), len(models[0].targets)
    sentences, equal = [], []
    for i in (i for i in range(len(models)) if i != best):
        said = f"{models[i].name} against {models[best].name}: "
        match verdict(name, paired, i, best):
            case "worse":
                said += f"worse (p = {paired.p[i, best]:.2g})."
            case "the same":
                equal.append(i)
                said += "the same predictions."
            case _:
                equal.append(i)
                count = more_rows(paired, i, best, rows)
                wanted = f"about {float(f'{count:.1g}'):,.0f}" if count < math.inf else f"more than {100 * rows:,}"
                said += f"cannot tell (p = {paired.p[i, best]:.2g}). It would take {wanted} more test rows."
        sentences.append(said)
    chosen, why = simpler(equal, best, [model.size for model in models], [model.seconds for model in models])
    name, chosen = models[best].name, models[chosen].name
    if not equal:
        sentences.append(f"Choose {name}: it is better than {'the others' if len(models) > 2 else 'the other'}.")
    elif why:
        sentences.append(f"Choose {chosen}, for now: it cannot be told from {name}, and {why}.")
    else:
        sentences.append(f"Choose {name}, for now: it scores best, and none that may be as good is simpler.")
    return sentences


def differing_flags(models: list[Scored]) -> list[str]:
    """Return for each model the flags in which the models differ, without those of where and on what they ran."""
    from evaluation.report import as_flag

    groups = [Config.from_dict(model.config).to_dict() for model in models]
    flags = [{**each["data"], **each["model"], **each["training"]} for each in groups]
    names = [name for name in flags[0] if any(each[name] != flags[0][name] for each in flags)]
    return [" ".join(as_flag(name, each[name]) for name in names if each[name] != []) for each in flags]


def show(models: list[Scored], found: dict, sentences: list[str]) -> None:
    """Print the comparison on one screen."""
    from evaluation.comparison import best_model, verdict
    from evaluation.intervals import with_interval

    name, paired = next(iter(found.items()))
    best, width = best_model(name, paired), max(len(model.name) for model in models)
    print(f"{models[0].task.summary()}; {len(models[0].targets)} test rows\n")
    print(" " * width + "".join(f"  {metric:>9}" for metric in found))
    for i, (model, flags) in enumerate(zip(models, differing_flags(models), strict=True)):
        values = "".join(f"  {each.values[i]:>9.4g}" for each in found.values())
        print(f"{model.name:<{width}}{values}  {flags}".rstrip())
    print(f"\nagainst {models[best].name}, the best by {name} (differences with 95 % intervals)")
    shown = found if len(models) <= MANY_MODELS else {name: paired}
    for i in (i for i in range(len(models)) if i != best):
        for metric, each in shown.items():
            difference = with_interval(each.difference[i, best], each.interval(i, best))
            heading = models[i].name if metric == name else ""
            print(f"{heading:<{width}}  {metric:<9}  {difference:<28}  {verdict(metric, each, i, best)}")
    if len(models) > 2:
        print(f"corrected for {len(models) * (len(models) - 1) // 2} pairs (Holm); the intervals are not")
    print("", *sentences, sep="\n")


def compare(options: Options) -> None:
    from evaluation.comparison import compare_models
    from evaluation.comparison_page import write_page

    if options.checkpoint:
        models = score_checkpoints(options.checkpoint, options.data, options.device)
    else:
        models = [read_run(folder) for folder in options.runs]
        check_tasks({model.name: model.task for model in models})
        models = in_same_order(models)
    first = models[0]
    if len(first.targets) < 2:
        raise UserError("there is one test record only: a comparison needs two or more.")
    groups = first.records["group"].astype(str).to_numpy() if "group" in first.records else None
    found = compare_models([m.task for m in models], [m.values for m in models], first.targets, groups)
    sentences = conclude(models, found)
    show(models, found, sentences)
    if options.output:
        write_page(options.output, models, found, sentences, differing_flags(models))
        print(f"Page: {options.output}")


if __name__ == "__main__":
    run(lambda: compare(parse_flags(Options, description=__doc__)))
