"""The request log in SQLite: records, predictions and the true targets that feedback adds."""

import base64
import json
import os
import sqlite3
import threading
import time
from fractions import Fraction
from pathlib import Path

from errors import UserError
from preprocessing.pixels import DATA_URL


class Log:
    """SQLite file of requests and feedback. Writes are on disk when a method returns."""

    def __init__(self, path: str):
        self.lock, self.path = threading.Lock(), path
        self.totals: dict[str, tuple] = {}  # model → number of errors, their sum, sum of squares: exact, also if large
        try:
            Path(path).parent.mkdir(mode=0o700, parents=True, exist_ok=True)
            os.close(os.open(path, os.O_RDWR | os.O_CREAT, 0o600))  # records are private; SQLite's files follow it
            self.file = self._file()
            self.database = sqlite3.connect(path, check_same_thread=False)
            self.database.executescript(
                "PRAGMA journal_mode=WAL; PRAGMA synchronous=FULL;"
                "CREATE TABLE IF NOT EXISTS requests (id TEXT, row INTEGER, time REAL, model TEXT, record TEXT,"
                " prediction TEXT, name TEXT, target TEXT, error REAL, PRIMARY KEY (id, row));"
                "CREATE TABLE IF NOT EXISTS models (sha256 TEXT PRIMARY KEY, kinds TEXT);"
                "CREATE INDEX IF NOT EXISTS errors ON requests (model, error) WHERE error IS NOT NULL;"
                "SELECT id, row, time, model, record, prediction, name, target, error FROM requests LIMIT 0;"
                "SELECT sha256, kinds FROM models LIMIT 0;"  # these fail for a log of an older version
            )
        except (sqlite3.Error, OSError, ValueError) as error:
            raise UserError(f"--log {path}: cannot be used as a request log ({error}).") from None

    def close(self) -> None:
        """Close the file, which then holds all rows: SQLite keeps the newest in a second file (-wal) meanwhile."""
        with self.lock:
            self.database.close()

    def _file(self) -> tuple[int, int]:
        found = os.stat(self.path)
        return found.st_dev, found.st_ino

    def _check_file(self) -> None:
        """Raise sqlite3.Error if the file was deleted or renamed: SQLite would go on writing to it."""
        try:
            same = self._file() == self.file
        except OSError:
            same = False
        if not same:
            raise sqlite3.OperationalError(f"{self.path} was deleted or renamed: restart the service")

    def add_model(self, sha256: str, kinds: dict[str, str]) -> None:
        """Store the kind of each column of a model, with which its records can be read as training data."""
        with self.lock, self.database:
            self.database.execute("INSERT OR IGNORE INTO models VALUES (?, ?)", [sha256, json.dumps(kinds)])
            if sha256 not in self.totals:
                query = "SELECT COUNT(error), TOTAL(error), TOTAL(error * error) FROM requests WHERE model = ?"
                query += " AND error IS NOT NULL"  # so that SQLite uses the index
                count, *sums = self.database.execute(query, [sha256]).fetchone()
                self.totals[sha256] = (count, *map(Fraction, sums))

    def add_predictions(self, predicted: list[tuple]) -> None:
        """Store pairs of a batching.Request and its predictions in one transaction."""
        self._check_file()
        now = time.time()
        rows = [
            (request.id, row, now, request.model.sha256, json.dumps(record, default=_to_json), json.dumps(prediction))
            for request, predictions in predicted
            for row, (record, prediction) in enumerate(zip(request.records, predictions, strict=True), request.first)
        ]
        with self.lock, self.database:
            self.database.executemany(
                "INSERT INTO requests (id, row, time, model, record, prediction) VALUES (?, ?, ?, ?, ?, ?)", rows
            )

    def predictions(self, request: str) -> list[dict]:
        """Return the predictions of a request; none for an unknown id."""
        query = "SELECT prediction FROM requests WHERE id = ? ORDER BY row"
        with self.lock:
            rows = self.database.execute(query, [request]).fetchall()
        try:
            return [json.loads(prediction) for (prediction,) in rows]
        except (ValueError, TypeError):
            raise sqlite3.DatabaseError("the predictions under this id are damaged") from None

    def add_targets(self, request: str, name: str, targets: list, errors: list[float]) -> None:
        """Store the true targets of a request's records and the error of each prediction. name: the target column."""
        self._check_file()
        rows = [(name, json.dumps(t), e, request, i) for i, (t, e) in enumerate(zip(targets, errors, strict=True), 1)]
        with self.lock:
            with self.database:
                query = "SELECT model, error FROM requests WHERE id = ?"
                before = self.database.execute(query, [request]).fetchall()
                self.database.executemany(
                    "UPDATE requests SET name = ?, target = ?, error = ? WHERE id = ? AND row = ?", rows
                )
            self._count(before[0][0], [error for _, error in before if error is not None], -1)
            self._count(before[0][0], errors, 1)

    def _count(self, model: str, errors: list[float], sign: int) -> None:
        """Add errors to the totals of a model, or take away those that are replaced."""
        if model in self.totals:
            count, total, squares = self.totals[model]
            exact = list(map(Fraction, errors))
            squares += sign * sum(error * error for error in exact)
            self.totals[model] = (count + sign * len(exact), total + sign * sum(exact), squares)

    def live_errors(self, model: str) -> tuple[int, float, float]:
        """Return the number of a model's predictions that have a target, their mean error and mean squared error.

        Running totals, because anyone may request /health and the log may be large.
        """
        count, total, squares = self.totals[model]
        return count, float(total / max(count, 1)), float(squares / max(count, 1))


def _to_json(cell) -> str:
    """Return a cell that JSON cannot hold as text: the bytes of an uploaded image, or a date of a parquet file."""
    return f"{DATA_URL}png;base64,{base64.b64encode(cell).decode()}" if isinstance(cell, bytes) else str(cell)
