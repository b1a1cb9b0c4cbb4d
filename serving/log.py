"""The request log in SQLite: records, predictions and the true targets that feedback adds."""

import base64
import json
import sqlite3
import threading
import time

from errors import UserError
from preprocessing.pixels import DATA_URL
from task import Task


class Log:
    """SQLite file of requests and feedback. Writes are on disk when a method returns."""

    def __init__(self, path: str):
        self.lock = threading.Lock()
        self.scores: dict[str, dict] = {}  # of models, until the next feedback
        try:
            self.database = sqlite3.connect(path, check_same_thread=False)
            self.database.executescript(
                "PRAGMA journal_mode=WAL; PRAGMA synchronous=FULL;"
                "CREATE TABLE IF NOT EXISTS requests (id TEXT, row INTEGER, time REAL, model TEXT, record TEXT,"
                " prediction TEXT, name TEXT, target TEXT, error REAL, PRIMARY KEY (id, row));"
                "CREATE TABLE IF NOT EXISTS models (sha256 TEXT PRIMARY KEY, kinds TEXT);"
                "CREATE INDEX IF NOT EXISTS errors ON requests (model, error) WHERE error IS NOT NULL;"
                "SELECT prediction FROM requests LIMIT 0;"  # fails for a log of an older version
            )
        except sqlite3.Error as error:
            raise UserError(f"--log {path}: cannot be used as a request log ({error}).") from None

    def add_model(self, sha256: str, kinds: dict[str, str]) -> None:
        """Store the kind of each column of a model, with which its records can be read as training data."""
        with self.lock, self.database:
            self.database.execute("INSERT OR IGNORE INTO models VALUES (?, ?)", [sha256, json.dumps(kinds)])

    def add_predictions(self, predicted: list[tuple]) -> None:
        """Store pairs of a batching.Request and its predictions in one transaction."""
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
        return [json.loads(prediction) for (prediction,) in rows]

    def add_targets(self, request: str, name: str, targets: list, errors: list[float]) -> None:
        """Store the true targets of a request's records and the error of each prediction. name: the target column."""
        rows = [(name, json.dumps(t), e, request, i) for i, (t, e) in enumerate(zip(targets, errors, strict=True), 1)]
        with self.lock, self.database:
            self.database.executemany(
                "UPDATE requests SET name = ?, target = ?, error = ? WHERE id = ? AND row = ?", rows
            )
            self.scores.clear()

    def live_score(self, model: str, task: Task) -> dict:
        """Return the score of a model's predictions on the targets that feedback added.

        It is kept until the next feedback, because anyone may request /health and the log may be large.
        """
        with self.lock:
            if model not in self.scores:
                query = "SELECT COUNT(error), AVG(error), AVG(error * error) FROM requests WHERE model = ?"
                query += " AND error IS NOT NULL"  # so that SQLite uses the index
                count, mean, mean_square = self.database.execute(query, [model]).fetchone()
                self.scores[model] = task.live_score(count, mean or 0.0, mean_square or 0.0)
            return self.scores[model]


def _to_json(cell) -> str:
    """Return a cell that JSON cannot hold as text: the bytes of an uploaded image, or a date of a parquet file."""
    return f"{DATA_URL}png;base64,{base64.b64encode(cell).decode()}" if isinstance(cell, bytes) else str(cell)
