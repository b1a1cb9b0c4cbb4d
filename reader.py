"""Files → records: csv, tsv, jsonl, parquet and logs of serve.py, however they are written, as DataFrames."""

import codecs
import contextlib
import csv
import glob
import gzip
import io
import itertools
import json
import os
import re
import shutil
import sqlite3
import sys
import tempfile
import zlib
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import quote

import numpy as np
import pandas as pd

from cells import NULLS, canonical, frame_of
from errors import UserError

FORMATS = {".csv": "csv", ".tsv": "csv", ".txt": "csv", ".jsonl": "jsonl", ".ndjson": "jsonl", ".parquet": "parquet",
           ".db": "log"}  # fmt: skip
FILE, LABEL = "file", "label"  # columns of the records that a folder gives
HEAD = 1 << 20  # bytes read to find out how a file is written
BLOCK = 1 << 20  # bytes of a text table in one piece
TEXT_BLOCK = 1 << 24  # where one cell may be a book
EVERYDAY_LATIN = frozenset(  # letters of western languages, and the quotes, dashes and dots that Windows adds
    "ÀÁÂÃÄÅÆÇÈÉÊËÌÍÎÏÑÒÓÔÕÖØÙÚÛÜßàáâãäåæçèéêëìíîïñòóôõöøùúûü\xa0¡£§ª«°²³µ·º»¿".encode("latin-1")
) | {0x80, 0x85, *range(0x91, 0x9A)}
SEPARATORS = ",;\t|"
LINES_IN_A_CELL = 200  # more than this is a quote that was left open


def read_class_folders(folder: str | Path, is_wanted: Callable[[Path], bool], notes: list[str]) -> pd.DataFrame:
    """Return a record (file, label) for each wanted file in folder/<class>/, the index counting them from 1.

    Hidden files and those that are not wanted are passed over and counted in `notes`. Raises UserError where a folder's
    name is, as a label, empty or the same as another's.
    """
    classes = sorted(p for p in Path(folder).iterdir() if p.is_dir() and not p.name.startswith("."))
    rows, ignored, names = [], 0, {"": "an empty cell"}
    for path in classes:
        files = sorted(p for p in path.rglob("*") if p.is_file())
        wanted = [p for p in files if is_wanted(p)]
        ignored += len(files) - len(wanted)
        name = repr(path.name)
        if wanted and (same := names.setdefault(canonical(path.name), name)) != name:
            raise UserError(f"{folder}: the class {name} is read as {same}: rename the folder.")
        rows += [(_as_text(p), path.name) for p in wanted]
    if rows and ignored:
        notes.append(f"{folder}: {ignored} files that are hidden or of another kind left out")
    return pd.DataFrame(rows, columns=[FILE, LABEL], index=pd.RangeIndex(1, len(rows) + 1, name="row"))


def find_files(source: str, is_wanted: Callable[[Path], bool], what: str) -> pd.DataFrame | None:
    """Return records (file) for the wanted files in a folder, with all below it, or of a glob; None for anything else.

    Raises UserError where there is none.
    """
    path = Path(source)
    if not path.is_dir() and (path.exists() or not glob.has_magic(source)):
        return None
    found = path.rglob("*") if path.is_dir() else map(Path, glob.glob(source, recursive=True))
    files = sorted(filter(is_wanted, found))
    if not files:
        raise UserError(f"{source}: no {what} there.")
    return pd.DataFrame({FILE: list(map(_as_text, files))}, index=pd.RangeIndex(1, len(files) + 1, name="row"))


def _as_text(path: Path) -> str:
    """Return a path as text. Raises UserError where its letters are no UTF-8, which no answer could hold."""
    if (name := str(path)) != name.encode("utf-8", "replace").decode():
        raise UserError(f"{os.fsencode(path)!r}: this name of a file is no UTF-8: rename it.")
    return name


def is_text_file(path: Path) -> bool:
    return path.is_file() and path.suffix.lower() == ".txt" and not path.name.startswith(".")


def read_text_file(path: str | Path) -> str:
    """Return what a text file holds, whatever its encoding. Raises UserError where it cannot be read."""
    with _reading(path):
        raw = Path(path).read_bytes()
        return raw.decode(_encoding(path, raw[:HEAD], is_table=False)).removeprefix("\ufeff")


@dataclass(frozen=True)
class Dialect:
    """How a text table is written."""

    encoding: str
    separator: str
    decimal: str
    raw_header: list[str]
    header: list[str]  # stripped, and named where it was empty
    text: str  # column whose cells are taken letter by letter: "NA" is a word there, and 007 no number; "" for none


def file_format(path: str | Path) -> str:
    """Return csv, jsonl, parquet or log by the file's name (.gz aside). Raises UserError for any other."""
    suffixes = [s.lower() for s in Path(path).suffixes]
    ending = next((s for s in reversed(suffixes) if s != ".gz"), "")
    if ending not in FORMATS:
        hint = " Save the sheet as csv." if ending in (".xls", ".xlsx", ".ods") else ""
        raise UserError(f"{path}: the name must end in one of {', '.join(FORMATS)} (also with .gz).{hint}")
    return FORMATS[ending]


def is_packed(path: str | Path) -> bool:
    with open(path, "rb") as file:
        return file.read(2) == b"\x1f\x8b"


def open_unpacked(path: str | Path):
    """Open a file for reading bytes, unpacking gzip whatever its name."""
    return gzip.open(path, "rb") if is_packed(path) else open(path, "rb")


@contextmanager
def _reading(path: str | Path) -> Iterator[None]:
    """Turn what can be wrong with a file into a UserError that names it."""
    try:
        yield
    except FileNotFoundError:
        raise UserError(f"{path}: no such file.") from None
    except (OSError, EOFError, zlib.error, csv.Error, UnicodeDecodeError) as error:
        raise UserError(f"{path}: cannot be read ({getattr(error, 'strerror', None) or error}).") from None


# ---------------------------------------------------------------- text tables


def _encoding(path: str | Path, head: bytes, *, is_table: bool = True) -> str:
    """Find the encoding: UTF-8, UTF-16 with a mark, else cp949 (which holds euc-kr) or latin-1.

    Nearly any bytes are some cp949 text, and any are latin-1: either is believed where most of its letters are of the
    everyday set.
    Raises UserError, naming the row (or the line of what is no table), for an encoding that is damaged here and there.
    """
    if head[:2] in (b"\xff\xfe", b"\xfe\xff"):
        return "utf-16"
    block = _first_misfit(path, "utf-8")
    if block is None:
        return "utf-8"
    seen = block.decode("utf-8", "replace")
    damaged = seen.count("\ufffd")
    is_cut = damaged == 1 and re.search(rb"[\xe0-\xf4][\x80-\xbf]+$", block)  # in half a letter
    if is_cut or sum(c > "\x7f" for c in seen) > 2 * damaged:  # elsewhere hardly any letter is UTF-8 by chance
        raise _damage(path, head, "utf-8", is_table)
    if len(block) == HEAD:  # whole lines of it, so that no letter is cut
        block = block[block.find(b"\n") + 1 : block.rfind(b"\n")]
    letters = [c for c in block.decode("cp949", "replace") if c > "\x7f"]
    korean = [c for c in letters if "가" <= c <= "힣" or "ㄱ" <= c <= "ㅣ"]
    if 2 * sum(len(c.encode("euc-kr", "ignore")) == 2 for c in korean) > len(letters):
        if _first_misfit(path, "cp949") is not None:
            raise _damage(path, head, "cp949", is_table)
        return "cp949"
    if 2 * sum(byte in EVERYDAY_LATIN for byte in block) < sum(byte > 0x7F for byte in block):
        raise _damage(path, head, "utf-8", is_table)
    return "latin-1"


def _first_misfit(path: str | Path, encoding: str) -> bytes | None:
    """Return the first HEAD bytes of a file with bytes that are not of an encoding; None where it is of it."""
    decoder = codecs.getincrementaldecoder(encoding)()
    with open_unpacked(path) as file:
        block = file.read(HEAD)
        while block:
            following = file.read(HEAD)
            try:
                decoder.decode(block, final=not following)
            except UnicodeDecodeError:
                return block
            block = following
    return None


def _damage(path: str | Path, head: bytes, encoding: str, is_table: bool) -> UserError:
    with io.TextIOWrapper(open_unpacked(path), encoding=encoding, errors="surrogateescape", newline="") as text:
        rows = csv.reader(text, delimiter=_separator(head.decode("latin-1"))) if is_table else text
        rows = (row for row in rows if row)
        bad = next(i for i, row in enumerate(rows) if re.search("[\udc80-\udcff]", "".join(row)))
    where = f"line {bad + 1}" if not is_table else f"row {bad}" if bad else "the header"
    return UserError(f"{path}: {where} holds bytes that are no {encoding.upper()}, as the rest is: mend it.")


def _separator(sample: str) -> str:
    """Return the separator that cuts the most lines into as many fields as the header, and into the most fields."""

    def score(separator: str) -> tuple[float, int]:
        rows = [r for r in csv.reader(io.StringIO(sample), delimiter=separator) if r][:200]
        width = len(rows[0]) if rows else 0
        return (np.mean([len(r) == width for r in rows]) if width > 1 else 0, width)

    return max(SEPARATORS, key=score)


def sniff(path: str | Path, text_column: str = "") -> Dialect:
    """Find out encoding, separator, decimal sign and header of a text table. Raises UserError for an unusable one."""
    csv.field_size_limit(TEXT_BLOCK if text_column else HEAD)
    with _reading(path):
        with open_unpacked(path) as file:
            head = file.read(HEAD)
        if not head.strip(b"\xef\xbb\xbf\xff\xfe\r\n\t \x00"):
            raise UserError(f"{path}: the file is empty.")
        encoding = _encoding(path, head)
        text = head.decode(encoding, "ignore").lstrip("\ufeff").replace("\r\n", "\n").replace("\r", "\n")
        if text.count("\0") > (len(text) / 100 if text_column else 0):  # a stray one is a space in a text
            row = text[: text.index("\0")].count("\n")
            raise UserError(f"{path}: this is no text table (it holds zero bytes, the first in line {row + 1}).")
        whole_lines = text[: text.rfind("\n") + 1] if len(head) == HEAD else text
        separator = _separator(whole_lines)
        rows = (r for r in csv.reader(io.StringIO(whole_lines), delimiter=separator) if r)
        raw_header = next(rows, [])
        if not raw_header:
            raise UserError(f"{path}: the first {HEAD:,} bytes hold no line end: this is no table.")
        header = [name.strip() or f"Unnamed: {i}" for i, name in enumerate(raw_header)]
        for name, count in Counter(header).items():
            if count > 1:
                raise UserError(f"{path}: column {name!r} is there twice: rename one of them.")
        decimal = "."
        if separator != ",":  # where a comma parts the fields it cannot part a number
            cells = [cell for _, row in zip(range(1000), rows, strict=False) for cell in row]
            if not any(re.fullmatch(r"\s*[+-]?\d*\.\d+\s*", c) for c in cells):
                decimal = "," if any(re.fullmatch(r"\s*[+-]?\d*,\d+\s*", c) for c in cells) else "."
    return Dialect(encoding, separator, decimal, raw_header, header, text_column)


class _Retype(Exception):
    """A cell did not fit the type of its column, which has been made wider: read again."""


@contextmanager
def _arrow_batches(path: str | Path, dialect: Dialect, types: dict) -> Iterator:
    """Open Arrow's streaming reader. Columns that `types` does not name get a type from the first block.

    Inside, a row with too few or too many fields becomes a UserError. A cell that does not fit the type of its column
    makes that type wider in `types` (whole number → number → text) and becomes a _Retype.
    """
    import pyarrow as pa
    import pyarrow.csv as arrow

    options = {
        "read_options": arrow.ReadOptions(encoding=dialect.encoding, block_size=TEXT_BLOCK if dialect.text else BLOCK),
        # No invalid_row_handler: a thread that lets go of a Python object while the process ends would abort it
        "parse_options": arrow.ParseOptions(delimiter=dialect.separator, newlines_in_values=True),
        "convert_options": arrow.ConvertOptions(
            decimal_point=dialect.decimal,
            null_values=sorted(NULLS),
            strings_can_be_null=not dialect.text,
            column_types=types,
        ),
    }
    try:
        # Arrow's own file, not Python's: its threads may still be reading when an error ends the process. Nor is it
        # closed here: they would go on reading from its number, which by then is that of the next file opened
        with _reading(path):
            file = pa.OSFile(str(path))
            file = pa.CompressedInputStream(file, "gzip") if is_packed(path) else file
            with arrow.open_csv(file, **options) as batches:
                yield batches
    except pa.ArrowInvalid as error:
        if re.search(r"Expected \d+ columns, got \d+", str(error)):
            row, fields = _ragged_row(path, dialect)
            raise UserError(f"{path}: row {row} has {fields} fields, the header {len(dialect.header)}.") from None
        misfit = re.search(r"CSV column #(\d+): .*conversion error", str(error))
        column = dialect.raw_header[int(misfit[1])] if misfit else ""
        if types.get(column, pa.string()) == pa.string():  # there is no wider type
            hint = " --text COLUMN reads long texts." if "straddling" in str(error) and not dialect.text else ""
            raise UserError(f"{path}: cannot be read as a table: {error} (Is a quote left open?){hint}") from None
        types[column] = pa.float64() if pa.types.is_integer(types[column]) else pa.string()
        raise _Retype from None


def _csv_batches(path: str | Path, dialect: Dialect, types: dict) -> Iterator:
    """Yield a text table as Arrow's batches of a block, its columns of the types that `types` gives by raw name."""
    import pyarrow as pa
    import pyarrow.compute as pc

    rows, last = 0, None
    with _arrow_batches(path, dialect, types) as batches:
        for batch in batches:
            columns = []
            for name, column in zip(dialect.header, batch.columns, strict=True):
                if pa.types.is_string(column.type):
                    lines = pc.max(pc.count_substring(column, "\n")).as_py() or 0
                    if lines > LINES_IN_A_CELL and not dialect.text:
                        raise UserError(
                            f"{path}: a cell of column {name!r} has {lines} lines: a quote was left open, or it is a "
                            f"column of texts, which --text {name!r} reads."
                        )
                    if dialect.decimal == "," and name != dialect.text:
                        column = pc.replace_substring_regex(column, r"^(\s*[+-]?\d*),(\d+\s*)$", r"\1.\2")
                columns.append(column)
            if len(batch):
                rows, last = rows + len(batch), columns[-1][-1].as_py()
            yield pa.RecordBatch.from_arrays(columns, dialect.header)
    if isinstance(last, str) and re.search(r"[\r\n]", last) and _ends_in_a_quote(path):
        raise UserError(f"{path}: row {rows}: a quote that begins there is left open to the end of the file.")


def _ends_in_a_quote(path: str | Path) -> bool:
    """Tell whether a table whose last cell holds line ends stops inside its quotes: inside, quotes stand in pairs, and
    one more closes them."""
    tail = b""
    with _reading(path), open_unpacked(path) as file:
        for block in iter(lambda: file.read(HEAD), b""):
            tail = (tail + block)[-1000:]
    return len(re.search(rb'"*$', tail.replace(b"\0", b"").rstrip())[0]) % 2 == 0


def _ragged_row(path: str | Path, dialect: Dialect) -> tuple[int, int]:
    """Find the number of the first row whose fields are not as many as the header's, which Arrow does not tell."""
    with _reading(path), io.TextIOWrapper(open_unpacked(path), encoding=dialect.encoding, newline="") as text:
        rows = (row for row in csv.reader(text, delimiter=dialect.separator) if row)
        return next(((i, len(row)) for i, row in enumerate(rows) if len(row) != len(dialect.header)), (0, 0))


def _read_csv(path: str | Path, text: str) -> pd.DataFrame:
    """Read a whole text table. Numbers are told from text, and nothing else: dates and words are read by the
    preprocessor's own rules, the same here and at prediction."""
    import pyarrow as pa

    dialect = sniff(path, text)
    with _arrow_batches(path, dialect, {}) as batches:
        types = {field.name: field.type for field in batches.schema}
    for name, t in types.items():
        is_number = pa.types.is_integer(t) or pa.types.is_floating(t)
        types[name] = t if is_number and name.strip() != text else pa.string()
    while True:
        try:
            batches = list(_csv_batches(path, dialect, types))
        except _Retype:
            continue
        table = pa.Table.from_batches(batches) if batches else pa.table({})
        del batches
        # Column by column, what was read of it given back: a large table is not in memory twice
        return table.to_pandas(split_blocks=True, self_destruct=True)


def _stream_csv(path: str | Path, numbers: set[str], text: str) -> Iterator[pd.DataFrame]:
    """Read a text table in pieces. A column in which a cell is no number goes on as text from there on: it is for the
    preprocessor to name the row."""
    import pyarrow as pa

    dialect, done = sniff(path, text), 0
    names = zip(dialect.raw_header, dialect.header, strict=True)
    types = {raw: pa.float64() if name in numbers else pa.string() for raw, name in names}
    while True:
        skip = done
        try:
            for batch in _csv_batches(path, dialect, types):
                rest = batch[min(skip, len(batch)) :]
                skip -= len(batch) - len(rest)
                done += len(rest)
                if len(rest):
                    yield rest.to_pandas()
            return
        except _Retype:
            continue


# ---------------------------------------------------------------- json lines and parquet


def _stream_jsonl(path: str | Path, rows: int) -> Iterator[pd.DataFrame]:
    records: list[dict] = []
    columns: dict[str, None] = {}  # a key that only some records have is an empty cell in the others

    def frame() -> pd.DataFrame:
        columns.update(dict.fromkeys(key for record in records for key in record))
        return frame_of(records).reindex(columns=list(columns))

    with _reading(path), open_unpacked(path) as file:
        for number, line in enumerate(file, start=1):
            if not line.strip():
                continue
            try:
                record = json.loads(line.decode("utf-8-sig"))
            except (ValueError, RecursionError) as error:
                raise UserError(f"{path}: line {number} is no JSON ({error}).") from None
            if not isinstance(record, dict):
                raise UserError(f"{path}: line {number} is no JSON object: each line is one record in braces.")
            records.append(record)
            if len(records) == rows:
                yield frame()
                records = []
    if records:
        yield frame()


@contextmanager
def _open_log(path: str | Path) -> Iterator[sqlite3.Connection]:
    try:
        with _reading(path), contextlib.closing(sqlite3.connect(f"file:{quote(str(path))}?mode=ro", uri=True)) as log:
            yield log
    except sqlite3.Error as error:
        raise UserError(f"{path}: no log of requests that can be read ({error}).") from None


def log_kind(path: str | Path) -> str:
    """Return the kind of the records in a log of serve.py: tabular, image or text; "" where it is not one alone."""
    with _open_log(path) as log:
        if "kind" not in [column[1] for column in log.execute("PRAGMA table_info(requests)")]:
            return ""  # logs of before it was kept
        kinds = log.execute("SELECT DISTINCT kind FROM requests WHERE target IS NOT NULL").fetchall()
    return kinds[0][0] or "" if len(kinds) == 1 else ""


def _stream_log(path: str | Path, rows: int) -> Iterator[pd.DataFrame]:
    """Read the records that serve.py --log kept and that were told their true target, which is the last column."""
    query = "SELECT record, name, target FROM requests WHERE target IS NOT NULL ORDER BY rowid"
    with _open_log(path) as log:
        if not log.execute(f"SELECT EXISTS ({query})").fetchone()[0]:
            raise UserError(f"{path}: no record in it has a true target yet, which POST /feedback tells.")
        found = log.execute(query)
        while some := found.fetchmany(rows):
            frame = frame_of([json.loads(record) | {name: json.loads(target)} for record, name, target in some])
            name = some[-1][1]
            yield frame[[c for c in frame if c != name] + [name]]


def _stream_parquet(path: str | Path, rows: int, text: str, image: str) -> Iterator[pd.DataFrame]:
    """Read parquet. Columns of bytes but that of the images are text, which some programs write so."""
    import pyarrow as pa
    from pyarrow import parquet

    done = 0
    try:
        with _reading(path), parquet.ParquetFile(open_unpacked(path)) as file:
            for batch in file.iter_batches(batch_size=rows):
                batch.validate(full=True)  # letters that are no UTF-8 are found much later otherwise
                for i, field in enumerate(batch.schema):
                    is_bytes = pa.types.is_binary(field.type) or pa.types.is_large_binary(field.type)
                    if is_bytes and field.name != image:
                        cells = [None if c is None else c.decode("utf-8", "replace") for c in batch[i].to_pylist()]
                        bad = [c is not None and "\ufffd" in c for c in cells]
                        if field.name == text and any(bad):
                            row = done + 1 + bad.index(True)
                            raise UserError(f"{path}: row {row}, column {text!r}: these bytes are no UTF-8.")
                        batch = batch.set_column(i, field.name, pa.array(cells, pa.string()))
                done += len(batch)
                frame = batch.to_pandas()
                yield frame.reset_index() if any(frame.index.names) else frame.reset_index(drop=True)
    except (pa.ArrowException, KeyError, TypeError, json.JSONDecodeError) as error:  # also in pandas' own part of it
        raise UserError(f"{path}: cannot be read as parquet: {error}.") from None


def _stream_lines(path: str | Path, rows: int, column: str) -> Iterator[pd.DataFrame]:
    with _reading(path), open_unpacked(path) as file:
        encoding = _encoding(path, file.read(HEAD), is_table=False)
    encoding = encoding.replace("utf-8", "utf-8-sig")
    with _reading(path), io.TextIOWrapper(open_unpacked(path), encoding=encoding) as lines:
        while part := [line.removesuffix("\n") for line in itertools.islice(lines, rows)]:
            yield pd.DataFrame({column: part})


def _is_table(path: str | Path, column: str) -> bool:
    """Tell a table from a file with a text in each line: in some encoding and with some separator, its first line names
    the column of texts, and most others have as many fields (a table of one column may hold anything)."""
    csv.field_size_limit(HEAD)
    with _reading(path), open_unpacked(path) as file:
        head = file.read(HEAD)
    for encoding in ("utf-16", "utf-8-sig", "cp949", "latin-1"):
        text = head.decode(encoding, "ignore")
        for separator in SEPARATORS:
            rows = (row for row in csv.reader(io.StringIO(text, newline=""), delimiter=separator) if row)
            header = next(rows, [])
            alike = [len(row) == len(header) for row in itertools.islice(rows, 200)]
            if column in [name.strip() for name in header] and (len(header) == 1 or np.mean(alike or [1]) > 0.9):
                return True
    return False


def read_chunks(
    path: str | Path, *, numbers: set[str] = frozenset(), text: str = "", image: str = "", rows: int = 65_536
) -> Iterator[pd.DataFrame]:
    """Read a csv, tsv, jsonl or parquet file in pieces of about `rows`, in constant memory.

    numbers: columns of a text table that training read as numbers; all others are read as text.
    text: column whose cells are taken letter by letter; a .txt file then holds one in each line, unless its first
    line names that column.  image: column whose bytes stay bytes.
    The index counts the file's rows from 1. Raises UserError, naming the row, where the file cannot be read.
    """
    may_be_lines = text and str(path).lower().removesuffix(".gz").endswith(".txt")
    read = {
        "csv": lambda: _stream_csv(path, numbers, text),
        "lines": lambda: _stream_lines(path, rows, text),
        "jsonl": lambda: _stream_jsonl(path, rows),
        "parquet": lambda: _stream_parquet(path, rows, text, image),
        "log": lambda: _stream_log(path, rows),
    }["lines" if may_be_lines and not _is_table(path, text) else file_format(path)]
    start = 1
    for frame in read():
        frame.index = pd.RangeIndex(start, start + len(frame), name="row")
        start += len(frame)
        yield frame


def read_table(path: str | Path, text: str = "", image: str = "") -> pd.DataFrame:
    """Read a whole file; the index counts its rows from 1. Raises UserError where it is empty or cannot be read.

    text: column whose cells are taken letter by letter.  image: column whose bytes stay bytes.
    """
    if file_format(path) == "csv":
        table = _read_csv(path, text)
    else:
        chunks = list(read_chunks(path, text=text, image=image))
        table = pd.concat(chunks, ignore_index=True) if chunks else pd.DataFrame()
    if table.empty:
        raise UserError(f"{path}: there are no rows below the header.")
    table.index = pd.RangeIndex(1, len(table) + 1, name="row")
    return table


@contextmanager
def standard_input(text: str = "") -> Iterator[str]:
    """Keep standard input in a temporary file, named by its format, for as long as the context lasts.

    text: column that holds texts; what is no table then holds one in each line.
    """
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "standard input"
        with open(path, "wb") as file:
            shutil.copyfileobj(sys.stdin.buffer, file, HEAD)
        with _reading("standard input"), open_unpacked(path) as file:
            line = next((line for line in iter(lambda: file.readline(TEXT_BLOCK), b"") if line.strip()), b"")
        is_jsonl = _is_record(line) if text else line.lstrip(b"\xef\xbb\xbf ")[:1] == b"{"
        path = path.rename(f"{path}.{'parquet' if line[:4] == b'PAR1' else 'jsonl' if is_jsonl else 'txt'}")
        try:
            yield str(path)
        except UserError as error:
            raise UserError(str(error).replace(str(path), "standard input")) from None


def _is_record(line: bytes) -> bool:
    try:
        return isinstance(json.loads(line.decode("utf-8-sig")), dict)
    except (ValueError, RecursionError):
        return False
