"""Answer over HTTP with the model of a checkpoint, and show a page on which to try it.

  python serve.py --checkpoint runs/x/best.pt --port 8000

POST /predict, /feedback and /reload; GET /health, /schema, /drift, /metrics (Prometheus), /docs (OpenAPI) and the page
at /. With a key, all but /health ask for it: `Authorization: Bearer KEY`, or as the password that a browser asks for.
"""

import os

os.environ.setdefault("OMP_WAIT_POLICY", "passive")  # threads that spin slow down all else on the machine

import asyncio
import base64
import contextlib
import gc
import json
import math
import re
import secrets
import shutil
import signal
import sqlite3
import sys
import tempfile
import time
import zlib
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path

from errors import UserError, did_you_mean, parse_flags, run

MAX_BODY = 32 << 20  # bytes of a request
MAX_BODIES = 256 << 20  # bytes of all requests that are being answered
MAX_RECORDS = 1_000  # of a request
MAX_VALUES = 1_000_000  # of JSON: reading more would hold up all other requests
MAX_FILE_ROWS = 100_000  # of an uploaded table
FILE_PIECE = 500  # rows of it that are asked at once
MAX_TEXT = 100_000  # characters of a text, or of any other cell
MAX_PIXELS = 50_000_000  # of the images of a request
LONGEST_BODY = 60  # seconds in which a request is to be here
LONGEST_STOP = 30  # seconds in which accepted requests are answered when the service is stopped


@dataclass(frozen=True)
class Options:
    """which model, and where"""

    checkpoint: str
    """best.pt of a run, or an .onnx file that export.py made."""
    host: str = "127.0.0.1"
    """Address to listen at; 0.0.0.0 = reachable from other machines (give an --api-key then)."""
    port: int = 8000
    """0 = any that is free."""
    api_key: str = ""
    """What clients must know; also from the environment variable API_KEY, which others can't see."""
    log: str = ""
    """SQLite file that keeps what was asked and answered, and the true targets sent to /feedback."""

    def __post_init__(self):
        if not 0 <= self.port < 65_536:
            raise UserError(f"--port is a number from 0 to 65535, not {self.port}.")


# ---------------------------------------------------------------- what is asked


def read_records(body, kind: str, columns: list[str], first: int = 1) -> list[dict]:
    """Check what a client sent as JSON and return its records, without columns that the model does not know.

    A text or an image may come without its column. first: the number of the first record.
    Raises UserError, naming row and column.
    """
    if not isinstance(body, dict) or not isinstance(body.get("records"), list):
        raise UserError('the body is to be JSON of the form {"records": [...]}.')
    records, kept = body["records"], []
    if not 1 <= len(records) <= MAX_RECORDS:
        raise UserError(f"records: 1 to {MAX_RECORDS} in a request, not {len(records)}.")
    for row, record in enumerate(records, start=first):
        if kind != "tabular" and not isinstance(record, dict):
            record = {columns[0]: record}
        if not isinstance(record, dict):
            raise UserError(f"row {row}: a record is an object of columns and values, not {type(record).__name__}.")
        for name in columns:
            if name not in record:
                others = [c for c in record if c not in columns][:1000]
                hint = did_you_mean(name, others, list(record)[:1000])
                raise UserError(f"row {row}, column {name!r} is missing.{hint}")
        check = _image if kind == "image" else _cell
        kept.append({name: check(row, name, record[name]) for name in columns})
    return kept


def _image(row: int, name: str, value) -> str:
    """Return an image as preprocessing takes it from a client: never as a path. Raises UserError for anything else."""
    if not str(value).startswith("data:image/"):
        raise UserError(f"row {row}, column {name!r}: an image is sent as a file, or as data:image/png;base64,…")
    return value


def _cell(row: int, name: str, value):
    """Return a cell of JSON as preprocessing takes it. Raises UserError for one that it does not take."""
    if isinstance(value, (dict, list)):
        raise UserError(f"row {row}, column {name!r}: a cell is a number, a string, true, false or null.")
    if isinstance(value, str) and len(value) > MAX_TEXT:
        raise UserError(f"row {row}, column {name!r}: {len(value):,} characters, at most {MAX_TEXT:,} are read.")
    if isinstance(value, int) and abs(value) >= 2**63:
        raise UserError(f"row {row}, column {name!r}: the number is too large.")
    # Beside an empty cell of another client's, a column of whole numbers becomes one of floats
    return str(value) if isinstance(value, int) and abs(value) > 2**53 else value


async def read_json(request):
    """Return the JSON of a request. Raises UserError where it is none."""
    raw = await request.body()
    if sum(map(raw.count, b",[{")) > MAX_VALUES:
        raise UserError(f"the body has more than {MAX_VALUES:,} values.")
    try:
        body = json.loads(raw, parse_constant=_no_constant)
        if b"\\ud" in raw.lower():  # half of a surrogate pair, which JSON can hold and nothing after it can
            body = json.loads(json.dumps(body, ensure_ascii=False).encode("utf-8", "replace"))
        return body
    except (ValueError, RecursionError) as error:
        raise UserError(f"the body is no JSON: {str(error)[:200]}") from None


def _no_constant(name: str):
    raise ValueError(f"{name} is no number of JSON; an empty cell is null")


async def read_files(request) -> list:
    """Return the files of a multipart form, whatever their fields are called."""
    from starlette.exceptions import HTTPException

    try:
        form = await request.form(max_files=MAX_RECORDS, max_fields=0)
    except HTTPException as error:
        if error.status_code != 400:  # that of a damaged form
            raise
        raise UserError(f"the form cannot be read: {error.detail}") from None
    files = [file for _, file in form.multi_items()]
    if not files:
        raise UserError("the form holds no file.")
    return files


def check_pixels(records: list[dict]) -> None:
    """Raise UserError where images, small as files, would be too large in memory, or one is none."""
    from images import count_pixels, naming_row

    pixels = 0
    for row, record in enumerate(records, start=1):
        ((column, cell),) = record.items()
        with naming_row(row, column, cell):
            pixels += count_pixels(cell)
    if pixels > MAX_PIXELS:
        raise UserError(f"the images have {pixels:,} pixels together, a request at most {MAX_PIXELS:,}.")


def save_upload(file, name: str, folder: str) -> str:
    """Write a file of records into a folder, unpacked, and return its path, which ends as its name does.

    Raises UserError where that is no ending of a table, or the file is damaged or too large.
    """
    from reader import FORMATS, file_format, is_packed, open_unpacked

    if file_format(name) == "log":
        raise UserError(f"{name}: a file of records is csv, tsv, txt, jsonl or parquet.")
    path = Path(folder, "file" + next(s for s in reversed(Path(name.lower()).suffixes) if s in FORMATS))
    raw = Path(folder, "raw")
    try:
        with open(raw, "wb") as copy:
            shutil.copyfileobj(file, copy)
        with open(path, "wb") as copy, open_unpacked(raw) as source:
            while block := source.read(1 << 20):
                if copy.tell() > MAX_BODIES:  # a few packed bytes can be gigabytes
                    raise UserError(f"{name}: more than {MAX_BODIES:,} bytes when it is unpacked.")
                copy.write(block)
    except (OSError, EOFError, zlib.error) as error:
        raise UserError(f"{name}: cannot be read ({error}).") from None
    if is_packed(path):
        raise UserError(f"{name}: packed twice.")
    return str(path)


def read_pieces(path: str, kind: str, pipeline, columns: list[str]):
    """Yield (number of its first row, records) of each piece of a file, read as predict.py reads it.

    Raises UserError, naming row or column, where that fails, or the cells are too many bytes.
    """
    from predict import read_inputs
    from preprocessing import as_frame

    known, size = pipeline.preprocessor, 0
    kept = (str, int, float, list, dict, datetime, type(None))  # not what else is in parquet, such as decimals
    for frame in read_inputs(path, kind, known, pipeline.task, FILE_PIECE):
        frame = as_frame(frame, getattr(known, "column", ""))
        if kind == "tabular":
            known.check_columns(frame)
        frame = frame[columns]
        size += frame.memory_usage(deep=True).sum()
        if size > MAX_BODIES:  # a few bytes of parquet can be gigabytes
            raise UserError(f"{path}: more than {MAX_BODIES:,} bytes when it is unpacked.")
        for start in range(0, len(frame), FILE_PIECE):
            part = frame.iloc[start : start + FILE_PIECE]
            records = [
                {name: cell if isinstance(cell, kept) else str(cell) for name, cell in record.items()}
                for record in part.astype(object).where(part.notna(), None).to_dict("records")
            ]
            first = int(part.index[0])
            yield first, read_records({"records": records}, kind, columns, first)


async def answer_file(request, upload, service, model, columns: list[str]) -> str:
    """Return as JSON what predict.py would answer to a file, asked piece by piece under one request id.

    Raises UserError, naming the file's row, where it cannot be read, or it or its answers are too large.
    """
    from starlette.requests import ClientDisconnect

    name, path, request_id, parts, size = upload.filename, "", "", [], 0
    with tempfile.TemporaryDirectory() as folder:
        try:
            path = await asyncio.to_thread(save_upload, upload.file, name, folder)
            pieces = read_pieces(path, service.kind, model.pipeline, columns)
            while piece := await asyncio.to_thread(next, pieces, None):
                first, records = piece
                if await request.is_disconnected():
                    raise ClientDisconnect
                if first + len(records) - 1 > MAX_FILE_ROWS:
                    raise UserError(f"{name}: more than {MAX_FILE_ROWS:,} rows: send it in parts, or ask predict.py.")
                request_id, answers = await service.ask(records, model, first, request_id)
                parts.append(json.dumps(answers, ensure_ascii=False)[1:-1])
                size += len(parts[-1])
                if size > MAX_BODIES:
                    raise UserError(f"{name}: more than {MAX_BODIES:,} bytes of answers: send it in parts.")
        except UserError as error:
            raise UserError(str(error).replace(path or name, name)) from None
    if not parts:
        raise UserError(f"{name}: there are no rows below the header.")
    return f'{{"id": "{request_id}", "predictions": [{", ".join(parts)}]}}'


# ---------------------------------------------------------------- what it may be


def record_schema(pipeline) -> dict:
    """Describe a record as JSON schema: names, types, ranges and categories seen in training."""
    from pipeline import kind_of

    known, kind = pipeline.preprocessor, kind_of(pipeline.preprocessor)
    if kind == "image":
        text = {"type": "string", "pattern": "^data:image/", "description": "an image as a data URL"}
        return _object({known.column: text})
    if kind == "text":
        text = {"type": "string", "maxLength": MAX_TEXT}
        return {"anyOf": [text, _object({known.column: text})]}
    properties = {}
    for name, state in known.used.items():
        seen = pipeline.profile.get(name, {})
        if state["kind"] == "number":
            what = {"type": ["number", "null"]}
            if "low" in seen:
                what["description"] = f"{seen['low']:g} to {seen['high']:g} in training"
        elif state["kind"] == "category":
            examples = [v for v in state["values"] if v][:100]
            what = {"type": ["string", "number", "boolean", "null"], "examples": examples}
        elif state["kind"] == "boolean":
            what = {"type": ["boolean", "string", "number", "null"], "examples": [True, False, "yes", "no", 1, 0]}
        else:
            examples = [e[name] for e in pipeline.examples if e[name] is not None]
            what = {"type": ["string", "null"], "description": f"date, as {state['form']}", "examples": examples[:1]}
            if state["form"] == "ISO8601" and all(re.fullmatch(r"\d{4}-\d\d-\d\d", e) for e in examples):
                what["format"] = "date"
        properties[name] = what | {"x-kind": state["kind"]}
    return _object(properties)


def openapi_parts(pipeline) -> dict:
    """Return what the OpenAPI schema says of /predict: what goes in, what comes out, and an example."""
    from pipeline import kind_of

    task, example = pipeline.task, pipeline.examples[:1]
    records = {"type": "array", "minItems": 1, "maxItems": MAX_RECORDS, "items": record_schema(pipeline)}
    content = _json(_object({"records": records}))
    if example:
        content["application/json"]["example"] = {"records": example}
    file = {"type": "string", "format": "binary"}
    if kind_of(pipeline.preprocessor) == "image":
        form = {"files": {"type": "array", "minItems": 1, "items": file}}
    else:
        form = {"file": file | {"description": "csv, tsv, txt, jsonl or parquet, by its name; also .gz"}}
    content["multipart/form-data"] = {"schema": _object(form)}
    answer = {"prediction": {"type": "number"}}
    if task.classes:
        kind = {bool: "boolean", str: "string"}.get(type(task.classes[0]), "number")
        answer = {
            "prediction": {"type": kind, "enum": task.classes},
            "probability": {"type": "number"},
            "probabilities": {"type": "object", "required": list(map(str, task.classes))},
        }
    answers = _object({"id": {"type": "string"}, "predictions": {"type": "array", "items": _object(answer)}})
    return {
        "requestBody": {"required": True, "content": content},
        "responses": {"200": {"description": "an answer for each record", "content": _json(answers)}, **REFUSALS},
    }


def _object(properties: dict) -> dict:
    return {"type": "object", "properties": properties, "required": list(properties)}


def _json(schema: dict) -> dict:
    return {"application/json": {"schema": schema}}


def _refusal(why: str) -> dict:
    return {"description": why, "content": _json(_object({"detail": {"type": "string"}}))}


REFUSALS = {
    "401": _refusal("the key is missing or wrong"),
    "403": _refusal("asked by a page of another site"),
    "408": _refusal(f"sent in more than {LONGEST_BODY} seconds"),
    "413": _refusal(f"more than {MAX_BODY} bytes"),
    "422": _refusal("what cannot be read, by row and column"),
    "503": _refusal("too much is waiting: try again after Retry-After seconds"),
}
TOLD = {
    "id": {"type": "string", "description": "of an answer"},
    "targets": {"type": "array", "description": "the true target of each of its records"},
}
FEEDBACK = {
    "requestBody": {"required": True, "content": _json(_object(TOLD))},
    "responses": {
        "200": {"description": "kept on disk"},
        "404": _refusal("no such request"),
        "409": _refusal("the service was started without --log"),
        **REFUSALS,
    },
}


# ---------------------------------------------------------------- the application


class Guard:
    """Before and after every request: the key, where it comes from, the size of its body, and the metrics."""

    def __init__(self, app, service, key: str, paths: set[str]):
        self.app, self.metrics, self.key, self.paths = app, service.metrics, key.encode(), paths
        self.bodies = 0  # bytes of the requests that are being answered

    async def __call__(self, scope, receive, send):
        from starlette.exceptions import HTTPException
        from starlette.requests import ClientDisconnect
        from starlette.responses import JSONResponse

        if scope["type"] != "http":
            return await self.app(scope, receive, send)
        began, status, size = time.perf_counter(), 500, 0
        late = asyncio.get_running_loop().time() + LONGEST_BODY

        async def receive_some():
            nonlocal size, late
            try:
                async with asyncio.timeout_at(late):
                    message = await receive()
            except TimeoutError:
                raise HTTPException(408, f"a request is to be sent within {LONGEST_BODY} seconds.") from None
            size += len(message.get("body", b""))
            self.bodies += len(message.get("body", b""))
            late = late if message.get("more_body") else None  # whoever waits on is not sending any more
            if size > MAX_BODY:
                raise HTTPException(413, f"a request is at most {MAX_BODY:,} bytes.")
            if self.bodies > MAX_BODIES:
                raise HTTPException(503, "too much is being sent: try again in a second.", {"Retry-After": "1"})
            return message

        async def send_and_note(message):
            nonlocal status
            status = message.get("status", status)
            await send(message)

        try:
            headers = dict(scope["headers"])
            if not self._may(scope["path"], headers):
                ask = {"WWW-Authenticate": 'Basic realm="model"'}
                raise HTTPException(401, "the key is missing or wrong: Authorization: Bearer KEY.", ask)
            if _is_foreign(scope["method"], headers):
                raise HTTPException(403, "a page of another site cannot ask this service.")
            await self.app(scope, receive_some, send_and_note)
        except HTTPException as refused:
            answer = JSONResponse({"detail": refused.detail}, refused.status_code, refused.headers)
            await answer(scope, receive, send_and_note)
        except ClientDisconnect:
            status = 499  # nobody is left to be answered
        finally:
            self.bodies -= size
            path = scope["path"] if scope["path"] in self.paths else "other"
            self.metrics.requests.labels(path, status).inc()
            self.metrics.seconds.labels(path).observe(time.perf_counter() - began)

    def _may(self, path: str, headers: dict[bytes, bytes]) -> bool:
        if not self.key or path == "/health":
            return True
        given = headers.get(b"authorization", b"")
        kind, _, value = given.partition(b" ")
        if kind.lower() == b"basic":
            with contextlib.suppress(ValueError):
                value = base64.b64decode(value).partition(b":")[2]
        return secrets.compare_digest(value, self.key)


def _is_foreign(method: str, headers: dict[bytes, bytes]) -> bool:
    """Tell whether a browser asks for a page of another site, with a key that it may remember for this one.

    Browsers say so themselves (https://www.w3.org/TR/fetch-metadata/), but for plain http; there the page's origin
    counts, beside the host that a proxy passes on. A link to here is no such question.
    """
    if method == "GET" and headers.get(b"sec-fetch-mode") == b"navigate":
        return False
    if b"sec-fetch-site" in headers:
        return headers[b"sec-fetch-site"] not in (b"same-origin", b"none")
    origin = headers.get(b"origin", b"").partition(b"://")[2]
    return bool(headers.get(b"origin")) and origin not in (headers.get(b"host"), headers.get(b"x-forwarded-host"))


def make_app(service, key: str = ""):
    """Return the application that answers with a Service."""
    from fastapi import FastAPI, HTTPException, Request
    from fastapi.responses import HTMLResponse, JSONResponse, Response
    from prometheus_client import CONTENT_TYPE_LATEST, generate_latest

    from pipeline import FORMAT
    from service import errors_of

    started = time.time()

    @contextlib.asynccontextmanager
    async def lifespan(_):
        loop, worker = asyncio.get_running_loop(), asyncio.create_task(service.run())
        with contextlib.suppress(ValueError, RuntimeError, AttributeError):  # not the main thread, or Windows
            loop.add_signal_handler(signal.SIGHUP, lambda: loop.create_task(reload_and_say(service)))
        yield
        worker.cancel()

    app = FastAPI(title=f"Predict {service.model.pipeline.task.target}", lifespan=lifespan)

    @app.exception_handler(sqlite3.Error)
    async def unwritable(_, error):
        answer = {"detail": f"the log cannot be written to ({error}): try again in a second."}
        return JSONResponse(answer, 503, {"Retry-After": "1"})

    @app.exception_handler(UserError)
    async def unreadable(_, error):
        return JSONResponse({"detail": str(error)}, 422)

    @app.post("/predict")
    async def predict(request: Request):
        """Answer records."""
        model = service.model  # that answers, whatever is reloaded meanwhile
        known = model.pipeline.preprocessor
        columns = list(known.used) if service.kind == "tabular" else [known.column]
        if request.headers.get("content-type", "").startswith("multipart/"):
            files = await read_files(request)
            if service.kind != "image":
                if len(files) > 1:
                    raise UserError(f"one file in a request, not {len(files)}.")
                answers = await answer_file(request, *files, service, model, columns)
                return Response(answers, media_type="application/json")
            records = [{known.column: await file.read()} for file in files]
        else:
            records = read_records(await read_json(request), service.kind, columns)
        if service.kind == "image":
            await asyncio.to_thread(check_pixels, records)
        request_id, answers = await service.ask(records, model)
        return JSONResponse({"id": request_id, "predictions": answers})

    @app.post("/feedback", openapi_extra=FEEDBACK)
    async def feedback(request: Request):
        """Take the true targets of a request's records; they are on disk when this answers."""
        if not service.log:
            raise HTTPException(409, "the service keeps no requests: start it with --log requests.db.")
        body = await read_json(request)
        if not isinstance(body, dict) or not isinstance(body.get("targets"), list):
            raise UserError('the body is to be JSON of the form {"id": "…", "targets": [...]}.')
        return await asyncio.to_thread(keep, body)

    def keep(body: dict) -> dict:
        answers, targets = service.log.answers(str(body.get("id"))), body["targets"]
        if not answers:
            raise HTTPException(404, "no request with this id was answered.")
        if len(targets) != len(answers):
            raise UserError(f"targets: {len(answers)} of them, one for each record of the request, not {len(targets)}.")
        for row, target in enumerate(targets, start=1):
            _cell(row, "targets", target)
        name = service.model.pipeline.task.target
        service.log.add_targets(body["id"], name, targets, errors_of(name, answers, targets))
        return {"kept": len(targets)}

    @app.post("/reload", openapi_extra={"responses": {"409": _refusal("it was not")}})
    async def reload():
        """Answer with what is in the checkpoint's file now, if its golden rows are answered as when it was saved."""
        try:
            return {"model": await service.reload()}
        except UserError as error:
            raise HTTPException(409, f"the old model answers on: {error}") from None

    @app.get("/health")
    async def health():
        """Tell that the model is ready, which one it is, and how right it has been."""
        state = {
            "status": "ready",
            "model": service.model.sha256,
            "target": service.model.pipeline.task.target,
            "task": service.model.pipeline.task.kind,
            "version": f"checkpoint format {FORMAT}",
            "seconds": round(time.time() - started, 3),
            "waiting": service.waiting,
        }
        if service.log:
            state["live"] = await asyncio.to_thread(live_score, service)
        return state

    @app.get("/schema")
    async def schema():
        """Describe a record and an answer, with an example."""
        pipeline = service.model.pipeline
        return {
            "kind": service.kind,
            "task": pipeline.task.kind,
            "target": pipeline.task.target,
            "classes": pipeline.task.classes,
            "record": record_schema(pipeline),
            "example": pipeline.examples[0] if pipeline.examples else None,
            "limits": {"bytes": MAX_BODY, "records": MAX_RECORDS, "characters": MAX_TEXT, "pixels": MAX_PIXELS},
            "feedback": service.log is not None,
        }

    @app.get("/drift")
    async def drift():
        """Compare the newest records with the training data."""
        return await asyncio.to_thread(service.drift)

    @app.get("/metrics", response_class=Response)
    async def metrics():
        """Show Prometheus what it counts."""
        service.metrics.waiting.set(service.waiting)
        await asyncio.to_thread(service.drift)
        return Response(generate_latest(service.metrics.registry), media_type=CONTENT_TYPE_LATEST)

    @app.get("/", response_class=HTMLResponse)
    async def page():
        """Show the page on which to try the model."""
        return HTMLResponse(Path(__file__).with_name("page.html").read_text(encoding="utf-8"))

    def openapi() -> dict:
        """Describe the model that answers now, which a reload may have changed."""
        asked = next(route for route in app.routes if route.path == "/predict")
        asked.openapi_extra, app.openapi_schema = openapi_parts(service.model.pipeline), None
        return FastAPI.openapi(app)

    app.openapi = openapi
    paths = {route.path for route in app.routes}
    app.add_middleware(Guard, service=service, key=key, paths=paths)
    return app


def live_score(service) -> dict:
    """Return how right the answers were whose true targets came back, with a 95 % interval.

    The interval of an accuracy is Wilson's (1927), that of a mean absolute error the normal one.
    """
    count, mean, square = service.log.score(service.model.sha256)
    if not count:
        return {"targets": 0}
    if not service.model.pipeline.task.classes:
        half = 1.96 * math.sqrt(max(0.0, square - mean**2) / count)
        return {"targets": count, "mae": mean, "interval": [max(0.0, mean - half), mean + half]}
    p, z2 = 1 - mean, 1.96**2
    centre, half = p + z2 / (2 * count), 1.96 * math.sqrt(p * (1 - p) / count + z2 / (4 * count**2))
    low, high = ((centre + sign * half) / (1 + z2 / count) for sign in (-1, 1))
    return {"targets": count, "accuracy": p, "interval": [max(0.0, low), min(1.0, high)]}


async def reload_and_say(service) -> None:
    """Reload on SIGHUP, where nobody waits for an answer."""
    try:
        print(f"reloaded {service.checkpoint}: {await service.reload()}", file=sys.stderr)
    except UserError as error:
        print(f"not reloaded, the old model answers on: {error}", file=sys.stderr)


def serve(options: Options) -> None:
    """Load the model and answer until stopped; then answer what was accepted."""
    import socket

    import torch
    import uvicorn
    from PIL import Image

    from service import Service

    Image.MAX_IMAGE_PIXELS = MAX_PIXELS
    service = Service(options.checkpoint, options.log)
    if service.kind == "tabular":
        torch.set_num_threads(1)  # a small network gains nothing from more, and the event loop needs a core
    try:
        family = socket.AF_INET6 if ":" in options.host else socket.AF_INET
        listener = socket.create_server((options.host, options.port), family=family, backlog=2048)
    except (OSError, OverflowError) as error:
        raise UserError(f"--host {options.host} --port {options.port}: cannot listen there ({error}).") from None
    host, port = listener.getsockname()[:2]
    host = f"[{host}]" if ":" in host else host
    print(f"{options.checkpoint} answers at http://{host}:{port} (Ctrl-C stops)", flush=True)
    app = make_app(service, options.api_key or os.environ.get("API_KEY", ""))
    gc.freeze()  # what is loaded by now stays: looking through it again takes the garbage collector 70 ms
    config = uvicorn.Config(app, log_level="warning", access_log=False, timeout_graceful_shutdown=LONGEST_STOP)
    uvicorn.Server(config).run(sockets=[listener])


if __name__ == "__main__":
    run(lambda: serve(parse_flags(Options, description=__doc__)))
