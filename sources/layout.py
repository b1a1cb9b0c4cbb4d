"""What readers need to know about records: file endings, and the columns that hold file names or long texts."""

from dataclasses import dataclass
from pathlib import Path

from errors import UserError

FORMATS = {".csv": "csv", ".tsv": "csv", ".txt": "csv", ".jsonl": "jsonl", ".ndjson": "jsonl", ".parquet": "parquet",
           ".db": "log"}  # fmt: skip
IMAGE_ENDINGS = (".png", ".jpg", ".jpeg", ".bmp", ".gif", ".webp", ".tif", ".tiff")
TEXT_ENDINGS = (".txt",)
FILE, LABEL = "file", "label"  # columns of the records in a folder


@dataclass(frozen=True)
class Layout:
    """The columns that are read in a way of their own; the default is a table of short cells."""

    paths: frozenset[str] = frozenset()  # file names, relative to the table's folder; or the bytes of files
    texts: frozenset[str] = frozenset()  # a cell may be as long as a book
    lone: str = ""  # the only column of the records: a .txt file without a header then holds one value per line


TABLE = Layout()


def file_format(path: str | Path) -> str:
    """Return csv, jsonl, parquet or log by the file's name (.gz aside). Raises UserError for any other name."""
    suffixes = [s.lower() for s in Path(path).suffixes]
    ending = next((s for s in reversed(suffixes) if s != ".gz"), "")
    if ending not in FORMATS:
        hint = " Save the sheet as csv." if ending in (".xls", ".xlsx", ".ods") else ""
        raise UserError(f"{path}: the name must end in one of {', '.join(FORMATS)} (also with .gz).{hint}")
    return FORMATS[ending]
