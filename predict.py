"""Predict a file of records from a checkpoint.

  python predict.py --checkpoint runs/x/best.pt --input new.csv --output predictions.csv

Reads csv, tsv, jsonl, parquet, xlsx, xls and ods. If the model has a single column of images, also an image, a folder
or a glob in quotes; with a single column of text, also a folder of .txt files, or a .txt file with one text per line.
"-" is standard input or output (csv, or jsonl if the input is jsonl). One prediction per row, in order. If the target
column is present, metrics are printed.

  python predict.py … --shard 2/8 --output part-2.csv            one of eight parts: `cat` joins them, in order
  torchrun --nproc-per-node 2 predict.py … --output all.csv      each process predicts a part of the file
"""

import os

os.environ.setdefault("OMP_WAIT_POLICY", "passive")  # spinning threads slow down everything else on the machine

import contextlib
import sys
from dataclasses import dataclass, replace
from functools import partial

from console import run
from errors import UserError, error_prefix, parse_flags
from scaling.launch import is_launched, process_group
from scaling.shards import Shard, join_parts, part_of


@dataclass(frozen=True)
class Options:
    """the model, and the records to predict"""

    checkpoint: str
    """best.pt of a run; last.pt predicts with the weights of the last epoch."""
    input: str
    """csv, tsv, jsonl, parquet, xlsx, xls or ods file (also .gz), or - for standard input; for a single column of
    images or texts also a folder, a glob, one image, or a .txt file with one text per line."""
    output: str = "-"
    """csv, tsv, jsonl or parquet file, or - for standard output."""
    keep: tuple[str, ...] = ()
    """Input columns that are copied to the predictions, before them and as they are, such as an id."""
    skip_broken: bool = False
    """Leave the predictions of records that cannot be read empty; the column `error` says why."""
    encoding: str = ""
    """Encoding of text files, such as utf-8, cp1252 or cp949; by default it is detected."""
    sheet: str = ""
    """The sheet of a spreadsheet; by default the first."""
    shard: str = ""
    """Predict one part of the file, such as 2/8, counted from 1. Only the first part has a header, so that cat joins
    the parts. A part holds whole chunks of 65,536 rows, fewer for texts and images."""
    skip_rows: int = -1
    """Lines above the header of a csv or a sheet; -1 = detect."""
    device: str = "auto"
    """auto (a GPU if there is one), cpu, cuda, mps …"""


def predict(options: Options) -> None:
    """Predict all rows in chunks, in constant memory; then report what a person should know about them."""
    import pandas as pd
    from tqdm import tqdm

    from evaluation.summary import Summary
    from pipeline import Pipeline
    from scaling.processes import gather_values, is_main
    from sources import read_records, standard_input
    from sources.tables import prefetch
    from sources.writer import atomic_write, kept_columns, open_output

    shard = Shard.of_process(options.shard, options.input, options.output)
    pipeline = Pipeline.load(options.checkpoint).to(options.device)
    preprocessor = pipeline.require_preprocessor()
    given = {name: getattr(options, name) for name in ("encoding", "sheet", "skip_rows", "keep")}
    layout, notes, summary = replace(preprocessor.layout, **given), [], Summary(pipeline)
    source = standard_input(layout) if options.input == "-" else contextlib.nullcontext(options.input)
    output = part_of(options.output, shard.number) if is_launched() else options.output
    opened, bar = partial(open_output, output, header=shard.number == 1), tqdm(unit=" rows", disable=None)
    with source as path, opened(path) as writer, bar:
        for frame in prefetch(shard.take(lambda: read_records(path, layout, preprocessor.read_rows, notes))):
            while notes:
                note = notes.pop(0)
                print(note.replace(path, "standard input") if options.input == "-" else note, file=sys.stderr)
            with error_prefix(path):
                (parts, logits), readable, broken = preprocessor.encode_readable(frame, pipeline.predict_logits)
                if broken and not options.skip_broken:
                    message = next(iter(broken.values()))
                    hint = "" if "--skip-broken" in message else " (--skip-broken predicts the others)"
                    raise UserError(message + hint)
                predictions = pipeline.to_frame(logits, frame, broken if options.skip_broken else None)
                kept = kept_columns(frame, options.keep, predictions)
            writer.write(pd.concat([kept, predictions], axis=1))
            summary.add(frame.iloc[readable], parts, logits, broken)
            bar.update(len(frame))
        if summary.rows == 0 and shard.number == 1:
            raise UserError(f"{path}: there are no rows below the header.")
    if is_launched():
        summary.merge(gather_values(summary.counts()))
        if is_main():
            with atomic_write(options.output, "wb") as file:
                join_parts(options.output, shard.count, file)
    summary.show(sys.stderr if options.output == "-" else sys.stdout)


def main() -> None:
    with process_group():
        predict(parse_flags(Options, description=__doc__))


if __name__ == "__main__":
    run(main)
