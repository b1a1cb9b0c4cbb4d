"""A model that many ask at once: requests are gathered into one forward pass, counted, logged and watched for drift."""

import asyncio
import collections
import hashlib
import json
import sqlite3
import threading
import time
import uuid
from collections import deque
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import pandas as pd
from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram
from starlette.exceptions import HTTPException

from cells import canonical, to_numbers
from drift import Profile
from errors import UserError
from images import data_url
from pipeline import Pipeline, kind_of
from preprocessing import as_frame
from runtime import load

GATHER = 0.002  # seconds in which requests are gathered
AT_ONCE = 512  # records in a forward pass, at least one request
MOST_WAITING = 4096  # records; beyond, requests are refused
LARGEST = 1e100  # of true numbers, so that squares of errors can be added up
WINDOW, PART = 5_000, 100  # records that drift is looked for in, and that are counted together


@dataclass(eq=False)
class Model:
    """A model that answers, the fingerprint of its file, and what its newest records looked like."""

    pipeline: Pipeline
    sha256: str
    window: deque[list] = field(default_factory=deque)  # of [number of records, their counts]

    def __post_init__(self):
        self.profile = Profile(self.pipeline.profile)

    def note(self, rows: int, counts: dict) -> None:
        """Add the counts of newer records to the window, in parts that are large enough to be few."""
        if self.window and self.window[-1][0] < PART:
            self.window[-1][0] += rows
            self.window[-1][1].update(counts)
        else:
            self.window.append([rows, collections.Counter(counts)])
        while sum(part for part, _ in self.window) - self.window[0][0] >= WINDOW:
            self.window.popleft()


@dataclass(eq=False)
class Request:
    """What one client wants to know, of which model, and what it will be told."""

    records: list[dict]
    model: Model
    future: asyncio.Future
    first: int  # number of the first record
    id: str


class Metrics:
    """What Prometheus is shown. See https://prometheus.io/docs/practices/naming/."""

    def __init__(self):
        self.registry = CollectorRegistry()
        kept = {"registry": self.registry}
        self.requests = Counter("http_requests", "Requests answered", ["path", "status"], **kept)
        buckets = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 10)
        self.seconds = Histogram(
            "http_request_seconds", "From a request to its answer", ["path"], buckets=buckets, **kept
        )
        self.batch = Histogram(
            "batch_records", "Records in a forward pass", buckets=(1, 2, 4, 8, 16, 32, 64, 512), **kept
        )
        self.waiting = Gauge("waiting_records", "Records that wait for the model", **kept)
        self.predictions = Counter("predictions", "Records answered, by the class answered", ["prediction"], **kept)
        self.unknown = Counter("unknown_values", "Values that training did not know", ["column"], **kept)
        self.psi = Gauge("drift_psi", "Population stability index of a column against training", ["column"], **kept)


class Service:
    """Answer records with the model of a checkpoint, from any number of coroutines of one event loop.

    Preprocessing and the network run on one thread of their own, so that the event loop stays free for other requests.
    """

    def __init__(self, checkpoint: str, log: str = ""):
        self.checkpoint, self.metrics = checkpoint, Metrics()
        self.thread = ThreadPoolExecutor(1, thread_name_prefix="model")
        self.log = Log(log) if log else None
        self.queue: deque[Request] = deque()
        self.waiting = 0  # records
        self.model = self._load()
        self.kind = kind_of(self.model.pipeline.preprocessor)

    def _load(self) -> Model:
        pipeline, sha256 = load(self.checkpoint), sha256_of(self.checkpoint)
        if pipeline.preprocessor is None:
            raise UserError(f"{self.checkpoint}: this model was saved without preprocessing: it cannot be asked.")
        return Model(pipeline, sha256)

    async def run(self) -> None:
        """Answer what is asked, until cancelled."""
        self.arrived = asyncio.Event()
        while True:
            await self.arrived.wait()
            await asyncio.sleep(GATHER)
            batch, size = [], 0
            while self.queue and (not batch or self._fits(batch[0], size)):
                batch.append(self.queue.popleft())
                size += len(batch[-1].records)
            if not self.queue:
                self.arrived.clear()
            try:
                answers = await asyncio.get_running_loop().run_in_executor(self.thread, self._answer_all, batch)
            except Exception as error:  # such as a full disk below the log; the next requests are answered
                answers = [error] * len(batch)
            self.waiting -= size
            for request, answer in zip(batch, answers, strict=True):
                if request.future.done():  # the client has left
                    continue
                if isinstance(answer, Exception):
                    request.future.set_exception(answer)
                else:
                    request.future.set_result(answer)

    def _fits(self, first: Request, size: int) -> bool:
        """Tell whether the next request goes into the batch that `first` began: after a reload, none of before does."""
        return size + len(self.queue[0].records) <= AT_ONCE and self.queue[0].model is first.model

    async def ask(
        self, records: list[dict], model: Model | None = None, first: int = 1, request_id: str = ""
    ) -> tuple[str, list[dict]]:
        """Return (request id, answers) for records, of the model that they were checked for (the present one).

        first, request_id: of a piece of a file, the number of its first row and the id of the pieces before.
        Raises UserError for records that cannot be read, and HTTPException where too many are waiting.
        """
        if self.waiting and self.waiting + len(records) > MOST_WAITING:
            raise HTTPException(503, "too many records are waiting: try again in a second.", {"Retry-After": "1"})
        future = asyncio.get_running_loop().create_future()
        request = Request(records, model or self.model, future, first, request_id or uuid.uuid4().hex)
        self.waiting += len(records)
        self.queue.append(request)
        self.arrived.set()
        return request.id, await request.future

    def _answer_all(self, batch: list[Request]) -> list:
        """Answer requests to one model in one pass; where that fails, each for itself, so that the bad one alone is
        refused."""
        self.metrics.batch.observe(sum(len(request.records) for request in batch))
        try:
            together = [record for request in batch for record in request.records]
            answers = iter(self._answer(together, batch[0].model))
            parts = [[next(answers) for _ in request.records] for request in batch]
        except Exception:  # a bug that one request meets is not to be met by all others
            parts = [self._answer_one(request) for request in batch]
        if self.log:
            answered = [(r, p) for r, p in zip(batch, parts, strict=True) if isinstance(p, list)]
            self.log.write(answered, self.kind)
        return parts

    def _answer_one(self, request: Request) -> list[dict] | Exception:
        try:
            return self._answer(request.records, request.model, request.first)
        except Exception as error:  # raised where the request is waited for
            return error

    def _answer(self, records: list, model: Model, first: int = 1) -> list[dict]:
        pipeline, known = model.pipeline, model.pipeline.preprocessor
        frame = as_frame(records)
        frame.index += first - 1
        inputs, logits = pipeline.ask(frame)
        answers = pipeline.task.answer(logits)
        for column, count in known.count_unknown(inputs).items():
            self.metrics.unknown.labels(column).inc(count)
        if pipeline.task.classes:
            for answer in answers:
                self.metrics.predictions.labels(str(answer["prediction"])).inc()
        else:
            self.metrics.predictions.labels("number").inc(len(answers))
        if model.profile.columns:
            model.note(len(frame), model.profile.count(known.measure(frame, inputs)))
        return answers

    def drift(self) -> dict:
        """Compare the newest records with the training data, and set the gauge of Prometheus."""
        model, total = self.model, collections.Counter()
        window = model.window.copy()
        for _, counts in window:
            total.update(counts)
        columns = model.profile.compare(total)
        for name, state in columns.items():
            self.metrics.psi.labels(name).set(state["psi"])
        return {"rows": sum(rows for rows, _ in window), "window": WINDOW, "columns": columns}

    async def reload(self) -> str:
        """Read the checkpoint's file again and answer with it whoever asks from then on; return its sha256.

        Raises UserError, and goes on with the old one, where it cannot be loaded, answers its golden rows otherwise, or
        is a model of something else.
        """
        model = await asyncio.to_thread(self._load)
        pipelines = self.model.pipeline, model.pipeline
        was, now = ((kind_of(p.preprocessor), p.task.kind, p.task.target) for p in pipelines)
        if was != now:
            raise UserError(f"{self.checkpoint}: of {' '.join(map(str, now))}, and this service is of {' '.join(was)}.")
        self.model = model
        return model.sha256


def sha256_of(path: str) -> str:
    """Return the sha256 of a file. Raises UserError where it cannot be read."""
    try:
        return hashlib.sha256(Path(path).read_bytes()).hexdigest()
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror}).") from None


def _as_json(cell) -> str:
    """Return what JSON cannot hold, an image or a date of a parquet file, as text."""
    return data_url(cell) if isinstance(cell, bytes) else str(cell)


class Log:
    """Answered records and the true targets that came back, in SQLite; what is written is on the disk."""

    def __init__(self, path: str):
        self.lock = threading.Lock()
        try:
            self.database = sqlite3.connect(path, check_same_thread=False)
            self.database.executescript(
                "PRAGMA journal_mode=WAL; PRAGMA synchronous=FULL;"
                "CREATE TABLE IF NOT EXISTS requests (id TEXT, row INTEGER, time REAL, model TEXT, kind TEXT,"
                " record TEXT, answer TEXT, name TEXT, target TEXT, error REAL, PRIMARY KEY (id, row));"
                "CREATE INDEX IF NOT EXISTS errors ON requests (model, error) WHERE error IS NOT NULL;"
                "SELECT kind FROM requests LIMIT 0;"  # one of before there was this column cannot be written to
            )
        except sqlite3.Error as error:
            raise UserError(f"--log {path}: cannot be used as a database ({error}).") from None

    def write(self, answered: list[tuple[Request, list[dict]]], kind: str) -> None:
        """Add the records of requests and their answers, in one transaction. kind: of data."""
        now = time.time()
        rows = [
            (request.id, i, now, request.model.sha256, kind, json.dumps(record, default=_as_json), json.dumps(answer))
            for request, answers in answered
            for i, (record, answer) in enumerate(zip(request.records, answers, strict=True), start=request.first)
        ]
        with self.lock, self.database:
            self.database.executemany(
                "INSERT INTO requests (id, row, time, model, kind, record, answer) VALUES (?, ?, ?, ?, ?, ?, ?)", rows
            )

    def answers(self, request: str) -> list[dict]:
        """Return the answers that a request was given; none for an unknown id."""
        with self.lock:
            rows = self.database.execute("SELECT answer FROM requests WHERE id = ? ORDER BY row", [request]).fetchall()
        return [json.loads(answer) for (answer,) in rows]

    def add_targets(self, request: str, name: str, targets: list, errors: list[float]) -> None:
        """Keep the true targets of a request's records, and how wrong each answer was."""
        rows = [(name, json.dumps(t), e, request, i) for i, (t, e) in enumerate(zip(targets, errors, strict=True), 1)]
        with self.lock, self.database:
            self.database.executemany(
                "UPDATE requests SET name = ?, target = ?, error = ? WHERE id = ? AND row = ?", rows
            )

    def score(self, model: str) -> tuple[int, float, float]:
        """Return (count, mean, mean square) of the errors of a model's answers whose targets are known."""
        with self.lock:
            query = (
                "SELECT COUNT(*), AVG(error), AVG(error * error) FROM requests WHERE model = ? AND error IS NOT NULL"
            )
            count, mean, square = self.database.execute(query, [model]).fetchone()
        return count, mean or 0.0, square or 0.0


def errors_of(name: str, answers: list[dict], targets: list) -> list[float]:
    """Return how wrong answers were, whichever model gave them: 0 or 1 for classes, the absolute difference for
    numbers. name: the target's.

    Raises UserError for a target that is no class of that model, or no number.
    """
    series = pd.Series(targets, index=range(1, len(targets) + 1), name=name)
    if "probabilities" in answers[0]:
        classes = {canonical(c): c for c in answers[0]["probabilities"]}
        for row, target in series.items():
            if canonical(target) not in classes:
                raise UserError(f"row {row}: {str(target)!r} is no class of the model ({', '.join(classes)}).")
        return [float(canonical(t) != canonical(a["prediction"])) for t, a in zip(targets, answers, strict=True)]
    numbers = to_numbers(series)
    far = np.isnan(numbers) | (np.abs(numbers) > LARGEST)
    if far.any():
        raise UserError(f"row {series.index[far.argmax()]}: {targets[far.argmax()]!r} is no number that can be true.")
    return [abs(t - a["prediction"]) for t, a in zip(numbers.tolist(), answers, strict=True)]
