"""Write the run folder: metrics, test predictions, a sample for predict.py, and a picture of a training batch."""

import json
from pathlib import Path

from errors import UserError
from pipeline import atomic_write, weights_sha256
from preprocessing.column import evenly_spaced

SAMPLE_ROWS = 5


def write_previews(out: Path, loader, preprocessor) -> None:
    """Write augmented.png: the next training batch as the network sees it, if a person can look at it."""
    if not any(column.path_cells for column in preprocessor.columns):
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


def _write_sample(records, pipeline, out: Path) -> Path:
    """Write a few records without the target for predict.py to try; return the file or folder to give it.

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
    if columns and pipeline.preprocessor.lone:
        return out / "sample"
    with atomic_write(out / "sample.csv") as file:
        records.to_csv(file, index=False)
    return out / "sample.csv"


def write_run(result, trainer, splits, config) -> Path:
    """Write what is known after training: test predictions, a sample for predict.py, and metrics.json last.

    result: a train.Run. Returns the sample.
    """
    out, task = result.out, result.pipeline.task
    with atomic_write(out / "test_predictions.csv") as file:
        result.predictions.to_csv(file, index=False)
    sample = _write_sample(evenly_spaced(splits.test, SAMPLE_ROWS), result.pipeline, out)
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
        "model": " + ".join(result.pipeline.model_spec["names"]),
        "device": str(trainer.device),
        "threads": trainer.threads,
        "config": config.to_dict(),
    }
    with atomic_write(out / "metrics.json") as file:
        plain = json.loads(json.dumps(metrics), parse_constant=lambda _: None)  # JSON has no NaN
        json.dump(plain, file, indent=2, ensure_ascii=False)
        file.write("\n")
    return sample
