"""Train a model on your own data and test it once.

  python train.py                                    the bundled example: breast cancer
  python train.py --data table.csv --target price    your own table
  python train.py --data photos/                     your own images, photos/<class>/*.jpg
  python train.py --data reviews.csv --target label --text review
  python train.py --resume runs/x/last.pt            go on after an interruption

Writes a run folder: best.pt (for predict.py), last.pt (for --resume), metrics.json, history.csv,
test_predictions.csv, sample.csv and TensorBoard events; of images, sample/ and augmented.png.
"""

import os

os.environ.setdefault("OMP_WAIT_POLICY", "passive")  # threads that spin slow down all else on the machine

import json
import shutil
import time
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path

from config import TABLE, Config, DataConfig, ModelConfig, TrainConfig
from errors import UserError, naming, parse_flags, run

# torch, pandas and scikit-learn are imported where they are used: --help and a typo are answered without them.

SAMPLE_ROWS = 5


@dataclass
class Run:
    """What `train` returns: the trained pipeline, and what is known of it."""

    pipeline: object  # a pipeline.Pipeline with the best weights
    history: object  # a DataFrame, a row per epoch
    val: dict[str, float]  # metrics of the best epoch
    test: dict[str, float]  # metrics on the test split
    predictions: object  # a DataFrame: row, target and answer of each test record
    out: Path | None


def train(
    data: DataConfig | None = None, model: ModelConfig | None = None, training: TrainConfig | None = None, *, table=None
) -> Run:
    """Assemble data, model and trainer; fit; test once; write the run folder.

    table: a DataFrame to use in place of the file that `data.data` names.
    Raises UserError for anything wrong with data or flags, and KeyboardInterrupt, everything saved, when interrupted.
    """
    import pandas as pd
    import torch

    from dataloader import load_splits
    from trainer import Trainer

    config = Config(data or DataConfig(), model or ModelConfig(), training or TrainConfig())
    path = config.training.resume
    state = _training_state(path) if path else None
    splits = load_splits(config.data, config.training.seed, table)
    out = _run_folder(config, splits.sources[0])
    assemble = assemble_images if splits.image else assemble_text if splits.text else assemble_table
    splits, pipeline, loaders = assemble(splits, config, out)
    config = replace(config, training=replace(config.training, out=str(out), resume=""))
    if table is not None:
        config = replace(config, data=replace(config.data, data=TABLE))
    pipeline.config = config.to_dict()
    trainer = Trainer(pipeline, config.training)
    if state:
        _take_over(trainer, state, path)
    _print_data(splits, pipeline)
    is_new = not out.exists()
    try:
        if splits.image:
            _write_contact_sheet(out, loaders[0], pipeline.preprocessor, config.training.seed)
        history = trainer.fit(*loaders[:2])
    except BaseException:
        if is_new and not (out / "last.pt").exists():
            shutil.rmtree(out, ignore_errors=True)  # nothing was learned yet: leave nothing half-made behind
        raise
    logits, targets = trainer.logits(loaders[2])  # the one look at the test split
    in_order = torch.cat(list(loaders[2].batch_sampler)).argsort()  # texts are asked by their length
    predictions = pipeline.answers(logits[in_order], splits.test)
    predictions.insert(0, "target", splits.test[splits.target])
    if splits.image:
        predictions["file"] = predictions.pop("file")  # to the end, where it disturbs nobody
    result = Run(
        pipeline=pipeline,
        history=pd.DataFrame(history),
        val={k.removeprefix("val/"): v for k, v in history[trainer.best["epoch"] - 1].items() if k.startswith("val/")},
        test=pipeline.task.measure(logits, targets),
        predictions=predictions.rename_axis("row").reset_index(),
        out=out,
    )
    _write_run(result, trainer, splits, config)
    return result


def assemble_table(splits, config: Config, out: Path):
    """Fit everything to the training records of a table; return (splits, pipeline, loaders)."""
    from dataloader import make_loaders
    from preprocessing import TabularPreprocessor

    kinds = {config.data.group: "drop"} if config.data.group else {}
    with naming(splits.sources[0]):
        preprocessor = TabularPreprocessor.fit(
            splits.train.drop(columns=splits.target),
            kinds=kinds | config.data.column_kinds(),
            scaling=config.data.scaling,
            min_freq=config.data.min_freq,
        )
    pipeline = _build_pipeline(splits, preprocessor, config)
    return splits, pipeline, make_loaders(splits, preprocessor, pipeline.task, config.data.batch_size)


def assemble_text(splits, config: Config, out: Path):
    """As `assemble_table`, of texts: what is known of words and n-grams comes from the training texts."""
    from dataloader import make_loaders
    from huggingface import from_hugging_face
    from model import network_class
    from pipeline import DEFAULT_MODELS
    from text import TextPreprocessor

    data = config.data
    name = DEFAULT_MODELS["text"] if config.model.model == "auto" else config.model.model
    pretrained, options = name.removeprefix("hf:") if name.startswith("hf:") else "", {}
    with naming(splits.sources[0]):
        if pretrained:
            preprocessor = TextPreprocessor.from_pretrained(pretrained, column=splits.text, max_length=data.max_length)
            options = {
                "encoder": json.loads(from_hugging_face("AutoConfig", pretrained).to_json_string(use_diff=False))
            }
        else:
            segment = getattr(network_class(name), "SEGMENT", "") if data.segment == "auto" else data.segment
            if not segment:
                raise UserError(f"--model {name} reads no texts: give bag, transformer or hf:NAME.")
            preprocessor = TextPreprocessor.fit(
                splits.train,
                column=splits.text,
                steps=list(data.clean),
                segment=segment,
                min_freq=data.min_freq,
                vocab_size=data.vocab_size,
                max_length=data.max_length,
            )
    pipeline = _build_pipeline(splits, preprocessor, config, options)
    if pretrained:
        pipeline.model.start_from(pretrained, preprocessor.max_length)
        if config.training.lr > 5e-4:
            splits.notes.append(f"--lr {config.training.lr:g} is high for a pretrained network: 2e-5 to 1e-4 is usual")
    return splits, pipeline, make_loaders(splits, preprocessor.ids, pipeline.task, data.batch_size)


def assemble_images(splits, config: Config, out: Path):
    """As `assemble_table`, of images: each is decoded here, once; those that cannot be read leave the splits."""
    import torch

    from augmentation import flip_is_harmless, make_augmentation
    from dataloader import make_loaders
    from drift import PROFILE_ROWS
    from images import ImagePreprocessor, PixelCache
    from pipeline import choose_device

    data = config.data
    cache = PixelCache(next(p for p in out.absolute().parents if p.exists()), data.skip_broken)
    preprocessor = ImagePreprocessor.fit(splits.train, column=splits.image, image_size=data.image_size, cache=cache)
    size, channels = preprocessor.size, preprocessor.channels
    parts = {n: cache.get(getattr(splits, n), splits.image, size, channels)[1] for n in ("train", "val", "test")}
    notes = [f"{len(cache.broken)} broken images left out, the first: {cache.broken[0]}"] if cache.broken else []
    pixels, records = cache.get(splits.train, splits.image, size, channels)
    some = torch.arange(0, len(pixels), max(1, len(pixels) // PROFILE_ROWS))
    sample = records.iloc[some.numpy()], preprocessor.normalise(pixels[some])
    pipeline = _build_pipeline(replace(splits, **parts), preprocessor, config, sample=sample)
    flip, why = data.flip == "on", f"--flip {data.flip}"
    if data.flip == "auto" and pipeline.task.classes:
        flip, why = flip_is_harmless(pixels, pipeline.task.encode(records[splits.target]))
    if data.augment != "none":
        notes.append(f"--augment {data.augment}, horizontal flip {'on' if flip else 'off'} ({why})")
    splits = replace(splits, **parts, notes=splits.notes + notes)
    augment, device = make_augmentation(data.augment, flip), choose_device(config.training.device)

    def finish(batch, change=None):  # on the device: the pixels stay bytes until then
        pixels = batch[0].to(device, non_blocking=True)
        return preprocessor.normalise(change(pixels) if change else pixels), batch[1]

    loaders = make_loaders(
        splits,
        lambda records: cache.get(records, splits.image, size, channels)[0],
        pipeline.task,
        data.batch_size,
        finish_training=partial(finish, change=augment),
        finish=finish,
    )
    return splits, pipeline, loaders


def _build_pipeline(splits, preprocessor, config: Config, facts: dict | None = None, sample=None):
    """Fit the task, and put a fresh network between it and the preprocessor.

    facts: more for its constructor.  sample: (records, x) from all over the training split, for its profile.
    """
    from drift import PROFILE_ROWS, Profile
    from model import build_model
    from pipeline import DEFAULT_MODELS, GOLDEN_ROWS, Pipeline, kind_of
    from preprocessing import spread
    from task import Task
    from trainer import seed_all

    task = Task.fit(
        splits.train[splits.target],
        splits.kind,
        loss=config.training.loss,
        class_weights=config.training.class_weights,
        label_smoothing=config.training.label_smoothing,
    )
    name = config.model.model if config.model.model != "auto" else DEFAULT_MODELS[kind_of(preprocessor)]
    options = {k: v for k, v in config.to_dict()["model"].items() if k != "model"} | (facts or {})
    facts = {**preprocessor.model_args, "out_features": task.out_features, **options}
    seed_all(config.training.seed, 0)
    model = build_model(name, facts)
    examples = preprocessor.examples(splits.train, GOLDEN_ROWS)
    if sample is None:
        records = spread(splits.train, PROFILE_ROWS)
        sample = records, preprocessor(records)
    profile = Profile.fit(preprocessor.measure(*sample)).columns
    network = {"name": name, "facts": facts}
    return Pipeline(model, task, preprocessor, network=network, examples=examples, profile=profile)


def resume_config(path: str) -> Config:
    """Return the flags of the run that wrote `path` (a last.pt), set to go on from there in the folder where it is."""
    config = Config.from_dict(_training_state(path)["config"])
    return replace(config, training=replace(config.training, resume=path, out=str(Path(path).parent)))


def _training_state(path: str) -> dict:
    from pipeline import read_checkpoint

    state = read_checkpoint(path)
    if "training" not in state:
        raise UserError(f"--resume {path}: it holds a model but no state of training. Give the last.pt beside it.")
    return state


def _take_over(trainer, state: dict, path: str) -> None:
    """Put a saved state into a trainer made anew; raise UserError where data or flags make it another run."""
    pipeline = trainer.pipeline
    now = {"task": asdict(pipeline.task), "preprocessor": asdict(pipeline.preprocessor), "network": pipeline.network}
    for name, what in (("task", "rows or the target"), ("preprocessor", "rows or columns"), ("network", "network")):
        if json.loads(json.dumps(now[name])) != state[name]:
            raise UserError(
                f"--resume {path}: the {what}, or flags that concern them, are not those of that run: its weights "
                "would not fit. Undo the change, or begin a new run without --resume."
            )
    pipeline.model.load_state_dict(state["state_dict"])
    trainer.resume(state["training"])


def _run_folder(config: Config, source: str) -> Path:
    """Return where the run is to be written. Raises UserError where another run is, or nothing can be."""
    base = config.training.out or f"runs/{Path(source).name.split('.')[0]}-{time.strftime('%Y%m%d-%H%M%S')}"
    out, count = Path(base), 1
    while not config.training.out and out.exists():
        count += 1
        out = Path(f"{base}-{count}")
    if not config.training.resume and any((out / name).exists() for name in ("best.pt", "last.pt")):
        raise UserError(f"--out {out} holds a run already: give another folder, or --resume {out / 'last.pt'}.")
    nearest = next(folder for folder in (out, *out.absolute().parents) if folder.exists())
    if not nearest.is_dir() or not os.access(nearest, os.W_OK):
        raise UserError(f"--out {out}: {nearest} is no folder that can be written to.")
    return out


def _write_contact_sheet(out: Path, loader, preprocessor, seed: int) -> None:
    """Write augmented.png: the first batch of the first epoch, as the network sees it."""
    from augmentation import contact_sheet
    from trainer import seed_all

    seed_all(seed, 0)
    inputs = next(iter(loader))[0][:32].cpu()
    try:
        out.mkdir(parents=True, exist_ok=True)
        contact_sheet(preprocessor.denormalise(inputs) * 255).save(out / "augmented.png")
    except OSError as error:
        raise UserError(f"--out {out}: cannot be written to ({error.strerror}).") from None


def _write_run(result: Run, trainer, splits, config: Config) -> None:
    """Write what is known once training is over: test predictions, a sample for predict.py, metrics.json last."""
    from images import image_bytes, is_in_memory
    from pipeline import atomic_write, weights_sha256
    from preprocessing import spread

    out, task = result.out, result.pipeline.task
    with atomic_write(out / "test_predictions.csv") as file:
        result.predictions.to_csv(file, index=False)
    records, sample = spread(splits.test, SAMPLE_ROWS), out / ("sample" if splits.image else "sample.csv")
    if splits.image:
        sample.mkdir(exist_ok=True)
        for row, cell in records[splits.image].items():
            name = f"{row}.png" if is_in_memory(cell) else f"{row}-{Path(cell).name}"
            (sample / name).write_bytes(image_bytes(cell))
    else:
        with atomic_write(sample) as file:
            records.drop(columns=splits.target).to_csv(file, index=False)
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
        "seconds": seconds,
        "samples_per_second": rows["train"] * len(result.history) / seconds,
        "weights_sha256": weights_sha256(trainer.best["state_dict"]),
        "model": result.pipeline.network["name"],
        "device": str(trainer.device),
        "threads": trainer.threads,
        "config": config.to_dict(),
    }
    with atomic_write(out / "metrics.json") as file:
        plain = json.loads(json.dumps(metrics), parse_constant=lambda _: None)  # JSON has no NaN
        json.dump(plain, file, indent=2, ensure_ascii=False)
        file.write("\n")
    early = f" (stopped early: --patience {config.training.patience})" if trainer.out_of_patience() else ""
    print(f"\nbest epoch {trainer.best['epoch']} of {len(result.history)}{early}, in {seconds:.1f} s")
    for split in ("val", "test"):
        print(f"{split:<5} " + "  ".join(f"{name} {value:.5g}" for name, value in getattr(result, split).items()))
    print(f"\nTry it: python predict.py --checkpoint {out / 'best.pt'} --input {sample} --output -")


def _print_data(splits, pipeline) -> None:
    """Show what was worked out about the data, for a person to overrule."""
    for note in splits.notes:
        print(note)
    task = pipeline.task
    rows = f"{len(splits.train)} train, {len(splits.val)} validation, {len(splits.test)} test rows"
    if task.classes:
        shown = ", ".join(map(str, task.classes[:8])) + (", …" if len(task.classes) > 8 else "")
        print(f"{task.target}: {task.kind} ({shown}); {rows}")
    else:
        print(f"{task.target}: regression (mean {task.mean:.4g}, deviation {task.std:.4g}); {rows}")
    decisions = pipeline.preprocessor.decisions()
    widths = [max(len(row[i]) for row in decisions) for i in range(2)]
    for name, kind, what in decisions:
        print(f"  {name:<{min(widths[0], 40)}}  {kind:<{widths[1]}}  {what}")
    print("Overrule with --task KIND and --columns NAME=KIND …", flush=True)


def main() -> None:
    config = parse_flags(Config, description=__doc__)
    if config.training.resume:  # once more, with the flags of that run as defaults: typed ones win
        config = parse_flags(Config, description=__doc__, default=resume_config(config.training.resume))
    config.data.check_files()
    train(config.data, config.model, config.training)


if __name__ == "__main__":
    run(main)
