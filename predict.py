"""Answer a file of samples from a checkpoint.

  python predict.py --checkpoint runs/x/best.pt --input new.csv --output answers.csv

A model of images takes an image, a folder, a glob in quotes, or a table of paths; one of texts also a .txt file
with one in each line. Otherwise csv, tsv, jsonl and parquet in and out; "-" is standard input or output, written as
csv, or as jsonl where the input is jsonl. One answer a row, in order. Where the target column is there, the metrics
are printed.
"""

import os

os.environ.setdefault("OMP_WAIT_POLICY", "passive")  # threads that spin slow down all else on the machine

import contextlib
import csv
import io
import sys
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

from errors import UserError, naming, parse_flags, run


@dataclass(frozen=True)
class Options:
    """what to answer with, and what"""

    checkpoint: str
    """best.pt of a run (last.pt answers as the last epoch did), or an .onnx file that export.py made."""
    input: str
    """csv, tsv, jsonl or parquet file (also .gz), or - for standard input; image, folder or glob for images; folder,
    glob, or .txt with a text in each line, for texts."""
    output: str = "-"
    """csv, tsv, jsonl or parquet file, or - for standard output."""
    device: str = "auto"
    """auto, cpu, cuda, mps …"""


TABLE_ROWS_AT_ONCE = 65_536
DRIFT_ROWS = 100_000  # the first of the input, which are compared with the training data


class Writer:
    """Write frames of answers, piece by piece, as csv, tsv, jsonl or parquet."""

    def __init__(self, file, form: str):
        self.file, self.form, self.parquet = file, form, None
        self.first = True

    def write(self, answers) -> None:
        import pyarrow as pa
        import pyarrow.compute as pc
        import pyarrow.csv as arrow
        from pyarrow import parquet

        if self.form == "jsonl":
            self.file.write(
                answers.to_json(orient="records", lines=True, double_precision=15, force_ascii=False).encode()
            )
            return
        table = pa.Table.from_pandas(answers, preserve_index=False)
        if self.form == "parquet":
            self.parquet = self.parquet or parquet.ParquetWriter(self.file, table.schema)
            self.parquet.write_table(table)
        else:
            separator = "\t" if self.form == "tsv" else ","
            if self.first:
                head = io.StringIO()
                csv.writer(head, delimiter=separator, lineterminator="\n").writerow(answers.columns)
                self.file.write(head.getvalue().encode())
            self.first = False
            # Arrow quotes either all words or none
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
    """Open `path` for answers: a file appears only when all of them are in it."""
    from pipeline import atomic_write
    from reader import file_format

    if path == "-":
        is_jsonl = source.removesuffix(".gz").endswith((".jsonl", ".ndjson"))
        yield Writer(sys.stdout.buffer, "jsonl" if is_jsonl else "csv")
        sys.stdout.buffer.flush()
        return
    form = "tsv" if path.lower().endswith(".tsv") else file_format(path)
    if form == "log":
        raise UserError(f"--output {path}: answers are written as csv, tsv, jsonl or parquet.")
    if path.lower().endswith(".gz"):
        raise UserError(f"--output {path}: answers are not packed; leave out .gz.")
    with atomic_write(path, "wb") as file:
        writer = Writer(file, form)
        yield writer
        writer.close()


def read_inputs(path: str, kind: str, preprocessor, task, rows: int = 0):
    """Yield pieces of a table, of which one may be as large as they come; for images and texts, of what a folder or
    glob holds, of one image, of a .txt with a text in each line, or of a table.

    rows: of a piece, about; 0 = what goes well through a network.
    """
    import pandas as pd

    from images import ENDINGS, IMAGES_AT_ONCE, is_image_file, resolve_paths
    from reader import FILE, find_files, is_text_file, read_chunks, read_text_file
    from text import TEXTS_AT_ONCE

    if kind == "tabular":
        plain = all(isinstance(c, (int, float)) and not isinstance(c, bool) for c in task.classes)
        numbers = preprocessor.number_columns | ({task.target} if plain else set())
        yield from read_chunks(path, numbers=numbers, rows=rows or TABLE_ROWS_AT_ONCE)
        return
    column, rows = preprocessor.column, rows or (IMAGES_AT_ONCE if kind == "image" else TEXTS_AT_ONCE)
    if kind == "image" and is_image_file(Path(path)):
        files = pd.DataFrame({FILE: [path]}, index=pd.RangeIndex(1, 2, name="row"))
    elif kind == "image":
        files = find_files(path, is_image_file, f"images ({', '.join(ENDINGS)})")
    else:
        files = find_files(path, is_text_file, "texts (.txt)")
    for table in read_chunks(path, **{kind: column}, rows=rows) if files is None else [files]:
        for start in range(0, len(table), rows):
            frame = table.iloc[start : start + rows]
            if kind == "image":
                yield frame.rename(columns={FILE: column}) if files is not None else resolve_paths(frame, column, path)
            else:
                yield frame if files is None else frame.assign(**{column: list(map(read_text_file, frame[FILE]))})


def predict(options: Options) -> None:
    """Answer all rows in pieces, in constant memory; then say what was unknown, which columns look unlike the training
    data, and, with targets, how good it was."""
    from tqdm import tqdm

    from drift import Profile
    from pipeline import kind_of
    from reader import standard_input
    from runtime import load

    pipeline = load(options.checkpoint).to(options.device)
    known, kind = pipeline.preprocessor, kind_of(pipeline.preprocessor)
    profile, seen = Profile(pipeline.profile), Counter()
    unknown, score, rows = Counter(), Score(pipeline.task), 0
    source = (
        standard_input(known.column if kind == "text" else "")
        if options.input == "-"
        else contextlib.nullcontext(options.input)
    )
    with source as path, open_output(options.output, path) as writer, tqdm(unit=" rows", disable=None) as bar:
        for frame in read_inputs(path, kind, known, pipeline.task):
            with naming(path):
                inputs, logits = pipeline.ask(frame)
            writer.write(pipeline.answers(logits, frame))
            unknown.update(known.count_unknown(inputs))
            if profile.columns and rows < DRIFT_ROWS:
                seen.update(profile.count(known.measure(frame, inputs)))
            score.add(logits, frame)
            rows += len(frame)
            bar.update(len(frame))
        if rows == 0:
            raise UserError(f"{path}: there are no rows below the header.")
    for name, count in unknown.items():
        print(f"column {name!r}: {count} of {rows} values unknown (unseen or too rare in training)", file=sys.stderr)
    for name, state in profile.compare(seen).items():
        if state["drifted"]:
            print(f"drift in {name!r}: {state['why']}", file=sys.stderr)
    score.show(sys.stderr if options.output == "-" else sys.stdout)


class Score:
    """Metrics over the rows that come with their target, if any."""

    def __init__(self, task):
        self.task, self.metrics, self.trouble = task, None, ""

    def add(self, logits, frame) -> None:
        if self.task.target not in frame or self.trouble:
            return
        import numpy as np

        from cells import hold_values

        given = np.flatnonzero(hold_values(frame[self.task.target]))
        if not len(given):
            return
        try:  # rows can be answered whatever stands in the target column, and wherever a service runs
            targets = self.task.encode(frame[self.task.target].iloc[given])
            self.metrics = self.metrics or self.task.metrics()
        except (UserError, ImportError) as error:
            self.trouble = str(error)
            return
        self.metrics.update(self.task.scores(logits[given]), self.task.decode(targets))

    def show(self, file) -> None:
        if self.trouble:
            print(f"no metrics: {self.trouble}", file=sys.stderr)
        elif self.metrics:
            values = self.task.results(self.metrics)
            print("metrics  " + "  ".join(f"{name} {value:.5g}" for name, value in values.items()), file=file)


if __name__ == "__main__":
    run(lambda: predict(parse_flags(Options, description=__doc__)))
