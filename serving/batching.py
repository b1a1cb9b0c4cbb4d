"""Micro-batching: concurrent requests share one forward pass, and are counted, logged and watched for drift."""

import asyncio
import collections
import hashlib
import uuid
from collections import deque
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

import pandas as pd
from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram
from starlette.exceptions import HTTPException

from errors import BrokenRecords, UserError
from evaluation.drift import Profile
from pipeline import Pipeline
from preprocessing.pixels import Pixels
from serving.log import Log
from serving.replacement import Present, check_replacement
from serving.schema import RecordSchema

BATCH_WINDOW = 0.002  # seconds during which requests are collected
MAX_BATCH = 512  # records in a forward pass, unless one request has more
MAX_QUEUE = 4096  # records; when more are queued, requests get a 503
MAX_PIXELS = 50_000_000  # of the images in one column of a request
DRIFT_WINDOW, DRIFT_STEP = 5_000, 100  # newest records that drift is computed on, and records counted together


@dataclass(eq=False)
class Model:
    """A loaded checkpoint, its sha256, the schema of its records, and the distribution of the newest ones."""

    pipeline: Pipeline
    sha256: str
    recent: deque[list] = field(default_factory=deque)  # of [number of records, their counts]

    def __post_init__(self):
        self.schema, self.profile = RecordSchema(self.pipeline), Profile(self.pipeline.profile)
        self.file_columns = [c for c in self.pipeline.preprocessor.columns if c.path_cells]

    def decode(self, records: list[dict], first: int) -> tuple[list[dict], list[int], dict[int, str]]:
        """Decode images, so that no image holds up the thread of the model. Return (records with their images decoded,
        of those whose images can be read; their positions; position → what is wrong with an image of another one).

        Raises BrokenRecords if no record can be read, and UserError for files that are small when compressed and huge
        when decoded.
        """

        def read(frame: pd.DataFrame) -> list[list[Pixels]]:
            for name, values in frame.items():
                columns[name].check_pixels(values, MAX_PIXELS)
            return [list(map(Pixels, columns[name].encode(values).numpy())) for name, values in frame.items()]

        columns = {column.name: column for column in self.file_columns}
        cells = {name: pd.Series([record[name] for record in records], dtype=object) for name in columns}
        frame = pd.DataFrame(cells).set_index(pd.RangeIndex(first, first + len(records), name="row"))
        pixels, rows, broken = self.pipeline.preprocessor.encode_readable(frame, read)
        if len(broken) == len(records):
            raise BrokenRecords(broken)
        decoded = [dict(zip(columns, cells, strict=True)) for cells in zip(*pixels, strict=True)]
        return [records[i] | cells for i, cells in zip(rows, decoded, strict=True)], rows.tolist(), broken

    def add_recent(self, rows: int, counts: dict) -> None:
        """Add the counts of new records to the drift window, and drop the oldest ones."""
        if self.recent and self.recent[-1][0] < DRIFT_STEP:
            self.recent[-1][0] += rows
            self.recent[-1][1].update(counts)
        else:
            self.recent.append([rows, collections.Counter(counts)])
        while sum(part for part, _ in self.recent) - self.recent[0][0] >= DRIFT_WINDOW:
            self.recent.popleft()


@dataclass(eq=False)
class Request:
    """Records of one client, the model that predicts them, and the future of the predictions."""

    records: list[dict]  # as they were sent
    decoded: list[dict]  # those whose images can be read, if there are images
    rows: list[int]  # their positions among all records
    broken: dict[int, str]  # position → what is wrong with an image of the record
    model: Model
    future: asyncio.Future
    first: int  # number of the first record
    id: str

    def with_broken(self, predictions: list[dict]) -> list[dict]:
        """Return an answer for each record, from the predictions of those that can be read."""
        found = dict(zip(self.rows, predictions, strict=True))
        for i, message in self.broken.items():
            found[i] = {"prediction": None, "error": message}
        return [found[i] for i in range(len(self.records))]


class Metrics:
    """Prometheus metrics; names follow https://prometheus.io/docs/practices/naming/."""

    def __init__(self):
        self.registry = CollectorRegistry()
        options = {"registry": self.registry}
        seconds = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 10)
        records = (1, 2, 4, 8, 16, 32, 64, 512)
        self.requests = Counter("http_requests", "HTTP requests", ["path", "status"], **options)
        self.seconds = Histogram("http_request_seconds", "Duration of requests", ["path"], buckets=seconds, **options)
        self.batch = Histogram("batch_records", "Records per forward pass", buckets=records, **options)
        self.waiting = Gauge("waiting_records", "Records in the queue", **options)
        self.predictions = Counter("predictions", "Predicted records by class", ["prediction"], **options)
        self.unknown = Counter("unknown_values", "Values that are unknown to the model", ["column"], **options)
        self.psi = Gauge("drift_psi", "Population stability index of a column against training", ["column"], **options)
        self.drifted = Gauge("drift_detected", "1 if a column has drifted, otherwise 0", ["column"], **options)
        self.drift_rows = Gauge("drift_records", "Newest records that drift is computed on", **options)
        self.targets = Gauge("live_targets", "Newest predictions with feedback, of which the score is", **options)
        self.live = Gauge("live_score", "Accuracy or mean absolute error on them", ["metric"], **options)


class Service:
    """Predict records for any number of coroutines of one event loop.

    Preprocessing and the network run on one thread of their own, so that the event loop stays free for other requests.
    """

    def __init__(self, checkpoint: str, log: str = "", *, force: bool = False):
        """force: use the checkpoint even if it is worse than the model that the log used last."""
        self.checkpoint, self.metrics = checkpoint, Metrics()
        self.thread = ThreadPoolExecutor(1, thread_name_prefix="model")
        self.log = Log(log) if log else None
        self.queue: deque[Request] = deque()
        self.waiting = 0  # records in the queue or in a forward pass
        self.one_file = asyncio.Lock()  # uploaded tables are predicted one after the other, to bound the memory
        model, last = self._load(), self.log.last_model() if self.log else None
        self.comparison = self._compare(Present(*last), model, force) if last else ""  # with the model before, in words
        self._use(model)

    def _load(self) -> Model:
        pipeline = Pipeline.load(self.checkpoint)
        pipeline.require_preprocessor()
        return Model(pipeline, sha256_of(self.checkpoint))

    def _compare(self, present: Present, model: Model, force: bool) -> str:
        """Say how a model compares with the present one. Raises UserError if it is worse, unless `force` is given."""
        if model.sha256 == present.sha256:
            return ""
        try:
            return check_replacement(present, model.pipeline, self.log)
        except UserError as error:
            if force:
                return f"warning: {error}"
            how = 'serve.py --force, or POST /reload with {"force": true}, uses it anyway'
            raise UserError(f"{self.checkpoint}: {error} ({how}).") from None

    def _use(self, model: Model) -> None:
        if self.log:
            self.log.add_model(model.sha256, model.pipeline.preprocessor.kinds, model.pipeline.test)
        for gauge in (self.metrics.psi, self.metrics.drifted, self.metrics.live):
            gauge.clear()  # the new model may lack a column, and has no feedback yet
        self.model = model

    async def run(self) -> None:
        """Predict queued requests until cancelled."""
        self.arrived = asyncio.Event()
        while True:
            await self.arrived.wait()
            await asyncio.sleep(BATCH_WINDOW)
            batch, size = [], 0
            while self.queue and (not batch or self._fits(batch[0], size)):
                batch.append(self.queue.popleft())
                size += len(batch[-1].records)
            if not self.queue:
                self.arrived.clear()
            try:
                results = await asyncio.get_running_loop().run_in_executor(self.thread, self._predict_batch, batch)
            except Exception as error:  # such as a full disk under the log: later requests must still be served
                results = [error] * len(batch)
            self.waiting -= size
            for request, result in zip(batch, results, strict=True):
                if request.future.done():  # the client disconnected
                    continue
                if isinstance(result, Exception):
                    request.future.set_exception(result)
                else:
                    request.future.set_result(result)

    def _fits(self, first: Request, size: int) -> bool:
        """Return whether the next request may join the batch of `first`: a batch never mixes models across a reload."""
        return size + len(self.queue[0].records) <= MAX_BATCH and self.queue[0].model is first.model

    async def predict(
        self, records: list[dict], model: Model | None = None, first: int = 1, request_id: str = ""
    ) -> tuple[str, list[dict], list[str]]:
        """Return (request id, predictions, warnings of cells that training did not know) for validated records.

        model: the one that validated them (default: the current one).  first, request_id: for a chunk of a file, the
        number of its first row and the id of the chunks before.
        A record whose image cannot be read gets an `error` in place of a prediction.
        Raises BrokenRecords if these are all records, UserError for others that cannot be read, and HTTPException when
        the queue is full.
        """
        model = model or self.model
        decoded, rows, broken = records, list(range(len(records))), {}
        if model.file_columns:
            decoded, rows, broken = await asyncio.to_thread(model.decode, records, first)
        if self.waiting and self.waiting + len(records) > MAX_QUEUE:
            raise HTTPException(503, "too many records are queued: try again in a second.", {"Retry-After": "1"})
        future = asyncio.get_running_loop().create_future()
        request = Request(records, decoded, rows, broken, model, future, first, request_id or uuid.uuid4().hex)
        self.waiting += len(records)
        self.queue.append(request)
        self.arrived.set()
        return request.id, *await request.future

    def _predict_batch(self, batch: list[Request]) -> list:
        """Return the predictions of each request, or the exception that it raises; all requests have the same model."""
        self.metrics.batch.observe(sum(len(request.records) for request in batch))
        try:
            records = [record for request in batch for record in request.decoded]
            results = _of_each(batch, *self._predict(records, batch[0].model))
        except Exception:  # predict one by one, so that only the request that causes it fails
            results = [self._predict_one(request) for request in batch]
        if self.log:
            predicted = [(r, p[0]) for r, p in zip(batch, results, strict=True) if isinstance(p, tuple)]
            self.log.add_predictions(predicted)
        return results

    def _predict_one(self, request: Request) -> tuple[list[dict], list[str]] | Exception:
        try:
            return _of_each([request], *self._predict(request.decoded, request.model, request))[0]
        except Exception as error:  # raised again in `predict`
            return error

    def _predict(
        self, records: list[dict], model: Model, request: Request | None = None
    ) -> tuple[list[dict], list[tuple[int, str]]]:
        """Return the predictions, and (position of the record, what is unknown about a cell) of unknown cells.

        request: the only one that the records belong to; errors then name rows as it counts them.
        """
        pipeline, preprocessor = model.pipeline, model.pipeline.preprocessor
        frame = preprocessor.as_frame(records)
        if request:
            frame.index = [request.first + i for i in request.rows]
        parts, logits = pipeline.predict_logits(frame)
        predictions, unknown = pipeline.task.to_json(logits), preprocessor.unknown(frame, parts)
        for column, mask in unknown.items():
            self.metrics.unknown.labels(column).inc(int(mask.sum()))
        for outcome, count in collections.Counter(map(pipeline.task.outcome, predictions)).items():
            self.metrics.predictions.labels(outcome).inc(count)
        if model.profile.columns:
            model.add_recent(len(frame), model.profile.count(preprocessor.profile_values(frame, parts)))
        return predictions, preprocessor.why_unknown(frame, unknown) if unknown else []

    def drift(self) -> dict:
        """Compare the newest records with the training data, and set the Prometheus gauge."""
        model, total = self.model, collections.Counter()
        recent = model.recent.copy()
        for _, counts in recent:
            total.update(counts)
        columns = model.profile.compare(total)
        for name, state in columns.items():
            self.metrics.psi.labels(name).set(state["psi"])
            self.metrics.drifted.labels(name).set(state["drifted"])
        rows = sum(rows for rows, _ in recent)
        self.metrics.drift_rows.set(rows)
        return {"rows": rows, "window": DRIFT_WINDOW, "columns": columns}

    def score_live(self) -> None:
        """Set the Prometheus gauges of the score on the newest feedback."""
        if self.log:
            errors = self.log.recent_errors(self.model.sha256)
            self.metrics.targets.set(len(errors))
            score = self.model.pipeline.task.live_score(len(errors), sum(errors) / max(1, len(errors)), 0.0)
            for name in score.keys() & {"accuracy", "mae"}:
                self.metrics.live.labels(name).set(score[name])

    def close(self) -> None:
        """Finish what is being predicted, and close the log."""
        self.thread.shutdown()
        if self.log:
            self.log.close()

    async def reload(self, *, force: bool = False) -> tuple[str, str]:
        """Load the checkpoint file again and use it for all later requests. Return its sha256, and how it compares with
        the current model.

        Raises UserError, and keeps the current model, if the file cannot be loaded, its self-check rows are predicted
        differently than when it was saved, it predicts another target, or (unless `force` is given) it is worse.
        """
        try:
            model = await asyncio.to_thread(self._load)
        except UserError:
            raise
        except Exception as error:  # a damaged file can raise anything
            raise UserError(f"{self.checkpoint}: cannot be loaded ({type(error).__name__}).") from error
        old, new = ((m.pipeline.task.kind, m.pipeline.task.target) for m in (self.model, model))
        if old != new:
            raise UserError(f"{self.checkpoint}: {new[0]} of {new[1]!r}; this service predicts {old[0]} of {old[1]!r}.")
        present = Present(self.model.sha256, self.model.pipeline.test)
        comparison = await asyncio.to_thread(self._compare, present, model, force)
        await asyncio.to_thread(self._use, model)
        return model.sha256, comparison


def _of_each(batch: list[Request], predictions: list[dict], unknown: list[tuple[int, str]]) -> list[tuple]:
    """Return (predictions, warnings) of each request of a batch; warnings name rows as their request counts them."""
    results, start, unknown = [], 0, collections.deque(unknown)
    for request in batch:
        end, warnings = start + len(request.decoded), []
        while unknown and unknown[0][0] < end:
            position, why = unknown.popleft()
            warnings.append(f"row {request.first + request.rows[position - start]}, {why}")
        results.append((request.with_broken(predictions[start:end]), warnings))
        start = end
    return results


def sha256_of(path: str) -> str:
    """Return the sha256 of a file. Raises UserError if it cannot be read."""
    try:
        return hashlib.sha256(Path(path).read_bytes()).hexdigest()
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror}).") from None
