"""Files → records: csv, tsv, jsonl and parquet, however they are written, as DataFrames."""

import csv
import gzip
import io
import json
import re
import shutil
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pandas as pd

from errors import UserError
from preprocessing import NULLS

FORMATS = {".csv": "csv", ".tsv": "csv", ".txt": "csv", ".jsonl": "jsonl", ".ndjson": "jsonl", ".parquet": "parquet"}
HEAD = 1 << 20  # bytes read to find out how a file is written


@dataclass(frozen=True)
class Dialect:
    """How a text table is written."""

    encoding: str
    separator: str
    decimal: str
    raw_header: list[str]
    header: list[str]  # stripped, and named where it was empty


def file_format(path: str | Path) -> str:
    """Return csv, jsonl or parquet by the file's name (.gz aside). Raises UserError for any other."""
    suffixes = [s.lower() for s in Path(path).suffixes]
    ending = next((s for s in reversed(suffixes) if s != ".gz"), "")
    if ending not in FORMATS:
        raise UserError(f"{path}: the name must end in one of {', '.join(FORMATS)} (also with .gz).")
    return FORMATS[ending]


def _open(path: str | Path):
    """Open a file for reading bytes, unpacking gzip whatever its name."""
    try:
        with open(path, "rb") as file:
            packed = file.read(2) == b"\x1f\x8b"
        return gzip.open(path, "rb") if packed else open(path, "rb")
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror}).") from None


def _encoding(path: str | Path, head: bytes) -> str:
    """Find the encoding: UTF-8, UTF-16 with a mark, else cp949 (which holds euc-kr) or latin-1.

    Nearly any bytes are some cp949 text; Korean is believed where most of its letters are of the everyday set.
    """
    if head[:2] in (b"\xff\xfe", b"\xfe\xff"):
        return "utf-16"
    try:
        with io.TextIOWrapper(_open(path), encoding="utf-8") as text:
            while text.read(1 << 22):
                pass
        return "utf-8"
    except UnicodeDecodeError:
        pass
    try:
        letters = [c for c in head[: head.rfind(b"\n") + 1 or None].decode("cp949") if c > "\x7f"]
        everyday = sum("가" <= c <= "힣" and len(c.encode("euc-kr", "ignore")) == 2 for c in letters)
        return "cp949" if everyday > 0.5 * len(letters) else "latin-1"
    except UnicodeDecodeError:
        return "latin-1"


def _separator(sample: str) -> str:
    """Return the separator that cuts the most lines into as many fields as the header, and into the most fields."""

    def score(separator: str) -> tuple[float, int]:
        rows = [r for r in csv.reader(io.StringIO(sample), delimiter=separator) if r][:200]
        width = len(rows[0]) if rows else 0
        return (np.mean([len(r) == width for r in rows]) if width > 1 else 0, width)

    return max(",;\t|", key=score)


def sniff(path: str | Path) -> Dialect:
    """Find out encoding, separator, decimal sign and header of a text table. Raises UserError for an unusable one."""
    with _open(path) as file:
        try:
            head = file.read(HEAD)
        except (OSError, EOFError, gzip.BadGzipFile) as error:
            raise UserError(f"{path}: cannot be unpacked ({error}).") from None
    if not head.strip(b"\xef\xbb\xbf\xff\xfe\r\n\t \x00"):
        raise UserError(f"{path}: the file is empty.")
    encoding = _encoding(path, head)
    text = head.decode(encoding, "ignore").lstrip("\ufeff")
    if "\0" in text:
        raise UserError(f"{path}: this is no text table (it holds zero bytes).")
    whole_lines = text[: text.rfind("\n") + 1] if len(head) == HEAD else text
    separator = _separator(whole_lines)
    rows = (r for r in csv.reader(io.StringIO(whole_lines), delimiter=separator) if r)
    raw_header = next(rows)
    header = [name.strip() or f"Unnamed: {i}" for i, name in enumerate(raw_header)]
    for i, name in enumerate(header):
        if name in header[:i]:
            raise UserError(f"{path}: column {name!r} is there twice: rename one of them.")
    decimal = "."
    if separator != ",":  # where a comma parts the fields it cannot part a number
        cells = [cell for _, row in zip(range(1000), rows, strict=False) for cell in row]
        if not any(re.fullmatch(r"\s*[+-]?\d*\.\d+\s*", c) for c in cells):
            decimal = "," if any(re.fullmatch(r"\s*[+-]?\d*,\d+\s*", c) for c in cells) else "."
    return Dialect(encoding, separator, decimal, raw_header, header)


def _arrow_options(dialect: Dialect, column_types: dict, ragged: list, block_size: int) -> dict:
    import pyarrow.csv as arrow

    return {
        "read_options": arrow.ReadOptions(encoding=dialect.encoding, block_size=block_size),
        "parse_options": arrow.ParseOptions(
            delimiter=dialect.separator,
            newlines_in_values=True,
            invalid_row_handler=lambda row: ragged.append(row) or "error",
        ),
        "convert_options": arrow.ConvertOptions(
            decimal_point=dialect.decimal,
            null_values=sorted(NULLS),
            strings_can_be_null=True,
            column_types=column_types,
            true_values=["true", "True", "TRUE"],
            false_values=["false", "False", "FALSE"],
        ),
    }


def _arrow_batches(path: str | Path, dialect: Dialect, column_types: dict, block_size: int) -> Iterator:
    """Yield Arrow record batches of a text table, one a block.

    Raises UserError for a row that has too few or too many fields, pyarrow.ArrowInvalid for a cell that is not of
    its column's type; types that `column_types` does not give are taken from the first block.
    """
    import pyarrow as pa
    import pyarrow.csv as arrow

    ragged: list = []
    try:
        options = _arrow_options(dialect, column_types, ragged, block_size)
        with _open(path) as file, arrow.open_csv(file, **options) as batches:
            yield from batches
    except pa.ArrowInvalid as error:
        if ragged:
            row, fields = _ragged_row(path, dialect)
            raise UserError(f"{path}: row {row} has {fields} fields, the header {len(dialect.header)}.") from None
        if "conversion error" in str(error):
            raise
        raise UserError(f"{path}: cannot be read as a table: {error}.") from None
    except (EOFError, gzip.BadGzipFile) as error:
        raise UserError(f"{path}: cannot be unpacked ({error}).") from None


def _ragged_row(path: str | Path, dialect: Dialect) -> tuple[int, int]:
    """Find the number of the first row whose fields are not as many as the header's, which Arrow does not tell."""
    with io.TextIOWrapper(_open(path), encoding=dialect.encoding, newline="") as text:
        rows = (row for row in csv.reader(text, delimiter=dialect.separator) if row)
        return next(((i, len(row)) for i, row in enumerate(rows) if len(row) != len(dialect.header)), (0, 0))


def _to_series(column) -> pd.Series:
    """Turn an Arrow column into pandas. Dates stay text: they are read by our own rules, as at prediction."""
    import pyarrow as pa

    column = column.cast(pa.string()) if pa.types.is_temporal(column.type) else column
    return column.to_pandas().copy()  # a copy is as large as its rows, an Arrow buffer up to twice that


def _read_csv(path: str | Path) -> pd.DataFrame:
    import pyarrow as pa
    import pyarrow.csv as arrow

    dialect = sniff(path)
    try:
        pieces: dict[str, list[pd.Series]] = {name: [] for name in dialect.header}
        for batch in _arrow_batches(path, dialect, {}, 1 << 24):
            for name, column in zip(dialect.header, batch.columns, strict=True):
                pieces[name].append(_to_series(column))
        columns = {name: pd.concat(pieces.pop(name), ignore_index=True) for name in dialect.header if pieces[name]}
        pa.default_memory_pool().release_unused()
        return pd.DataFrame(columns, copy=False)
    except pa.ArrowInvalid:
        pass  # a column turns from numbers to words further down: look at the whole file before deciding on types
    with _open(path) as file:
        table = arrow.read_csv(file, **_arrow_options(dialect, {}, [], 1 << 22))
    return pd.DataFrame(
        {name: _to_series(c) for name, c in zip(dialect.header, table.columns, strict=True)}, copy=False
    )


def _stream_csv(path: str | Path, numbers: set[str]) -> Iterator[pd.DataFrame]:
    import pyarrow as pa

    dialect, done = sniff(path), 0
    text = {raw: pa.string() for raw in dialect.raw_header}
    typed = text | {
        raw: pa.float64() for raw, name in zip(dialect.raw_header, dialect.header, strict=True) if name in numbers
    }
    for types in (typed, text):
        skip = done
        try:
            for batch in _arrow_batches(path, dialect, types, 1 << 22):
                rows = batch.slice(min(skip, len(batch)))
                skip -= len(batch) - len(rows)
                done += len(rows)
                if len(rows):
                    yield rows.to_pandas().set_axis(dialect.header, axis=1)
            return
        except pa.ArrowInvalid:
            pass  # a cell that is no number: read on as text, and let the preprocessor name its row and column


def _stream_jsonl(path: str | Path, rows: int) -> Iterator[pd.DataFrame]:
    records: list[dict] = []
    columns: dict[str, None] = {}  # a key that only some records have is an empty cell in the others

    def frame() -> pd.DataFrame:
        columns.update(dict.fromkeys(key for record in records for key in record))
        return pd.DataFrame.from_records(records, columns=list(columns))

    with _open(path) as file:
        for number, line in enumerate(file, start=1):
            if not line.strip():
                continue
            try:
                record = json.loads(line.decode("utf-8-sig"))
            except ValueError as error:
                raise UserError(f"{path}: line {number} is no JSON ({error}).") from None
            if not isinstance(record, dict):
                raise UserError(f"{path}: line {number} is no JSON object: each line is one record in braces.")
            records.append(record)
            if len(records) == rows:
                yield frame()
                records = []
    if records:
        yield frame()


def _stream_parquet(path: str | Path, rows: int) -> Iterator[pd.DataFrame]:
    import pyarrow as pa
    from pyarrow import parquet

    try:
        with parquet.ParquetFile(path) as file:
            for batch in file.iter_batches(batch_size=rows):
                frame = batch.to_pandas()
                yield frame.reset_index() if any(frame.index.names) else frame.reset_index(drop=True)
    except (pa.ArrowInvalid, OSError) as error:
        raise UserError(f"{path}: cannot be read as parquet: {error}.") from None


def read_chunks(path: str | Path, *, numbers: set[str] = frozenset(), rows: int = 65_536) -> Iterator[pd.DataFrame]:
    """Read a csv, tsv, jsonl or parquet file in pieces of about `rows`, in constant memory.

    numbers: columns of a text table to read as numbers, all others being text.
    The index counts the file's rows from 1. Raises UserError, naming the row, where the file cannot be read.
    """
    read = {
        "csv": lambda: _stream_csv(path, numbers),
        "jsonl": lambda: _stream_jsonl(path, rows),
        "parquet": lambda: _stream_parquet(path, rows),
    }[file_format(path)]
    start = 1
    for frame in read():
        frame.index = pd.RangeIndex(start, start + len(frame), name="row")
        start += len(frame)
        yield frame


def read_table(path: str | Path) -> pd.DataFrame:
    """Read a whole file; the index counts its rows from 1. Raises UserError where it is empty or cannot be read."""
    if file_format(path) == "csv":
        table = _read_csv(path)
    else:
        chunks = list(read_chunks(path))
        table = pd.concat(chunks, ignore_index=True) if chunks else pd.DataFrame()
    if table.empty:
        raise UserError(f"{path}: there are no rows below the header.")
    table.index = pd.RangeIndex(1, len(table) + 1, name="row")
    return table


@contextmanager
def standard_input() -> Iterator[str]:
    """Keep standard input in a temporary file, named by its format, for as long as the context lasts."""
    source = sys.stdin.buffer
    start = source.read(1024)
    body = gzip.GzipFile(fileobj=io.BytesIO(start)).read1(1) if start[:2] == b"\x1f\x8b" else start
    ending = (
        ".parquet" if body[:4] == b"PAR1" else ".jsonl" if body.lstrip(b"\xef\xbb\xbf \r\n")[:1] == b"{" else ".csv"
    )
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / f"standard input{ending}"
        with open(path, "wb") as file:
            file.write(start)
            shutil.copyfileobj(source, file, HEAD)
        yield str(path)
