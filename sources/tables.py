"""Any file of records → DataFrames: csv, jsonl, parquet, sheets, lines, a service's log, folders, standard input."""

import io
import itertools
import json
import shutil
import sys
import tempfile
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

import pandas as pd

from errors import UserError, did_you_mean
from preprocessing.parsing import NULLS, frame_of
from sources.delimited import TEXT_BLOCK, find_separator, holds_table, read_delimited
from sources.disk import LARGE, join_on_disk, memory
from sources.encodings import HEAD, check_is_file, find_encoding, guess_note, open_unpacked, read_head, reading
from sources.folders import find_files, read_files
from sources.layout import AS_WRITTEN, TABLE, Layout, file_format
from sources.request_log import read_log
from sources.sheets import read_sheet

_SIGNATURES = {b"PAR1": "parquet", b"PK\3\4": "xlsx", b"\xd0\xcf\x11\xe0": "xls"}  # first bytes → ending
ON_DISK = 16 << 20  # bytes of text from which on a table is kept on disk: it takes a multiple in memory
PACKED = 5  # bytes in memory of a byte of a packed file
PARTS = (".csv", ".tsv", ".jsonl", ".ndjson", ".parquet")  # of the files of a folder that are parts of one table
DATA_URL = "data:image/"  # an image inside a cell of text


def read_table(path: str | Path, layout: Layout = TABLE, notes: list[str] | None = None) -> pd.DataFrame:
    """Read a whole file; the index counts its rows from 1. Raises UserError if it is empty or cannot be read.

    notes: gets what a person should know, such as lines above the header that are skipped.
    """
    chunks = read_chunks(path, layout, notes=notes)
    if _size_in_memory(path) > min(ON_DISK, LARGE * memory()):
        table = join_on_disk(chunks)
    else:
        chunks = list(chunks)
        table = pd.concat(chunks, ignore_index=True) if chunks else None
    if table is None:
        raise UserError(f"{path}: there are no rows below the header.")
    table.index = pd.RangeIndex(1, len(table) + 1, name="row")
    return table


def _size_in_memory(path: str | Path) -> int:
    """Return about how many bytes the cells of a file take."""
    size = 0
    for file in table_files(path) or [Path(path)]:
        packed = file_format(file) in ("parquet", "sheet") or str(file).endswith(".gz")
        size += file.stat().st_size * (PACKED if packed else 1) if file.is_file() else 0
    return size


def read_chunks(
    path: str | Path, layout: Layout = TABLE, rows: int = 65_536, notes: list[str] | None = None
) -> Iterator[pd.DataFrame]:
    """Read a file, or a folder of files that are parts of a table, in chunks of about `rows`, in constant memory; the
    index counts the rows from 1.

    Cells of a csv are text as they are written, those of other files have their types. Spreadsheets, which are never
    long, are in memory as a whole. notes: see `read_table`.
    Raises UserError, naming the row, if the file cannot be read.
    """
    notes, first, start = [] if notes is None else notes, None, 1
    for file in table_files(path) or [path]:
        check_is_file(file)
        is_log = file_format(file) == "log"  # which holds data URLs, and no file names to resolve
        for frame in _read(file, layout, rows, notes):
            first = list(frame) if first is None else first
            if file != path and set(frame) != set(first):
                name = sorted(set(frame) ^ set(first))[0]
                which = "is missing" if name in first else "is in no file before it"
                raise UserError(f"{file}: column {name!r} {which}: the files of {path} must have the same columns.")
            frame.index = pd.RangeIndex(start, start + len(frame), name="row")
            start += len(frame)
            yield frame if is_log else resolve_paths(frame, layout, file)


def table_files(path: str | Path) -> list[Path]:
    """Return the files of a folder that holds the parts of one table, in the order of their names; else none."""
    folder = Path(path)
    if not folder.is_dir():
        return []
    found = sorted(file for file in folder.iterdir() if not file.name.startswith((".", "_")))
    are_parts = all(file.is_file() and file.name.lower().removesuffix(".gz").endswith(PARTS) for file in found)
    return found if found and are_parts else []


def read_records(path: str, layout: Layout, rows: int, notes: list[str] | None = None) -> Iterator[pd.DataFrame]:
    """Read what is to be predicted in chunks of at most `rows`: a table, or for a lone column also files of one record.

    Raises UserError as read_chunks does, and for a folder or glob without files to read.
    """
    files = find_files(path, layout) if layout.lone else None
    for frame in read_chunks(path, layout, rows, notes) if files is None else read_files(files, layout, rows):
        for start in range(0, len(frame), rows):
            yield frame.iloc[start : start + rows]


def prefetch(frames: Iterator[pd.DataFrame]) -> Iterator[pd.DataFrame]:
    """Yield frames while the next one is read in another thread."""
    with ThreadPoolExecutor(1) as reader:
        following = reader.submit(next, frames, None)
        while (frame := following.result()) is not None:
            following = reader.submit(next, frames, None)
            yield frame


def separator_of(path: str | Path, layout: Layout = TABLE) -> str:
    """Return the separator of a text table, and "" for everything else."""
    is_text = Path(path).is_file() and file_format(path) == "csv" and not _holds_lines(path, layout)
    return find_separator(path, layout) if is_text else ""


def _holds_lines(path: str | Path, layout: Layout) -> bool:
    may_be_lines = layout.lone and str(path).lower().removesuffix(".gz").endswith(".txt")
    return bool(may_be_lines) and not holds_table(path, layout.lone)


def _read(path: str | Path, layout: Layout, rows: int, notes: list[str]) -> Iterator[pd.DataFrame]:
    if _holds_lines(path, layout):
        return _read_lines(path, layout, rows, notes)
    match file_format(path):
        case "csv":
            return read_delimited(path, layout, notes)
        case "jsonl":
            return _read_jsonl(path, rows)
        case "parquet":
            return _read_parquet(path, layout, rows)
        case "sheet":
            return read_sheet(path, layout, rows, notes)
        case "log":
            return read_log(path, rows, notes)


def resolve_paths(frame: pd.DataFrame, layout: Layout, source: str | Path) -> pd.DataFrame:
    """Make file names start from the folder of their table; bytes, data URLs and empty cells stay as they are."""
    # Standard input has no folder: its paths start here
    folder = Path(".") if Path(source).name.startswith("standard input") else Path(source).parent
    for column in layout.paths:
        if column not in frame:
            raise UserError(f"{source}: column {column!r} is missing.{did_you_mean(column, frame.columns)}")
        cells = frame[column]
        stays = cells.isna() | cells.map(lambda c: isinstance(c, bytes) or str(c).startswith(DATA_URL) or c in NULLS)
        paths = [c if stay else str(folder / str(c)) for c, stay in zip(cells, stays, strict=True)]
        frame = frame.assign(**{column: paths} | ({AS_WRITTEN + column: cells} if column in layout.keep else {}))
    return frame


def _read_lines(path: str | Path, layout: Layout, rows: int, notes: list[str]) -> Iterator[pd.DataFrame]:
    with reading(path):
        encoding = find_encoding(path, read_head(path), named=layout.encoding)
    notes += guess_note(path, encoding, layout.encoding)
    encoding = encoding.replace("utf-8", "utf-8-sig")
    with reading(path), io.TextIOWrapper(open_unpacked(path), encoding=encoding) as lines:
        while part := [line.removesuffix("\n") for line in itertools.islice(lines, rows)]:
            yield pd.DataFrame({layout.lone: part})


def _read_jsonl(path: str | Path, rows: int) -> Iterator[pd.DataFrame]:
    columns: dict[str, None] = {}  # a key that only some records have is an empty cell in the others
    records = _json_records(path)
    while part := list(itertools.islice(records, rows)):
        columns.update(dict.fromkeys(key for record in part for key in record))
        yield frame_of(part).reindex(columns=list(columns))


def _json_records(path: str | Path) -> Iterator[dict]:
    with reading(path), open_unpacked(path) as file:
        for number, line in enumerate(file, start=1):
            if not line.strip():
                continue
            try:
                record = json.loads(line.decode("utf-8-sig"), parse_int=_parse_int)
            except (ValueError, RecursionError) as error:
                raise UserError(f"{path}: line {number} is not valid JSON ({error}).") from None
            if not isinstance(record, dict):
                raise UserError(f"{path}: line {number} is not a JSON object: each line is one record in braces.")
            yield record


def _parse_int(digits: str) -> int | str:
    """Keep large integers as text: beside a missing cell they would be rounded to floats."""
    return int(digits) if len(digits) < 16 else digits


def _with_exact_integers(frame: pd.DataFrame, batch) -> pd.DataFrame:
    """Make columns of large integers text, as `_parse_int` does."""
    import pyarrow as pa
    import pyarrow.compute as pc

    for name, column in zip(batch.schema.names, batch.columns, strict=True):
        if pa.types.is_integer(column.type) and column.type.bit_width == 64 and name in frame:
            ends = pc.min_max(column).as_py()
            if column.null_count < len(column) and max(-ends["min"], ends["max"]) > 2**53:
                frame[name] = pc.cast(column, pa.string()).to_pandas().to_numpy()
    return frame


def _read_parquet(path: str | Path, layout: Layout, rows: int) -> Iterator[pd.DataFrame]:
    """Read parquet. Columns of bytes are text, which some programs write so, except where files are expected."""
    import pyarrow as pa
    from pyarrow import parquet

    done = 0
    try:
        with reading(path), parquet.ParquetFile(open_unpacked(path)) as file:
            for name, count in Counter(file.schema_arrow.names).items():
                if count > 1:
                    raise UserError(f"{path}: column {name!r} occurs twice: rename one of them.")
            for batch in file.iter_batches(batch_size=rows):
                batch.validate(full=True)  # otherwise invalid UTF-8 is found much later
                for i, field in enumerate(batch.schema):
                    is_bytes = pa.types.is_binary(field.type) or pa.types.is_large_binary(field.type)
                    if is_bytes and field.name not in layout.paths:
                        cells = [None if c is None else c.decode("utf-8", "replace") for c in batch[i].to_pylist()]
                        bad = [c is not None and "\ufffd" in c for c in cells]
                        if field.name in layout.texts and any(bad):
                            where = f"row {done + 1 + bad.index(True)}, column {field.name!r}"
                            raise UserError(f"{path}: {where}: these bytes are not valid UTF-8.")
                        batch = batch.set_column(i, field.name, pa.array(cells, pa.string()))
                done += len(batch)
                frame = batch.to_pandas()
                frame = frame.reset_index() if any(frame.index.names) else frame.reset_index(drop=True)
                frame.columns = [str(name) for name in frame.columns]
                for name, kind in frame.dtypes.items():
                    if isinstance(kind, (pd.IntervalDtype, pd.PeriodDtype)):
                        frame[name] = frame[name].astype(object).map(str, na_action="ignore")
                yield _with_exact_integers(frame, batch)
    except UserError:
        raise
    except (pa.ArrowException, KeyError, TypeError, ValueError, ArithmeticError, AttributeError, IndexError) as error:
        # also from metadata that pandas keeps in the file
        raise UserError(f"{path}: cannot be read as parquet: {error}.") from None


@contextmanager
def standard_input(layout: Layout) -> Iterator[str]:
    """Keep standard input in a temporary file, named by its format, for as long as the context lasts."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "standard input"
        with open(path, "wb") as file:
            shutil.copyfileobj(sys.stdin.buffer, file, HEAD)
        with reading("standard input"), open_unpacked(path) as file:
            line = next((line for line in iter(lambda: file.readline(TEXT_BLOCK), b"") if line.strip()), b"")
        # A line of text may begin with a brace; in a table it is a record, if a broken one
        is_jsonl = _is_record(line) if layout.lone else line.lstrip(b"\xef\xbb\xbf ")[:1] == b"{"
        path = path.rename(f"{path}.{_SIGNATURES.get(line[:4], 'jsonl' if is_jsonl else 'txt')}")
        try:
            yield str(path)
        except UserError as error:
            raise UserError(str(error).replace(str(path), "standard input")) from None


def _is_record(line: bytes) -> bool:
    try:
        return isinstance(json.loads(line.decode("utf-8-sig")), dict)
    except (ValueError, RecursionError):
        return False
