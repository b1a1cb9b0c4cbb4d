"""Train a model on your own data and evaluate it once on held-out rows.

  python train.py                                    the bundled example: breast cancer
  python train.py --data table.csv --target price    your own table; text columns are used too
  python train.py --data photos/                     your own images, photos/<class>/*.jpg
  python train.py --data table.csv --target price --image path
  python train.py --resume runs/x/last.pt            continue after an interruption
  torchrun --nproc-per-node 2 train.py --data …      several processes, see docs/scaling.md

Writes a run folder: best.pt (for predict.py), last.pt (for --resume), metrics.json, history.csv,
test_predictions.csv, sample.csv and TensorBoard events; with images also sample/ and augmented.png.
"""

import os

os.environ.setdefault("OMP_WAIT_POLICY", "passive")  # spinning threads slow down everything else on the machine

import copy
import json
import time
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path

from config import TABLE, Config, DataConfig, ModelConfig, RunConfig, TrainConfig
from console import run
from errors import UserError, parse_flags
from scaling.launch import process_group, refuse_if_launched, restarted_from

# torch, pandas and scikit-learn are imported where they are used: --help and a typo are reported without them.


@dataclass
class Run:
    """What `train` returns: the trained pipeline and how good it is."""

    pipeline: object  # a pipeline.Pipeline with the best weights
    history: object  # a DataFrame, one row per epoch
    val: dict[str, float]  # metrics of the best epoch
    test: dict[str, float]  # metrics on the test split, and their 95 % intervals, [low, high]
    intervals: dict[str, list[float]]
    predictions: object  # a DataFrame: row, target and prediction of each test record
    out: Path
    diagnosis: list[str]  # what is wrong with the result, and what to try; empty if nothing is


def train(
    data: DataConfig | None = None,
    model: ModelConfig | None = None,
    training: TrainConfig | None = None,
    run: RunConfig | None = None,
    *,
    table=None,
) -> Run:
    """Assemble data, model and trainer; fit; evaluate on the test split once; write the run folder.

    table: a DataFrame to use instead of the file that `data.data` names.
    Raises UserError for anything wrong with data or flags, and KeyboardInterrupt, after saving, when interrupted.
    """
    from dataloader import load_splits

    config = Config(data or DataConfig(), model or ModelConfig(), training or TrainConfig(), run or RunConfig())
    started = time.monotonic()
    splits = load_splits(config.data, config.training.seed, table)
    if table is not None:
        config = replace(config, data=replace(config.data, data=TABLE))
    if config.data.folds:
        refuse_if_launched("--folds")
        return _train_folds(splits, config)
    return _train_once(splits, config, started)


def _train_folds(splits, config: Config) -> Run:
    """Train and evaluate on each fold, in a run folder of its own; return the ensemble of the models."""
    from evaluation.folds import combine, make_folds, print_folds, same_columns, same_networks
    from evaluation.run_folder import open_run_folder

    data, training, runs = config.data, config.training, []
    training = replace(training, time_budget=training.time_budget / data.folds)
    folds = make_folds(splits, training.seed)
    with open_run_folder(config.run, splits.sources[0]) as out:
        for number, fold in enumerate(folds, start=1):
            print(f"{'' if number == 1 else chr(10)}fold {number} of {data.folds}", flush=True)
            folder = out / f"fold-{number}"
            last = folder / "last.pt"
            run = replace(config.run, out=str(folder), resume=str(last) if last.exists() else "")
            if runs:
                fold = replace(fold, config=same_columns(splits, runs[0].pipeline))
                config = replace(config, model=same_networks(config.model, runs[0].pipeline))
            runs.append(_train_once(fold, replace(config, training=training, run=run), time.monotonic(), number))
        result, coverage = combine(runs, folds, config, out)
    print_folds(runs, result, coverage)
    return result


def _train_once(splits, config: Config, started: float, fold: int = 0) -> Run:
    """Train on one split, or on one fold of several.  started: when the time of --time-budget began."""
    from backbones.settings import tries_lite0
    from evaluation.calibration import calibrate
    from evaluation.comparison import compare_networks
    from evaluation.conformal import check_rows, fit_coverage
    from evaluation.diagnosis import diagnose
    from evaluation.held_out import summarize_test
    from evaluation.learning_curve import learning_curve
    from evaluation.run_folder import (
        evaluate_test,
        open_run_folder,
        print_data,
        print_result,
        read_tested,
        write_previews,
        write_run,
    )
    from pipeline import weights_sha256
    from scaling.processes import check_same, leave
    from scaling.randomness import seed_all
    from trainer import Trainer

    path = config.run.resume
    state = _training_state(path) if path else None
    with open_run_folder(config.run, splits.sources[0]) as out:
        config = replace(config, run=replace(config.run, out=str(out), resume=""))
        check_rows(len(splits.val), config.run.coverage)
        splits, pipeline, loaders, findings = assemble(splits, config)
        trainer = Trainer(pipeline, config.training, config.run)
        trainer.started = started
        if state:
            _restore(trainer, state, path)
        check_same(lambda: {
            "rows": [len(records) for records in (splits.train, splits.val, splits.test)],
            "data": json.dumps([asdict(pipeline.task), pipeline.preprocessor.state()]),
            "initial weights": weights_sha256(pipeline.model.state_dict()),
        })  # fmt: skip
        if fold < 2:
            print_data(splits, pipeline, findings)
        seed_all(config.training.seed, 0)
        write_previews(out, loaders[0], pipeline.preprocessor)
        history = trainer.fit(*loaders[:2])
        leave()
        if fold < 2 and tries_lite0(config, **pipeline.model_spec, rows=len(splits.train)):
            other = replace(config, model=replace(config.model, model=("lite0",), freeze=True))
            rival, batches, initial, batch = _fit_without_files(splits, other)
            better, sentence = compare_networks((trainer, loaders[1]), (rival, batches[1]), ("the cnn", "lite0"))
            print(f"\n{sentence}", flush=True)
            if better:  # its files are written by training it again, from features that are computed already
                config, pipeline, loaders = other, rival.pipeline, batches
                pipeline.model.load_state_dict(initial)
                pipeline.config = config.to_dict()
                write_previews(out, [batch], pipeline.preprocessor)
                trainer = Trainer(pipeline, config.training, config.run)
                history = trainer.fit(*loaders[:2])
        logits, targets = trainer.logits(loaders[1])
        task = calibrate(pipeline.task, logits, targets, config.training.monitor)
        task = fit_coverage(task, logits, targets, config.run.coverage, scaled=not fold)
        pipeline.task = trainer.task = task
        val = pipeline.task.evaluate(logits, targets)
        tested = read_tested(out, trainer, splits, config) if state else None
        predictions, test, evaluation = tested or evaluate_test(trainer, splits, loaders, config)
        pipeline.test = summarize_test(pipeline, predictions, test, splits.test)
        pipeline.save(out / "best.pt")
        planned = replace(config, training=trainer.config)
        diagnosis = diagnose(history, val, test, evaluation, pipeline.task, splits, planned)
        if config.run.learning_curve and not fold and not tested:
            whole, fit = (pipeline.task, logits, targets), partial(_fit_part, config=planned, pipeline=pipeline)
            curve, sentence = learning_curve(splits, config.training.seed, whole, fit)
            evaluation["learning_curve"] = curve
            diagnosis.append(sentence)
        result = Run(pipeline, history, val, test, evaluation["intervals"], predictions, out, diagnosis)
        if tested:
            print(f"\n{out} is complete, and stays as it is: the test split was evaluated before.")
        else:
            write_run(result, trainer, splits, config, evaluation, findings)
    if not fold:
        print_result(result, trainer, splits, evaluation, findings)
    return result


def _fit_part(splits, config: Config, pipeline):
    """Train on a part of the training rows, with the columns of a fitted pipeline, without files. Return (task, logits,
    targets) of the validation split."""
    from evaluation.folds import same_columns

    splits = replace(splits, config=same_columns(splits, pipeline))
    trainer, loaders, *_ = _fit_without_files(splits, config)
    return (trainer.task, *trainer.logits(loaders[1]))


def _fit_without_files(splits, config: Config):
    """Return (the trainer when it has finished, loaders, the initial weights, a batch of records)."""
    from trainer import Trainer

    run = replace(config.run, out="", report=False)
    _, pipeline, loaders, _ = assemble(replace(splits, notes=[]), replace(config, run=run))
    initial, batch = copy.deepcopy(pipeline.model.state_dict()), next(iter(loaders[0]))
    trainer = Trainer(pipeline, config.training, run)
    trainer.fit(*loaders[:2])
    return trainer, loaders, initial, batch


def assemble(splits, config: Config):
    """Fit task and preprocessor to the training records and build the network.

    Returns (splits, pipeline, loaders, what evaluation/audit.py found in the data).
    """
    import torch

    from backbones.settings import advise, data_settings, resolve_names, settle_training
    from dataloader import fit_splits, make_loaders
    from evaluation.audit import audit
    from evaluation.drift import PROFILE_ROWS, Profile
    from model import read_ids_of_texts
    from pipeline import SELF_CHECK_ROWS, Pipeline
    from preprocessing.column import evenly_spaced
    from preprocessing.preprocessor import take
    from scaling.device import choose_device
    from scaling.processes import is_main
    from task import Task

    training = config.training
    options = {"class_weights": training.class_weights, "label_smoothing": max(0, training.label_smoothing)}
    options["form"] = splits.config.column_formats().get(splits.target, "")
    task = Task.fit(splits.train[splits.target], splits.kind, loss=training.loss, **options)
    names = resolve_names(config.model.model)
    on_cpu = choose_device(config.run.device).type == "cpu"
    settled = settle_training(config.model, len(splits.train), on_cpu, splits.notes)
    config = replace(config, model=settled)  # a resumed run does not choose again
    data = data_settings(replace(splits.config, tokenizer=_tokenizer(names, config)), names, settled.freeze)
    splits, preprocessor, encoded = fit_splits(splits, data, task, text_ids=read_ids_of_texts(names))
    model, model_spec = _build_network(preprocessor, encoded[0], task, names, config)
    if task.classes:
        task = replace(task, label_smoothing=training.settled(getattr(model, "RECIPE", {})).label_smoothing)
    splits.notes.extend(advise(config, **model_spec, rows=len(splits.train)))
    rows = evenly_spaced(torch.arange(len(splits.train)), PROFILE_ROWS)
    sample = {name: take(part, rows) for name, part in encoded[0].items()}
    profile = Profile.fit(preprocessor.profile_values(splits.train.iloc[rows.numpy()], sample)).columns
    examples = preprocessor.examples(splits.train, SELF_CHECK_ROWS)
    if not config.run.examples:
        examples = preprocessor.made_up(profile, SELF_CHECK_ROWS)
    pipeline = Pipeline(
        model, task, preprocessor, model_spec=model_spec, config=config.to_dict(), examples=examples, profile=profile
    )
    findings = audit(splits, task, preprocessor, encoded) if config.run.report and is_main() else []
    loaders = make_loaders(splits, preprocessor, encoded, task, config.data.batch_size)
    return splits, pipeline, loaders, findings


def _tokenizer(names: tuple[str, ...], config: Config) -> str:
    """Return the tokenizer of text columns: the one that is given, or the one that the network of texts reads."""
    from model import DEFAULTS, network_class

    if pretrained := [name for name in names if name.startswith("hf:")]:
        return pretrained[0]
    if config.data.tokenizer != "auto":
        return config.data.tokenizer
    networks = [network_class(name) for name in (*names, DEFAULTS["text"]) if name != "auto"]
    return next(network.TOKENIZER for network in networks if hasattr(network, "TOKENIZER"))


def _build_network(preprocessor, encoded: dict, task, names: tuple[str, ...], config: Config):
    """Return (the network with its initial weights, how `build_model` builds it again).

    encoded: the columns of the training records.  names: of --model.
    """
    import torch

    from backbones.embeddings import BIN_ROWS, frequent_values, quantile_bins
    from backbones.settings import pretrained_args
    from model import choose_dropout, choose_networks, initial_model
    from preprocessing.column import evenly_spaced
    from preprocessing.preprocessor import take

    names = choose_networks(names, list(preprocessor.inputs))
    flags = {name: getattr(config.model, name) for name in ("activation", "batch_norm", "dropout")}
    if flags["dropout"] == -1:
        flags["dropout"] = choose_dropout(names, bool(task.classes), len(next(iter(encoded.values()))))
    flags |= {"hidden": list(config.model.hidden), **pretrained_args(names, config.model.freeze)}
    args = {**preprocessor.model_args, "out_features": task.out_features, **flags}
    if "numbers" in preprocessor.inputs:
        rows = evenly_spaced(torch.arange(len(next(iter(encoded.values())))), BIN_ROWS)
        numbers = torch.cat([take(encoded[column.name], rows) for column in preprocessor.inputs["numbers"]], dim=1)
        args |= {"bins": quantile_bins(numbers), "levels": frequent_values(numbers)}
    return initial_model(names, args, config.training.seed), {"names": names, "args": args}


# ---------------------------------------------------------------- resume


def resume_config(path: str) -> Config:
    """Return the flags of the run that wrote `path` (a last.pt), to continue from there in its folder."""
    state, folder = _training_state(path)["config"], Path(path).parent
    state["data"].setdefault("keep_duplicates", True)  # a run from before this flag: the split stays what it was
    config = Config.from_dict(state)
    out = folder.parent if config.data.folds else folder
    return replace(config, run=replace(config.run, resume=path, out=str(out)))


def _training_state(path: str) -> dict:
    from pipeline import read_checkpoint
    from scaling.processes import from_main

    state = from_main(read_checkpoint, path)  # only the first process needs the file
    if "training" not in state:
        raise UserError(f"--resume {path}: it holds a model but no training state. Give the last.pt beside it.")
    return state


def _restore(trainer, state: dict, path: str) -> None:
    """Load a saved state into a new trainer. Raises UserError if data or flags would make it another run."""
    pipeline, spec = trainer.pipeline, trainer.pipeline.model_spec
    args = {name: spec["args"].get(name) for name in state["model_spec"]["args"]}  # an older run may have fewer
    now = {
        "task": asdict(pipeline.task),
        "preprocessor": pipeline.preprocessor.state(),
        "model_spec": {"names": spec["names"], "args": args},
    }
    for name, what in (("task", "rows or the target"), ("preprocessor", "rows or columns"), ("model_spec", "network")):
        if json.loads(json.dumps(now[name])) != state[name]:
            raise UserError(
                f"--resume {path}: the {what}, or flags that concern them, differ from that run: its weights would "
                "not fit. Undo the change, or start a new run without --resume."
            )
    pipeline.model.load_state_dict(state["state_dict"])
    trainer.resume(state["training"])


# ---------------------------------------------------------------- around a run


def main() -> None:
    with process_group():
        config = parse_flags(Config, description=__doc__)
        if resume := config.run.resume or restarted_from(config.run.out):
            # parse again, with the flags of that run as defaults: flags that are given win
            config = parse_flags(Config, description=__doc__, default=resume_config(resume))
        config.data.check_files()
        train(config.data, config.model, config.training, config.run)


if __name__ == "__main__":
    run(main)
