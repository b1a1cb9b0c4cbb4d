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
from sources.encodings import reading


@contextmanager
def _open_log(path: str | Path) -> Iterator[sqlite3.Connection]:
    try:
        with reading(path), contextlib.closing(sqlite3.connect(f"file:{quote(str(path))}?mode=ro", uri=True)) as log:
            yield log
    except sqlite3.Error as error:
        raise UserError(f"{path}: not a readable log of requests ({error}).") from None


def log_kinds(path: str | Path) -> dict[str, str]:
    """Return {column: kind} of the newest model with records whose target is known; {} if the log does not keep it."""
    query = (
        "SELECT kinds FROM requests JOIN models ON models.sha256 = requests.model WHERE target IS NOT NULL"
        " ORDER BY requests.rowid DESC LIMIT 1"
    )
    with _open_log(path) as log:
        if not log.execute("PRAGMA table_info(models)").fetchall():
            return {}
        found = log.execute(query).fetchone()
    return json.loads(found[0]) if found else {}


def read_log(path: str | Path, rows: int) -> Iterator[pd.DataFrame]:
    """Yield the records whose true target is known, `rows` at a time, with the target as their last column."""
    query = "SELECT record, name, target FROM requests WHERE target IS NOT NULL ORDER BY rowid"
    with _open_log(path) as log:
        found = log.execute(query)
        part = found.fetchmany(rows)
        if not part:
            raise UserError(f"{path}: none of its records has a true target yet; POST /feedback adds them.")
        while part:
            frame = frame_of([json.loads(record) | {name: json.loads(target)} for record, name, target in part])
            name = part[-1][1]
            yield frame[[c for c in frame if c != name] + [name]]
            part = found.fetchmany(rows)
