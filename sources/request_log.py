"""Read the log of serve.py: records that were predicted, with the true targets that were reported later."""

import contextlib
import json
import sqlite3
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from urllib.parse import quote

import pandas as pd

from errors import UserError
from preprocessing.parsing import frame_of
from sources.encodings import check_is_file, reading


@contextmanager
def _open_log(path: str | Path) -> Iterator[sqlite3.Connection]:
    check_is_file(path)
    try:
        with reading(path), contextlib.closing(sqlite3.connect(f"file:{quote(str(path))}?mode=ro", uri=True)) as log:
            if not _has_table(log, "requests"):
                raise UserError(f"{path}: not a log of requests of serve.py: it has no table of that name.")
            yield log
    except sqlite3.Error as error:
        raise UserError(f"{path}: not a readable log of requests ({error}).") from None


def _has_table(log: sqlite3.Connection, name: str) -> bool:
    """Return whether there is a table: a view of the same name may be endless."""
    return bool(log.execute("SELECT 1 FROM sqlite_master WHERE type = 'table' AND name = ?", [name]).fetchone())


def log_kinds(path: str | Path) -> dict[str, str]:
    """Return {column: kind} of the newest model with records whose target is known; {} if the log does not keep it."""
    query = (
        "SELECT kinds FROM requests JOIN models ON models.sha256 = requests.model WHERE target IS NOT NULL"
        " ORDER BY requests.rowid DESC LIMIT 1"
    )
    with _open_log(path) as log:
        found = log.execute(query).fetchone() if _has_table(log, "models") else None
    try:
        kinds = json.loads(found[0]) if found else {}
        return dict(zip(kinds, map(str, kinds.values()), strict=True))
    except (ValueError, TypeError, AttributeError, RecursionError):
        raise UserError(f"{path}: the kinds of columns in the table models are damaged.") from None


def read_log(path: str | Path, rows: int, notes: list[str]) -> Iterator[pd.DataFrame]:
    """Yield the records whose true target is known, `rows` at a time, with the target as their last column.

    notes: gets how many records have none.
    """
    query = "SELECT rowid, record, name, target FROM requests WHERE target IS NOT NULL ORDER BY rowid"
    with _open_log(path) as log:
        (unknown,) = log.execute("SELECT COUNT(*) FROM requests WHERE target IS NULL").fetchone()
        notes += [f"{path}: {unknown} records without feedback left out"] if unknown else []
        found = log.execute(query)
        part = found.fetchmany(rows)
        if not part:
            raise UserError(f"{path}: none of its records has a true target yet; POST /feedback adds them.")
        while part:
            frame = frame_of([_with_target(path, *row) for row in part])
            name = part[-1][2]
            yield frame[[c for c in frame if c != name] + [name]]
            part = found.fetchmany(rows)


def _with_target(path: str | Path, row: int, record: str, name: str, target: str) -> dict:
    """Return the record of a row of the log, with its target under its name."""
    try:
        values = json.loads(record)
        if isinstance(values, dict) and isinstance(name, str):
            return values | {name: json.loads(target)}
    except (ValueError, TypeError, RecursionError):
        pass
    raise UserError(f"{path}: row {row} of the table requests is damaged: it is not a record with a target in JSON.")
