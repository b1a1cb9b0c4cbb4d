"""Read delimited text (csv, tsv, …): every cell stays the text that it is in the file."""

import csv
import io
import re
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

import numpy as np
import pandas as pd

from errors import UserError
from sources.encodings import HEAD, as_raw_text, find_encoding, guess_note, is_gzip, open_unpacked, read_head, reading
from sources.headers import as_note, find_header
from sources.layout import Layout

BLOCK = 1 << 20  # bytes of a table that are read at once
TEXT_BLOCK = 1 << 24  # the same where a cell may be a book
SEPARATORS = ",;\t|"
SEPARATOR_LINE = re.compile(r'"?sep=([^\w\s"]|\t)"?[,;\t]*(\r\n|\r|\n)', re.IGNORECASE)  # Excel understands it
LINES_IN_A_CELL = 200  # more than these come from a quote that was left open


@dataclass(frozen=True)
class Dialect:
    """How a text table is written."""

    encoding: str
    separator: str
    raw_header: list[str]
    header: list[str]  # stripped; an empty name becomes "Unnamed: <position>"
    skip: int  # lines above the header
    note: str  # on these lines


def _rows(text: str, separator: str, skip: int = 0) -> Iterator[list[str]]:
    """Split text into rows of fields, empty lines left out. Line ends inside quotes stay as they are."""
    return (row for row in csv.reader(_below(io.StringIO(text, newline=""), skip), delimiter=separator) if row)


def _below(lines: Iterator[str], skip: int) -> Iterator[str]:
    """Return lines without the first `skip`."""
    for _ in islice(lines, skip):
        pass
    return lines


def _find_start(text: str, separator: str, skip: int, detect: bool) -> tuple[int, list[list[str]]]:
    """Return the number of lines above the header, and the first rows of fields from there on.

    skip: lines that are above it in any case.
    """
    reader = csv.reader(_below(io.StringIO(text, newline=""), skip), delimiter=separator)
    starts, rows = [skip], []
    for row in islice(reader, 200):
        rows.append(row)
        starts.append(skip + reader.line_num)
    first = find_header(rows) if detect else 0
    return starts[first], [row for row in rows[first:] if row]


def _find_structure(text: str, layout: Layout) -> tuple[str, int]:
    """Return the separator and the number of lines above the header.

    The separator is the one that a first line such as "sep=;" names; or else the one that splits the most rows into as
    many fields as the header, and into the most fields.
    """
    named = SEPARATOR_LINE.match(text)
    skip, best = max(layout.skip_rows, 1 if named else 0), (-1.0, 0)
    for separator in named[1] if named else SEPARATORS:
        start, rows = _find_start(text, separator, skip, layout.skip_rows < 0)
        width = len(rows[0]) if rows else 0
        score = (float(np.mean([len(row) == width for row in rows])) if width > 1 else 0.0, width)
        if score > best:
            best, found = score, (separator, start)
    return found


def find_separator(path: str | Path, layout: Layout) -> str:
    """Return the separator of a text table, as it is found or named in its first line."""
    csv.field_size_limit(TEXT_BLOCK if layout.texts else HEAD)
    with reading(path):
        head = read_head(path)
        return _find_structure(_whole_lines(as_raw_text(head, layout.encoding), head), layout)[0]


def find_dialect(path: str | Path, layout: Layout) -> Dialect:
    """Detect encoding, separator and header of a text table. Raises UserError for an unusable one."""
    csv.field_size_limit(TEXT_BLOCK if layout.texts else HEAD)
    with reading(path):
        head = read_head(path)
        if not head.strip(b"\xef\xbb\xbf\xff\xfe\r\n\t \x00"):
            raise UserError(f"{path}: the file is empty.")
        raw = as_raw_text(head, layout.encoding)
        if raw.count("\0") > (len(raw) / 100 if layout.texts else 0):  # a text may hold a stray one
            line = raw[: raw.index("\0")].count("\n") + 1
            raise UserError(f"{path}: this is not a text table (it contains zero bytes, the first in line {line}).")
        separator, skip = _find_structure(_whole_lines(raw, head), layout)
        encoding = find_encoding(path, head, separator, skip, layout.encoding)
        text = _whole_lines(head.decode(encoding, "ignore").removeprefix("\ufeff"), head)
        raw_header = next(_rows(text, separator, skip), [])
    if not raw_header and layout.skip_rows > 0:
        raise UserError(f"{path}: --skip-rows {layout.skip_rows} leaves no header.")
    if not raw_header:
        raise UserError(f"{path}: no line ends within the first {HEAD:,} bytes: this is not a table.")
    header = [name.strip() or f"Unnamed: {i}" for i, name in enumerate(raw_header)]
    for name, count in Counter(header).items():
        if count > 1:
            raise UserError(f"{path}: column {name!r} occurs twice: rename one of them.")
    first = 1 if SEPARATOR_LINE.match(text) else 0
    above = list(csv.reader(islice(io.StringIO(text, newline=""), first, skip), delimiter=separator))
    note = as_note(above, skip - first) if any(map(any, above)) else ""
    return Dialect(encoding, separator, raw_header, header, skip, note)


def _whole_lines(text: str, head: bytes) -> str:
    """Leave out the last line of a head that was cut off."""
    return text[: max(text.rfind("\n"), text.rfind("\r")) + 1] if len(head) == HEAD else text


def holds_table(path: str | Path, column: str) -> bool:
    """Tell a table from a file with one value per line.

    In some encoding and with some separator, the first line of a table names the column, and most others have as many
    fields (a table of one column may hold anything).
    """
    csv.field_size_limit(HEAD)
    with reading(path):
        head = read_head(path)
    for encoding in ("utf-16", "utf-8-sig", "cp949", "latin-1"):
        text = head.decode(encoding, "ignore")
        for separator in SEPARATORS:
            header, *rows = _find_start(text, separator, 0, True)[1] or [[]]
            alike = [len(row) == len(header) for row in rows]
            if column in [name.strip() for name in header] and (len(header) == 1 or np.mean(alike or [1]) > 0.9):
                return True
    return False


def read_delimited(path: str | Path, layout: Layout, notes: list[str]) -> Iterator[pd.DataFrame]:
    """Yield a text table block by block, so that one block is in memory at a time. Each column is text, "" if empty.

    notes: gets a line if lines above the header are skipped, and one if the encoding is a guess.
    Raises UserError, naming the row, for rows of another length than the header and for quotes that are left open.
    """
    import pyarrow as pa

    dialect, rows, batch = find_dialect(path, layout), 0, None
    notes += [f"{path}: {dialect.note}"] if dialect.note else []
    notes += guess_note(path, dialect.encoding, layout.encoding)
    with _arrow_batches(path, dialect, layout) as batches:
        for part in batches:
            if not len(part):
                continue
            batch = pa.RecordBatch.from_arrays(part.columns, dialect.header)
            rows += len(batch)
            _check_lines(path, batch, layout)
            yield batch.to_pandas()
    # An unclosed quote in the last column consumes the rest of the file, and Arrow does not report it
    if batch is not None and re.search(r"[\r\n]", batch.columns[-1][-1].as_py()) and _ends_within_quotes(path):
        raise UserError(f"{path}: row {rows}: a quote that opens there is never closed.")


@contextmanager
def _arrow_batches(path: str | Path, dialect: Dialect, layout: Layout) -> Iterator:
    """Open Arrow's streaming reader. Inside, whatever Arrow raises becomes a UserError that names the row."""
    import pyarrow as pa
    from pyarrow import csv as arrow

    options = {
        "read_options": arrow.ReadOptions(
            encoding=dialect.encoding, skip_rows=dialect.skip, block_size=TEXT_BLOCK if layout.texts else BLOCK
        ),
        # No invalid_row_handler: a thread that releases a Python object while the process ends would abort it
        "parse_options": arrow.ParseOptions(delimiter=dialect.separator, newlines_in_values=True),
        # large_string is what pandas keeps text in: it takes the cells over without a copy
        "convert_options": arrow.ConvertOptions(
            column_types=dict.fromkeys(dialect.raw_header, pa.large_string()), null_values=[], strings_can_be_null=False
        ),
    }
    try:
        # Arrow's own file, not Python's: its threads may still be reading when an error ends the process. Nor is it
        # closed here: they would continue to read from its descriptor, which by then belongs to the next file opened
        with reading(path):
            file = pa.OSFile(str(path))
            file = pa.CompressedInputStream(file, "gzip") if is_gzip(path) else file
            with arrow.open_csv(file, **options) as batches:
                yield batches
    except pa.ArrowInvalid as error:
        if re.search(r"Expected \d+ columns, got \d+", str(error)):
            row, fields = _ragged_row(path, dialect)
            is_short = row == 1 and len(dialect.header) < fields and not dialect.skip
            hint = " If that is no header but a title, --skip-rows 1 skips it." if is_short else ""
            raise UserError(f"{path}: row {row} has {fields} fields, the header {len(dialect.header)}.{hint}") from None
        hint = " --text COLUMN reads long texts." if "straddling" in str(error) and not layout.texts else ""
        raise UserError(f"{path}: cannot be read as a table: {error} (Is a quote left open?){hint}") from None


def _check_lines(path: str | Path, batch, layout: Layout) -> None:
    """Refuse a cell of very many lines in a column that is not known to hold texts."""
    import pyarrow.compute as pc

    for name, column in zip(batch.schema.names, batch.columns, strict=True):
        if name in layout.texts or pc.max(pc.binary_length(column)).as_py() <= LINES_IN_A_CELL:
            continue  # the lengths are known without reading the cells
        if (lines := pc.max(pc.count_substring(column, "\n")).as_py()) > LINES_IN_A_CELL:
            raise UserError(
                f"{path}: a cell of column {name!r} has {lines} lines: a quote was left open, or the column holds long "
                f"texts, which --text {name!r} reads."
            )


def _ragged_row(path: str | Path, dialect: Dialect) -> tuple[int, int]:
    """Return number and length of the first row that is not as long as the header: Arrow does not report the number."""
    with reading(path), io.TextIOWrapper(open_unpacked(path), encoding=dialect.encoding, newline="") as text:
        rows = (row for row in csv.reader(_below(text, dialect.skip), delimiter=dialect.separator) if row)
        return next(((i, len(row)) for i, row in enumerate(rows) if len(row) != len(dialect.header)), (0, 0))


def _ends_within_quotes(path: str | Path) -> bool:
    """Tell whether a table whose last cell holds line ends stops inside its quotes.

    Quotes inside a quoted cell are doubled, and one more closes it: an even number at the end closes nothing.
    """
    tail = b""
    with reading(path), open_unpacked(path) as file:
        for block in iter(lambda: file.read(HEAD), b""):
            tail = (tail + block)[-1000:]
    return len(re.search(rb'"*$', tail.replace(b"\0", b"").rstrip())[0]) % 2 == 0
