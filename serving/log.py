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

RECENT = 1_000  # newest errors that the live score of /metrics is computed on
MAX_FEEDBACK = 1_000  # newest records with feedback on which two models are compared


class Log:
    """SQLite file of requests and feedback. Writes are on disk when a method returns."""

    def __init__(self, path: str):
        self.lock, self.path = threading.Lock(), path
        self.totals: dict[str, tuple] = {}  # model → number of errors, their sum, sum of squares: exact, also if large
        self.recent: dict[str, dict] = {}  # model → its newest errors by (request, row), in the order of the feedback
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
                "CREATE TABLE IF NOT EXISTS tests (sha256 TEXT PRIMARY KEY, test TEXT, used REAL);"
                "CREATE INDEX IF NOT EXISTS errors ON requests (model, error) WHERE error IS NOT NULL;"
                "SELECT id, row, time, model, record, prediction, name, target, error FROM requests LIMIT 0;"
                "SELECT sha256, kinds FROM models LIMIT 0;"  # these fail for a log of an older version
                "SELECT sha256, test, used FROM tests LIMIT 0;"
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

    def add_model(self, sha256: str, kinds: dict[str, str], test: dict) -> None:
        """Store the model that is used from now on.

        kinds: the kind of each column, with which its records can be read as training data.  test: see
        evaluation/held_out.py.
        """
        with self.lock, self.database:
            self.database.execute("INSERT OR IGNORE INTO models VALUES (?, ?)", [sha256, json.dumps(kinds)])
            used = [sha256, json.dumps(test), time.time()]
            self.database.execute("INSERT OR REPLACE INTO tests VALUES (?, ?, ?)", used)
            if sha256 not in self.totals:
                query = "SELECT COUNT(error), TOTAL(error), TOTAL(error * error) FROM requests WHERE model = ?"
                query += " AND error IS NOT NULL"  # so that SQLite uses the index
                count, *sums = self.database.execute(query, [sha256]).fetchone()
                self.totals[sha256] = (count, *map(Fraction, sums))
                query = "SELECT id, row, error FROM requests WHERE model = ? AND error IS NOT NULL"
                newest = self.database.execute(f"{query} ORDER BY rowid DESC LIMIT {RECENT}", [sha256]).fetchall()
                self.recent[sha256] = {(request, row): error for request, row, error in reversed(newest)}

    def last_model(self) -> tuple[str, dict] | None:
        """Return the sha256 of the model that was used last, and what its checkpoint keeps of its test split."""
        query = "SELECT sha256, test FROM tests ORDER BY used DESC LIMIT 1"
        with self.lock:
            found = self.database.execute(query).fetchone()
        return found and (found[0], json.loads(found[1]))

    def feedback(self, model: str) -> tuple[list[dict], list, list[float]]:
        """Return (records, true targets, errors of the predictions) of the newest predictions of a model that have
        feedback."""
        query = "SELECT record, target, error FROM requests WHERE model = ? AND error IS NOT NULL"
        with self.lock:
            rows = self.database.execute(f"{query} ORDER BY rowid DESC LIMIT {MAX_FEEDBACK}", [model]).fetchall()
        try:
            return [json.loads(row[0]) for row in rows], [json.loads(row[1]) for row in rows], [row[2] for row in rows]
        except (ValueError, TypeError):
            raise UserError(f"--log {self.path}: records with feedback are damaged.") from None

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

    def add_targets(self, request: str, name: str, targets: list, errors: list[float | None]) -> None:
        """Store the true targets of a request's records and the error of each prediction, in place of earlier ones.

        name: the target column. A target that is None is not known, and has no error.
        """
        self._check_file()
        known = [None if target is None else json.dumps(target) for target in targets]
        rows = [(name, t, e, request, i) for i, (t, e) in enumerate(zip(known, errors, strict=True), 1)]
        with self.lock:
            with self.database:
                query = "SELECT model, error FROM requests WHERE id = ?"
                before = self.database.execute(query, [request]).fetchall()
                self.database.executemany(
                    "UPDATE requests SET name = ?, target = ?, error = ? WHERE id = ? AND row = ?", rows
                )
            model = before[0][0]
            if model in self.totals:
                self._count(model, [error for _, error in before], -1)
                self._count(model, errors, 1)
                self._remember(model, {(request, row): error for row, error in enumerate(errors, 1)})

    def _remember(self, model: str, errors: dict[tuple, float | None]) -> None:
        """Put errors at the end of the newest ones of a model; None only removes an earlier one."""
        recent = self.recent[model]
        for key, error in errors.items():
            recent.pop(key, None)
            recent |= {} if error is None else {key: error}
        for key in list(recent)[: max(0, len(recent) - RECENT)]:
            del recent[key]

    def _count(self, model: str, errors: list[float | None], sign: int) -> None:
        """Add errors to the totals of a model, or take away those that are replaced."""
        count, total, squares = self.totals[model]
        exact = [Fraction(error) for error in errors if error is not None]
        squares += sign * sum(error * error for error in exact)
        self.totals[model] = (count + sign * len(exact), total + sign * sum(exact), squares)

    def recent_errors(self, model: str) -> list[float]:
        """Return the errors of the newest predictions of a model that have a target, at most RECENT."""
        return list(self.recent[model].values())

    def live_errors(self, model: str) -> tuple[int, float, float]:
        """Return the number of a model's predictions that have a target, their mean error and mean squared error.

        Running totals, because anyone may request /health and the log may be large.
        """
        count, total, squares = self.totals[model]
        return count, float(total / max(count, 1)), float(squares / max(count, 1))


def _to_json(cell) -> str:
    """Return a cell that JSON cannot hold as text: the bytes of an uploaded image, or a date of a parquet file."""
    return f"{DATA_URL}png;base64,{base64.b64encode(cell).decode()}" if isinstance(cell, bytes) else str(cell)
