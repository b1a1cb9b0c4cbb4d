"""Train a model on your own data and evaluate it once on held-out rows.

  python train.py                                    the bundled example: breast cancer
  python train.py --data table.csv --target price    your own table; text columns are used too
  python train.py --data photos/                     your own images, photos/<class>/*.jpg
  python train.py --data table.csv --target price --image path
  python train.py --resume runs/x/last.pt            continue after an interruption

Writes a run folder: best.pt (for predict.py), last.pt (for --resume), metrics.json, history.csv,
test_predictions.csv, sample.csv and TensorBoard events; with images also sample/ and augmented.png.
"""

import os

os.environ.setdefault("OMP_WAIT_POLICY", "passive")  # spinning threads slow down everything else on the machine

import json
import time
from dataclasses import asdict, dataclass, replace
from pathlib import Path

from config import TABLE, Config, DataConfig, ModelConfig, RunConfig, TrainConfig
from console import run
from errors import UserError, parse_flags

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
    from evaluation.calibration import calibrate
    from evaluation.run_folder import (
        diagnose,
        evaluate_test,
        open_run_folder,
        print_data,
        print_result,
        read_tested,
        write_previews,
        write_run,
    )
    from trainer import Trainer, seed_all

    config = Config(data or DataConfig(), model or ModelConfig(), training or TrainConfig(), run or RunConfig())
    started, path = time.monotonic(), config.run.resume
    state = _training_state(path) if path else None
    splits = load_splits(config.data, config.training.seed, table)
    with open_run_folder(config.run, splits.sources[0]) as out:
        config = replace(config, run=replace(config.run, out=str(out), resume=""))
        if table is not None:
            config = replace(config, data=replace(config.data, data=TABLE))
        splits, pipeline, loaders, findings = assemble(splits, config)
        trainer = Trainer(pipeline, config.training, config.run)
        trainer.started = started
        if state:
            _restore(trainer, state, path)
        print_data(splits, pipeline, findings)
        seed_all(config.training.seed, 0)
        write_previews(out, loaders[0], pipeline.preprocessor)
        history = trainer.fit(*loaders[:2])
        logits, targets = trainer.logits(loaders[1])
        pipeline.task = trainer.task = calibrate(pipeline.task, logits, targets, config.training.monitor)
        pipeline.save(out / "best.pt")
        val = pipeline.task.evaluate(logits, targets)
        tested = read_tested(out, trainer, splits, config) if state else None
        predictions, test, evaluation = tested or evaluate_test(trainer, splits, loaders, config)
        diagnosis = diagnose(val, test, pipeline.task, splits, replace(config, training=trainer.config))
        learned = not diagnosis
        diagnosis += [evaluation["comparison"]] if learned and evaluation["comparison"] else []
        result = Run(pipeline, history, val, test, evaluation["intervals"], predictions, out, diagnosis)
        if tested:
            print(f"\n{out} is complete, and stays as it is: the test split was evaluated before.")
        else:
            write_run(result, trainer, splits, config, evaluation["baselines"], findings)
    print_result(result, trainer, evaluation["baselines"], learned)
    return result


def assemble(splits, config: Config):
    """Fit task and preprocessor to the training records and build the network.

    Returns (splits, pipeline, loaders, what evaluation/audit.py found in the data).
    """
    import torch

    from dataloader import fit_splits, make_loaders
    from evaluation.audit import audit
    from evaluation.drift import PROFILE_ROWS, Profile
    from model import read_ids_of_texts
    from pipeline import SELF_CHECK_ROWS, Pipeline
    from preprocessing.column import evenly_spaced
    from preprocessing.preprocessor import take
    from task import Task

    training = config.training
    options = {"class_weights": training.class_weights, "label_smoothing": training.label_smoothing}
    options["form"] = splits.config.column_formats().get(splits.target, "")
    task = Task.fit(splits.train[splits.target], splits.kind, loss=training.loss, **options)
    data = replace(splits.config, tokenizer=_tokenizer(config))
    splits, preprocessor, encoded = fit_splits(splits, data, task, text_ids=read_ids_of_texts(config.model.model))
    model, model_spec = _build_network(preprocessor, encoded[0], task, config, splits.notes)
    rows = evenly_spaced(torch.arange(len(splits.train)), PROFILE_ROWS)
    sample = {name: take(part, rows) for name, part in encoded[0].items()}
    profile = Profile.fit(preprocessor.profile_values(splits.train.iloc[rows.numpy()], sample))
    pipeline = Pipeline(
        model,
        task,
        preprocessor,
        model_spec=model_spec,
        config=config.to_dict(),
        examples=preprocessor.examples(splits.train, SELF_CHECK_ROWS),
        profile=profile.columns,
    )
    findings = audit(splits, task, preprocessor, encoded) if config.run.report else []
    loaders = make_loaders(splits, preprocessor, encoded, task, config.data.batch_size)
    return splits, pipeline, loaders, findings


def _tokenizer(config: Config) -> str:
    """Return the tokenizer of text columns: the one that is given, or the one that the network of texts reads."""
    from model import DEFAULTS, network_class

    if config.model.pretrained:
        return f"hf:{config.model.pretrained}"
    if config.data.tokenizer != "auto":
        return config.data.tokenizer
    networks = [network_class(name) for name in (*config.model.model, DEFAULTS["text"]) if name != "auto"]
    return next(network.TOKENIZER for network in networks if hasattr(network, "TOKENIZER"))


def _build_network(preprocessor, encoded: dict, task, config: Config, notes: list[str]):
    """Return (the network with its initial weights, how `build_model` builds it again).

    encoded: the columns of the training records.
    """
    from model import build_model, choose_networks, quantile_bins
    from trainer import seed_weights

    names = choose_networks(config.model.model, list(preprocessor.inputs))
    flags = {name: value for name, value in config.to_dict()["model"].items() if name != "model"}
    args = {**preprocessor.model_args, "out_features": task.out_features, **flags}
    if "numbers" in preprocessor.inputs:
        args["bins"] = quantile_bins(preprocessor.join(encoded)["numbers"])
    if pretrained := config.model.pretrained:
        from preprocessing.hub import from_hugging_face

        args["encoder"] = json.loads(from_hugging_face("AutoConfig", pretrained).to_json_string(use_diff=False))
        if config.training.lr > 5e-4:
            notes.append(f"--lr {config.training.lr:g} is high for a pretrained network: 2e-5 to 1e-4 is usual")
    seed_weights(config.training.seed)
    model = build_model(names, args)
    for network in model.modules():
        if hasattr(network, "start_from"):
            network.start_from(pretrained, args["max_length"])
    return model, {"names": names, "args": args}


# ---------------------------------------------------------------- resume


def resume_config(path: str) -> Config:
    """Return the flags of the run that wrote `path` (a last.pt), to continue from there in its folder."""
    state = _training_state(path)["config"]
    state["data"].setdefault("keep_duplicates", True)  # a run from before this flag: the split stays what it was
    config = Config.from_dict(state)
    return replace(config, run=replace(config.run, resume=path, out=str(Path(path).parent)))


def _training_state(path: str) -> dict:
    from pipeline import read_checkpoint

    state = read_checkpoint(path)
    if "training" not in state:
        raise UserError(f"--resume {path}: it holds a model but no training state. Give the last.pt beside it.")
    return state


def _restore(trainer, state: dict, path: str) -> None:
    """Load a saved state into a new trainer. Raises UserError if data or flags would make it another run."""
    pipeline = trainer.pipeline
    now = {
        "task": asdict(pipeline.task),
        "preprocessor": pipeline.preprocessor.state(),
        "model_spec": pipeline.model_spec,
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
    config = parse_flags(Config, description=__doc__)
    if config.run.resume:  # parse again, with the flags of that run as defaults: flags that are given win
        config = parse_flags(Config, description=__doc__, default=resume_config(config.run.resume))
    config.data.check_files()
    train(config.data, config.model, config.training, config.run)


if __name__ == "__main__":
    run(main)
