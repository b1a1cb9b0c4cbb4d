"""Write files completely or not at all, and tables piece by piece, as csv, tsv, jsonl or parquet."""

import csv
import io
import json
import os
import sys
import tempfile
from collections.abc import Iterator
from contextlib import closing, contextmanager
from pathlib import Path

import pandas as pd

from errors import UserError, did_you_mean, disk_is_full
from sources.layout import AS_WRITTEN, file_format


@contextmanager
def atomic_write(path: str | Path, mode: str = "w") -> Iterator:
    """Open a temporary file beside `path`, and rename it to `path` once it is complete and on the disk.

    Raises UserError if the folder cannot be written to, or the disk is full: a file that was there before is intact.
    """
    path = Path(path)
    if os.path.isdir(path):
        raise UserError(f"{path} is a folder: give the name of a file.")
    try:
        handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    except OSError as error:
        raise UserError(f"{path}: cannot be written ({error.strerror}).") from None
    try:
        os.close(handle)
        text = {} if "b" in mode else {"encoding": "utf-8", "newline": ""}
        with open(temporary, mode, **text) as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.umask(mask := os.umask(0))  # a temporary file is private; the result has the usual permissions
        os.chmod(temporary, 0o666 & ~mask)
        os.replace(temporary, path)
    except BaseException as error:
        Path(temporary).unlink(missing_ok=True)
        if reason := disk_is_full(error):
            raise UserError(f"{path}: cannot be written ({reason}).") from None
        raise


@contextmanager
def open_output(path: str, source: str, *, header: bool = True) -> Iterator["Writer"]:
    """Open `path` for predictions: the file appears only once it is complete. "-" is standard output, as jsonl if the
    file `source` is. Without `header` it continues another part. Raises UserError for a name of another format."""
    if path == "-":
        if getattr(sys.stdout, "is_closed", False):
            raise UserError("--output -: standard output is closed.")
        is_jsonl = source.removesuffix(".gz").endswith((".jsonl", ".ndjson"))
        yield Writer(sys.stdout.buffer, "jsonl" if is_jsonl else "csv", header)
        sys.stdout.buffer.flush()
        return
    form = "tsv" if path.lower().endswith(".tsv") else file_format(path)
    if form in ("log", "sheet"):
        raise UserError(f"--output {path}: predictions are written as csv, tsv, jsonl or parquet.")
    if path.lower().endswith(".gz"):
        raise UserError(f"--output {path}: predictions are not compressed; leave out .gz.")
    with atomic_write(path, "wb") as file, closing(Writer(file, form, header)) as writer:
        yield writer


class Writer:
    """Write frames with the same columns one after the other. form: csv, tsv, jsonl or parquet."""

    def __init__(self, file, form: str, header: bool = True):
        self.file, self.form, self.parquet = file, form, None
        self.first = header  # the next frame of a csv comes after a header

    def write(self, frame: pd.DataFrame) -> None:
        """Raises UserError if a column cannot be stored in the type that it had in the first frame."""
        import pyarrow as pa
        from pyarrow import parquet

        if self.form == "jsonl":
            self.file.write(_json_lines(frame))
            return
        table = pa.table({name: _as_column(frame[name]) for name in frame})
        if self.form == "parquet":
            self.parquet = self.parquet or parquet.ParquetWriter(self.file, table.schema)
            self.parquet.write_table(_with_schema(table, self.parquet.schema))
        else:
            self._write_csv(table, "\t" if self.form == "tsv" else ",")

    def _write_csv(self, table, separator: str) -> None:
        import pyarrow as pa
        import pyarrow.compute as pc
        import pyarrow.csv as arrow

        if self.first:
            head = io.StringIO()
            csv.writer(head, delimiter=separator, lineterminator="\n").writerow(table.column_names)
            self.file.write(head.getvalue().encode())
        self.first = False
        # Arrow quotes either all strings or none
        words = [c for c in table.columns if pa.types.is_string(c.type) or pa.types.is_large_string(c.type)]
        special = any(pc.any(pc.match_substring_regex(column, f'[{separator}"\r\n]')).as_py() for column in words)
        quoting = "needed" if special else "none"
        options = arrow.WriteOptions(include_header=False, delimiter=separator, quoting_style=quoting)
        arrow.write_csv(table, self.file, options)

    def close(self) -> None:
        if self.parquet:
            self.parquet.close()


def kept_columns(frame: pd.DataFrame, names: tuple[str, ...], predictions: pd.DataFrame) -> pd.DataFrame:
    """Return columns of the input as they are. Raises UserError for one that is not there, or is in the predictions."""
    names = list(dict.fromkeys(names))
    for name in names:
        if name not in frame:
            raise UserError(f"--keep {name}: no such column.{did_you_mean(name, frame.columns)}")
        if name in predictions:
            raise UserError(f"--keep {name}: the predictions have a column of that name: rename it in the input.")
        if any(isinstance(cell, bytes) for cell in frame[name].head(100)):
            raise UserError(f"--keep {name}: it holds files, such as images, which are not copied.")
    kept = frame[[AS_WRITTEN + name if AS_WRITTEN + name in frame else name for name in names]]
    return whole_again(kept.set_axis(names, axis=1))


def whole_again(frame: pd.DataFrame) -> pd.DataFrame:
    """Turn columns of whole numbers, which pandas makes floats where a cell is empty, back into integers."""
    whole = {
        name: frame[name].astype("Int64")
        for name in frame
        if frame[name].dtype == float and frame[name].hasnans and _are_whole(frame[name].dropna())
    }
    return frame.assign(**whole)


def _are_whole(numbers: pd.Series) -> bool:
    return bool((numbers % 1 == 0).all() and (numbers.abs() < 2**53).all())


def _json_lines(frame: pd.DataFrame) -> bytes:
    encode, names = json.JSONEncoder(ensure_ascii=False, default=str).encode, list(frame)
    cells = [c.astype(object).where(c.notna(), None) if c.hasnans else c for c in (frame[name] for name in names)]
    rows = zip(*(column.tolist() for column in cells), strict=True)
    return "".join(encode(dict(zip(names, row, strict=True))) + "\n" for row in rows).encode("utf-8", "replace")


def _as_column(cells: pd.Series):
    """Return cells as an Arrow array; those of several types, and lists and objects of JSON, as text."""
    import pyarrow as pa

    try:
        column = pa.array(cells, from_pandas=True)
        if pa.types.is_dictionary(column.type):
            column = column.dictionary_decode()
        if not pa.types.is_nested(column.type):
            return column
    except (pa.ArrowException, OverflowError):
        pass
    cells = cells.astype(object).where(cells.notna(), None)
    text = [c if c is None or isinstance(c, str) else json.dumps(c, ensure_ascii=False, default=str) for c in cells]
    return pa.array(text, pa.string())


def _with_schema(table, schema):
    import pyarrow as pa

    try:
        return table.cast(schema)
    except (pa.ArrowException, ValueError):
        names = [field.name for field in table.schema if field.type != schema.field(field.name).type]
        raise UserError(
            f"column {names[0]!r} changes its type in the course of the input, which parquet cannot hold: "
            "write csv or jsonl."
        ) from None
