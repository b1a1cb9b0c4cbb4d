"""Predict a file of records from a checkpoint.

  python predict.py --checkpoint runs/x/best.pt --input new.csv --output predictions.csv

Reads csv, tsv, jsonl and parquet. If the model has a single column of images, also an image, a folder or a glob in
quotes; with a single column of text, also a folder of .txt files, or a .txt file with one text per line. "-" is
standard input or output (csv, or jsonl if the input is jsonl). One prediction per row, in order. If the target column
is present, metrics are printed.
"""

import os

os.environ.setdefault("OMP_WAIT_POLICY", "passive")  # spinning threads slow down everything else on the machine

import contextlib
import csv
import io
import sys
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

from errors import UserError, error_prefix, parse_flags, run


@dataclass(frozen=True)
class Options:
    """the model, and the records to predict"""

    checkpoint: str
    """best.pt of a run; last.pt predicts with the weights of the last epoch."""
    input: str
    """csv, tsv, jsonl or parquet file (also .gz), or - for standard input; for a single column of images or texts also
    a folder, a glob, one image, or a .txt file with one text per line."""
    output: str = "-"
    """csv, tsv, jsonl or parquet file, or - for standard output."""
    device: str = "auto"
    """auto (a GPU if there is one), cpu, cuda, mps …"""


DRIFT_ROWS = 100_000  # the first rows of the input are compared with the training data


class Writer:
    """Write frames of predictions one after the other, as csv, tsv, jsonl or parquet."""

    def __init__(self, file, form: str):
        self.file, self.form, self.parquet = file, form, None
        self.first = True

    def write(self, predictions) -> None:
        import pyarrow as pa
        import pyarrow.compute as pc
        import pyarrow.csv as arrow
        from pyarrow import parquet

        if self.form == "jsonl":
            self.file.write(
                predictions.to_json(orient="records", lines=True, double_precision=15, force_ascii=False).encode()
            )
            return
        table = pa.Table.from_pandas(predictions, preserve_index=False)
        if self.form == "parquet":
            self.parquet = self.parquet or parquet.ParquetWriter(self.file, table.schema)
            self.parquet.write_table(table)
        else:
            separator = "\t" if self.form == "tsv" else ","
            if self.first:
                head = io.StringIO()
                csv.writer(head, delimiter=separator, lineterminator="\n").writerow(predictions.columns)
                self.file.write(head.getvalue().encode())
            self.first = False
            # Arrow quotes either all strings or none
            words = [
                column
                for column in table.columns
                if pa.types.is_string(column.type) or pa.types.is_large_string(column.type)
            ]
            special = any(pc.any(pc.match_substring_regex(column, f'[{separator}"\r\n]')).as_py() for column in words)
            quoting = "needed" if special else "none"
            options = arrow.WriteOptions(include_header=False, delimiter=separator, quoting_style=quoting)
            arrow.write_csv(table, self.file, options)

    def close(self) -> None:
        if self.parquet:
            self.parquet.close()


@contextlib.contextmanager
def open_output(path: str, source: str):
    """Open `path` for predictions: the file appears only once it is complete."""
    from pipeline import atomic_write
    from sources import file_format

    if path == "-":
        is_jsonl = source.removesuffix(".gz").endswith((".jsonl", ".ndjson"))
        yield Writer(sys.stdout.buffer, "jsonl" if is_jsonl else "csv")
        sys.stdout.buffer.flush()
        return
    form = "tsv" if path.lower().endswith(".tsv") else file_format(path)
    if form == "log":
        raise UserError(f"--output {path}: predictions are written as csv, tsv, jsonl or parquet.")
    if path.lower().endswith(".gz"):
        raise UserError(f"--output {path}: predictions are not compressed; leave out .gz.")
    with atomic_write(path, "wb") as file:
        writer = Writer(file, form)
        yield writer
        writer.close()


def prefetch(frames):
    """Yield frames while the next one is read in another thread."""
    with ThreadPoolExecutor(1) as reader:
        following = reader.submit(next, frames, None)
        while (frame := following.result()) is not None:
            following = reader.submit(next, frames, None)
            yield frame


def predict(options: Options) -> None:
    """Predict all rows in chunks, in constant memory; then report unknown values, columns that differ from the training
    data and, if there are targets, metrics."""
    from tqdm import tqdm

    from evaluation.drift import Profile
    from pipeline import Pipeline
    from sources import read_records, standard_input

    pipeline = Pipeline.load(options.checkpoint).to(options.device)
    preprocessor = pipeline.require_preprocessor()
    layout, profile, counted = preprocessor.layout, Profile(pipeline.profile), Counter()
    unknown, score, rows = Counter(), Score(pipeline.task), 0
    source = standard_input(layout) if options.input == "-" else contextlib.nullcontext(options.input)
    with source as path, open_output(options.output, path) as writer, tqdm(unit=" rows", disable=None) as bar:
        for frame in prefetch(read_records(path, layout, preprocessor.read_rows)):
            with error_prefix(path):
                parts, logits = pipeline.predict_logits(frame)
            writer.write(pipeline.to_frame(logits, frame))
            unknown.update(preprocessor.count_unknown(parts))
            if profile.columns and rows < DRIFT_ROWS:
                counted.update(profile.count(preprocessor.profile_values(frame, parts)))
            score.add(logits, frame)
            rows += len(frame)
            bar.update(len(frame))
        if rows == 0:
            raise UserError(f"{path}: there are no rows below the header.")
    for name, count in unknown.items():
        print(f"column {name!r}: {count} of {rows} values unknown (unseen or too rare in training)", file=sys.stderr)
    for name, state in profile.compare(counted).items():
        if state["drifted"]:
            print(f"drift in {name!r}: {state['why']}", file=sys.stderr)
    score.show(sys.stderr if options.output == "-" else sys.stdout)


class Score:
    """Metrics over the rows that have a target, if any."""

    def __init__(self, task):
        self.task, self.metrics, self.problem = task, None, ""

    def add(self, logits, frame) -> None:
        if self.task.target not in frame or self.problem:
            return
        import numpy as np

        from preprocessing.parsing import has_value

        given = np.flatnonzero(has_value(frame[self.task.target]))
        if not len(given):
            return
        try:  # rows can be predicted whatever the target column holds, and where torchmetrics is not installed
            targets = self.task.encode(frame[self.task.target].iloc[given])
            self.metrics = self.metrics or self.task.metrics()
        except (UserError, ImportError) as error:
            self.problem = str(error)
            return
        self.metrics.update(self.task.metric_inputs(logits[given]), self.task.decode(targets))

    def show(self, file) -> None:
        if self.problem:
            print(f"no metrics: {self.problem}", file=sys.stderr)
        elif self.metrics:
            values = self.task.compute_metrics(self.metrics)
            print("metrics  " + "  ".join(f"{name} {value:.5g}" for name, value in values.items()), file=file)


if __name__ == "__main__":
    run(lambda: predict(parse_flags(Options, description=__doc__)))
