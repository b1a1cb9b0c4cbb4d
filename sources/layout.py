"""What readers need to know about records: file endings, how a file is written, and the columns that hold file names
or long texts."""

from dataclasses import dataclass
from pathlib import Path

from errors import UserError

FORMATS = {".csv": "csv", ".tsv": "csv", ".txt": "csv", ".jsonl": "jsonl", ".ndjson": "jsonl", ".parquet": "parquet",
           ".db": "log", **dict.fromkeys((".xlsx", ".xls", ".ods", ".xlsm", ".xlsb"), "sheet")}  # fmt: skip
IMAGE_ENDINGS = (".png", ".jpg", ".jpeg", ".bmp", ".gif", ".webp", ".tif", ".tiff")
UNREAD_IMAGE_ENDINGS = (".heic", ".heif", ".avif")  # photos of telephones: named as such where they are found
TEXT_ENDINGS = (".txt",)
FILE, LABEL = "file", "label"  # columns of the records in a folder
AS_WRITTEN = "as written: "  # before the name of a column that a Layout keeps


@dataclass(frozen=True)
class Layout:
    """The columns that are read in a way of their own, and what a person says about the file.

    The default is a table of short cells, written in a way that is found out.
    """

    paths: frozenset[str] = frozenset()  # file names, relative to the table's folder; or the bytes of files
    texts: frozenset[str] = frozenset()  # a cell may be as long as a book
    lone: str = ""  # the only column of the records: a .txt file without a header then holds one value per line
    encoding: str = ""  # of text files; "" = detect
    sheet: str = ""  # of a spreadsheet; "" = the first
    skip_rows: int = -1  # lines or rows above the header of a text table or spreadsheet; -1 = detect
    keep: tuple[str, ...] = ()  # columns that are also wanted as they are written: file names are resolved
    max_bytes: int = 0  # of an unpacked spreadsheet, which is then read in a process of its own; 0 = no limit


TABLE = Layout()


def file_format(path: str | Path) -> str:
    """Return csv, jsonl, parquet, sheet or log by the file's name (.gz aside). Raises UserError for any other name."""
    suffixes = [s.lower() for s in Path(path).suffixes]
    ending = next((s for s in reversed(suffixes) if s != ".gz"), "")
    if ending not in FORMATS:
        raise UserError(f"{path}: the name must end in one of {', '.join(FORMATS)} (also with .gz).")
    return FORMATS[ending]
